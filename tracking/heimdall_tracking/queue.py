"""The metric queue: never blocks a training step, never raises into training, keeps order, delivers in batches.

A background thread sends what was put. While the server is away it tries again, with growing delays. Points are
numbered in the order they were put, so that waiting for delivery means waiting for those put so far, not for silence.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.redact import redact

BATCH: Final = 1000
"""MLflow takes at most this many metrics in one call."""
CAPACITY: Final = 1_000_000
"""Points kept while the server is away: some 200 MB. Beyond it the oldest are dropped, counted and reported."""
LINGER_S: Final = 1.0
"""How long points are gathered before a batch goes: one call a second, however short the steps."""
RETRY_S: Final = 0.5
RETRY_LIMIT_S: Final = 15.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int
    timestamp_ms: int


Send = Callable[[Sequence[Point]], None]


class MetricQueue:
    """Points on their way to the server."""

    def __init__(
        self, send: Send, *, capacity: int = CAPACITY, linger_s: float = LINGER_S, retry_s: float = RETRY_S
    ) -> None:
        """Start the background thread.

        Args:
            send: Delivers a batch or raises; called from the background thread alone.
            capacity: Most points that wait.
            linger_s: How long points are gathered before they go.
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
        """
        self._send = send
        self._capacity = capacity
        self._linger_s = linger_s
        self._retry_s = retry_s
        self._points: deque[Point] = deque()
        self._changed = threading.Condition()
        self._taken = 0  # points ever put
        self._settled = 0  # points ever delivered, dropped or refused
        self._dropped = 0
        self._waiting_flushes = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="heimdall-metrics", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many points were given up: over capacity, or refused by the server for good."""
        with self._changed:
            return self._dropped

    @property
    def waiting(self) -> int:
        """How many points were put and are neither delivered nor given up."""
        with self._changed:
            return self._taken - self._settled

    def put(self, points: Sequence[Point]) -> None:
        """Take points; returns at once. After close they are dropped and counted."""
        with self._changed:
            self._taken += len(points)
            if self._closed:
                self._give_up(len(points))
                return
            self._points.extend(points)
            overflow = len(self._points) - self._capacity
            for _ in range(overflow):
                self._points.popleft()
            if overflow > 0:
                self._give_up(overflow)
            self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that was put before is delivered, or given up.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether none of it is still waiting.
        """
        with self._changed:
            target = self._taken
            self._waiting_flushes += 1
            self._changed.notify_all()
            try:
                return self._changed.wait_for(lambda: self._settled >= target, timeout_s)
            finally:
                self._waiting_flushes -= 1

    def close(self, timeout_s: float) -> bool:
        """Deliver what can be delivered in time, then end the thread.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether everything was delivered, nothing dropped.
        """
        delivered = self.flush(timeout_s)
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(timeout=1)
        return delivered and not self.dropped

    # --- the background thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        while (batch := self._next_batch()) is not None:
            self._deliver(batch)
            with self._changed:
                self._settled += len(batch)
                self._changed.notify_all()

    def _next_batch(self) -> list[Point] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._points or self._closed)
            self._changed.wait_for(self._in_a_hurry, self._linger_s)
            if self._closed:
                return None
            return [self._points.popleft() for _ in range(min(BATCH, len(self._points)))]

    def _in_a_hurry(self) -> bool:
        return self._closed or self._waiting_flushes > 0 or len(self._points) >= BATCH

    def _deliver(self, batch: Sequence[Point]) -> None:
        delay = self._retry_s
        while not self._closed:
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
                if is_permanent(error):
                    self._deliver_apart(batch, error)
                    return
                forget_connections()
                log.warning("metrics could not be delivered; trying again", error=redact(error), again_in_s=delay)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, delay)
                delay = min(2 * delay, RETRY_LIMIT_S)
            else:
                return
        with self._changed:
            self._dropped += len(batch)

    def _deliver_apart(self, batch: Sequence[Point], error: Exception) -> None:
        """Find the points that the server refuses, so that one bad point doesn't take its batch along."""
        if len(batch) > 1 and getattr(error, "error_code", None) == "INVALID_PARAMETER_VALUE":
            self._deliver(batch[: len(batch) // 2])
            self._deliver(batch[len(batch) // 2 :])
            return
        names = sorted({point.name for point in batch})
        log.error("MLflow refuses metrics; they are dropped", metrics=names[:10], error=redact(error))
        with self._changed:
            self._dropped += len(batch)

    def _give_up(self, count: int) -> None:
        """Count points that were never sent; called with the lock held."""
        if not self._dropped:
            log.error("metrics are dropped: the server was away for too long", capacity=self._capacity)
        self._dropped += count
        self._settled += count


def now_ms() -> int:
    """The time as MLflow counts it."""
    return time.time_ns() // 1_000_000
