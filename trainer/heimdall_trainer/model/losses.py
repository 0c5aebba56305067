"""Losses of predicted positions with their standard deviations.

Errors are counted in kilometres, so that losses and their gradients are of order 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from heimdall_trainer.errors import ConfigurationError

UNIT_M: Final = 1000.0
HUBER_DELTA_M: Final = 100.0
QUANTILES: Final = (0.1587, 0.5, 0.8413)
"""Minus one, zero and one standard deviation of a normal distribution."""

Loss = Callable[[Tensor, Tensor], Tensor]


def gaussian_nll(prediction: Tensor, target: Tensor) -> Tensor:
    """Negative log-likelihood of independent normal errors in east and north (Nix and Weigend 1994).

    Args:
        prediction: Metres east and north, and standard deviations in metres, shape (B, 4).
        target: Metres east and north, shape (B, 2).

    Returns:
        Mean over batch and axes, in nats, for a density per kilometre; without the constant ½·log 2π.
    """
    mean, sigma = _split(prediction)
    error = (target / UNIT_M - mean) / sigma
    return (0.5 * error.square() + sigma.log()).mean()


def huber(prediction: Tensor, target: Tensor) -> Tensor:
    """Huber loss of the position (Huber 1964), beside which the uncertainty learns from its likelihood alone.

    Args:
        prediction: Metres east and north, and standard deviations in metres, shape (B, 4).
        target: Metres east and north, shape (B, 2).

    Returns:
        Mean over batch and axes.
    """
    mean, sigma = _split(prediction)
    delta = HUBER_DELTA_M / UNIT_M
    position = torch.nn.functional.huber_loss(mean, target / UNIT_M, delta=delta) / delta
    detached = torch.cat([mean.detach(), sigma], dim=-1) * UNIT_M
    return position + gaussian_nll(detached, target)


def quantile(prediction: Tensor, target: Tensor) -> Tensor:
    """Pinball loss of the quantiles at minus one, zero and one standard deviation (Koenker and Bassett 1978).

    Args:
        prediction: Metres east and north, and standard deviations in metres, shape (B, 4).
        target: Metres east and north, shape (B, 2).

    Returns:
        Mean over batch, axes and quantiles.
    """
    mean, sigma = _split(prediction)
    losses = []
    for level, steps in zip(QUANTILES, (-1.0, 0.0, 1.0), strict=True):
        over = target / UNIT_M - (mean + steps * sigma)
        losses.append(torch.maximum(level * over, (level - 1) * over))
    return torch.stack(losses).mean()


LOSSES: Final[dict[str, Loss]] = {"gaussian": gaussian_nll, "huber": huber, "quantile": quantile}


def loss_by_name(name: str) -> Loss:
    """The loss of a name.

    Raises:
        ConfigurationError: There is no such loss.
    """
    if name not in LOSSES:
        raise ConfigurationError(f"spec.training.loss is {name!r}: use one of {', '.join(LOSSES)}")
    return LOSSES[name]


def _split(prediction: Tensor) -> tuple[Tensor, Tensor]:
    mean, sigma = (prediction / UNIT_M).chunk(2, dim=-1)
    return mean, sigma
