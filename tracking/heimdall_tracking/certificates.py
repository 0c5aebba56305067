"""Whether the server's certificate can be trusted: asked once, before MLflow's client tries for minutes."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Final
from urllib.parse import urlsplit

from heimdall_api.contract import ENV_ATTEMPT
from heimdall_tracking.errors import AwayError
from heimdall_tracking.settings import SettingsError, TrackingSettings, trusts_anybody

TIMEOUT_S: Final = 10
HTTPS_PORT: Final = 443
NOT_YET_VALID: Final = 9
EXPIRED: Final = 10
"""OpenSSL's numbers for a certificate that is out of its time: it is renewed, or a clock is set, without a setting."""


def check_certificate(settings: TrackingSettings) -> None:
    """Shake hands with an MLflow server that is asked by TLS. One that does not answer may answer later.

    Args:
        settings: The server, and the authorities that are trusted.

    Raises:
        SettingsError: Its certificate is not one of an authority that is trusted, or is another host's.
        AwayError: The same in a later attempt, or its certificate is out of its time: it may be renewed meanwhile.
    """
    address = urlsplit(settings.tracking_uri)
    if address.scheme != "https" or not address.hostname or trusts_anybody() or _by_proxy(settings.tracking_uri):
        return
    context = _context(settings)
    try:
        with (
            socket.create_connection((address.hostname, address.port or HTTPS_PORT), TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=address.hostname),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        problem = f"the certificate of {settings.display_uri} can't be trusted: {error.verify_message}"
        if error.verify_code in (NOT_YET_VALID, EXPIRED):
            raise AwayError(f"{problem}; renew it, or set the clocks right") from None
        raise _judged(
            f"{problem}; set MLFLOW_TRACKING_SERVER_CERT_PATH to a file with the certificate of the authority that "
            "signed it"
        ) from None
    except OSError:
        return


def _judged(problem: str) -> Exception:
    """The error of a server that isn't trusted: in a later attempt it is no setting, for an earlier one got past it."""
    attempt = os.environ.get(ENV_ATTEMPT, "")
    return AwayError(problem) if attempt.isdigit() and int(attempt) > 1 else SettingsError(problem)


def _by_proxy(uri: str) -> bool:
    """Whether `requests` goes through a proxy: what answers at the address itself says nothing then."""
    from requests.utils import get_environ_proxies, select_proxy

    return select_proxy(uri, get_environ_proxies(uri)) is not None


def _context(settings: TrackingSettings) -> ssl.SSLContext:
    """What MLflow's client trusts: the given authorities alone, or those that come with `requests`.

    Raises:
        SettingsError: The file of authorities holds none; in a later attempt AwayError.
    """
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    bundle = settings.ca_bundle
    try:
        if bundle is not None and bundle.is_dir():
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle or DEFAULT_CA_BUNDLE_PATH)
    except ssl.SSLError:
        raise _judged(
            f"MLFLOW_TRACKING_SERVER_CERT_PATH names {bundle}, which holds no certificates: PEM is wanted"
        ) from None
