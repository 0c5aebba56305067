"""The metric queue: never blocks a training step, never raises into training, keeps order, delivers in batches.

A background thread sends what was put. While the server is away it tries again, with growing delays; what the memory's
share can't hold waits on disk. Points are numbered in the order they were put, so that waiting for delivery means
waiting for those put so far, not for silence.

The order of what waits: the batch under way, `head`, the spill on disk, `tail`. New points go to the tail wherever the
spill holds older ones.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Final

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent, is_refusal
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.points import Point
from heimdall_tracking.redact import redact
from heimdall_tracking.spill import Spill, read

BATCH: Final = 1000
"""MLflow takes at most this many metrics in one call."""
MEMORY_POINTS: Final = 50_000
"""Points kept in memory: some 10 MB. Beyond it they wait on disk."""
LINGER_S: Final = 1.0
"""How long points are gathered before a batch goes: one call a second, however short the steps."""
DISK_RETRY_S: Final = 5.0
"""How long a disk that takes or gives nothing is left alone: trying costs time that training would wait for."""
NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
"""Errors of a disk that has room again when something older goes. Of others, such as too many open files, nothing is
removed: they pass, and what lies on disk is still good."""
RETRY_S: Final = 0.5
RETRY_LIMIT_S: Final = 15.0

log = structlog.get_logger()

Send = Callable[[Sequence[Point]], None]


class MetricQueue:
    """Points on their way to the server."""

    def __init__(
        self,
        send: Send,
        *,
        spill: Spill | None = None,
        memory_points: int = MEMORY_POINTS,
        linger_s: float = LINGER_S,
        retry_s: float = RETRY_S,
        disk_retry_s: float = DISK_RETRY_S,
    ) -> None:
        """Start the background thread.

        Args:
            send: Delivers a batch or raises; called from the background thread alone.
            spill: Where points wait that the memory's share can't hold; without it the oldest are dropped.
            memory_points: Most points that wait in memory, beside the batch under way.
            linger_s: How long points are gathered before they go.
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
            disk_retry_s: How long a disk that takes or gives nothing is left alone.
        """
        self._send = send
        self._spill = spill
        self._half = max(1, memory_points // 2)
        self._linger_s = linger_s
        self._retry_s = retry_s
        self._batch: list[Point] = []
        self._head: deque[Point] = deque()
        self._tail: deque[Point] = deque()
        self._changed = threading.Condition()
        self._taken = 0  # points ever put
        self._settled = 0  # points ever delivered, dropped or refused
        self._dropped = 0
        self._waiting_flushes = 0
        self._disk_retry_s = disk_retry_s
        self._disk_again_at = 0.0
        self._disk_failed = False
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="heimdall-metrics", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """How many points were given up: no memory and disk had room, or the server refused them for good."""
        with self._changed:
            return self._dropped

    @property
    def waiting(self) -> int:
        """How many points were put and are neither delivered nor given up."""
        with self._changed:
            return self._taken - self._settled

    def outstanding(self) -> Outstanding:
        """What is on its way."""
        with self._changed:
            return Outstanding(settled=self._settled, calls=math.ceil(self.waiting / BATCH))

    def put(self, points: Sequence[Point]) -> None:
        """Take points; returns at once. After close they are dropped and counted."""
        with self._changed:
            self._taken += len(points)
            if self._closed:
                self._give_up(len(points))
                return
            before = self._waits()
            behind = self._tail or self._spilled()
            (self._tail if behind or len(self._head) >= self._half else self._head).extend(points)
            if len(self._head) + len(self._tail) > 2 * self._half:
                self._make_room()
            # The background thread is woken where it has something to do: each time it looks, a training step waits.
            if not before or before < BATCH <= self._waits():
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
        """Deliver what can be delivered in time, then end the thread. What still waits then is left; see `left`.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether everything was delivered, nothing dropped.
        """
        deadline = time.monotonic() + timeout_s
        delivered = self.flush(timeout_s)
        self.stop()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return delivered and not self.dropped and not self.waiting

    def stop(self) -> None:
        """Send nothing more; returns at once, though the answer to a batch may still be out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def left(self) -> tuple[list[Point], list[Point]]:
        """What a closed queue did not deliver: the points before those that lie in the spill, and those behind.

        A batch whose answer is still out counts as not delivered: MLflow takes equal points once.
        """
        with self._changed:
            return [*self._batch, *self._head], list(self._tail)

    # --- the background thread -----------------------------------------------------------------------------------

    def _work(self) -> None:
        while batch := self._next_batch():
            settled = self._deliver(batch)
            with self._changed:
                if not settled:
                    return
                self._settled += len(batch)
                self._batch = []
                self._changed.notify_all()

    def _next_batch(self) -> list[Point]:
        """The next points to send; none when the queue was closed."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waits() or self._closed)
                self._changed.wait_for(self._in_a_hurry, self._linger_s)
            self._read_back()
            with self._changed:
                if self._closed:
                    return []
                if not self._head and not self._spilled():
                    self._head, self._tail = self._tail, self._head
                self._batch = [self._head.popleft() for _ in range(min(BATCH, len(self._head)))]
                if self._batch:
                    return self._batch

    def _read_back(self) -> None:
        """Fill the head from the disk, which no step that logs must wait for: the lock is not held while it is read.

        What the disk can't give now is waited for: whatever was put later must not overtake it.
        """
        with self._changed:
            spill = self._to_be_read()
            if spill is None:
                return
            ahead = spill.ahead(self._half)
        try:
            found = read(ahead)
        except OSError as error:
            log.warning("metrics that wait on disk can't be read; trying again", error=error.strerror or str(error))
            with self._changed:
                spill.take([])
                self._changed.wait_for(lambda: self._closed, self._disk_retry_s)
            return
        with self._changed:
            if self._closed:
                return  # who has closed it takes them as lying on disk
            points, lost = spill.take(found)
            self._head.extend(points)
            if lost:
                self._give_up(lost)

    def _to_be_read(self) -> Spill | None:
        """What waits on disk, where it is this one's turn: who has closed the queue looks at it without the lock."""
        return None if self._closed or self._head else self._spill

    def _waits(self) -> int:
        return len(self._head) + len(self._tail) + self._spilled()

    def _spilled(self) -> int:
        return self._spill.waiting if self._spill is not None else 0

    def _in_a_hurry(self) -> bool:
        return self._closed or self._waiting_flushes > 0 or self._waits() >= BATCH

    def _deliver(self, batch: Sequence[Point]) -> bool:
        """Send a batch until it is settled: delivered, or refused for good; whether it is."""
        delay = self._retry_s
        while not self._closed:
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
                if is_permanent(error):
                    return self._deliver_apart(batch, error)
                forget_connections()
                log.warning("metrics could not be delivered; trying again", error=redact(error), again_in_s=delay)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, delay)
                delay = min(2 * delay, RETRY_LIMIT_S)
            else:
                return True
        return False

    def _deliver_apart(self, batch: Sequence[Point], error: Exception) -> bool:
        """Find the points that the server refuses, so that one bad point doesn't take its batch along."""
        if len(batch) > 1 and is_refusal(error):
            middle = len(batch) // 2
            return self._deliver(batch[:middle]) and self._deliver(batch[middle:])
        log_refused(batch, error)
        with self._changed:
            self._dropped += len(batch)
        return True

    # --- with the lock held --------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Have the tail wait on disk; where the disk takes nothing more, give up the oldest points."""
        if self._spill is not None and time.monotonic() >= self._disk_again_at:
            if self._write_tail(self._spill):
                return
            self._disk_again_at = time.monotonic() + self._disk_retry_s
        excess = len(self._head) + len(self._tail) - 2 * self._half
        for _ in range(excess):
            (self._head or self._tail).popleft()
        self._give_up(excess)

    def _write_tail(self, spill: Spill) -> bool:
        """Have the tail wait on disk, in place of the oldest file there where that makes room; whether it does."""
        if not self._tail:
            # One call brought more than the memory's share: the newest half is written like any other.
            self._tail.extend(islice(self._head, self._half, None))
            self._head = deque(islice(self._head, self._half))
        for may_drop in (True, False):
            try:
                spill.append(self._tail)
            except OSError as error:
                self._tell_of_disk(error)
                gone = spill.drop_oldest() if may_drop and error.errno in NO_ROOM else 0
                if not gone:
                    return False
                self._give_up(gone)
            else:
                self._tail.clear()
                return True
        return False

    def _tell_of_disk(self, error: OSError) -> None:
        if not self._disk_failed:
            log.error(
                "metrics that wait for MLflow can't be written to disk; the oldest are dropped while it takes no more",
                error=error.strerror or str(error),
            )
        self._disk_failed = True

    def _give_up(self, count: int) -> None:
        """Count points that were never sent."""
        if not self._dropped:
            log.error("metrics are dropped: the server was away for too long", memory_points=2 * self._half)
        self._dropped += count
        self._settled += count
        self._changed.notify_all()


def log_refused(batch: Sequence[Point], error: Exception) -> None:
    """Tell of points that MLflow won't take."""
    names = sorted({point.name for point in batch})
    log.error("MLflow refuses metrics; they are dropped", metrics=names[:10], error=redact(error))


def now_ms() -> int:
    """The time as MLflow counts it."""
    return time.time_ns() // 1_000_000
