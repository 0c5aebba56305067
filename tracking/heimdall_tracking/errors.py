"""Errors of tracking, and which errors of a server will not go away by waiting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from heimdall_tracking.redact import redact

PERMANENT: Final = frozenset(
    {"INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "RESOURCE_ALREADY_EXISTS", "INVALID_STATE", "NOT_FOUND"}
)
"""Error codes of MLflow that say the call itself is wrong. Everything else may be a server that is away."""

REMEDIES: Final = {
    HTTPStatus.UNAUTHORIZED: "check the user and password, or the keys, that it is asked with",
    HTTPStatus.FORBIDDEN: "the user, or the key, needs the right to write there",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "raise the largest body of a request that the ingress or proxy before it lets "
    "through (ingress-nginx: the annotation nginx.ingress.kubernetes.io/proxy-body-size)",
}
"""Answers to an upload that trying again does not change, and what does."""
STATUS_OF: Final = {"UNAUTHENTICATED": HTTPStatus.UNAUTHORIZED, "PERMISSION_DENIED": HTTPStatus.FORBIDDEN}
"""HTTP statuses of MLflow's error codes that are one of these answers."""
REFUSED_RETRY_S: Final = 60.0
"""How long nothing is tried after a refusal of whom was asked with: somebody has to mend that."""
SHOWN: Final = 300
"""Characters of an answer that people are shown: a proxy's may be a page."""

OF_A_DELETED_RUN: Final = "must be in the 'active' state"
"""What MLflow says, with the code of a wrong value, to whoever logs to a run that was deleted."""


class TrackingError(Exception):
    """Something can't be tracked; the message says why and what to do."""


class OvertakenError(TrackingError):
    """A newer attempt has taken over: this one publishes nothing more."""


class TooLargeError(TrackingError):
    """A file is larger than what is let through on its way; it can be delivered when that is mended."""


class AwayError(Exception):
    """The server does not answer; what was to be delivered is still there for another try."""


@dataclass(frozen=True)
class Refusal:
    """An answer to an upload that stays as it is until somebody mends something."""

    status: HTTPStatus
    reason: str

    @property
    def of_size(self) -> bool:
        """Whether it is about this file alone: another one may be let through."""
        return self.status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE

    @property
    def sentence(self) -> str:
        """What was answered, and the remedy."""
        return f"{self.reason}; {REMEDIES[self.status]}"


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


def refusal_of(error: BaseException) -> Refusal | None:
    """The refusal that an error of an upload tells of; None where trying again may help."""
    status = status_of(error)
    if status not in REMEDIES:
        return None
    text = " ".join(redact(error).split())
    return Refusal(HTTPStatus(status), text if len(text) <= SHOWN else f"{text[: SHOWN - 1]}…")


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what has led to it; urllib says that in an attribute of its own."""
    while error is not None:
        yield error
        reason = getattr(error, "reason", None)
        error = reason if isinstance(reason, BaseException) else error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """HTTP status of the answer that has led to an error, or None where none has."""
    return next((found for each in causes(error) if (found := _status(each)) is not None), None)


def _status(error: BaseException) -> int | None:
    """HTTP status of the answer that an error is about: one of requests, of the S3 client, of urllib, or of MLflow."""
    answer: Any = getattr(error, "response", None)
    if isinstance(answer, dict):
        answer = answer.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        answer = getattr(answer, "status_code", getattr(error, "code", None))
    return answer if isinstance(answer, int) else STATUS_OF.get(getattr(error, "error_code", ""))
