"""How long a training's end takes, added up with a clock of the test's own; and what a fenced one leaves behind."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import heimdall_tracking
from heimdall_api.contract import ENV_GRACE_PERIOD
from heimdall_api.types import RegistrationSpec
from heimdall_tracking import registry, runs
from heimdall_tracking.errors import AwayError
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.registry import ModelMissingError
from heimdall_trainer import callbacks, checkpoints, grace, group, patience, pipeline
from heimdall_trainer.commands import training as training_command
from heimdall_trainer.config import parse
from heimdall_trainer.errors import ConfigurationError, FencedError, UndeliveredError
from heimdall_trainer.pipeline import TrainingPipeline
from heimdall_trainer.termination import TerminatedError


class Clock:
    """Time that passes where something waits."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def wait(self, timeout_s: float) -> bool:
        """In vain, for as long as one may."""
        self.now += timeout_s
        return False


class Run:
    """A run, and its own client, whose server stays away: every wait takes all of its time."""

    run_id = "run"
    undelivered = refusal = None
    outstanding = Outstanding

    def __init__(self, clock: Clock) -> None:
        self.client, self.clock = self, clock
        self.done: list[str] = []

    def get_run(self, run_id: str) -> Any:
        return SimpleNamespace(data=SimpleNamespace(tags={}))

    def put_tag(self, name: str, value: object) -> None:
        """The way there is not waited for."""

    def keep_undelivered_in(self, *_: object, **__: object) -> None:
        """It keeps nothing."""

    def settle(self, timeout_s: float) -> bool:
        return self.clock.wait(timeout_s)

    flush = settle

    def close(self, timeout_s: float) -> bool:
        self.done.append("closed")
        return self.clock.wait(timeout_s)

    def discard(self) -> None:
        self.done.append("discarded")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (grace, patience, pipeline):
        monkeypatch.setattr(module, "time", made)
    return made


def training(clock: Clock, folder: Path) -> tuple[TrainingPipeline, Run]:
    run = Run(clock)
    made = TrainingPipeline(
        parse({"metadata": {"name": "ends"}, "spec": {}}),
        run,
        output_dir=folder,
        fenced=True,  # type: ignore[arg-type]
    )
    publisher: Any = made._publisher
    publisher.close()
    publisher.settle = publisher.flush = clock.wait

    def close(timeout_s: float = 0) -> list[Any]:
        clock.wait(min(timeout_s, checkpoints.JOIN_S))
        return []

    publisher.close = close
    return made, run


@pytest.mark.parametrize("period_s", [10, 15, 60, 600])
@pytest.mark.parametrize("torchrun", [False, True])
def test_all_waits_after_sigterm_together_leave_the_reserve(
    period_s: int, torchrun: bool, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_GRACE_PERIOD, str(period_s))
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        period_s -= group.SHUTDOWN_MARGIN_S
    made, run = training(clock, tmp_path)
    checkpointing = made._checkpointing

    def told_to_end_in_validation() -> dict[str, float]:
        made.grace.enter_loop()
        made.grace._on_sigterm(signal.SIGTERM, None)
        clock.wait(callbacks.VALIDATION_SHARE * grace.grace_period_s() + 0.001)
        trained: Any = SimpleNamespace(total=SimpleNamespace(processed=checkpointing._last_batch))
        loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=trained))
        trainer = SimpleNamespace(sanity_checking=False, global_step=0, fit_loop=loop)
        checkpointing.on_validation_batch_end(trainer)
        raise AssertionError("a validation with no end in sight is broken off")

    monkeypatch.setattr(made, "_train", told_to_end_in_validation)
    began = clock.now
    with pytest.raises(TerminatedError, match="could not be delivered in time"):
        made.train()
    clock.wait(made.grace.left_s())  # the run's end, without an operator

    assert run.done == ["closed"]
    assert clock.now - began == pytest.approx(period_s - max(grace.RESERVE_S, period_s * grace.RESERVE_SHARE))


def test_a_second_sigterm_does_not_begin_the_grace_period_anew(clock: Clock) -> None:
    counted = grace.Grace()
    counted.begin()
    left = counted.left_s()
    clock.wait(5)
    counted.begin()
    assert counted.left_s() == left - 5


@pytest.mark.parametrize("waiting", ["checkpoint", "metrics"])
@pytest.mark.parametrize("failure", [TerminatedError("asked to end"), RuntimeError("boom")], ids=["told", "failed"])
def test_sigterm_while_what_is_left_is_delivered_breaks_nothing_off_and_shortens_the_wait(
    failure: BaseException, waiting: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the only one, after a failure; or as one more."""
    monkeypatch.setenv(ENV_GRACE_PERIOD, "12")
    made, run = training(clock, tmp_path)

    def train() -> dict[str, float]:
        if isinstance(failure, TerminatedError):
            made.grace._on_sigterm(signal.SIGTERM, None)
        raise failure

    def told_meanwhile(timeout_s: float) -> bool:
        if not run.done:
            run.done.append("told")
            made.grace._on_sigterm(signal.SIGTERM, None)
        return clock.wait(timeout_s)

    monkeypatch.setattr(made, "_train", train)
    first = told_meanwhile if waiting == "checkpoint" else lambda _: True
    made._publisher.settle = first  # type: ignore[method-assign]
    run.settle = told_meanwhile  # type: ignore[method-assign]
    began = clock.now
    with pytest.raises(type(failure)):
        made.train()
    assert run.done == ["told", "closed"]
    assert clock.now - began <= 12 - grace.RESERVE_S + checkpoints.JOIN_S


def test_sigterm_interrupts_except_in_the_loop_and_at_the_end() -> None:
    watched = grace.Grace()

    def receive() -> None:
        watched._on_sigterm(signal.SIGTERM, None)

    watched.enter_loop()
    receive()
    assert watched.began
    watched.leave_loop()
    for _ in range(2):
        with pytest.raises(TerminatedError):
            receive()
    watched.settle()
    receive()


def test_ctrl_c_is_heard_as_sigterm_is_and_a_second_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    watched = grace.Grace(by_hand=True)
    watched.watch()
    watched.enter_loop()
    watched.begin()  # another process of a group was told first
    signal.raise_signal(signal.SIGINT)
    assert "once more ends it at once" in capfd.readouterr().err
    assert str(watched.error(" at step 3.")) == "Asked to end (Ctrl-C) at step 3."

    watched.hint = "Go on with: this"
    ended = list[int]()
    monkeypatch.setattr(grace.os, "_exit", ended.append)
    signal.raise_signal(signal.SIGINT)
    assert ended == [130]
    assert "MLflow was not told. Go on with: this\n" in capfd.readouterr().err


def test_ctrl_c_is_left_to_programs_that_call_a_training_and_to_those_who_have_it_ignored() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    grace.Grace().watch()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    grace.Grace(by_hand=True).watch()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.fixture
def _child_handler() -> Iterator[None]:
    """As torch's, which raises where one of its processes has ended; what was there is put back."""
    before = signal.signal(signal.SIGCHLD, lambda *_: 1 // 0)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("_child_handler")
def test_processes_that_sigterm_has_ended_too_raise_nothing_in_the_middle_of_a_step() -> None:
    with pytest.raises(ZeroDivisionError):
        signal.raise_signal(signal.SIGCHLD)
    watched = grace.Grace()
    watched.enter_loop()
    watched._on_sigterm(signal.SIGTERM, None)
    signal.raise_signal(signal.SIGCHLD)


def test_a_process_that_sigterm_has_ended_first_is_no_error_of_the_users(clock: Clock, tmp_path: Path) -> None:
    """Who tells each process by itself may reach those that load data before the one that trains."""
    made, _ = training(clock, tmp_path)
    told = RuntimeError("DataLoader worker (pid 7) is killed by signal: Terminated. ")
    with pytest.raises(TerminatedError, match="an older checkpoint is used"):
        made._checkpointing.on_exception(None, None, told)
    assert made.grace.began
    for other in ("DataLoader worker (pid 7) is killed by signal: Killed. ", "Terminated"):
        made._checkpointing.on_exception(None, None, RuntimeError(other))


def test_sigterm_outside_training_says_nothing_of_processes_that_load_data(clock: Clock, tmp_path: Path) -> None:
    """It is raised where the process stands: in a test, mostly where the next batch is waited for."""
    made, _ = training(clock, tmp_path)
    made.grace.begin()
    waits: dict[str, Any] = {"__name__": grace.LOADER, "error": TerminatedError("asked to end")}
    exec(f"def {grace.WAITS_FOR_BATCH}():\n    raise error", waits)
    with pytest.raises(TerminatedError) as caught:
        waits[grace.WAITS_FOR_BATCH]()
    assert grace.is_lost_batch(caught.value)
    made._checkpointing.on_exception(SimpleNamespace(training=False), None, caught.value)


@pytest.mark.parametrize("how", ["raised", "noticed by the publisher"])
def test_a_fenced_attempt_forgets_what_waits_at_once(
    how: str, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = training(clock, tmp_path)
    fence = FencedError("attempt 2 has taken over")

    def fenced() -> dict[str, float]:
        if how == "raised":
            raise fence
        made._publisher.fence = fence
        raise TerminatedError

    monkeypatch.setattr(made, "_train", fenced)
    began = clock.now
    with pytest.raises((FencedError, TerminatedError)):
        made.train()
    assert run.done == ["discarded"]
    assert clock.now == began


def test_a_failure_waits_for_what_was_logged(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = training(clock, tmp_path)
    monkeypatch.setattr(made, "_train", lambda: 1 / 0)
    began = clock.now
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert run.done == ["closed"]
    assert clock.now - began == pipeline.FAILURE_TIMEOUT_S


def test_a_failure_lets_a_checkpoint_arrive_that_is_under_way(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, run = training(clock, tmp_path)

    def arrives(timeout_s: float) -> bool:
        clock.wait(timeout_s)
        if clock.now - began < 10:
            return False
        run.done.append("arrived")
        return True

    made._publisher.settle = arrives  # type: ignore[method-assign]
    monkeypatch.setattr(made, "_train", lambda: 1 / 0)
    began = clock.now
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert run.done == ["arrived", "closed"]


def test_what_is_too_large_is_put_away_and_not_waited_for(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asked in a loop, it would cost a core until the time is over: it says at once that it was not delivered."""
    made, run = training(clock, tmp_path)
    asked = list[str]()

    def kept(what: str) -> Any:
        def flush(timeout_s: float) -> bool:
            asked.append(what)
            clock.wait(0.01)
            return False

        return flush

    made._publisher.flush = kept("checkpoint")  # type: ignore[method-assign]
    run.flush = kept("artifact")  # type: ignore[method-assign]
    made._publisher.settle = run.settle = lambda _: True  # type: ignore[method-assign]
    monkeypatch.setattr(made, "_train", lambda: 1 / 0)
    began = clock.now
    with pytest.raises(ZeroDivisionError):
        made.train()
    assert run.done == ["closed"]
    assert not asked
    assert clock.now - began == checkpoints.JOIN_S


def test_the_waits_at_the_end_share_one_time(clock: Clock, tmp_path: Path) -> None:
    made, _ = training(clock, tmp_path)
    began = clock.now
    for _ in range(3):
        with pytest.raises(UndeliveredError):
            made._deliver()
    assert clock.now - began == pipeline.DELIVERY_TIMEOUT_S


def test_several_workers_hear_of_the_first_sooner_than_they_would_give_it_up(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    heard = [clock.now]

    def from_first(value: Any) -> Any:
        heard.append(clock.now)
        return value

    monkeypatch.setattr(group, "from_first", from_first)
    made, _ = training(clock, tmp_path)
    with pytest.raises(UndeliveredError, match="the last checkpoint could not be delivered"):
        made._test(None)
    assert heard[-1] - heard[0] == pipeline.DELIVERY_TIMEOUT_S
    waits = [later - sooner for sooner, later in pairwise(heard)]
    assert max(waits) < group.COLLECTIVE_TIMEOUT.total_seconds() / 10


@pytest.mark.parametrize("problem", [None, FencedError("attempt 2 has taken over"), UndeliveredError("too late")])
def test_the_others_wait_for_the_first_and_end_as_it_does(
    problem: Exception | None, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    said = iter([None, None, problem is None, problem])
    monkeypatch.setattr(group, "from_first", lambda mine: next(said))
    made, _ = training(clock, tmp_path)
    with nullcontext() if problem is None else pytest.raises(type(problem)):
        made._deliver_checkpoints()
    assert list(said) == []


def test_a_process_that_can_not_have_the_best_weights_tests_no_others(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it give the first up, which may download them for long."""
    alone = list[Any]()
    monkeypatch.setattr(group, "by_first", lambda make: alone.append(make()) or alone[-1])
    best = SimpleNamespace(path="checkpoints/best.ckpt")
    made, _ = training(clock, tmp_path)
    publisher: Any = made._publisher
    publisher.flush = lambda _: True
    publisher.best = lambda _: best
    publisher.local_file = lambda *_: None
    with pytest.raises(ConnectionError, match=r"checkpoints/best\.ckpt, can't be had"):
        made._test(None)
    assert alone == [best]


def test_the_others_of_a_group_wait_as_long_as_the_first_rehearses_the_export(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did = list[str]()

    def by_first(make: Any) -> None:
        did.append("they wait")
        make()

    made, _ = training(clock, tmp_path)
    steps: Any = made
    monkeypatch.setattr(group, "begin", lambda _: did.append("they meet"))
    monkeypatch.setattr(group, "by_first", by_first)
    steps.setup_model = steps._make_trainer = lambda: None
    steps._results.check = lambda *_, **__: did.append("checked")
    steps.setup_data_loaders = lambda: 1 / 0
    steps._publisher.newest_file = lambda _: None
    with pytest.raises(ZeroDivisionError):
        made._train()
    assert did == ["they meet", "they wait", "checked"]


@pytest.mark.parametrize(
    "started",
    [{"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, {"PET_NNODES": "2"}],
    ids=["by torchrun", "on several nodes"],
)
def test_processes_that_nobody_has_made_a_run_for_are_refused_before_each_makes_its_own(
    started: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in started.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(runs, "ensure_run", lambda *_, **__: pytest.fail("a run was made"))
    with pytest.raises(ConfigurationError, match=r"PET_NPROC_PER_NODE=N; .* in MLFLOW_RUN_ID$"):
        training_command._train_locally(parse({"metadata": {"name": "side-by-side"}}), tmp_path, grace.Grace())


class Ended:
    """A tracker that tells how its run was ended, and whether that could be told."""

    run_id = "run"
    settings = SimpleNamespace(display_uri="http://mlflow")
    undelivered = SimpleNamespace(sentence="the end (FINISHED) of run run could not be delivered")

    def __init__(self, *, told: bool) -> None:
        self.client, self.told = self, told
        self.ends: list[tuple[str, float | None]] = []
        self.left: list[str] = []

    def leave_registration(self, spec: RegistrationSpec) -> None:
        self.left.append(spec.model)

    def start_run(self, run_id: str) -> None:
        """It is there."""

    def adopt(self, run_id: str) -> None:
        self.adopted = run_id

    def end_run_in_time(self, status: str, timeout_s: float | None = None) -> bool:
        self.ends.append((status, timeout_s))
        return self.told


AWAY = AwayError("MLflow does not answer")


@pytest.mark.parametrize(
    ("whole", "trained", "registered", "told", "raised", "end", "left"),
    [
        (True, None, None, True, None, ("FINISHED", None), []),
        (True, None, None, False, UndeliveredError, ("FINISHED", None), []),
        (True, None, AWAY, True, UndeliveredError, ("FINISHED", None), ["m"]),
        (True, None, ModelMissingError("no model"), True, ModelMissingError, ("FAILED", None), []),
        (True, UndeliveredError("the model"), None, True, UndeliveredError, ("FINISHED", None), ["m"]),
        (False, UndeliveredError("metrics"), None, True, UndeliveredError, ("FAILED", None), []),
        (True, TerminatedError(), None, True, TerminatedError, ("FINISHED", 7), ["m"]),
        (False, TerminatedError(), None, True, TerminatedError, ("KILLED", 7), []),
    ],
    ids=[
        *("well", "untold", "away at registration", "nothing to register", "undelivered model", "undelivered"),
        *("sigterm when all is made", "sigterm"),
    ],
)
def test_a_run_without_an_operator_ends_as_what_was_delivered_says(
    *,
    whole: bool,
    trained: BaseException | None,
    registered: Exception | None,
    told: bool,
    raised: type[BaseException] | None,
    end: tuple[str, float | None],
    left: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracker = Ended(told=told)

    def fail(error: BaseException | None, result: Any) -> Any:
        if error is not None:
            raise error
        return result

    time_left = SimpleNamespace(left_s=lambda: 7, settle=lambda: None)
    made = SimpleNamespace(train=lambda: fail(trained, {"loss": 0.5}), is_whole=whole, can_go_on=False)
    monkeypatch.setattr(heimdall_tracking, "initialize_mlflow", lambda _: tracker)
    monkeypatch.setattr(pipeline, "TrainingPipeline", lambda *_, **__: made)
    monkeypatch.setattr(runs, "read_facts", lambda *_: "facts")
    monkeypatch.setattr(registry, "register", lambda *_: fail(registered, SimpleNamespace(uri="models:/m/1")))
    monkeypatch.setenv(training_command.LOCAL_RUN_ID, "run")
    asked = parse({"metadata": {"name": "ends"}, "spec": {"registration": {"model": "m"}}})
    with nullcontext() if raised is None else pytest.raises(raised):
        training_command._train_locally(asked, tmp_path, time_left)  # type: ignore[arg-type]
    assert (tracker.ends, tracker.left) == ([end], left)


@pytest.mark.parametrize(("error", "status"), [(AWAY, "FAILED"), (TerminatedError(), "KILLED")])
def test_a_run_that_was_made_and_could_not_be_started_is_ended(
    error: BaseException, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Ended(told=True)

    def start_run(run_id: str) -> None:
        raise error

    monkeypatch.setattr(tracker, "start_run", start_run)
    monkeypatch.setattr(heimdall_tracking, "initialize_mlflow", lambda _: tracker)
    monkeypatch.setenv(training_command.LOCAL_RUN_ID, "made")
    with pytest.raises(type(error)):
        training_command._train_locally(parse({"metadata": {"name": "ends"}}), tmp_path, grace.Grace())
    assert tracker.adopted == "made"
    assert [end for end, _ in tracker.ends] == [status]
