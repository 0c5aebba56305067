"""Splitting by session: recordings of one session are alike, so none may be on two sides."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from heimdall_trainer.errors import ConfigurationError


@dataclass(frozen=True)
class Split:
    """Sessions of each side."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]


def split_sessions(sessions: Sequence[str], *, validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Divide sessions between training, validation and test.

    Args:
        sessions: IDs of the sessions.
        validation_fraction: Share for validation; at least one session if greater than 0.
        test_fraction: Share for the test; at least one session if greater than 0.
        seed: The same seed and sessions give the same split.

    Returns:
        The split.

    Raises:
        ConfigurationError: There are too few sessions.
    """
    order = sorted(set(sessions))
    random.Random(seed).shuffle(order)  # noqa: S311 - no secret
    validation = _count(len(order), validation_fraction)
    test = _count(len(order), test_fraction)
    if validation + test >= len(order):
        raise ConfigurationError(
            f"{len(order)} sessions are too few for spec.data.validationFraction {validation_fraction} and "
            f"testFraction {test_fraction}, which take {validation + test}: add sessions, or lower the fractions"
        )
    return Split(
        train=tuple(sorted(order[validation + test :])),
        validation=tuple(sorted(order[:validation])),
        test=tuple(sorted(order[validation : validation + test])),
    )


def _count(sessions: int, fraction: float) -> int:
    return max(1, round(sessions * fraction)) if fraction > 0 else 0
