"""Sessions for training, validation and test, so that no session is on two sides.

Transmissions of one session share receivers and surroundings: a network that had seen some of them would look better on
the others than it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from heimdall_trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from heimdall_api.types import DataSpec
    from heimdall_trainer.data.sessions import SessionStore

SESSIONS: Final = "sessions"
"""Under this name, checkpoints and logged models hold the sessions of their training by side."""


@dataclass(frozen=True)
class Split:
    """IDs of sessions, sorted; each is in one of the three."""

    train: tuple[str, ...]
    validation: tuple[str, ...]
    test: tuple[str, ...]

    @classmethod
    def of(cls, sides: Mapping[str, Sequence[str]]) -> Split:
        """The split that `sides` told of."""
        return cls(**{side: tuple(sides[side]) for side in ("train", "validation", "test")})

    @property
    def sides(self) -> dict[str, list[str]]:
        """Sessions by side, as checkpoints and logged models hold them."""
        return {"train": list(self.train), "validation": list(self.validation), "test": list(self.test)}

    @property
    def ids(self) -> list[str]:
        """All sessions, sorted."""
        return sorted([*self.train, *self.validation, *self.test])


def divide(database: SessionStore, data: DataSpec, seed: int) -> Split:
    """Divide the sessions that a training has; see `split_sessions`.

    Args:
        database: Knows which are approved.
        data: Which are wanted, and the shares.
        seed: The training's.

    Raises:
        ConfigurationError: Sessions are missing, not approved, or too few.
        DataError: There is no approved session.
        ConnectionError: The database does not answer.
    """
    return split_sessions(
        database.approved(data.sessions.ids),
        validation_fraction=data.validation_fraction,
        test_fraction=data.test_fraction,
        seed=seed,
    )


def split_sessions(ids: Iterable[str], *, validation_fraction: float, test_fraction: float, seed: int) -> Split:
    """Divide sessions; the same sessions and the same seed give the same split, in whatever order they come.

    One session more may move others to another side: a training that goes on keeps to the split that it began with.
    A fraction above 0 is at least one session.

    Args:
        ids: Sessions; doubles count once.
        validation_fraction: Share kept for validation, 0 for none.
        test_fraction: Share kept for the test, 0 for none.
        seed: Chooses who goes where.

    Raises:
        ConfigurationError: There are too few sessions for that.
    """
    drawn = sorted(set(ids), key=lambda identity: hashlib.sha256(f"{seed}:{identity}".encode()).digest())
    test = _share(len(drawn), test_fraction)
    validation = _share(len(drawn), validation_fraction)
    if len(drawn) <= test + validation:
        raise ConfigurationError(
            f"{len(drawn)} recording session(s) are too few for spec.data.validationFraction={validation_fraction:g} "
            f"and spec.data.testFraction={test_fraction:g}: sessions are never divided, so {test + validation + 1} are "
            "the least; add sessions, or make the fractions smaller"
        )
    return Split(
        train=tuple(sorted(drawn[test + validation :])),
        validation=tuple(sorted(drawn[test : test + validation])),
        test=tuple(sorted(drawn[:test])),
    )


def _share(count: int, fraction: float) -> int:
    return max(1, round(count * fraction)) if fraction > 0 else 0
