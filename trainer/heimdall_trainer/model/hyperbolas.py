"""Where arrivals say that a transmission came from: hyperbolic location, by Gauss and Newton, of a whole batch.

A difference of two arrivals puts the transmitter on a hyperbola. Least squares of them all (Torrieri 1984) is joined
with what is known otherwise, a place with its standard deviations, so that there is an answer for any number of
receivers: where arrivals tell nothing, it is that place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

BLUR: Final = 0.5
"""Kilometres that arrivals are made less sure by at first, and half as many with each step.

The sum of squares has valleys elsewhere, narrow ones of the surest arrivals: with all of them vague there is one."""
BLURRED_STEPS: Final = 10
SHARP_STEPS: Final = 5
"""After these, the error that is left is far below the arrivals' own."""
LEAST_DISTANCE: Final = 1e-5
"""Kilometres; nearer to a receiver the direction to it is not told apart."""


@dataclass(frozen=True)
class Heard:
    """Who heard transmissions, and when, in kilometres."""

    places: Tensor
    """Receivers, shape (B, R, 2)."""
    late: Tensor
    """How far light has gone until each heard it, from any one instant on, shape (B, R, 1)."""
    sigma: Tensor
    """Standard deviations of that, shape (B, R, 1)."""
    present: Tensor
    """1 for receivers, 0 for padding, shape (B, R, 1)."""


@dataclass(frozen=True)
class Fix:
    """What arrivals and an earlier guess come to together, in kilometres."""

    place: Tensor
    """East and north, shape (B, 2)."""
    deviation: Tensor
    """Standard deviations, shape (B, 2)."""
    correlation: Tensor
    """Of the errors in east and north, shape (B, 1)."""
    misfit: Tensor
    """Sum of the squared residuals, each in its standard deviations, shape (B, 1): about the number of receivers less
    three where all fits."""


def solve(heard: Heard, guess: Tensor, deviation: Tensor) -> Fix:
    """Locate transmissions by their arrivals, beginning with a guess.

    The guess counts as a measurement. Gradients reach it, its deviations and those of the arrivals by the last step
    alone, which is all that they change where the steps before have arrived.

    Args:
        heard: When each receiver heard them.
        guess: Kilometres, shape (B, 2).
        deviation: Standard deviations of the guess, shape (B, 2).

    Returns:
        The place, and how sure it is by the arrivals' own word.
    """
    variance = heard.sigma.square()
    prior = deviation.square().reciprocal()
    place = guess.detach()
    for blur in [*(BLUR / 2**step for step in range(BLURRED_STEPS)), *(0.0,) * (SHARP_STEPS - 1)]:
        weights = heard.present / (variance.detach() + blur**2)
        place = _step(heard, weights, guess.detach(), prior.detach(), place).place
    return _step(heard, heard.present / variance, guess, prior, place)


def _step(heard: Heard, weights: Tensor, guess: Tensor, prior: Tensor, place: Tensor) -> Fix:
    away = place.unsqueeze(1) - heard.places
    distance = (away.square().sum(-1, keepdim=True) + LEAST_DISTANCE**2).sqrt()
    share = weights / weights.sum(1, keepdim=True)
    # The time of sending is unknown: what all receivers have in common says nothing.
    slope = away / distance
    slope = slope - (share * slope).sum(1, keepdim=True)
    residual = heard.late - distance
    residual = residual - (share * residual).sum(1, keepdim=True)
    pull = (weights * slope * residual).sum(1) + prior * (guess - place)
    east, north = slope[..., 0], slope[..., 1]
    weight = weights[..., 0]
    xx, yy = (weight * east * east).sum(1), (weight * north * north).sum(1)
    xy = (weight * east * north).sum(1)
    # As a sum of squares (Lagrange's identity): xx·yy - xy² would lose all its digits where receivers are in line.
    crossed = east.unsqueeze(2) * north.unsqueeze(1) - east.unsqueeze(1) * north.unsqueeze(2)
    minor = 0.5 * (weight.unsqueeze(2) * weight.unsqueeze(1) * crossed.square()).sum((1, 2))
    determinant = minor + xx * prior[:, 1] + yy * prior[:, 0] + prior[:, 0] * prior[:, 1]
    xx, yy = xx + prior[:, 0], yy + prior[:, 1]
    step = torch.stack([yy * pull[:, 0] - xy * pull[:, 1], xx * pull[:, 1] - xy * pull[:, 0]], dim=-1)
    step = step / determinant.unsqueeze(-1)
    return Fix(
        place=place + step,
        deviation=(torch.stack([yy, xx], dim=-1) / determinant.unsqueeze(-1)).sqrt(),
        correlation=-(xy / (xx * yy).sqrt()).unsqueeze(-1),
        misfit=(weights * residual.square()).sum(1),
    )
