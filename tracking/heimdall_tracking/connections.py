"""Connections to MLflow that are kept open, and why they are not trusted after a failure."""

from __future__ import annotations

import structlog

log = structlog.get_logger()


def forget_connections() -> None:
    """Have the next call open a new connection.

    A kept connection may lead to where the server no longer is: while a Service has no pod behind it, a connection to
    its address may be answered by whatever lies on the way, and would go on being answered so when the server is back.
    """
    from mlflow.utils import request_utils

    # MLflow has no public way to close its sessions.
    cached = getattr(request_utils, "_cached_get_request_session", None)
    if cached is None or not hasattr(cached, "cache_clear"):
        log.debug("this version of MLflow keeps its connections elsewhere")
        return
    cached.cache_clear()
