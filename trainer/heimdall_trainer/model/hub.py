"""The library's own weights, from its hub: why they could not be fetched."""

from __future__ import annotations

import http.client
import socket
import ssl
from collections.abc import Collection
from typing import Final

from heimdall_tracking.errors import causes, status_of

AGAIN: Final = frozenset({408, 425, 429})
"""HTTP statuses below 500 that ask for another try."""
BROKEN: Final = frozenset(
    {"NetworkError", "TimeoutException", "RemoteProtocolError", "ProxyError", "Timeout", "ChunkedEncodingError"}
)
"""How HTTP libraries call errors of the network that have no class of Python's own: httpx and its heir, requests."""


def is_away(error: BaseException) -> bool:
    """Whether weights could not be fetched because a server, or the way to it, was ill: it may be well another time.

    The hub's library, timm and torch each wrap the errors of another HTTP library: what was wrapped tells.
    """
    chain = list(causes(error))
    if any(isinstance(each, ssl.SSLCertVerificationError) or _is(each, {"OfflineModeIsEnabled"}) for each in chain):
        return False
    status = status_of(error)
    if status is not None:
        return status >= http.client.INTERNAL_SERVER_ERROR or status in AGAIN
    kinds = (ConnectionError, TimeoutError, socket.gaierror, http.client.HTTPException)
    return any(isinstance(each, kinds) or _is(each, BROKEN) for each in chain)


def _is(error: BaseException, names: Collection[str]) -> bool:
    return any(kind.__name__ in names for kind in type(error).__mro__)
