"""A server whose certificate is not trusted: which of them a setting mends, and which may be right in a minute."""

from __future__ import annotations

import os
import ssl
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from heimdall_api.contract import ENV_ATTEMPT
from heimdall_tracking import certificates
from heimdall_tracking.certificates import EXPIRED, NOT_YET_VALID, check_certificate
from heimdall_tracking.errors import AwayError
from heimdall_tracking.settings import SettingsError, TrackingSettings

UNKNOWN_AUTHORITY, OTHER_HOST = 20, 62
SERVER = TrackingSettings(tracking_uri="https://mlflow.invalid", ca_bundle=None)


class Context:
    """A handshake that fails as OpenSSL says by number."""

    def __init__(self, code: int) -> None:
        self.code = code

    def wrap_socket(self, *_: object, **__: object) -> Any:
        error = ssl.SSLCertVerificationError(1, "certificate verify failed")
        error.verify_code, error.verify_message = self.code, "the reason"
        raise error


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Addresses that were connected to."""
    found: list[object] = []

    def connect(address: object, *_: object) -> Any:
        found.append(address)
        return nullcontext()

    monkeypatch.setattr(certificates.socket, "create_connection", connect)
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name in (ENV_ATTEMPT, "MLFLOW_TRACKING_INSECURE_TLS"):
            monkeypatch.delenv(name)
    return found


def fail_with(code: int, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(certificates, "_context", lambda _: Context(code))


@pytest.mark.parametrize("code", [UNKNOWN_AUTHORITY, OTHER_HOST])
def test_one_that_is_not_trusted_ends_a_first_attempt_for_good_and_is_away_for_a_later_one(
    code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(code, monkeypatch)
    with pytest.raises(SettingsError, match="the reason; set MLFLOW_TRACKING_SERVER_CERT_PATH"):
        check_certificate(SERVER)
    monkeypatch.setenv(ENV_ATTEMPT, "2")
    with pytest.raises(AwayError, match="can't be trusted: the reason"):
        check_certificate(SERVER)


@pytest.mark.parametrize("code", [EXPIRED, NOT_YET_VALID])
def test_one_that_is_out_of_its_time_is_away(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(code, monkeypatch)
    with pytest.raises(AwayError, match="the reason; renew it"):
        check_certificate(SERVER)


def test_a_file_of_authorities_that_was_right_before_is_no_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.pem").write_text("nothing yet")
    wrong = TrackingSettings(tracking_uri="https://mlflow.invalid", ca_bundle=tmp_path / "ca.pem")
    with pytest.raises(SettingsError, match="holds no certificates"):
        check_certificate(wrong)
    monkeypatch.setenv(ENV_ATTEMPT, "2")
    with pytest.raises(AwayError, match="holds no certificates"):
        check_certificate(wrong)


def test_through_a_proxy_nothing_is_asked_here(monkeypatch: pytest.MonkeyPatch, asked: list[object]) -> None:
    fail_with(UNKNOWN_AUTHORITY, monkeypatch)
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.invalid:3128")
    check_certificate(SERVER)
    assert asked == []
    monkeypatch.setenv("NO_PROXY", "mlflow.invalid")
    with pytest.raises(SettingsError):
        check_certificate(SERVER)
    assert asked == [("mlflow.invalid", 443)]
