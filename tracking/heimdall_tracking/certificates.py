"""Whether the server's certificate can be trusted: asked once, before MLflow's client tries for minutes."""

from __future__ import annotations

import os
import socket
import ssl
from typing import Final
from urllib.parse import urlsplit

from heimdall_tracking.settings import SettingsError, TrackingSettings

TIMEOUT_S: Final = 10
HTTPS_PORT: Final = 443


def check_certificate(settings: TrackingSettings) -> None:
    """Shake hands with an MLflow server that is asked by TLS. One that does not answer may answer later.

    Args:
        settings: The server, and the authorities that are trusted.

    Raises:
        SettingsError: Its certificate is not one of an authority that is trusted, or is another host's, or too old.
    """
    address = urlsplit(settings.tracking_uri)
    insecure = os.environ.get("MLFLOW_TRACKING_INSECURE_TLS", "").lower() in ("true", "1")
    if address.scheme != "https" or not address.hostname or insecure:
        return
    context = _context(settings)
    try:
        with (
            socket.create_connection((address.hostname, address.port or HTTPS_PORT), TIMEOUT_S) as connection,
            context.wrap_socket(connection, server_hostname=address.hostname),
        ):
            return
    except ssl.SSLCertVerificationError as error:
        raise SettingsError(
            f"the certificate of {settings.display_uri} can't be trusted: {error.verify_message}; set "
            "MLFLOW_TRACKING_SERVER_CERT_PATH to a file with the certificate of the authority that signed it"
        ) from None
    except OSError:
        return


def _context(settings: TrackingSettings) -> ssl.SSLContext:
    """What MLflow's client trusts: the given authorities alone, or those that come with `requests`."""
    from requests.utils import DEFAULT_CA_BUNDLE_PATH

    bundle = settings.ca_bundle
    try:
        if bundle is not None and bundle.is_dir():
            return ssl.create_default_context(capath=bundle)
        return ssl.create_default_context(cafile=bundle or DEFAULT_CA_BUNDLE_PATH)
    except ssl.SSLError:
        raise SettingsError(
            f"MLFLOW_TRACKING_SERVER_CERT_PATH names {bundle}, which holds no certificates: PEM is wanted"
        ) from None
