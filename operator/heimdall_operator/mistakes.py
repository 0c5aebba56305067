"""Tells mistakes of our own code from what servers do: of those, a traceback is logged."""

from __future__ import annotations

from typing import Any, Final

from heimdall_tracking.redact import described

SPOKEN: Final = frozenset(
    {"aiohttp", "heimdall_api", "heimdall_operator", "heimdall_tracking", "kubernetes", "mlflow", "requests", "urllib3"}
)
"""Packages whose own errors are answers, or say all there is to say."""


def about(error: Exception) -> dict[str, Any]:
    """What a log line says of an error."""
    return {"error": described(error), "exc_info": mistake(error)}


def mistake(error: Exception) -> Exception | None:
    """An error that nobody expects, for `exc_info`.

    Args:
        error: What went wrong.

    Returns:
        The error; None where a server, the network, a disk or one of our own words is behind it.
    """
    if isinstance(error, OSError):  # also of time that ran out, and of connections
        return None
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return None if packages & SPOKEN else error
