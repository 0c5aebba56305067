"""Which answers to an upload stay as they are until somebody mends something."""

from __future__ import annotations

from http import HTTPStatus
from types import SimpleNamespace

import pytest

from heimdall_tracking.errors import REMEDIES, SHOWN, refusal_of
from tests.unit.tracking.fakes import AnsweredError, RefusedError


class ClientError(Exception):
    """As the S3 client's own: its answer is a dictionary."""

    def __init__(self, status: int) -> None:
        super().__init__("An error occurred (AccessDenied)")
        self.response = {"Error": {"Code": "AccessDenied"}, "ResponseMetadata": {"HTTPStatusCode": status}}


def wrapped(error: Exception) -> Exception:
    """As the S3 client's uploads raise it."""
    outer = RuntimeError("Failed to upload x to y")
    outer.__context__ = error
    return outer


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (AnsweredError(401), HTTPStatus.UNAUTHORIZED),
        (AnsweredError(403), HTTPStatus.FORBIDDEN),
        (AnsweredError(413), HTTPStatus.REQUEST_ENTITY_TOO_LARGE),
        (ClientError(403), HTTPStatus.FORBIDDEN),
        (wrapped(ClientError(403)), HTTPStatus.FORBIDDEN),
        (RefusedError("PERMISSION_DENIED"), HTTPStatus.FORBIDDEN),
        (RefusedError("UNAUTHENTICATED"), HTTPStatus.UNAUTHORIZED),
    ],
)
def test_a_refusal_is_told_with_its_remedy(error: Exception, status: HTTPStatus) -> None:
    refusal = refusal_of(error)
    assert refusal is not None
    assert refusal.status == status
    assert refusal.sentence == f"{error}; {REMEDIES[status]}"
    assert refusal.of_size is (status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE)


@pytest.mark.parametrize(
    "error",
    [
        *(AnsweredError(status) for status in (404, 408, 429, 500, 502, 503, 504)),
        ClientError(503),
        RefusedError("INTERNAL_ERROR"),
        RefusedError("TEMPORARILY_UNAVAILABLE"),
        ConnectionError("reset"),
        AnsweredError(SimpleNamespace()),
    ],
)
def test_a_server_that_may_be_away_has_refused_nothing(error: Exception) -> None:
    assert refusal_of(error) is None


def test_a_page_is_cut_and_holds_no_password() -> None:
    refusal = refusal_of(AnsweredError(413, "413 for http://alice:canary@host\n<html>\n" + 1000 * "x"))
    assert refusal is not None
    assert refusal.reason.startswith("413 for http://***@host <html> xxx")
    assert len(refusal.reason) == SHOWN
