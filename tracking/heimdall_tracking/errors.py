"""Errors of tracking, and which errors of MLflow will never go away by waiting."""

from __future__ import annotations

from typing import Final

PERMANENT: Final = frozenset(
    {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "NOT_FOUND"}
)
"""Error codes of MLflow that say the call itself is wrong. Everything else may be a server that is away."""

OF_A_DELETED_RUN: Final = "must be in the 'active' state"
"""What MLflow says, with the code of a wrong value, to whoever logs to a run that was deleted."""


class TrackingError(Exception):
    """Something can't be tracked; the message says why and what to do."""


class OvertakenError(TrackingError):
    """A newer attempt has taken over: this one publishes nothing more."""


class AwayError(Exception):
    """The server does not answer; what was to be delivered is still there for another try."""


def is_refusal(error: BaseException) -> bool:
    """Whether MLflow refuses what it was given, not whom it was given for: a part of it may be taken."""
    return getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE" and OF_A_DELETED_RUN not in str(error)


def is_permanent(error: BaseException) -> bool:
    """Whether the same call would fail again however long one waits."""
    if isinstance(error, TrackingError):
        return True
    if isinstance(error, OSError) and isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError):
        return True
    return getattr(error, "error_code", None) in PERMANENT
