"""The outbox: calls to the server that training must not wait for, such as tags and parameters.

Each call has a key. A newer call with the same key takes the place of an older one that still waits: of a progress that
could not be told, only the newest matters. Calls must be idempotent, since one that failed half-way is made again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Final

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.redact import redact

RETRY_S: Final = 0.5
RETRY_LIMIT_S: Final = 15.0

log = structlog.get_logger()


class Outbox:
    """Calls on their way to the server, in order of their first put."""

    def __init__(self, *, retry_s: float = RETRY_S) -> None:
        """Start the background thread.

        Args:
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
        """
        self._retry_s = retry_s
        self._calls: dict[str, Callable[[], object]] = {}
        self._busy = False
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="heimdall-outbox", daemon=True)
        self._thread.start()

    def put(self, key: str, call: Callable[[], object]) -> None:
        """Have something done; returns at once.

        Args:
            key: What it is; it replaces a waiting call of the same key.
            call: Does it, or raises.
        """
        with self._changed:
            self._calls[key] = call
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls and not self._busy, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Do what can be done in time, then end the thread; whether everything was done."""
        done = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)
        return done

    def _work(self) -> None:
        delay = self._retry_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closed)
                if self._closed:
                    return
                key = next(iter(self._calls))
                call = self._calls.pop(key)
                self._busy = True
            done = self._try(key, call)
            with self._changed:
                if not done:
                    # Back to the front, unless something newer has taken its place meanwhile.
                    self._calls = {key: self._calls.pop(key, call), **self._calls}
                    self._changed.wait_for(lambda: self._closed, delay)
                delay = self._retry_s if done else min(2 * delay, RETRY_LIMIT_S)
                self._busy = False
                self._changed.notify_all()

    def _try(self, key: str, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
            if is_permanent(error):
                log.warning("MLflow refuses this; it is left out", what=key, error=redact(error))
                return True
            forget_connections()
            log.warning("MLflow could not be told; trying again", what=key, error=redact(error))
            return False
        return True
