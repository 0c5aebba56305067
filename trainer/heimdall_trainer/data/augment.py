"""Augmentation of samples, for training only. Each effect treats all receivers of a sample alike, as nature would."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from heimdall_trainer.data.spectrogram import DEFAULT_PARAMETERS

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How strongly samples are varied."""

    dropout: float = 0.1
    """Probability that a receiver is left out."""
    minimum_receivers: int = 3
    """Dropout leaves at least so many, where there were."""
    shift_frames: int = 4
    """Spectrograms are moved in time, cyclically, by up to so many frames."""
    scale_db: float = 3.0
    """The transmitter is made weaker or stronger by up to so many decibels."""
    turn: bool = True
    """The scene is turned around the origin by any angle, and mirrored: no direction is special."""


def augment(
    spectrograms: Array, receivers: Array, position: Array, settings: Augmentation, rng: np.random.Generator
) -> tuple[Array, Array, Array]:
    """Vary one sample.

    Args:
        spectrograms: Shape (R, 3, 128, 32).
        receivers: Metres east and north, and whatever else is known of each, shape (R, 2 or more).
        position: Metres, shape (2,).
        settings: How strongly.
        rng: Source of randomness.

    Returns:
        The three, varied; R may be smaller.
    """
    kept = _kept_receivers(len(receivers), settings, rng)
    spectrograms, receivers = spectrograms[kept], receivers[kept]
    shift = int(rng.integers(-settings.shift_frames, settings.shift_frames + 1))
    # The same offset for all receivers: their relative power is what tells the position.
    offset = np.float32(rng.uniform(-settings.scale_db, settings.scale_db) / DEFAULT_PARAMETERS.scale_db)
    spectrograms = np.roll(spectrograms, shift, axis=-1) + offset
    if settings.turn:
        matrix = _orthogonal(rng)
        receivers = np.concatenate([receivers[:, :2] @ matrix, receivers[:, 2:]], axis=1)
        position = position @ matrix
    return spectrograms, receivers, position


def _kept_receivers(count: int, settings: Augmentation, rng: np.random.Generator) -> NDArray[np.int64]:
    draws = rng.uniform(size=count)
    kept = np.flatnonzero(draws >= settings.dropout)
    if len(kept) < min(settings.minimum_receivers, count):
        kept = np.sort(np.argsort(draws)[::-1][: settings.minimum_receivers])
    return kept.astype(np.int64)


def _orthogonal(rng: np.random.Generator) -> Array:
    angle = rng.uniform(0, 2 * np.pi)
    mirror = rng.choice([-1.0, 1.0])
    rows = [[np.cos(angle), np.sin(angle)], [-mirror * np.sin(angle), mirror * np.cos(angle)]]
    return np.asarray(rows, dtype=np.float32)
