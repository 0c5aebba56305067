"""The outbox: calls to the server that training must not wait for, such as tags and parameters.

Each call has a key. A newer call with the same key takes the place of an older one that still waits: of a progress that
could not be told, only the newest matters. Calls must be idempotent, since one that failed half-way is made again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.pauses import doubling_s
from heimdall_tracking.redact import redact

RETRY_S: Final = 0.5
RETRY_LIMIT_S: Final = 15.0

log = structlog.get_logger()


class Keyed(Protocol):
    """A call, as data."""

    @property
    def key(self) -> str:
        """What it is."""


CallT = TypeVar("CallT", bound=Keyed)


class Outbox(Generic[CallT]):
    """Calls on their way to the server, in order of their first put."""

    def __init__(self, make: Callable[[CallT], object], *, retry_s: float = RETRY_S) -> None:
        """Start the background thread.

        Args:
            make: Makes a call, or raises; called from the background thread alone.
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
        """
        self._make = make
        self._retry_s = retry_s
        self._calls: dict[str, CallT] = {}
        self._under_way: CallT | None = None
        self._settled = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="heimdall-outbox", daemon=True)
        self._thread.start()

    def put(self, call: CallT) -> None:
        """Have a call made; returns at once. It replaces one of the same key that waits."""
        with self._changed:
            self._calls[call.key] = call
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until nothing waits any more; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._calls and self._under_way is None, timeout_s)

    def close(self, timeout_s: float) -> bool:
        """Do what can be done in time, then end the thread; whether everything was done. See `left`."""
        deadline = time.monotonic() + timeout_s
        done = self.flush(timeout_s)
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return done

    def stop(self) -> None:
        """Make no more calls; returns at once, though the answer to one may still be out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def left(self) -> list[CallT]:
        """What a closed outbox did not do; a call whose answer is still out counts as not done."""
        with self._changed:
            first = {} if self._under_way is None else {self._under_way.key: self._under_way}
            return list({**first, **self._calls}.values())

    def outstanding(self) -> Outstanding:
        """What is on its way."""
        with self._changed:
            return Outstanding(settled=self._settled, calls=len(self.left()))

    def _work(self) -> None:
        pauses = doubling_s(self._retry_s, RETRY_LIMIT_S)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._closed)
                if self._closed:
                    return
                call = self._calls.pop(next(iter(self._calls)))
                self._under_way = call
            done = self._try(call)
            with self._changed:
                if not done:
                    # Back to the front, unless something newer has taken its place meanwhile.
                    newest = self._calls.pop(call.key, call)
                    self._under_way = newest
                    self._calls = {call.key: newest, **self._calls}
                    self._changed.wait_for(lambda: self._closed, next(pauses))
                else:
                    pauses = doubling_s(self._retry_s, RETRY_LIMIT_S)
                self._settled += done
                self._under_way = None
                self._changed.notify_all()

    def _try(self, call: CallT) -> bool:
        try:
            self._make(call)
        except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
            if is_permanent(error):
                log.warning("MLflow refuses this; it is left out", what=call.key, error=redact(error))
                return True
            forget_connections()
            log.warning("MLflow could not be told; trying again", what=call.key, error=redact(error))
            return False
        return True
