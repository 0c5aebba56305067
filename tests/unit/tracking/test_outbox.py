"""The outbox: the newest of a key, again while the server is away, never when it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from structlog.testing import capture_logs

from heimdall_tracking.errors import TrackingError
from heimdall_tracking.outbox import Outbox
from heimdall_tracking.outstanding import Outstanding
from tests.unit.tracking.fakes import PATIENCE_S, AwayError, RefusedError, in_thread, join

ENDLESS_S = 3600
SOON_S = 0.02


@dataclass(frozen=True)
class Call:
    """A call whose making is the test's."""

    key: str
    made: Callable[[], object]


class Calls(Outbox[Call]):
    """An outbox of calls that a test names."""

    def __init__(self, *, retry_s: float = 0.001) -> None:
        super().__init__(lambda call: call.made(), retry_s=retry_s)

    def add(self, key: str, made: Callable[[], object]) -> None:
        self.put(Call(key, made))


class Desk:
    """Notes what was done; the first call hangs until it is told to go on."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.hanging = threading.Event()
        self.go_on = threading.Event()

    def hang(self) -> None:
        self.hanging.set()
        assert self.go_on.wait(PATIENCE_S)
        self.done.append("hang")

    def note(self, what: str) -> Callable[[], object]:
        return lambda: self.done.append(what)


def busy() -> tuple[Calls, Desk]:
    """An outbox whose thread is held up, so that what is put now waits."""
    outbox, desk = Calls(retry_s=0.001), Desk()
    outbox.add("hang", desk.hang)
    assert desk.hanging.wait(PATIENCE_S)
    return outbox, desk


def test_calls_are_made_in_the_order_of_their_first_put() -> None:
    outbox, desk = busy()
    for what in "abc":
        outbox.add(what, desk.note(what))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "a", "b", "c"]


def test_of_a_key_that_waits_only_the_newest_call_is_made_and_keeps_its_place() -> None:
    outbox, desk = busy()
    outbox.add("progress", desk.note("step 1"))
    outbox.add("other", desk.note("other"))
    outbox.add("progress", desk.note("step 2"))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "step 2", "other"]


def test_a_newer_call_takes_the_place_of_one_that_failed() -> None:
    outbox, done = Calls(retry_s=0.001), []
    failed, go_on = threading.Event(), threading.Event()

    def old() -> None:
        failed.set()
        assert go_on.wait(PATIENCE_S)
        raise AwayError

    outbox.add("progress", old)
    assert failed.wait(PATIENCE_S)
    outbox.add("progress", lambda: done.append("new"))
    go_on.set()

    assert outbox.close(PATIENCE_S)
    assert done == ["new"]


def test_a_call_is_made_again_until_the_server_is_back_before_those_after_it() -> None:
    outbox, desk = busy()
    errors = [AwayError(), ConnectionError(), RefusedError("TEMPORARILY_UNAVAILABLE")]

    def try_again() -> None:
        if errors:
            raise errors.pop()
        desk.done.append("first")

    outbox.add("first", try_again)
    outbox.add("second", desk.note("second"))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "first", "second"]


def test_a_call_that_is_refused_is_left_out_and_holds_nothing_up() -> None:
    outbox, desk = busy()
    calls = []

    def refused(error: Exception) -> Callable[[], object]:
        def call() -> None:
            calls.append(error)
            raise error

        return call

    outbox.add("refused", refused(RefusedError("RESOURCE_DOES_NOT_EXIST")))
    outbox.add("impossible", refused(TrackingError("no such thing")))
    outbox.add("next", desk.note("next"))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "next"]
    assert len(calls) == 2, "each was tried once"


def test_flush_says_false_while_a_call_is_under_way() -> None:
    outbox, desk = busy()

    assert not outbox.flush(SOON_S)

    desk.go_on.set()
    assert outbox.flush(PATIENCE_S)
    assert outbox.close(0)


def test_flush_says_false_while_a_call_waits_to_be_made_again() -> None:
    outbox, tried = Calls(retry_s=ENDLESS_S), threading.Event()

    def away() -> None:
        tried.set()
        raise AwayError

    outbox.add("tag", away)
    assert tried.wait(PATIENCE_S)

    assert not outbox.flush(SOON_S)
    assert not outbox.close(SOON_S)
    join(outbox._thread)
    assert [call.key for call in outbox.left()] == ["tag"]
    assert not outbox.close(0), "closing again does not make it done"


def test_a_call_whose_answer_is_still_out_at_the_end_is_left_too_the_newest_of_each_key() -> None:
    outbox, desk = busy()
    outbox.add("progress", desk.note("step 1"))
    newest = desk.note("step 2")
    outbox.add("progress", newest)

    assert not outbox.close(0)

    assert [call.key for call in outbox.left()] == ["hang", "progress"]
    assert outbox.left()[1].made is newest
    desk.go_on.set()
    join(outbox._thread)


def test_calls_that_are_on_their_way_are_counted_until_they_are_done() -> None:
    outbox, desk = busy()
    outbox.add("progress", desk.note("step 1"))
    outbox.add("progress", desk.note("step 2"))
    assert outbox.outstanding() == Outstanding(calls=2)

    desk.go_on.set()
    assert outbox.close(PATIENCE_S)
    assert outbox.outstanding() == Outstanding(settled=2)


def test_a_secret_in_an_error_does_not_reach_the_log() -> None:
    with capture_logs() as lines:
        outbox, errors = Calls(retry_s=0.001), [AwayError("http://alice:canary@host")]

        def call() -> None:
            if errors:
                raise errors.pop()

        outbox.add("tag", call)
        assert outbox.close(PATIENCE_S)

    assert lines
    assert "canary" not in str(lines)


def test_puts_from_several_threads_are_all_done() -> None:
    outbox, done = Calls(), []
    threads = [
        in_thread(lambda part=part: [outbox.add(f"{part}-{index}", lambda: done.append(1)) for index in range(100)])
        for part in range(4)
    ]
    for thread in threads:
        join(thread)

    assert outbox.close(PATIENCE_S)
    assert len(done) == 400
