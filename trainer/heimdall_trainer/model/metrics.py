"""How far off positions are, and whether their uncertainty is honest."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

LEVELS: Final = {"coverage_68": 0.6827, "coverage_95": 0.9545}
SCALES_TRIED: Final = 129
TRUSTED_SAMPLES: Final = 10
"""How many samples a scale of sigma is worth before any was seen: a handful must not move it far."""


def position_error_m(prediction: Tensor, target: Tensor) -> Tensor:
    """Distance between predicted and true places.

    Args:
        prediction: Metres east and north, and more, shape (B, 4).
        target: Metres east and north, shape (B, 2).

    Returns:
        Metres, shape (B,).
    """
    error: Tensor = torch.linalg.vector_norm(prediction[:, :2] - target, dim=-1)
    return error


def squared_mahalanobis(prediction: Tensor, target: Tensor) -> Tensor:
    """Squared error in standard deviations, shape (B,); chi-squared with two degrees of freedom if sigma is right."""
    return ((prediction[:, :2] - target) / prediction[:, 2:]).square().sum(-1)


def ellipse_bound(level: float) -> float:
    """Squared radius, in standard deviations, of the ellipse that holds a share of a normal distribution in the plane.

    The inverse of the chi-squared distribution with two degrees of freedom: -2·log(1 - level).
    """
    return -2.0 * math.log(1.0 - level)


def fitted_scale(squares: Tensor) -> Tensor:
    """What standard deviations have to be multiplied with so that their ellipses hold what they should.

    Errors have longer tails than a normal distribution, so the ellipses of 68 and of 95 % ask for different factors.
    The one between is taken that leaves the worse of the two off by the least. (A likelihood's answer, Guo et al. 2017,
    would let a few large errors widen both.)

    Args:
        squares: Squared errors in standard deviations, shape (N,).

    Returns:
        A number near 1 where they are right, or where there are few that are numbers.
    """
    squares = squares[squares.isfinite()]
    if not len(squares):
        return squares.new_ones(())
    levels = torch.tensor(list(LEVELS.values()), dtype=squares.dtype, device=squares.device)
    bounds = torch.stack([squares.new_tensor(ellipse_bound(level)) for level in LEVELS.values()])
    asked = 0.5 * torch.log(torch.quantile(squares, levels) / bounds)
    between = asked[0] + torch.linspace(0, 1, SCALES_TRIED, device=squares.device) * (asked[1] - asked[0])
    held = (squares / torch.exp(2 * between)[:, None, None] <= bounds[:, None]).float().mean(-1)
    best = (held - levels).abs().amax(-1).argmin()
    share = len(squares) / (len(squares) + TRUSTED_SAMPLES)
    return torch.exp(share * between[best])


class PositionMetrics(Metric):
    """Median and 90th percentile of the position error, and how many true places the ellipses of 68 and 95 % hold.

    Gathered over batches and over processes. Perfectly calibrated, `coverage_68` is 0.68, `coverage_95` is 0.95, and
    `sigma_scale`, which is what standard deviations are too small by, is 1.
    """

    full_state_update = False
    errors: list[Tensor]
    squares: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("errors", default=[], dist_reduce_fx="cat")
        self.add_state("squares", default=[], dist_reduce_fx="cat")

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Take in a batch: predictions in metres, shape (B, 4), and truth in metres, shape (B, 2)."""
        self.errors.append(position_error_m(prediction.detach(), target).float())
        self.squares.append(squared_mahalanobis(prediction.detach(), target).float())

    def compute(self) -> dict[str, Tensor]:
        """`position_error_median_m`, `position_error_p90_m`, `coverage_68`, `coverage_95`, `sigma_scale`."""
        errors, squares = dim_zero_cat(self.errors), dim_zero_cat(self.squares)
        result: dict[str, Any] = {
            "position_error_median_m": torch.quantile(errors, 0.5),
            "position_error_p90_m": torch.quantile(errors, 0.9),
        }
        for name, level in LEVELS.items():
            result[name] = (squares <= ellipse_bound(level)).float().mean()
        result["sigma_scale"] = fitted_scale(squares)
        return result


class MeanLoss(Metric):
    """Mean loss of samples, gathered over batches and over processes.

    torchmetrics' own looks at each value, for which training would wait for the GPU, or leaves weights out.
    """

    full_state_update = False
    total: Tensor
    samples: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "samples"):
            self.add_state(name, default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, total: Tensor | float, samples: float) -> None:
        """Take in the sum of some samples' losses, and how many they are."""
        self.total += total
        self.samples += samples

    def compute(self) -> Tensor:
        """The mean, float32."""
        return (self.total / self.samples).float()
