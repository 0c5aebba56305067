"""Errors in metres, and whether the uncertainty is honest."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from heimdall_trainer.model.metrics import (
    LEVELS,
    PositionMetrics,
    ellipse_bound,
    fitted_scale,
    position_error_m,
    squared_mahalanobis,
)

COUNT = 20_000


def calibrated(sigma_share: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions whose errors are normal; sigma is that share of the true deviation."""
    generator = torch.Generator().manual_seed(1)
    sigma = 50 + 400 * torch.rand(COUNT, 2, generator=generator)
    truth = torch.randn(COUNT, 2, generator=generator) * 1000
    mean = truth + sigma * torch.randn(COUNT, 2, generator=generator)
    return torch.cat([mean, sigma * sigma_share], dim=1), truth


def computed(prediction: torch.Tensor, target: torch.Tensor) -> dict[str, float]:
    metrics = PositionMetrics()
    metrics.update(prediction, target)
    return {name: value.item() for name, value in metrics.compute().items()}


def test_the_error_is_the_distance() -> None:
    prediction = torch.tensor([[3.0, 4.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    assert position_error_m(prediction, torch.tensor([[0.0, 0.0], [1.0, 1.0]])).tolist() == [5.0, 0.0]


def test_the_squared_error_counts_in_standard_deviations() -> None:
    prediction = torch.tensor([[30.0, 40.0, 10.0, 20.0]])
    assert squared_mahalanobis(prediction, torch.zeros(1, 2)).item() == pytest.approx(9 + 4)


@pytest.mark.parametrize("level", [0.5, *LEVELS.values()])
def test_the_ellipse_s_bound_is_the_chi_squared_quantile(level: float) -> None:
    assert ellipse_bound(level) == pytest.approx(scipy.stats.chi2.ppf(level, df=2))


def test_a_perfectly_calibrated_prediction_is_covered_as_its_levels_say() -> None:
    found = computed(*calibrated())
    assert found["coverage_68"] == pytest.approx(0.6827, abs=0.01)
    assert found["coverage_95"] == pytest.approx(0.9545, abs=0.005)


def test_too_small_a_sigma_covers_less_and_too_large_a_one_more() -> None:
    bold, timid = computed(*calibrated(0.5)), computed(*calibrated(2.0))
    assert bold["coverage_68"] == pytest.approx(scipy.stats.chi2.cdf(ellipse_bound(0.6827) / 4, df=2), abs=0.01)
    assert timid["coverage_68"] == pytest.approx(scipy.stats.chi2.cdf(ellipse_bound(0.6827) * 4, df=2), abs=0.01)


def test_median_and_90th_percentile_are_those_of_all_samples() -> None:
    prediction, truth = calibrated()
    errors = np.linalg.norm((prediction[:, :2] - truth).numpy(), axis=1)
    found = computed(prediction, truth)
    assert found["position_error_median_m"] == pytest.approx(np.median(errors), rel=1e-4)
    assert found["position_error_p90_m"] == pytest.approx(np.quantile(errors, 0.9), rel=1e-4)


def test_batches_of_any_size_give_the_same_as_all_at_once() -> None:
    prediction, truth = calibrated()
    metrics = PositionMetrics()
    for start, end in ((0, 10), (10, 11), (11, COUNT)):
        metrics.update(prediction[start:end], truth[start:end])
    assert {name: value.item() for name, value in metrics.compute().items()} == computed(prediction, truth)


def test_after_a_reset_nothing_is_left_of_what_was() -> None:
    metrics = PositionMetrics()
    metrics.update(torch.full((4, 4), 1e6), torch.zeros(4, 2))
    metrics.reset()
    metrics.update(torch.tensor([[3.0, 4.0, 1.0, 1.0]]), torch.zeros(1, 2))
    assert metrics.compute()["position_error_p90_m"].item() == 5.0


def test_metrics_keep_no_graph() -> None:
    metrics = PositionMetrics()
    metrics.update(torch.ones(1, 4, requires_grad=True) * 2, torch.zeros(1, 2))
    assert not metrics.errors[0].requires_grad


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_the_scale_is_what_sigma_is_too_small_by(share: float) -> None:
    assert computed(*calibrated(share))["sigma_scale"] == pytest.approx(1 / share, rel=0.02)


def test_with_long_tails_the_scale_leaves_both_ellipses_off_by_as_much() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.zeros(COUNT, 2)
    # A mixture: one error in ten is four times as large.
    wide = torch.where(torch.rand(COUNT, 1, generator=generator) < 0.1, 4.0, 1.0)
    prediction = torch.cat([100 * wide * torch.randn(COUNT, 2, generator=generator), torch.full((COUNT, 2), 40.0)], 1)
    scale = computed(prediction, truth)["sigma_scale"]
    scaled = computed(prediction * torch.tensor([1.0, 1.0, scale, scale]), truth)
    too_many, too_few = scaled["coverage_68"] - 0.6827, 0.9545 - scaled["coverage_95"]
    assert too_many > 0
    assert too_many == pytest.approx(too_few, abs=0.015)


def test_a_handful_of_samples_moves_the_scale_by_little() -> None:
    squares = torch.full((2,), 400.0)
    assert 1.0 < fitted_scale(squares).item() < 2.0


def test_a_prediction_that_is_no_number_moves_no_scale() -> None:
    squares = torch.full((50,), 2.0)
    spoiled = torch.cat([squares, torch.tensor([torch.nan, torch.inf])])
    assert fitted_scale(spoiled) == fitted_scale(squares)
    assert fitted_scale(spoiled[50:]) == 1.0
