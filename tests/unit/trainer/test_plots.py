"""Plots are drawn from what there is; how they look, people judge."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import matplotlib.image
import numpy as np
import pytest

from heimdall_trainer.evaluation import Predictions
from heimdall_trainer.plots import PREDICTED, RECEIVER, TRUE, VALIDATION, _by_step, _smoothed, draw

SIGNATURE = b"\x89PNG"
SERIES = {
    "error_map.png": (TRUE, PREDICTED, RECEIVER),
    "calibration.png": (PREDICTED, RECEIVER),
    "loss.png": (PREDICTED, VALIDATION),
}
"""Colours of what each plot shows; of all but the receivers' grey, nothing else is in them."""
A_FEW: Final = 50
"""Pixels of a mark's inside, which no blending has changed."""


def predictions(sessions: int, transmissions: int = 12) -> Predictions:
    rng = np.random.default_rng(3)
    truth, sigma = rng.normal(0, 800, (transmissions, 2)), rng.uniform(100, 300, (transmissions, 2))
    return Predictions(
        position=truth + sigma * rng.standard_normal((transmissions, 2)),
        sigma=sigma,
        truth=truth,
        receivers=tuple(rng.uniform(-1500, 1500, (3, 2)) for _ in range(transmissions)),
        sessions=tuple(f"session {index % sessions}" for index in range(transmissions)),
        transmissions=tuple(f"transmission {index}" for index in range(transmissions)),
        origins=np.tile([52.0, 10.0], (transmissions, 1)),
    )


def pixels(file: Path, colour: str) -> int:
    """How many pixels of a picture are of a colour, exactly."""
    wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
    found = np.round(255 * matplotlib.image.imread(file)[..., :3]).astype(int)
    return int((found == wanted).all(-1).sum())


HISTORY = {"train/loss_step": [(0, 1.0), (1, 0.5), (2, 0.4)], "val/loss": [(1, 0.8), (2, 0.7)]}


@pytest.mark.parametrize("sessions", [1, 3, 6])
def test_any_number_of_sessions_is_drawn_with_all_that_there_is_to_see(sessions: int) -> None:
    files = draw(predictions(sessions), HISTORY, Path("plots"))
    assert [file.name for file in files] == list(SERIES)
    for file in files:
        assert file.read_bytes().startswith(SIGNATURE)
        assert {colour: pixels(file, colour) >= A_FEW for colour in SERIES[file.name]} == dict.fromkeys(
            SERIES[file.name], True
        )


def test_what_there_is_none_of_is_not_in_the_picture() -> None:
    *_, losses = draw(predictions(1), {**HISTORY, "val/loss": []}, Path("plots"))
    assert pixels(losses, VALIDATION) == 0
    assert pixels(losses, PREDICTED) >= A_FEW


def test_one_transmission_is_enough_and_without_losses_there_are_no_loss_curves() -> None:
    files = draw(predictions(1, transmissions=1), {"train/loss_step": [], "val/loss": []}, Path("plots"))
    assert [file.name for file in files] == ["error_map.png", "calibration.png"]


def test_figures_are_those_of_the_errors() -> None:
    said = predictions(2, transmissions=400)
    figures = said.figures()
    assert figures["position_error_median_m"] == pytest.approx(np.quantile(said.errors_m, 0.5))
    assert figures["position_error_p90_m"] == pytest.approx(np.quantile(said.errors_m, 0.9))
    # Errors were drawn with the sigma that is claimed.
    assert figures["coverage_68"] == pytest.approx(0.6827, abs=0.06)
    assert figures["coverage_95"] == pytest.approx(0.9545, abs=0.03)


def test_a_step_that_was_made_twice_counts_once_and_what_is_no_number_not_at_all() -> None:
    history = [(2, 0.5), (0, 1.0), (1, float("nan")), (2, 0.25), (3, float("inf"))]
    assert _by_step(history).tolist() == [[0, 1.0], [2, 0.25]]


def test_a_running_mean_keeps_length_and_level_to_the_ends() -> None:
    assert _smoothed(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    assert _smoothed(np.arange(5.0)) == pytest.approx([0.5, 1, 2, 3, 3.5])
