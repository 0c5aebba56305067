"""The metric queue: never blocks a training step, never raises into training, keeps order, delivers in batches.

A background thread sends what was put. While the server is away it tries again, with growing delays; what the memory's
share can't hold waits on disk. Another thread writes it there: a disk that is slow or hangs must not hold training up
either. Until it was written it waits in memory, up to a bound of its own; beyond that the oldest points are dropped and
counted, since neither may a step wait for the disk nor the memory grow without end. Points are numbered in the order
they were put, so that waiting for delivery means waiting for those put so far, not for silence.

The order of what waits: the batch under way, `head`, the spill on disk, `writing`, `tail`. New points go to the tail
wherever older ones wait behind the head.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent, is_refusal
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.pauses import doubling_s
from heimdall_tracking.points import Point, to_lines
from heimdall_tracking.redact import redact
from heimdall_tracking.spill import Spill, read, write

BATCH: Final = 1000
"""MLflow takes at most this many metrics in one call."""
MEMORY_POINTS: Final = 50_000
"""Points kept in memory: some 10 MB. Beyond it they wait on disk."""
HARD_POINTS: Final = 200_000
"""Points kept in memory where the disk does not take them as fast as they come: some 40 MB. Beyond it the oldest go."""
LINGER_S: Final = 1.0
"""How long points are gathered before a batch goes: one call a second, however short the steps."""
DISK_RETRY_S: Final = 5.0
"""How long a disk that takes or gives nothing is left alone."""
DISK_WAIT_S: Final = 10.0
"""How long the end waits for points that are being written; they are left in memory then, to be put away once more."""
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
        hard_points: int = HARD_POINTS,
        linger_s: float = LINGER_S,
        retry_s: float = RETRY_S,
        disk_retry_s: float = DISK_RETRY_S,
    ) -> None:
        """Start the background threads.

        Args:
            send: Delivers a batch or raises; called from the background thread alone.
            spill: Where points wait that the memory's share can't hold; without it the oldest are dropped.
            memory_points: Most points that wait in memory, beside the batch under way and what is to be written.
            hard_points: Most points that wait in memory with what is to be written.
            linger_s: How long points are gathered before they go.
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
            disk_retry_s: How long a disk that takes or gives nothing is left alone.
        """
        self._send = send
        self._spill = spill
        self._half = max(1, memory_points // 2)
        self._hard = max(hard_points, 2 * self._half)
        self._linger_s = linger_s
        self._retry_s = retry_s
        self._batch: list[Point] = []
        self._head: deque[Point] = deque()
        self._writing: deque[Point] = deque()
        self._tail: deque[Point] = deque()
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._overfull = threading.Condition(lock)  # apart: a step that logs wakes nobody who has nothing to do
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
        self._spilling: threading.Thread | None = None
        if spill is not None:
            self._spilling = threading.Thread(
                target=self._spill_over, args=(spill,), name="heimdall-spill", daemon=True
            )
            self._spilling.start()

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
            behind = self._tail or self._writing or self._spilled()
            room = 0 if behind else self._half - len(self._head)
            self._head.extend(points[:room])
            self._tail.extend(points[room:])
            if self._held() > 2 * self._half:
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
        if self._spilling is not None:
            # It may still write points that have been taken back from it: what follows has the folder alone.
            self._spilling.join(min(DISK_WAIT_S, max(0.0, deadline - time.monotonic())))
        return delivered and not self.dropped and not self.waiting

    def stop(self) -> None:
        """Send nothing more; returns at once, though the answer to a batch may still be out."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._overfull.notify_all()

    def rest(self, timeout_s: float) -> bool:
        """Wait until nothing is being written to disk, nor is to be; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._writing and (self._closed or not self._is_overfull()), timeout_s
            )

    def left(self) -> tuple[list[Point], list[Point]]:
        """What a closed queue did not deliver: the points before those that lie in the spill, and those behind.

        A batch whose answer is still out counts as not delivered, and what is still being written as not written:
        MLflow takes equal points once.
        """
        self.rest(DISK_WAIT_S)
        with self._changed:
            self._take_back()
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
                    self._take_back()  # the server is there: nobody needs the disk
                    self._head = self._cut_off()
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
            parts = spill.read_ranges(self._half)
        spill.remove()
        try:
            found = read(parts)
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
        return self._held() + self._spilled()

    def _held(self) -> int:
        return len(self._head) + len(self._writing) + len(self._tail)

    def _spilled(self) -> int:
        return self._spill.waiting if self._spill is not None else 0

    def _in_a_hurry(self) -> bool:
        return self._closed or self._waiting_flushes > 0 or self._waits() >= BATCH

    def _deliver(self, batch: Sequence[Point]) -> bool:
        """Send a batch until it is settled: delivered, or refused for good; whether it is."""
        pauses = doubling_s(self._retry_s, RETRY_LIMIT_S)
        while not self._closed:
            try:
                self._send(batch)
            except Exception as error:  # noqa: BLE001 - nothing that tracking does may end a training
                if is_permanent(error):
                    return self._deliver_apart(batch, error)
                forget_connections()
                delay = next(pauses)
                log.warning("metrics could not be delivered; trying again", error=redact(error), again_in_s=delay)
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, delay)
            else:
                return True
        return False

    def _deliver_apart(self, batch: Sequence[Point], error: Exception) -> bool:
        parts = halves(batch, error)
        if parts:
            return all(self._deliver(part) for part in parts)
        log_refused(batch, error)
        with self._changed:
            self._dropped += len(batch)
        return True

    # --- the thread that writes to disk --------------------------------------------------------------------------

    def _spill_over(self, spill: Spill) -> None:
        while True:
            with self._changed:
                self._overfull.wait_for(lambda: self._closed or self._is_overfull())
                if self._closed:
                    return
                part = self._writing = self._cut_off()
            written = self._write(spill, part)
            with self._changed:
                if not written:
                    self._disk_again_at = time.monotonic() + self._disk_retry_s
                    if self._writing is part:
                        self._take_back()
                    self._drop_beyond(2 * self._half)
                self._changed.notify_all()

    def _write(self, spill: Spill, part: deque[Point]) -> bool:
        """Have points wait on disk, in place of the oldest file there where that makes room; whether they do."""
        lines = to_lines(part)
        for may_drop in (True, False):
            try:
                self._append(spill, lines, part)
            except OSError as error:
                self._tell_of_disk(error)
                if not (may_drop and error.errno in NO_ROOM and self._drop_oldest(spill)):
                    return False
            else:
                return True
        return False

    def _append(self, spill: Spill, lines: bytes, part: deque[Point]) -> None:
        spill.prepare()
        with self._changed:
            place = spill.write_slot(len(lines))
        size = count = 0
        try:
            write(place, lines)
            size, count = len(lines), len(part)
        finally:
            with self._changed:
                if self._writing is not part:
                    size = count = 0  # somebody else has them: what lies there is written over
                elif count:
                    self._writing = deque()
                spill.wrote(place, size, count)

    def _drop_oldest(self, spill: Spill) -> bool:
        """Make room on disk; whether there is some now."""
        with self._changed:
            oldest = spill.oldest()
        spill.remove()
        if oldest is None:
            return False
        try:
            oldest.path.unlink(missing_ok=True)
        except OSError:
            with self._changed:
                spill.restore(oldest)
            return False
        with self._changed:
            self._give_up(oldest.waiting)
        return True

    def _tell_of_disk(self, error: OSError) -> None:
        if not self._disk_failed:
            log.error(
                "metrics that wait for MLflow can't be written to disk; the oldest are dropped while it takes no more",
                error=error.strerror or str(error),
            )
        self._disk_failed = True

    # --- with the lock held --------------------------------------------------------------------------------------

    def _is_overfull(self) -> bool:
        """Whether something is to be written to disk now."""
        return self._held() > 2 * self._half and time.monotonic() >= self._disk_again_at

    def _make_room(self) -> None:
        """Have the disk take points; where it takes nothing, or not soon enough, give up the oldest."""
        if self._spill is not None and time.monotonic() >= self._disk_again_at:
            self._overfull.notify_all()
            self._drop_beyond(self._hard)
        else:
            self._drop_beyond(2 * self._half)

    def _cut_off(self) -> deque[Point]:
        """The oldest points of the tail, to be sent or written next; so many that files keep their size."""
        if len(self._tail) <= self._half:
            part, self._tail = self._tail, deque()
            return part
        return deque(self._tail.popleft() for _ in range(self._half))

    def _take_back(self) -> None:
        """What is being written waits in memory as before, whatever comes of the writing."""
        if self._writing:
            self._tail, self._writing = deque([*self._writing, *self._tail]), deque()

    def _drop_beyond(self, limit: int) -> None:
        """Give up the oldest points that memory holds, those that are being written aside."""
        excess = min(self._held() - limit, len(self._head) + len(self._tail))
        if excess > 0:
            for _ in range(excess):
                (self._head or self._tail).popleft()
            self._give_up(excess)

    def _give_up(self, count: int) -> None:
        """Count points that were never sent."""
        if not self._dropped:
            log.error("metrics are dropped: the server was away for too long", memory_points=2 * self._half)
        self._dropped += count
        self._settled += count
        self._changed.notify_all()


def halves(batch: Sequence[Point], error: Exception) -> tuple[Sequence[Point], ...]:
    """What to send apart after an error, so that one point that MLflow refuses doesn't take its batch along.

    Args:
        batch: What could not be sent.
        error: Why.

    Returns:
        Its two halves; nothing where it is one point, or where no point is to blame.
    """
    if len(batch) == 1 or not is_refusal(error):
        return ()
    middle = len(batch) // 2
    return batch[:middle], batch[middle:]


def log_refused(batch: Sequence[Point], error: Exception) -> None:
    """Tell of points that MLflow won't take."""
    names = sorted({point.name for point in batch})
    log.error("MLflow refuses metrics; they are dropped", metrics=names[:10], error=redact(error))


def now_ms() -> int:
    """The time as MLflow counts it."""
    return time.time_ns() // 1_000_000
