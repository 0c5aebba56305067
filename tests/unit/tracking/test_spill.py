"""Points on disk: order, bounds, full disks; and the queue that uses them, over arbitrary failures."""

from __future__ import annotations

import errno
import math
import resource
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_tracking import queue as queue_module
from heimdall_tracking import spill as spill_module
from heimdall_tracking.points import Point, from_line, to_lines
from heimdall_tracking.queue import BATCH, MetricQueue
from heimdall_tracking.spill import PATTERN, ReadRange, ReadResult, Spill, WriteSlot
from tests.unit.tracking.fakes import PATIENCE_S, AwayError, RefusedError, Server, in_thread, join, points

MEMORY = 20
"""Points that the queues of these tests keep in memory."""


def spill_in(folder: Path, *, file_bytes: int = 200, limit_bytes: int = 2**20) -> Spill:
    return Spill(lambda: folder, file_bytes=file_bytes, limit_bytes=limit_bytes)


def append_to(spill: Spill, added: Sequence[Point]) -> None:
    """As the queue does it."""
    lines = to_lines(added)
    spill.prepare()
    place, written = spill.write_slot(len(lines)), False
    try:
        spill_module.write(place, lines)
        written = True
    finally:
        spill.wrote(place, written * len(lines), written * len(added))


def read_from(spill: Spill, limit: int) -> tuple[list[Point], int]:
    """As the queue does it."""
    parts = spill.read_ranges(limit)
    spill.remove()
    return spill.take(spill_module.read(parts))


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(PATTERN))


def on_disk(folder: Path) -> list[int]:
    lines = [line for file in files(folder) for line in file.read_bytes().splitlines(keepends=True)]
    return [point.step for line in lines if (point := from_line(line)) is not None]


@contextmanager
def full_disk(bytes_left: int) -> Iterator[None]:
    """No file of this process grows beyond a size: writes fail as they do where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_left, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


# --- the spill alone -----------------------------------------------------------------------------------------------

VALUES = st.floats(allow_nan=True, allow_infinity=True)
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)


@given(st.lists(st.builds(Point, NAMES, VALUES, st.integers(0, 2**60), st.integers(0, 2**50)), max_size=20))
def test_points_come_back_from_their_lines_exactly(given_points: list[Point]) -> None:
    back = [from_line(line) for line in to_lines(given_points).splitlines(keepends=True)]

    assert [repr(point) for point in back] == [repr(point) for point in given_points]


def test_half_a_line_is_no_point() -> None:
    whole = to_lines([Point("loss", math.pi, 3, 4)])

    assert [from_line(whole[:end]) for end in range(len(whole) - 2)] == [None] * (len(whole) - 2)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), max_size=30))
def test_what_is_appended_is_read_once_in_order_and_leaves_nothing(moves: list[int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        spill, put, read = spill_in(Path(name)), 0, list[int]()
        for move in moves:
            if move % 2:
                append_to(spill, points(range(put, put + move)))
                put += move
            else:
                found, lost = read_from(spill, move)
                assert not lost
                assert len(found) == min(move, put - len(read))
                read += [point.step for point in found]
            assert spill.waiting == put - len(read)
        found, _ = read_from(spill, put)
        assert [*read, *(point.step for point in found)] == list(range(put))
        read_from(spill, 1)
        assert files(Path(name)) == []


def test_beyond_its_bound_nothing_is_written(tmp_path: Path) -> None:
    spill = spill_in(tmp_path, limit_bytes=1000)
    with pytest.raises(OSError, match="bound of 1000 bytes"):
        append_to(spill, points(range(1000)))
    assert spill.waiting == 0
    assert on_disk(tmp_path) == []


@pytest.mark.parametrize("can_cut", [True, False])
def test_a_write_that_fails_half_way_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, can_cut: bool
) -> None:
    spill = spill_in(tmp_path, file_bytes=10_000)
    if not can_cut:
        monkeypatch.setattr(spill_module, "_cut", lambda place: None)
    append_to(spill, points(range(10)))
    with full_disk(files(tmp_path)[0].stat().st_size + 30), pytest.raises(OSError):
        append_to(spill, points(range(10, 20)))
    assert not can_cut or on_disk(tmp_path) == list(range(10))

    append_to(spill, points(range(20, 22)))

    found, lost = read_from(spill, 100)
    assert [point.step for point in found] == [*range(10), 20, 21]
    assert lost == 0


def test_a_file_that_somebody_removed_is_counted_as_lost(tmp_path: Path) -> None:
    spill = spill_in(tmp_path)
    append_to(spill, points(range(20)))
    append_to(spill, points(range(20, 25)))
    files(tmp_path)[0].unlink()

    assert read_from(spill, 100) == (points(range(20, 25)), 20)


def test_settled_it_holds_what_was_not_read_and_nothing_else(tmp_path: Path) -> None:
    spill = spill_in(tmp_path)
    for start in range(0, 60, 20):
        append_to(spill, points(range(start, start + 20)))
    read_from(spill, 27)

    assert spill.settle() == 33
    assert on_disk(tmp_path) == list(range(27, 60))


# --- the queue with a disk -----------------------------------------------------------------------------------------


class Rows:
    """A server that keeps equal points once, as MLflow's databases do, in the order of their arrival."""

    def __init__(self, failures: Sequence[str] = ()) -> None:
        self.rows: dict[Point, None] = {}
        self.failures = iter(failures)

    def send(self, batch: Sequence[Point]) -> None:
        assert len(batch) <= BATCH
        failure = next(self.failures, "none")
        if failure == "before":
            raise AwayError
        taken = batch if failure != "half" else batch[: len(batch) // 2]
        self.rows.update(dict.fromkeys(taken))
        if failure in ("half", "answer lost"):
            raise ConnectionError

    @property
    def steps(self) -> list[int]:
        return [point.step for point in self.rows]


FAILURES = st.lists(st.sampled_from(["before", "half", "answer lost", "none"]), max_size=12)


@settings(deadline=None, max_examples=60)
@given(puts=st.lists(st.integers(1, 60), max_size=25), failures=FAILURES)
def test_over_any_failures_every_point_arrives_once_in_order(puts: list[int], failures: list[str]) -> None:
    server = Rows(failures)
    with tempfile.TemporaryDirectory() as name:
        queue = MetricQueue(server.send, spill=spill_in(Path(name)), memory_points=MEMORY, linger_s=0, retry_s=0.0001)
        put = 0
        for count in puts:
            queue.put(points(range(put, put + count)))
            put += count

        assert queue.close(PATIENCE_S)
        assert server.steps == list(range(put))


@settings(deadline=None, max_examples=60)
@given(puts=st.lists(st.integers(1, 60), min_size=1, max_size=25), failures=FAILURES, answers=st.integers(0, 6))
def test_what_is_delivered_and_what_is_left_are_everything_in_order(
    puts: list[int], failures: list[str], answers: int
) -> None:
    """The server goes away for good after some answers: the process ends, and leaves the rest."""
    server = Rows([*failures, *["none"] * answers, *["before"] * 1000])
    with tempfile.TemporaryDirectory() as name:
        spill = spill_in(Path(name))
        queue = MetricQueue(server.send, spill=spill, memory_points=MEMORY, linger_s=0, retry_s=0.0001)
        put = 0
        for count in puts:
            queue.put(points(range(put, put + count)))
            put += count
        queue.close(0)
        join(queue._thread)

        before, behind = queue.left()
        spill.settle()
        left = [*(point.step for point in before), *on_disk(Path(name)), *(point.step for point in behind)]

    assert left == list(range(put - len(left), put))
    seen = server.steps
    assert seen == list(range(len(seen)))
    assert len(seen) + len(left) >= put


def held_up(folder: Path, *, limit_bytes: int = 2**20) -> tuple[MetricQueue, Server]:
    """A queue whose server hangs with the first point."""
    server = Server()
    server.open.clear()
    spill = spill_in(folder, limit_bytes=limit_bytes)
    queue = MetricQueue(server.send, spill=spill, memory_points=MEMORY, linger_s=0, retry_s=0.001, disk_retry_s=0)
    queue.put(points([0]))
    server.wait_for_call()
    return queue, server


def put_each(queue: MetricQueue, steps: Sequence[int]) -> None:
    """Put points one by one, and wait until the disk has taken what it can."""
    for step in steps:
        queue.put(points([step]))
    assert queue.rest(PATIENCE_S)


def test_memory_holds_its_share_and_the_disk_the_rest(tmp_path: Path) -> None:
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 500))

    assert len(queue._head) + len(queue._tail) <= MEMORY
    assert len(on_disk(tmp_path)) >= 499 - MEMORY
    assert queue.dropped == 0
    server.open.set()
    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(500))


def test_one_put_larger_than_the_memory_keeps_its_order(tmp_path: Path) -> None:
    queue, server = held_up(tmp_path)
    queue.put(points(range(1, 1000)))
    queue.put(points([1000]))
    server.open.set()

    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(1001))


def test_beyond_the_bound_on_disk_the_oldest_are_dropped_and_counted(tmp_path: Path) -> None:
    queue, server = held_up(tmp_path, limit_bytes=2000)
    put_each(queue, range(1, 500))

    assert sum(file.stat().st_size for file in files(tmp_path)) <= 2000
    dropped = queue.dropped
    assert dropped > 0
    server.open.set()
    assert queue.flush(PATIENCE_S), "what was dropped is not waited for"
    assert len(server.steps) == 500 - dropped
    assert server.steps == sorted(server.steps)
    assert server.steps[-10:] == list(range(490, 500)), "the newest say most"
    assert not queue.close(PATIENCE_S)


def test_a_full_disk_is_told_once_and_what_it_can_not_take_is_counted(tmp_path: Path) -> None:
    from structlog.testing import capture_logs

    queue, server = held_up(tmp_path)
    with capture_logs() as lines, full_disk(0):
        put_each(queue, range(1, 500))

    assert queue.dropped == 499 - MEMORY
    assert [line["event"].partition(";")[0] for line in lines if "disk" in line["event"]] == [
        "metrics that wait for MLflow can't be written to disk"
    ]
    queue.put(points(range(500, 600)))
    server.open.set()
    assert queue.flush(PATIENCE_S)
    assert server.steps == [0, *range(500 - MEMORY, 600)], "with room again, the disk is used again"
    queue.close(0)


def test_a_disk_that_takes_nothing_is_left_alone_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, server = held_up(tmp_path)
    queue._disk_retry_s, tries = 3600, []

    def full(*_: object) -> None:
        tries.append(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(queue_module, "write", full)
    put_each(queue, range(1, 500))

    assert len(tries) == 1
    server.open.set()
    queue.close(PATIENCE_S)


def test_a_training_on_a_full_disk_goes_on(tmp_path: Path) -> None:
    """A process of its own, whose files may not grow: nothing is raised, it ends, and says what is lost."""
    script = f"""
import resource, signal, sys
from pathlib import Path
from heimdall_tracking.points import Point
from heimdall_tracking.queue import MetricQueue
from heimdall_tracking.spill import Spill
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
def send(batch):
    raise ConnectionError
queue = MetricQueue(send, spill=Spill(lambda: Path({str(tmp_path)!r})), memory_points=100, retry_s=3600)
for step in range(10_000):
    queue.put([Point("loss", 0.5, step, step)])
closed = queue.close(0)
queue.left()  # its thread has done with the disk
sys.exit(f"{{closed}} {{queue.dropped + queue.waiting}}")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)

    assert done.stderr == "False 10000\n"


def test_a_refused_point_among_spilled_ones_is_dropped_alone(tmp_path: Path) -> None:
    server = Server(refuses="bad", errors=[AwayError(), RefusedError("TEMPORARILY_UNAVAILABLE")])
    queue = MetricQueue(server.send, spill=spill_in(tmp_path), memory_points=MEMORY, linger_s=0, retry_s=0.001)
    for step in range(200):
        queue.put(points([step], "bad" if step == 150 else "loss"))

    assert queue.flush(PATIENCE_S)
    assert server.steps == [step for step in range(200) if step != 150]
    assert queue.dropped == 1
    queue.close(0)


def test_files_that_can_not_be_opened_for_a_moment_cost_no_backlog(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too many open files say nothing of what lies on disk: it stays, and what memory can't hold meanwhile goes."""
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 200))
    before, queue._disk_retry_s, tries = on_disk(tmp_path), 3600, []

    def refuse(self: Path, *_: object, **__: object) -> None:
        tries.append(self)
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        queue.put(points(range(200, 200 + 2 * MEMORY)))
        assert queue.rest(PATIENCE_S)

    assert len(tries) <= 2, "one write and its repair: then the disk is left alone for a while"
    assert on_disk(tmp_path) == before
    assert queue.dropped <= 3 * MEMORY
    server.open.set()
    assert queue.flush(PATIENCE_S)
    assert set(before) <= set(server.steps)
    queue.close(0)


def test_one_put_drops_one_file_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 200))
    count, queue._disk_retry_s = len(files(tmp_path)), 3600

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(queue_module, "write", full)
    queue.put(points(range(200, 300)))
    assert queue.rest(PATIENCE_S)

    assert len(files(tmp_path)) == count - 1
    server.open.set()
    queue.close(PATIENCE_S)


def test_what_can_not_be_read_for_a_moment_is_delivered_later_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 200))
    refused, whole_read = threading.Event(), spill_module._read

    def refuse_once(part: ReadRange) -> ReadResult:
        if not refused.is_set():
            refused.set()
            raise OSError(errno.EMFILE, "Too many open files")
        return whole_read(part)

    monkeypatch.setattr(spill_module, "_read", refuse_once)
    server.open.set()

    assert queue.close(PATIENCE_S)
    assert refused.is_set()
    assert server.steps == list(range(200))
    assert queue.dropped == 0


class SlowDisk:
    """A disk whose reads take until they are allowed to end."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reading, self.free = threading.Event(), threading.Event()
        whole_read = spill_module._read

        def read(part: ReadRange) -> ReadResult:
            self.reading.set()
            assert self.free.wait(PATIENCE_S)
            return whole_read(part)

        monkeypatch.setattr(spill_module, "_read", read)


def held_up_while_reading(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[MetricQueue, Server, SlowDisk]:
    """A queue that has begun to read 199 points from a disk that is slow, behind the first one."""
    queue, server = held_up(folder)
    put_each(queue, range(1, 200))
    disk = SlowDisk(monkeypatch)
    server.open.set()
    assert disk.reading.wait(PATIENCE_S)
    return queue, server, disk


@pytest.mark.parametrize("meanwhile", [1, MEMORY, 10 * MEMORY])
def test_a_step_that_logs_does_not_wait_until_the_disk_is_read(
    meanwhile: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server, disk = held_up_while_reading(tmp_path, monkeypatch)
    for step in range(200, 200 + meanwhile):
        queue.put(points([step]))
    disk.free.set()

    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(200 + meanwhile))


def test_what_is_being_read_when_the_queue_is_closed_is_left_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server, disk = held_up_while_reading(tmp_path, monkeypatch)
    assert not queue.close(0)
    before, behind = queue.left()
    disk.free.set()
    join(queue._thread)

    assert queue._spill is not None
    queue._spill.settle()
    left = [*(point.step for point in before), *on_disk(tmp_path), *(point.step for point in behind)]
    assert [*server.steps, *left] == list(range(200))


def test_a_closed_queue_leaves_the_disk_to_who_has_closed_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 200))
    queue.stop()
    queue._head.clear()
    assert on_disk(tmp_path)
    looked: list[int] = []
    monkeypatch.setattr(queue._spill, "read_ranges", looked.append)

    queue._read_back()

    assert not looked
    server.open.set()
    join(queue._thread)


def test_what_is_being_read_is_not_dropped_for_what_comes_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server = held_up(tmp_path, limit_bytes=1000)
    put_each(queue, range(1, 40))
    disk = SlowDisk(monkeypatch)
    server.open.set()
    assert disk.reading.wait(PATIENCE_S)
    put_each(queue, range(40, 200))
    disk.free.set()

    assert queue.flush(PATIENCE_S)
    assert queue.dropped > 0
    assert len(server.steps) == 200 - queue.dropped
    assert server.steps == sorted(set(server.steps))
    assert server.steps[-10:] == list(range(190, 200))
    assert not queue.close(PATIENCE_S)


def test_points_that_could_not_be_read_wait_as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = spill_in(tmp_path)
    append_to(spill, points(range(20)))

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(OSError, match="Input/output"):
            read_from(spill, 100)

    assert spill.waiting == 20
    assert read_from(spill, 100) == (points(range(20)), 0)


def test_files_that_can_not_be_removed_raise_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spill = spill_in(tmp_path)
    append_to(spill, points(range(20)))
    append_to(spill, points(range(20, 40)))
    read_from(spill, 20)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)

    spill.remove()
    assert read_from(spill, 20) == (points(range(20, 40)), 0)


def test_a_file_that_can_not_be_removed_to_make_room_stays_and_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue, server = held_up(tmp_path)
    put_each(queue, range(1, 200))
    before, queue._disk_retry_s = on_disk(tmp_path), 3600

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(queue_module, "write", full)
        patch.setattr(Path, "unlink", refuse)
        queue.put(points(range(200, 200 + 2 * MEMORY)))
        assert queue.rest(PATIENCE_S)

    assert on_disk(tmp_path) == before
    server.open.set()
    assert queue.flush(PATIENCE_S)
    assert set(before) <= set(server.steps)
    assert len(server.steps) == 200 + 2 * MEMORY - queue.dropped
    queue.close(0)


# --- a disk that hangs ---------------------------------------------------------------------------------------------


class HangingDisk:
    """A disk that takes points only when it is allowed to: it hangs as a network's does that is away."""

    def __init__(self, folder: Path, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
        self.hangs, self.free = threading.Event(), threading.Event()

        def make() -> Path:
            if where == "folder":
                self.wait()
            return folder

        def write(place: WriteSlot, lines: bytes) -> None:
            if where == "write":
                self.wait()
            spill_module.write(place, lines)

        monkeypatch.setattr(queue_module, "write", write)
        self.spill = Spill(make, file_bytes=200)

    def wait(self) -> None:
        self.hangs.set()
        assert self.free.wait(PATIENCE_S)


def held_up_by_the_disk(disk: HangingDisk, *, hard_points: int = 10_000) -> tuple[MetricQueue, Server]:
    """A queue whose server hangs with the first point, and whose disk hangs with what memory can't hold."""
    server = Server()
    server.open.clear()
    queue = MetricQueue(
        server.send, spill=disk.spill, memory_points=MEMORY, hard_points=hard_points, linger_s=0, retry_s=0.001
    )
    queue.put(points([0]))
    server.wait_for_call()
    queue.put(points(range(1, MEMORY + 2)))
    assert disk.hangs.wait(PATIENCE_S)
    return queue, server


@pytest.fixture(params=["folder", "write"])
def hanging(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HangingDisk:
    return HangingDisk(tmp_path, request.param, monkeypatch)


def test_a_step_that_logs_does_not_wait_for_a_disk_that_hangs(hanging: HangingDisk) -> None:
    queue, server = held_up_by_the_disk(hanging)

    join(in_thread(lambda: [queue.put(points([step])) for step in range(MEMORY + 2, 500)]))

    assert (queue.waiting, queue.dropped) == (500, 0)
    hanging.free.set()
    server.open.set()
    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(500))


def test_what_a_disk_that_hangs_does_not_take_is_bounded_and_the_oldest_go(hanging: HangingDisk) -> None:
    queue, server = held_up_by_the_disk(hanging, hard_points=3 * MEMORY)
    for step in range(MEMORY + 2, 500):
        queue.put(points([step]))

    assert queue._held() == 3 * MEMORY
    assert (queue.waiting, queue.dropped) == (1 + 3 * MEMORY, 499 - 3 * MEMORY)
    hanging.free.set()
    server.open.set()
    assert queue.flush(PATIENCE_S), "what was dropped is not waited for"
    assert len(server.steps) == 1 + 3 * MEMORY
    assert server.steps == sorted(server.steps)
    assert server.steps[-MEMORY:] == list(range(500 - MEMORY, 500)), "the newest say most"
    assert not queue.close(PATIENCE_S)


def test_a_server_that_is_there_again_is_not_kept_waiting_by_a_disk_that_hangs(
    hanging: HangingDisk, tmp_path: Path
) -> None:
    queue, server = held_up_by_the_disk(hanging)
    server.open.set()

    assert queue.flush(PATIENCE_S)
    assert server.steps == list(range(MEMORY + 2))
    hanging.free.set()
    assert queue.close(PATIENCE_S)
    assert hanging.spill.settle() == 0, "what was written in the end nobody needs"


def test_what_a_disk_that_hangs_has_not_taken_at_the_end_is_left(
    hanging: HangingDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queue_module, "DISK_WAIT_S", 0.02)
    queue, server = held_up_by_the_disk(hanging)
    assert not queue.close(0)

    before, behind = queue.left()

    assert [point.step for point in (*before, *behind)] == list(range(MEMORY + 2))
    hanging.free.set()
    assert queue._spilling is not None
    join(queue._spilling)
    assert queue.left() == (before, behind)
    assert hanging.spill.waiting == 0, "what came of the writing does not count as well"
    server.open.set()
