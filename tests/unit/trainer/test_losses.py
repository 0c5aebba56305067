"""Losses against their formulas."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.losses import LOSSES, gaussian_nll, huber, loss_by_name, quantile

METRES = st.floats(-5000, 5000, width=32)
SIGMAS = st.floats(10, 5000, width=32)


def prediction(east: float, north: float, sigma_east: float, sigma_north: float) -> torch.Tensor:
    return torch.tensor([[east, north, sigma_east, sigma_north]], dtype=torch.float64)


def target(east: float, north: float) -> torch.Tensor:
    return torch.tensor([[east, north]], dtype=torch.float64)


@settings(deadline=None, max_examples=50)
@given(east=METRES, north=METRES, sigma_east=SIGMAS, sigma_north=SIGMAS)
def test_the_gaussian_loss_is_the_negative_log_density_per_kilometre(
    east: float, north: float, sigma_east: float, sigma_north: float
) -> None:
    found = gaussian_nll(prediction(0, 0, sigma_east, sigma_north), target(east, north)).item()
    density = [
        scipy.stats.norm.logpdf(error / 1000, scale=sigma / 1000)
        for error, sigma in ((east, sigma_east), (north, sigma_north))
    ]
    assert found == pytest.approx(-sum(density) / 2 - 0.5 * math.log(2 * math.pi), rel=1e-6, abs=1e-6)


def test_the_gaussian_loss_is_least_where_sigma_is_the_error() -> None:
    sigmas = [100.0, 250.0, 300.0, 350.0, 900.0]
    losses = [gaussian_nll(prediction(0, 0, sigma, sigma), target(300, -300)).item() for sigma in sigmas]
    assert min(losses) == losses[2]


@pytest.mark.parametrize(("error_m", "expected"), [(50.0, 0.5 * 0.05**2 / 0.1), (400.0, 0.4 - 0.05)])
def test_huber_is_square_below_100_m_and_straight_above(error_m: float, expected: float) -> None:
    # North is hit; the mean over both axes halves what east costs.
    found = huber(prediction(error_m, 0, 1000, 1000), target(0, 0)).item()
    likelihood = gaussian_nll(prediction(error_m, 0, 1000, 1000), target(0, 0)).item()
    assert found - likelihood == pytest.approx(expected / 2)


def test_huber_moves_the_position_by_its_own_part_alone() -> None:
    given_ = prediction(3000, 0, 20, 20).requires_grad_()
    huber(given_, target(0, 0)).backward()
    # A slope of 1 per kilometre, halved by the mean; the likelihood's would be in the thousands.
    assert given_.grad is not None
    assert given_.grad[0, 0].item() * 1000 == pytest.approx(0.5)
    assert given_.grad[0, 2].item() < 0


@pytest.mark.parametrize(
    ("truth_m", "parts"), [(0.0, (0.1587, 0.0, 0.1587)), (300.0, (0.1587 * 4, 0.5 * 3, 0.8413 * 2))]
)
def test_quantile_is_the_pinball_loss_at_minus_one_zero_and_one_sigma(
    truth_m: float, parts: tuple[float, float, float]
) -> None:
    found = quantile(prediction(0, 0, 100, 100), target(truth_m, truth_m)).item()
    assert found == pytest.approx(0.1 * sum(parts) / 3, rel=1e-6)


def test_quantile_is_least_where_sigma_is_the_deviation_of_the_truth() -> None:
    truth = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(1)) * 300
    losses = {
        sigma: quantile(torch.tensor([0.0, 0, sigma, sigma]).expand(20_000, 4), truth).item()
        for sigma in (200.0, 300.0, 400.0)
    }
    assert min(losses, key=losses.__getitem__) == 300.0


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_is_better_for_a_better_position_and_has_gradients_for_all(name: str) -> None:
    loss = loss_by_name(name)
    near, far = (loss(prediction(error, error, 200, 200), target(0, 0)).item() for error in (100, 1000))
    assert near < far
    given_ = prediction(500, -500, 200, 200).requires_grad_()
    loss(given_, target(0, 0)).backward()
    assert given_.grad is not None
    assert (given_.grad != 0).all()


def test_an_unknown_loss_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigurationError, match=r"spec\.training\.loss is 'mse': use one of gaussian, huber, quantile"
    ):
        loss_by_name("mse")
