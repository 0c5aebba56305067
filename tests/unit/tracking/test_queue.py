"""The metric queue: order, batches, patience, bounds; and what it says of delivery."""

from __future__ import annotations

import threading

import pytest

from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.points import Point
from heimdall_tracking.queue import BATCH, MetricQueue, Send
from tests.unit.tracking.fakes import PATIENCE_S, AwayError, RefusedError, Server, in_thread, join, points

ENDLESS_S = 3600
SOON_S = 0.02


def queue_to(send: Send, *, linger_s: float = 0, memory_points: int = 50_000, retry_s: float = 0.001) -> MetricQueue:
    return MetricQueue(send, linger_s=linger_s, memory_points=memory_points, retry_s=retry_s)


def test_points_arrive_once_in_the_order_they_were_put() -> None:
    server = Server()
    queue = queue_to(server.send)
    for step in range(50):
        queue.put(points([step]))

    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(50))
    assert (queue.waiting, queue.dropped) == (0, 0)


def test_points_of_several_threads_arrive_once_each_threads_own_in_order() -> None:
    server = Server()
    queue = queue_to(server.send)

    def log(name: str) -> None:
        for step in range(200):
            queue.put(points([step], name))

    threads = [in_thread(lambda name=name: log(name)) for name in "abcd"]
    for thread in threads:
        join(thread)

    assert queue.close(PATIENCE_S)
    delivered = [point for batch in server.batches for point in batch]
    for name in "abcd":
        assert [point.step for point in delivered if point.name == name] == list(range(200))


def test_what_waits_goes_in_batches_of_the_size_that_mlflow_takes() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send)
    queue.put(points([0]))
    server.wait_for_call()
    queue.put(points(range(1, 2 * BATCH + 301)))
    server.open.set()

    assert queue.close(PATIENCE_S)
    assert [len(batch) for batch in server.batches] == [1, BATCH, BATCH, 300]
    assert server.steps == list(range(2 * BATCH + 301))


def test_points_are_gathered_until_somebody_waits_for_them() -> None:
    server = Server()
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    for step in range(20):
        queue.put(points([step]))

    assert queue.flush(PATIENCE_S)
    assert [len(batch) for batch in server.batches] == [20]
    queue.close(0)


def test_a_full_batch_waits_for_nobody() -> None:
    server = Server()
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    queue.put(points(range(BATCH)))

    server.wait_for_call()
    queue.close(PATIENCE_S)
    assert [len(batch) for batch in server.batches] == [BATCH]


def test_points_that_are_waited_with_go_when_the_batch_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    server, waits_with_it = Server(), threading.Event()
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    in_a_hurry = queue._in_a_hurry

    def look() -> bool:
        waits_with_it.set()  # what is put from here on finds the thread waiting: it looks with the lock held
        return in_a_hurry()

    monkeypatch.setattr(queue, "_in_a_hurry", look)
    queue.put(points([0]))
    assert waits_with_it.wait(PATIENCE_S)
    queue.put(points(range(1, BATCH)))

    server.wait_for_call()
    queue.close(PATIENCE_S)
    assert [len(batch) for batch in server.batches] == [BATCH]


def test_put_returns_while_the_server_hangs() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send)
    queue.put(points([0]))
    server.wait_for_call()

    queue.put(points(range(1, 100)))

    assert queue.waiting == 100
    server.open.set()
    assert queue.close(PATIENCE_S)


def test_a_server_that_comes_back_gets_everything_once() -> None:
    server = Server(errors=[AwayError(), ConnectionError(), RefusedError("TEMPORARILY_UNAVAILABLE"), OSError()])
    queue = queue_to(server.send)
    queue.put(points(range(10)))

    assert queue.close(PATIENCE_S)
    assert server.steps == list(range(10))
    assert server.calls == 5
    assert queue.dropped == 0


def test_a_refused_point_does_not_take_its_batch_along() -> None:
    server = Server(refuses="bad")
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    queue.put([*points(range(40)), Point("bad", 1, 40, 0), *points(range(41, 70)), Point("bad", 1, 70, 0)])

    assert queue.flush(PATIENCE_S)
    assert server.steps == [*range(40), *range(41, 70)]
    assert queue.dropped == 2
    assert not queue.close(PATIENCE_S), "something was not delivered"


@pytest.mark.parametrize(
    "error",
    [
        RefusedError("RESOURCE_DOES_NOT_EXIST"),
        RefusedError("INVALID_STATE"),
        RefusedError("INVALID_PARAMETER_VALUE", "The run 1 must be in the 'active' state. Current state is deleted."),
    ],
    ids=str,
)
def test_a_run_that_is_gone_is_not_asked_point_by_point(error: Exception) -> None:
    server = Server(errors=[error])
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    queue.put(points(range(100)))

    assert queue.flush(PATIENCE_S)
    assert server.calls == 1
    assert queue.dropped == 100
    queue.close(0)


def test_the_thread_outlives_refusals_and_goes_on_with_what_comes_next() -> None:
    server = Server(errors=[RefusedError("INVALID_STATE")])
    queue = queue_to(server.send)
    queue.put(points([0]))
    assert queue.flush(PATIENCE_S)
    queue.put(points([1]))

    assert queue.flush(PATIENCE_S)
    assert server.steps == [1]
    queue.close(0)


def test_without_a_disk_the_oldest_are_dropped_and_counted() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send, memory_points=10)
    queue.put(points([0]))
    server.wait_for_call()
    for step in range(1, 31):
        queue.put(points([step]))

    assert queue.dropped == 20
    assert queue.waiting == 11
    server.open.set()
    assert queue.flush(PATIENCE_S), "what was dropped is not waited for"
    assert server.steps == [0, *range(21, 31)]
    assert not queue.close(PATIENCE_S)


def test_flush_says_false_when_the_server_stays_away() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send)
    queue.put(points([0]))

    assert not queue.flush(SOON_S)
    assert queue.waiting == 1
    assert queue.outstanding() == Outstanding(calls=1)
    server.open.set()
    assert queue.close(PATIENCE_S)
    assert queue.outstanding() == Outstanding(settled=1)


def test_flush_of_an_empty_queue_is_done_at_once() -> None:
    queue = queue_to(Server().send)

    assert queue.flush(0)
    assert queue.close(0)


def test_flush_does_not_wait_for_what_is_put_after_it() -> None:
    delivered: list[int] = []

    def send_and_put_another(batch: list[Point]) -> None:
        delivered.extend(point.step for point in batch)
        queue.put(points([batch[-1].step + 1]))

    queue = queue_to(send_and_put_another)  # type: ignore[arg-type]
    queue.put(points([0]))

    assert queue.flush(PATIENCE_S)
    queue.close(0)
    join(queue._thread)
    assert delivered == list(range(len(delivered)))


def test_several_may_wait_at_once() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send, linger_s=ENDLESS_S)
    queue.put(points([0]))
    answers: list[bool] = []
    threads = [in_thread(lambda: answers.append(queue.flush(PATIENCE_S))) for _ in range(3)]
    server.wait_for_call()
    server.open.set()
    for thread in threads:
        join(thread)

    assert answers == [True, True, True]
    queue.close(0)


def test_close_ends_the_thread_and_says_what_is_left() -> None:
    away = threading.Event()

    def send(batch: object) -> None:
        away.set()
        raise AwayError

    queue = queue_to(send, retry_s=ENDLESS_S)
    queue.put(points(range(3)))
    assert away.wait(PATIENCE_S)

    assert not queue.close(SOON_S)
    join(queue._thread)
    assert (queue.dropped, queue.waiting) == (0, 3)
    assert queue.left() == (points(range(3)), [])
    assert not queue.close(0), "closing again does not make it delivered"


def test_a_batch_whose_answer_is_still_out_at_the_end_is_left_too() -> None:
    server = Server()
    server.open.clear()
    queue = queue_to(server.send)
    queue.put(points([0]))
    server.wait_for_call()
    queue.put(points([1, 2]))

    assert not queue.close(0)

    assert queue.left() == (points([0, 1, 2]), [])
    server.open.set()
    join(queue._thread)


def test_points_put_after_close_are_counted_and_raise_nothing() -> None:
    server = Server()
    queue = queue_to(server.send)
    assert queue.close(0)

    queue.put(points([1, 2]))

    assert queue.dropped == 2
    assert server.steps == []
    assert queue.flush(0)
