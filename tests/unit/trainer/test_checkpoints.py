"""Which checkpoints stay, and how they are published."""

from __future__ import annotations

import errno
import hashlib
import shutil
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from heimdall_api.contract import TAG_ATTEMPT, TAG_CHECKPOINTS, Checkpoint, format_checkpoints, parse_checkpoints
from heimdall_api.types import TrainingSpec
from heimdall_tracking import MLflowTracker, load_settings
from heimdall_tracking.checkpoints import Mode, retained
from heimdall_tracking.errors import REFUSED_RETRY_S, OvertakenError
from heimdall_tracking.outstanding import Outstanding
from heimdall_trainer import checkpoints
from heimdall_trainer.callbacks import Checkpointing
from heimdall_trainer.checkpoint_io import Snapshot
from heimdall_trainer.checkpoints import CheckpointPublisher
from heimdall_trainer.errors import FencedError
from heimdall_trainer.grace import Grace
from heimdall_trainer.termination import TerminatedError

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
TIMEOUT_S = 60


def listed(step: int, metric: float | None) -> Checkpoint:
    return Checkpoint(
        step=step, path=f"checkpoints/{step}", sha256="", size=1, time=datetime(2026, 1, 1, tzinfo=UTC), metric=metric
    )


METRICS = st.lists(st.none() | st.floats(-10, 10), min_size=1, max_size=12)


@settings(deadline=None)
@given(metrics=METRICS, keep=st.integers(1, 5), mode=st.sampled_from(["min", "max"]))
def test_the_newest_and_the_best_stay_and_nothing_else(
    metrics: list[float | None], keep: int, mode: Literal["min", "max"]
) -> None:
    every = [listed(step, metric) for step, metric in enumerate(metrics)]
    stay, go = retained(every, keep=keep, mode=mode)
    assert sorted(item.step for item in [*stay, *go]) == [item.step for item in every]
    assert [item.step for item in stay] == sorted(item.step for item in stay)
    assert stay[-1].step == every[-1].step
    assert [item.last for item in stay] == [False] * (len(stay) - 1) + [True]
    known = sorted((item for item in every if item.metric is not None), key=lambda item: item.metric or 0.0)
    best = known[:keep] if mode == "min" else known[::-1][:keep]
    assert [item.metric for item in best] == sorted(
        [item.metric for item in stay if item.metric is not None], reverse=mode == "max"
    )[: len(best)]
    assert len(stay) <= keep + 1
    assert all(item.metric is not None for item in stay[:-1])


@settings(deadline=None)
@given(metrics=METRICS, keep=st.integers(1, 5))
def test_one_after_another_is_the_same_as_all_at_once(metrics: list[float | None], keep: int) -> None:
    every = [listed(step, metric) for step, metric in enumerate(metrics)]
    stay: list[Checkpoint] = []
    for item in every:
        stay, _ = retained([*stay, item], keep=keep, mode="min")
    assert stay == retained(every, keep=keep, mode="min")[0]


class FakeTracker:
    """A run that remembers what was done to it, in which order; it is its own client."""

    def __init__(self, tags: dict[str, str] | None = None) -> None:
        self.client = self
        self.run_id = "run"
        self.tracking_uri = "sqlite://"
        self.tags = dict(tags or {})
        self.done: list[str] = []
        self.before_upload: Callable[[str], None] = lambda name: None
        self.metrics_delivered: Callable[[], bool] = lambda: True
        self.overtaken: OvertakenError | None = None

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(
            data=SimpleNamespace(tags=dict(self.tags)),
            info=SimpleNamespace(artifact_uri="file:///nowhere", lifecycle_stage="active"),
        )

    def log_artifact(self, run_id: str, file: str, folder: str) -> None:
        name = Path(file).name
        self.before_upload(name)
        self.done.append(f"uploaded {name}")

    def flush_metrics(self, timeout_s: float) -> bool:
        delivered = self.metrics_delivered()
        self.done.append("metrics delivered" if delivered else "metrics wait")
        return delivered

    def set_tag(self, run_id: str, name: str, value: str, synchronous: bool | None = None) -> None:
        self.tags[name] = value
        self.done.append(f"named {parse_checkpoints(value)[-1].path}")


Publish = Callable[..., CheckpointPublisher]


@pytest.fixture
def publish() -> Iterator[Publish]:
    """Makes publishers, which are closed at the end."""
    made: list[CheckpointPublisher] = []

    def make(
        tracker: Any, *, attempt: int = 1, keep: int = 3, mode: Mode = "min", fenced: bool = True
    ) -> CheckpointPublisher:
        made.append(CheckpointPublisher(tracker, attempt=attempt, keep=keep, mode=mode, fenced=fenced))
        return made[-1]

    yield make
    for publisher in made:
        publisher.close()


def checkpoint_file(folder: Path, name: str) -> Path:
    file = folder / name
    file.write_bytes(name.encode() * 100)
    return file


def submit(publisher: CheckpointPublisher, folder: Path, step: int, metric: float | None = None) -> None:
    publisher.submit(checkpoint_file(folder, f"step-{step}.ckpt"), step=step, epoch=0, metric=metric)


def test_a_checkpoint_is_named_only_after_its_bytes_and_metrics_are_there(publish: Publish, tmp_path: Path) -> None:
    tracker = FakeTracker()
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1, metric=0.5)
    assert publisher.flush(TIMEOUT_S)
    assert tracker.done == ["uploaded step-1.ckpt", "metrics delivered", "named checkpoints/step-1.ckpt"]
    (named,) = parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])
    content = (tmp_path / "step-1.ckpt").read_bytes()
    assert (named.step, named.metric, named.last) == (1, 0.5, True)
    assert (named.size, named.sha256) == (len(content), hashlib.sha256(content).hexdigest())


def test_a_checkpoint_waits_for_its_metrics_and_is_uploaded_once(publish: Publish, tmp_path: Path) -> None:
    tracker, answers = FakeTracker(), iter([False, False, True])
    tracker.metrics_delivered = lambda: next(answers)
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1)
    assert publisher.flush(TIMEOUT_S)
    waits = ["metrics wait", "metrics wait", "metrics delivered"]
    assert tracker.done == ["uploaded step-1.ckpt", *waits, "named checkpoints/step-1.ckpt"]


def test_a_checkpoint_whose_metrics_were_not_delivered_is_never_named(publish: Publish, tmp_path: Path) -> None:
    tracker, waits, closed = FakeTracker(), threading.Event(), threading.Event()

    def delivered() -> bool:
        waits.set()
        closed.wait(TIMEOUT_S)
        return False

    tracker.metrics_delivered = delivered
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1)
    assert waits.wait(TIMEOUT_S)
    left = publisher.close()
    closed.set()
    publisher._thread.join(TIMEOUT_S)
    assert [item.checkpoint.step for item in left] == [1]
    assert TAG_CHECKPOINTS not in tracker.tags


def test_what_was_handed_back_is_not_named_behind_it(publish: Publish, tmp_path: Path) -> None:
    tracker, uploading, closed = FakeTracker(), threading.Event(), threading.Event()

    def upload(name: str) -> None:
        uploading.set()
        closed.wait(TIMEOUT_S)

    tracker.before_upload = upload
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1)
    assert uploading.wait(TIMEOUT_S)
    assert len(publisher.close()) == 1
    closed.set()
    publisher._thread.join(TIMEOUT_S)
    assert TAG_CHECKPOINTS not in tracker.tags


def test_an_upload_that_fails_names_nothing_and_is_tried_again(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "RETRY_S", 0.0)
    tracker, failures = FakeTracker(), iter([True, True])

    def fail_twice(name: str) -> None:
        assert TAG_CHECKPOINTS not in tracker.tags
        if next(failures, False):
            raise ConnectionError("the server is away")

    tracker.before_upload = fail_twice
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1)
    assert publisher.flush(TIMEOUT_S)
    assert [item.step for item in parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])] == [1]


def refused(status: int) -> Exception:
    error = RuntimeError(f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


def test_checkpoints_that_no_proxy_lets_through_are_tried_once_told_once_and_left(
    publish: Publish, tmp_path: Path
) -> None:
    tracker, tried = FakeTracker(), list[str]()

    def too_large(name: str) -> None:
        tried.append(name)
        raise refused(413)

    tracker.before_upload = too_large
    publisher = publish(tracker, keep=1)
    with capture_logs() as lines:
        for step in (1, 2, 3):
            submit(publisher, tmp_path, step, metric=float(step))
            assert publisher.settle(TIMEOUT_S), "nothing is waited for that can't come"
            assert not publisher.flush(0)
    assert tried == ["step-1.ckpt", "step-2.ckpt", "step-3.ckpt"]
    (told,) = [line for line in lines if line["log_level"] == "error"]
    assert told["fate"] == "is kept, to be delivered later"
    assert "413 Client Error; raise the largest body" in told["error"]
    assert publisher.refusal is not None
    assert [item.checkpoint.step for item in publisher.close()] == [1, 3], "the best and the newest"
    assert not (tmp_path / "step-2.ckpt").exists()


def test_when_one_is_let_through_those_before_it_are_tried_again_and_come_before_it(
    publish: Publish, tmp_path: Path
) -> None:
    tracker, errors = FakeTracker(), [refused(413)]

    def too_large_at_first(name: str) -> None:
        if errors:
            raise errors.pop()

    tracker.before_upload = too_large_at_first
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1, metric=0.1)
    assert not publisher.flush(TIMEOUT_S)
    submit(publisher, tmp_path, 2, metric=0.2)
    assert publisher.flush(TIMEOUT_S)
    named = parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])
    assert [(item.step, item.last) for item in named] == [(1, False), (2, True)]
    assert publisher.refusal is None
    assert publisher.close() == []


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused_is_told_once_and_tried_slowly_until_that_is_mended(
    status: int, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, errors, waits = FakeTracker(), 3 * [refused(status)], list[float]()

    def not_allowed_at_first(name: str) -> None:
        if errors:
            raise errors.pop()

    tracker.before_upload = not_allowed_at_first
    publisher = publish(tracker)
    wait_for = publisher._changed.wait_for

    def no_long_wait(predicate: Callable[[], Any], timeout_s: float | None = None) -> Any:
        if timeout_s is not None and threading.current_thread() is publisher._thread:
            waits.append(timeout_s)
            return predicate()
        return wait_for(predicate, timeout_s)

    monkeypatch.setattr(publisher._changed, "wait_for", no_long_wait)
    with capture_logs() as lines:
        submit(publisher, tmp_path, 1)
        assert publisher.flush(TIMEOUT_S)
    assert waits == 3 * [REFUSED_RETRY_S]
    (told,) = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert told["fate"] == "is tried again every 60 s"


def test_a_file_that_somebody_removed_holds_no_other_up(publish: Publish, tmp_path: Path) -> None:
    tracker = FakeTracker()

    def removed_meanwhile(name: str) -> None:
        if name == "step-1.ckpt":
            (tmp_path / name).unlink()
            raise FileNotFoundError(name)

    tracker.before_upload = removed_meanwhile
    publisher = publish(tracker)
    for step in (1, 2):
        submit(publisher, tmp_path, step)
    assert publisher.flush(TIMEOUT_S)
    assert [item.step for item in parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])] == [2]


def held_up(tracker: FakeTracker) -> tuple[threading.Event, threading.Event]:
    """Whether an upload has begun, and what it waits for before it goes on."""
    held, go_on = threading.Event(), threading.Event()

    def hold(name: str) -> None:
        held.set()
        assert go_on.wait(TIMEOUT_S)

    tracker.before_upload = hold
    return held, go_on


@pytest.mark.parametrize(
    ("keep", "metrics", "stay"),
    [
        (1, (1.0, 2.0, 3.0, 4.0), {0, 3}),
        (1, (4.0, 3.0, 2.0, 1.0), {2, 3}),
        (1, (2.0, None, 3.0, None), {0, 3}),
        (1, (None, None, None), {1, 2}),
        (3, (3.0, 1.0, None, 2.0, 9.0, 4.0, 5.0), {0, 1, 3, 6}),
    ],
)
def test_of_checkpoints_that_wait_the_newest_and_the_best_stay(
    publish: Publish, tmp_path: Path, keep: int, metrics: tuple[float | None, ...], stay: set[int]
) -> None:
    """Uploads that take longer than an epoch."""
    tracker = FakeTracker()
    held, go_on = held_up(tracker)
    publisher = publish(tracker, keep=keep)
    publisher.submit(checkpoint_file(tmp_path, "first"), step=0, epoch=0, metric=None)
    assert held.wait(TIMEOUT_S)
    for step, metric in enumerate(metrics):
        publisher.submit(checkpoint_file(tmp_path, f"waits-{step}"), step=step + 1, epoch=0, metric=metric)
    go_on.set()
    assert publisher.flush(TIMEOUT_S)

    uploaded = {item for item in tracker.done if item.startswith("uploaded waits")}
    assert uploaded == {f"uploaded waits-{step}" for step in stay}


def test_handing_over_never_waits_and_of_many_the_newest_are_published(publish: Publish, tmp_path: Path) -> None:
    tracker = FakeTracker()
    held, go_on = held_up(tracker)
    publisher = publish(tracker, keep=1)
    submit(publisher, tmp_path, 1)
    assert held.wait(TIMEOUT_S)
    for step in (2, 3, 4):
        submit(publisher, tmp_path, step)
    assert not publisher.flush(0)
    size = len(b"step-1.ckpt") * 100
    assert publisher.outstanding() == Outstanding(size=3 * size, tries=1, under_way=size)
    go_on.set()
    assert publisher.flush(TIMEOUT_S)
    assert publisher.outstanding() == Outstanding(settled=3, tries=3)
    assert [line for line in tracker.done if line.startswith("uploaded")] == [
        f"uploaded step-{step}.ckpt" for step in (1, 3, 4)
    ]
    assert not (tmp_path / "step-2.ckpt").exists()


def test_what_could_not_be_published_is_handed_over_at_the_end(publish: Publish, tmp_path: Path) -> None:
    tracker, tried = FakeTracker(), threading.Event()

    def away(name: str) -> None:
        tried.set()
        raise ConnectionError("the server is away")

    tracker.before_upload = away
    publisher = publish(tracker, keep=2)
    submit(publisher, tmp_path, 1)
    assert tried.wait(TIMEOUT_S)
    submit(publisher, tmp_path, 2, metric=0.5)
    left = publisher.close()
    assert [(item.file.name, item.checkpoint.step, item.keep, item.mode) for item in left] == [
        ("step-1.ckpt", 1, 2, "min"),
        ("step-2.ckpt", 2, 2, "min"),
    ]
    assert publisher.close() == []


def test_what_was_overtaken_is_not_handed_over(publish: Publish, tmp_path: Path) -> None:
    publisher = publish(FakeTracker({TAG_ATTEMPT: "2"}), attempt=1)
    submit(publisher, tmp_path, 1)
    assert not publisher.flush(TIMEOUT_S)
    assert publisher.close() == []


def test_a_training_whose_metrics_are_not_wanted_any_more_stops(publish: Publish) -> None:
    tracker = FakeTracker()
    publisher = publish(tracker)
    publisher.raise_if_fenced()

    tracker.overtaken = OvertakenError("attempt 2 has taken over")

    with pytest.raises(FencedError, match="attempt 2 has taken over"):
        publisher.raise_if_fenced()
    assert not publisher.flush(0)


def test_a_metric_that_is_no_number_counts_as_none(publish: Publish, tmp_path: Path) -> None:
    publisher = publish(FakeTracker())
    submit(publisher, tmp_path, 1, metric=0.5)
    submit(publisher, tmp_path, 2, metric=float("nan"))
    assert publisher.flush(TIMEOUT_S)
    assert [item.metric for item in publisher.listed] == [0.5, None]
    best = publisher.best(tmp_path)
    assert best is not None
    assert best.step == 1


def test_a_newer_attempt_stops_an_older_one_from_publishing(publish: Publish, tmp_path: Path) -> None:
    tracker = FakeTracker({TAG_ATTEMPT: "2"})
    publisher = publish(tracker, attempt=1)
    submit(publisher, tmp_path, 1)
    assert not publisher.flush(TIMEOUT_S)
    assert isinstance(publisher.fence, FencedError)
    assert "attempt 2 has taken over" in str(publisher.fence)
    assert tracker.done == []


def test_an_attempt_that_is_overtaken_during_its_upload_names_nothing(publish: Publish, tmp_path: Path) -> None:
    tracker = FakeTracker({TAG_ATTEMPT: "1"})
    tracker.before_upload = lambda name: tracker.tags.update({TAG_ATTEMPT: "2"})
    publisher = publish(tracker, attempt=1)
    submit(publisher, tmp_path, 1)
    assert not publisher.flush(TIMEOUT_S)
    assert publisher.fence is not None
    assert TAG_CHECKPOINTS not in tracker.tags


@pytest.mark.parametrize(("attempt", "fenced"), [(2, True), (3, True), (1, False)])
def test_the_newest_attempt_and_one_without_an_operator_publish(
    attempt: int, fenced: bool, publish: Publish, tmp_path: Path
) -> None:
    publisher = publish(FakeTracker({TAG_ATTEMPT: "2"}), attempt=attempt, fenced=fenced)
    publisher.check_fence()
    submit(publisher, tmp_path, 1)
    assert publisher.flush(TIMEOUT_S)


# --- what is written behind training -----------------------------------------------------------------------------


class Disk:
    """Writes when it is allowed to, or fails; tells what it has done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failure: Exception | None = None) -> None:
        self.busy, self.free = threading.Event(), threading.Event()
        self.failure = failure
        self.whole: list[str] = []
        monkeypatch.setattr(Snapshot, "write", lambda _, file: self.write(file))

    def write(self, file: Path) -> None:
        self.busy.set()
        assert self.free.wait(TIMEOUT_S)
        if self.failure is not None:
            raise self.failure
        checkpoint_file(file.parent, file.name)
        self.whole.append(file.name)


FULL = OSError(errno.ENOSPC, "No space left on device", "/out/step-1.ckpt")


def submit_later(publisher: CheckpointPublisher, folder: Path, step: int) -> None:
    publisher.submit(folder / f"step-{step}.ckpt", step=step, epoch=0, metric=None, snapshot=Snapshot({}))


def test_a_checkpoint_is_handed_over_before_it_is_written_and_delivered_when_it_is_named(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, tracker = Disk(monkeypatch), FakeTracker()
    publisher = publish(tracker)
    submit_later(publisher, tmp_path, 1)
    assert disk.busy.wait(TIMEOUT_S)
    assert not publisher.flush(0)
    disk.free.set()
    assert publisher.flush(TIMEOUT_S)
    assert tracker.done == ["uploaded step-1.ckpt", "metrics delivered", "named checkpoints/step-1.ckpt"]
    (named,) = parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])
    assert named.size == (tmp_path / "step-1.ckpt").stat().st_size


def test_one_that_waits_for_the_server_keeps_no_other_from_the_disk(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, tracker = Disk(monkeypatch), FakeTracker()
    disk.free.set()
    held, go_on = held_up(tracker)
    publisher = publish(tracker)
    for step in (1, 2, 3):
        submit_later(publisher, tmp_path, step)
        assert publisher.written(TIMEOUT_S)
        assert held.wait(TIMEOUT_S)
    assert disk.whole == [f"step-{step}.ckpt" for step in (1, 2, 3)]
    go_on.set()
    assert publisher.flush(TIMEOUT_S)


class Training:
    """As much of Lightning's trainer as a checkpoint is made of."""

    global_step, current_epoch, is_global_zero, is_last_batch = 1, 0, True, False
    progress = SimpleNamespace(total=SimpleNamespace(processed=1))
    fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))

    def __init__(self, on_save: Callable[[], None] = lambda: None) -> None:
        self.strategy = SimpleNamespace(checkpoint_io=SimpleNamespace())
        self.on_save = on_save
        self._logger_connector = SimpleNamespace(update_train_step_metrics=lambda: None)

    def save_checkpoint(self, file: Path) -> None:
        self.on_save()
        self.strategy.checkpoint_io.taken = Snapshot({})


def test_no_second_copy_of_the_state_is_made_while_the_first_is_being_written(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch)
    publisher = publish(FakeTracker())
    checkpointing = Checkpointing(publisher, TrainingSpec(), tmp_path, 1, Grace())
    wait = publisher.wait_for_file

    def waits() -> None:
        disk.free.set()
        wait()

    checkpointing._save(Training(), metric=None)
    assert disk.busy.wait(TIMEOUT_S)
    monkeypatch.setattr(publisher, "wait_for_file", waits)
    on_disk: list[int] = []
    checkpointing._save(Training(lambda: on_disk.append(len(disk.whole))), metric=None, suffix="-end")
    assert on_disk == [1]
    assert publisher.flush(TIMEOUT_S)


def test_a_disk_that_takes_no_checkpoint_ends_training_at_the_next_step(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(monkeypatch, FULL)
    publisher = publish(FakeTracker())
    checkpointing = Checkpointing(publisher, TrainingSpec(), tmp_path, 1, Grace())
    checkpointing._save(Training(), metric=None)
    checkpointing.on_train_batch_end(Training(), None, None, None, 0)
    disk.free.set()
    assert publisher.written(TIMEOUT_S)
    for goes_on in (
        lambda: checkpointing.on_train_batch_end(Training(), None, None, None, 1),
        lambda: checkpointing._save(Training(), metric=None),
    ):
        with pytest.raises(OSError) as caught:
            goes_on()
        assert caught.value is FULL
    assert publisher.close() == []


@pytest.mark.parametrize("failure", [None, FULL], ids=["written", "full"])
def test_who_is_told_to_end_waits_for_the_file_and_its_delivery(
    failure: OSError | None, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk, tracker, grace = Disk(monkeypatch, failure), FakeTracker(), Grace()
    publisher = publish(tracker)
    checkpointing = Checkpointing(publisher, TrainingSpec(), tmp_path, 1, grace)
    flush = publisher.flush

    def flushed(timeout_s: float) -> bool:
        disk.free.set()
        return flush(timeout_s)

    monkeypatch.setattr(publisher, "flush", flushed)
    grace.begin()
    with pytest.raises((TerminatedError, OSError)) as caught:
        checkpointing.on_train_batch_end(Training(), None, None, None, 0)
    if failure is not None:
        assert caught.value is failure
    else:
        assert "its checkpoint was delivered" in str(caught.value)
        assert [item.step for item in parse_checkpoints(tracker.tags[TAG_CHECKPOINTS])] == [1]


def test_only_what_is_whole_on_disk_is_handed_over_at_the_end(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "JOIN_S", 0.0)
    disk, tracker = Disk(monkeypatch), FakeTracker()
    held, go_on = held_up(tracker)
    publisher = publish(tracker)
    submit(publisher, tmp_path, 1)
    assert held.wait(TIMEOUT_S)
    submit_later(publisher, tmp_path, 2)
    assert [item.checkpoint.step for item in publisher.close()] == [1]
    disk.free.set()
    assert publisher.written(TIMEOUT_S)
    go_on.set()


def test_what_is_still_being_written_at_the_end_is_handed_over_when_it_is_whole(
    publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "JOIN_S", TIMEOUT_S)
    disk, tracker = Disk(monkeypatch), FakeTracker()
    publisher = publish(tracker)
    submit_later(publisher, tmp_path, 1)
    written = publisher.written

    def waited_for(timeout_s: float | None = None) -> bool:
        disk.free.set()
        return written(timeout_s)

    monkeypatch.setattr(publisher, "written", waited_for)
    (left,) = publisher.close()
    assert (left.file.name, left.checkpoint.step) == ("step-1.ckpt", 1)
    assert left.checkpoint.size == left.file.stat().st_size


# --- against a real MLflow ---------------------------------------------------------------------------------------


@pytest.fixture
def tracker(mlflow_uri: str) -> Iterator[MLflowTracker]:
    tracker = MLflowTracker(load_settings(tracking_uri=mlflow_uri))
    tracker.start_run()
    yield tracker
    tracker.close(0)


def artifacts(tracker: MLflowTracker) -> list[str]:
    return sorted(item.path for item in tracker.client.list_artifacts(tracker.run_id, "checkpoints"))


def named(tracker: MLflowTracker) -> list[str]:
    tag = tracker.client.get_run(tracker.run_id).data.tags[TAG_CHECKPOINTS]
    return [item.path for item in parse_checkpoints(tag)]


def test_what_is_no_longer_named_is_removed(tracker: MLflowTracker, publish: Publish, tmp_path: Path) -> None:
    publisher = publish(tracker, keep=1)
    for step, metric in ((1, 0.9), (2, 0.5), (3, 0.7), (4, 0.8)):
        submit(publisher, tmp_path, step, metric)
        assert publisher.flush(TIMEOUT_S)
    assert named(tracker) == ["checkpoints/step-2.ckpt", "checkpoints/step-4.ckpt"]
    assert artifacts(tracker) == named(tracker)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["step-2.ckpt", "step-4.ckpt"]


def test_the_next_attempt_goes_on_from_the_last_one_and_keeps_the_best(
    tracker: MLflowTracker, publish: Publish, tmp_path: Path
) -> None:
    first = publish(tracker, keep=1)
    for step, metric in ((1, 0.5), (2, 0.9)):
        submit(first, tmp_path, step, metric)
        assert first.flush(TIMEOUT_S)
    second = publish(tracker, attempt=2, keep=1)
    file = second.newest_file(tmp_path / "resumed")
    assert file is not None
    assert file.read_bytes() == b"step-2.ckpt" * 100
    submit(second, tmp_path, 3, 0.8)
    assert second.flush(TIMEOUT_S)
    assert named(tracker) == ["checkpoints/step-1.ckpt", "checkpoints/step-3.ckpt"]


@pytest.mark.parametrize("fate", ["gone", "half of it"])
def test_a_checkpoint_that_is_not_what_was_uploaded_is_left_out_for_an_older_one(
    fate: str, tracker: MLflowTracker, publish: Publish, tmp_path: Path
) -> None:
    first = publish(tracker)
    for step in (1, 2):
        submit(first, tmp_path, step, metric=float(step))
        assert first.flush(TIMEOUT_S)
    where = tracker.client.get_run(tracker.run_id).info.artifact_uri.removeprefix("file://")
    newest = Path(where) / "checkpoints/step-2.ckpt"
    newest.unlink() if fate == "gone" else newest.write_text(fate)
    file = publish(tracker, attempt=2).newest_file(tmp_path / "resumed")
    assert file is not None
    assert file.read_bytes() == b"step-1.ckpt" * 100
    best = publish(tracker, attempt=2, mode="max").best(tmp_path / "resumed")
    assert best is not None
    assert best.step == 1
    shutil.rmtree(where)


def test_a_store_that_is_ill_has_lost_no_checkpoint(
    tracker: MLflowTracker, publish: Publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = publish(tracker)
    submit(first, tmp_path, 1)
    assert first.flush(TIMEOUT_S)

    def ill(*_: object) -> str:
        raise ConnectionError("the store does not answer")

    monkeypatch.setattr(tracker.client, "download_artifacts", ill)
    with pytest.raises(ConnectionError, match="does not answer"):
        publish(tracker, attempt=2).newest_file(tmp_path / "resumed")


def test_without_checkpoints_there_is_nothing_to_go_on_from(
    tracker: MLflowTracker, publish: Publish, tmp_path: Path
) -> None:
    publisher = publish(tracker)
    assert publisher.newest_file(tmp_path) is None
    assert publisher.best(tmp_path) is None


def test_a_list_of_checkpoints_comes_back_from_its_tag() -> None:
    every = [listed(1, 0.5), listed(2, None)]
    assert parse_checkpoints(format_checkpoints(every)) == every
