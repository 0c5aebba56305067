"""Metrics of localisation over a whole epoch."""

from __future__ import annotations

import math
from typing import Final

import torch

REGIONS: Final = {"68": 0.68, "95": 0.95}


class LocalizationMetrics:
    """Gathers errors over an epoch: their median and 90th percentile, and how honest the sigmas are."""

    def __init__(self) -> None:
        self._errors: list[torch.Tensor] = []
        self._distances: list[torch.Tensor] = []

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            prediction: Positions and standard deviations in metres, shape (B, 4).
            target: True positions in metres, shape (B, 2).
        """
        residual = (prediction[:, :2] - target).detach().float().cpu()
        sigma = prediction[:, 2:].detach().float().cpu()
        self._errors.append(residual.norm(dim=-1))
        self._distances.append((residual / sigma).square().sum(dim=-1))

    def compute(self) -> dict[str, float]:
        """The metrics of the epoch: errors in metres, coverage as shares; then begin anew."""
        if not self._errors:
            return {}
        errors, distances = torch.cat(self._errors), torch.cat(self._distances)
        self._errors, self._distances = [], []
        metrics = {
            "position_error_median_m": float(errors.quantile(0.5)),
            "position_error_p90_m": float(errors.quantile(0.9)),
        }
        for name, share in REGIONS.items():
            # The squared distance of a two-dimensional Gaussian is exponential: its quantile is -2·ln(1 - share).
            metrics[f"coverage_{name}"] = float((distances <= -2 * math.log(1 - share)).float().mean())
        return metrics
