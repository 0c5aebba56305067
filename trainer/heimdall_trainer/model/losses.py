"""Losses of a position with its uncertainty: all shapes are (batch, 2), all units metres."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import torch

HUBER_DELTA: Final = 1.0
"""In standard deviations."""
QUANTILES: Final = (0.16, 0.84)
"""The interval of one standard deviation."""

Loss = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def gaussian(position: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Gaussian negative log-likelihood (Nix and Weigend 1994), mean over batch and axes."""
    residual = (target - position) / sigma
    return (0.5 * residual.square() + torch.log(sigma) + 0.5 * math.log(2 * math.pi)).mean()


def huber(position: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As gaussian, with residuals beyond one sigma counted linearly (Huber 1964): outliers pull less."""
    residual = (target - position) / sigma
    cost = torch.nn.functional.huber_loss(residual, torch.zeros_like(residual), delta=HUBER_DELTA)
    return cost + torch.log(sigma).mean()


def quantile(position: torch.Tensor, sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Pinball losses of median and of the bounds position ± sigma (Koenker and Bassett 1978)."""
    low, high = QUANTILES
    bounds = ((low, position - sigma), (0.5, position), (high, position + sigma))
    return torch.stack([_pinball(target - bound, share) for share, bound in bounds]).mean()


def _pinball(error: torch.Tensor, share: float) -> torch.Tensor:
    return torch.maximum(share * error, (share - 1) * error).mean()


LOSSES: Final[dict[str, Loss]] = {"gaussian": gaussian, "huber": huber, "quantile": quantile}
