"""The outbox: the newest of a key, again while the server is away, never when it refuses."""

from __future__ import annotations

import threading
from collections.abc import Callable

from structlog.testing import capture_logs

from heimdall_tracking.errors import TrackingError
from heimdall_tracking.outbox import Outbox
from tests.unit.tracking.fakes import PATIENCE_S, AwayError, RefusedError, in_thread, join

ENDLESS_S = 3600
SOON_S = 0.02


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


def busy() -> tuple[Outbox, Desk]:
    """An outbox whose thread is held up, so that what is put now waits."""
    outbox, desk = Outbox(retry_s=0.001), Desk()
    outbox.put("hang", desk.hang)
    assert desk.hanging.wait(PATIENCE_S)
    return outbox, desk


def test_calls_are_made_in_the_order_of_their_first_put() -> None:
    outbox, desk = busy()
    for what in "abc":
        outbox.put(what, desk.note(what))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "a", "b", "c"]


def test_of_a_key_that_waits_only_the_newest_call_is_made_and_keeps_its_place() -> None:
    outbox, desk = busy()
    outbox.put("progress", desk.note("step 1"))
    outbox.put("other", desk.note("other"))
    outbox.put("progress", desk.note("step 2"))
    desk.go_on.set()

    assert outbox.close(PATIENCE_S)
    assert desk.done == ["hang", "step 2", "other"]


def test_a_newer_call_takes_the_place_of_one_that_failed() -> None:
    outbox, done = Outbox(retry_s=0.001), []
    failed, go_on = threading.Event(), threading.Event()

    def old() -> None:
        failed.set()
        assert go_on.wait(PATIENCE_S)
        raise AwayError

    outbox.put("progress", old)
    assert failed.wait(PATIENCE_S)
    outbox.put("progress", lambda: done.append("new"))
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

    outbox.put("first", try_again)
    outbox.put("second", desk.note("second"))
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

    outbox.put("refused", refused(RefusedError("RESOURCE_DOES_NOT_EXIST")))
    outbox.put("impossible", refused(TrackingError("no such thing")))
    outbox.put("next", desk.note("next"))
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
    outbox, tried = Outbox(retry_s=ENDLESS_S), threading.Event()

    def away() -> None:
        tried.set()
        raise AwayError

    outbox.put("tag", away)
    assert tried.wait(PATIENCE_S)

    assert not outbox.flush(SOON_S)
    assert not outbox.close(SOON_S)
    join(outbox._thread)
    assert not outbox.close(0), "closing again does not make it done"


def test_a_secret_in_an_error_does_not_reach_the_log() -> None:
    with capture_logs() as lines:
        outbox, errors = Outbox(retry_s=0.001), [AwayError("http://alice:canary@host")]

        def call() -> None:
            if errors:
                raise errors.pop()

        outbox.put("tag", call)
        assert outbox.close(PATIENCE_S)

    assert lines
    assert "canary" not in str(lines)


def test_puts_from_several_threads_are_all_done() -> None:
    outbox, done = Outbox(), []
    threads = [
        in_thread(lambda part=part: [outbox.put(f"{part}-{index}", lambda: done.append(1)) for index in range(100)])
        for part in range(4)
    ]
    for thread in threads:
        join(thread)

    assert outbox.close(PATIENCE_S)
    assert len(done) == 400
