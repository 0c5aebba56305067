"""How far off positions are, and whether their uncertainty is honest."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

LEVELS: Final = {"coverage_68": 0.6827, "coverage_95": 0.9545}


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


class PositionMetrics(Metric):
    """Median and 90th percentile of the position error, and how many true places the ellipses of 68 and 95 % hold.

    Gathered over batches and over processes. Perfectly calibrated, `coverage_68` is 0.68 and `coverage_95` is 0.95.
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
        """`position_error_median_m`, `position_error_p90_m`, `coverage_68`, `coverage_95`."""
        errors, squares = dim_zero_cat(self.errors), dim_zero_cat(self.squares)
        result: dict[str, Any] = {
            "position_error_median_m": torch.quantile(errors, 0.5),
            "position_error_p90_m": torch.quantile(errors, 0.9),
        }
        for name, level in LEVELS.items():
            result[name] = (squares <= ellipse_bound(level)).float().mean()
        return result
