"""Lightning callbacks: checkpoints, SIGTERM, progress. Made for whichever Lightning package the module belongs to."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog
from pydantic import ValidationError

from heimdall_api.contract import TAG_ACTIVITY, TAG_BEST, TAG_PROGRESS, BestMetric, Progress
from heimdall_trainer import checkpoint_io, group
from heimdall_trainer.checkpoints import CheckpointPublisher
from heimdall_trainer.grace import Grace, grace_period_s, is_lost_batch, is_terminated_loader
from heimdall_trainer.termination import TerminatedError

if TYPE_CHECKING:
    from heimdall_api.types import TrainingSpec
    from heimdall_tracking import MLflowTracker

PROGRESS_EVERY_S: Final = 5.0
LINE_EVERY_S: Final = 10.0
VALIDATION_SHARE: Final = 1 / 6
"""Share of the grace period that a validation may go on for. One that is broken off is not made up for later."""

HOOKS_OF_A_STEP: Final = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
)

log = structlog.get_logger()


class Beginning:
    """Calls something when training begins.

    A class that nobody else has: of Lightning's own, one that a module's `configure_callbacks` brings replaces ours.
    """

    def __init__(self, begin: Callable[[Any], None]) -> None:
        """Nothing is called yet.

        Args:
            begin: Is given Lightning's trainer.
        """
        self._begin = begin

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Nothing was trained yet, and the data is there."""
        del pl_module
        self._begin(trainer)


class Checkpointing:
    """Makes checkpoints at epochs' ends, every so many minutes, and on SIGTERM."""

    def __init__(
        self, publisher: CheckpointPublisher, training: TrainingSpec, folder: Path, attempt: int, grace: Grace
    ) -> None:
        self._publisher = publisher
        self._monitor = training.early_stopping.monitor
        self._every_s = training.checkpoints.every_minutes * 60
        self._folder = folder
        self._attempt = attempt
        self._last_time = time.monotonic()
        self._last_batch = -1
        """Batches that were trained on when the last checkpoint was made: not every optimizer counts its steps."""
        self._grace = grace
        self._seen: dict[int, float] = {}
        """Metrics of the epoch that ends, by the number of the scheduler that waits for one (`ReduceLROnPlateau`)."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning has registered its own handler by now: ours, which exits 143, comes after it."""
        del pl_module
        self._last_batch = _batches(trainer)
        self._grace.enter_loop()
        for index, value in self._seen.items():
            trainer.lightning_module.lr_scheduler_step(trainer.lr_scheduler_configs[index].scheduler, value)
        self._seen = {}
        self._restore_loaders(trainer.fit_loop)
        if any(_has_stopped(stopper) for stopper in trainer.early_stopping_callbacks):
            trainer.should_stop = True  # the last attempt was done; Lightning restores the count, not the conclusion
        self._grace.watch()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint of an epoch's end holds for schedulers that Lightning tells of the epoch only behind it."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Have those schedulers told when training goes on."""
        self._seen = dict(state_dict.get("seen", {}))

    def _restore_loaders(self, loop: Any) -> None:
        # Lightning leaves the data loaders' states out where `configure_optimizers` has asked for the number of steps.
        if loop._combined_loader_states_to_load:  # noqa: SLF001 - there is no other way
            loop._load_combined_loader_states()  # noqa: SLF001
            iter(loop._data_fetcher)  # noqa: SLF001

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """The loop is over; who was asked to end since the end of its last epoch stops here."""
        del pl_module
        self._grace.leave_loop()
        if group.any_of([self._grace.began], trainer)[0]:
            self._stop(trainer)

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        """Lightning has registered its own handler again, which talks to the others of a group when a signal comes."""
        del trainer, pl_module
        self._grace.watch()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop if asked to; make a checkpoint if it is time."""
        del pl_module, outputs, batch, batch_idx
        self._publisher.raise_if_fenced()
        self._publisher.raise_if_not_written()
        if trainer.is_last_batch:
            return  # going on from between an epoch's last step and its validation would leave that out
        due = trainer.is_global_zero and time.monotonic() - self._last_time >= self._every_s
        stop, save = group.any_of([self._grace.began, due], trainer)
        if stop:
            # Lightning logs a step's metrics after this hook, which it won't get past.
            trainer._logger_connector.update_train_step_metrics()  # noqa: SLF001 - there is no other way
            self._stop(trainer)
        elif save:
            self._save(trainer, metric=None)

    def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
        """Stop if asked to and there is no end in sight; a group stops after it, where all can agree on it."""
        if not self._grace.began or trainer.sanity_checking or group.world_size() > 1:
            return
        if self._grace.passed_s() >= VALIDATION_SHARE * grace_period_s():
            self._stop(trainer)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Stop if what went wrong is that SIGTERM has ended a process that loads data, too.

        A process alone that was waiting for its next batch makes a checkpoint. A group's processes can't agree on one.
        """
        del pl_module
        is_lost = self._grace.began and is_lost_batch(exception)
        if is_lost and trainer.training and group.world_size() == 1:
            self._stop(trainer)
        if isinstance(exception, TerminatedError):
            return  # where it is raised says nothing of processes that load data
        if not is_lost and not is_terminated_loader(exception):
            return
        self._grace.begin()
        raise self._grace.error(", as was a process that loads data; an older checkpoint is used.")

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """An epoch is over, its validation included."""
        del pl_module
        value = trainer.callback_metrics.get(self._monitor)
        self._seen = _told_behind(trainer)
        self._save(trainer, metric=None if value is None else float(value), suffix="-end")
        self._seen = {}
        if group.any_of([self._grace.began], trainer)[0]:
            # Lightning logs an epoch's metrics after this hook, which it won't get past; as of the epoch's last step.
            loop = trainer.fit_loop.epoch_loop
            loop._batches_that_stepped -= 1  # noqa: SLF001 - there is no other way
            trainer._logger_connector.update_train_epoch_metrics()  # noqa: SLF001
            loop._batches_that_stepped += 1  # noqa: SLF001
            self._stop(trainer)

    def _stop(self, trainer: Any) -> None:
        if _batches(trainer) != self._last_batch:
            self._save(trainer, metric=None)
        self._grace.begin()  # in a group another process may have been told first
        delivered = self._publisher.flush(self._grace.left_s())
        self._publisher.raise_if_not_written()
        fate = "was delivered" if delivered else "could not be delivered in time; an older one is used"
        raise self._grace.error(f" at step {trainer.global_step}; its checkpoint {fate}.")

    def _save(self, trainer: Any, metric: float | None, suffix: str = "") -> None:
        step, batch = int(trainer.global_step), _batches(trainer)
        # A name of its own for an epoch's end: its last step has a checkpoint where its validation was broken off.
        # And one for each batch: steps of an optimizer that Lightning knows nothing of are not counted.
        place = f"epoch-{trainer.current_epoch:04}{suffix or f'-batch-{batch:08}'}"
        file = self._folder / f"step-{step:08}-attempt-{self._attempt}-{place}.ckpt"
        self._publisher.wait_for_file()  # there is room for one copy of the state, not for one of each checkpoint
        snapshot = checkpoint_io.save(trainer, file)
        self._last_time, self._last_batch = time.monotonic(), batch
        if trainer.is_global_zero:
            epoch = int(trainer.current_epoch)
            self._publisher.submit(file, step=step, epoch=epoch, metric=metric, snapshot=snapshot)


def _batches(trainer: Any) -> int:
    """How many batches were trained on, over all epochs and attempts."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.processed)


def _has_stopped(stopper: Any) -> bool:
    """Whether a checkpoint says that early stopping has ended training."""
    return stopper.stopping_reason_message is not None or stopper.wait_count >= max(stopper.patience, 1)


def _told_behind(trainer: Any) -> dict[int, float]:
    """What Lightning tells schedulers of this epoch only when its checkpoint is made: metrics by their number."""
    if not trainer.lightning_module.automatic_optimization:
        return {}
    return {
        index: float(trainer.callback_metrics[config.monitor])
        for index, config in enumerate(trainer.lr_scheduler_configs)
        if config.reduce_on_plateau
        and config.interval == "epoch"
        and (trainer.current_epoch + 1) % config.frequency == 0
        and config.monitor in trainer.callback_metrics
    }


class ProgressReport:
    """Tells the run how far training is, behind training; and people, in plain lines, where there is no terminal."""

    def __init__(
        self, tracker: MLflowTracker, training: TrainingSpec, *, attempt: int = 1, monitored: bool = True
    ) -> None:
        """Nothing is told yet.

        Args:
            tracker: The run.
            training: What is monitored.
            attempt: Number of this attempt.
            monitored: Whether it is to be.
        """
        self.diverged: tuple[int, float] | None = None
        """Since which epoch the monitored metric is no number, and what it was then."""
        self._to_be_logged = monitored
        self._has_validated = False
        self._tracker = tracker
        self._monitor = training.early_stopping.monitor
        self._sign = 1 if training.early_stopping.mode == "min" else -1
        self._best: float | None = None
        self._first_step = 0
        self._first_step_time: datetime | None = None
        self._attempt, self._beats = attempt, 0
        self._reported: int | None = None
        """Step at the last batch that was reported."""
        self._last_report = self._last_line = self._last_beat = -math.inf
        self._lines = group.is_first() and not sys.stderr.isatty()

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Remember where this attempt began: its pace counts from there."""
        del pl_module
        self._first_step = int(trainer.global_step)

    def beat(self) -> None:
        """Something was done that is no step: a recording read, a batch validated or tested, a wait looked at."""
        self._beats += 1
        now = time.monotonic()
        if group.is_first() and now - self._last_beat >= PROGRESS_EVERY_S:
            self._last_beat = now
            self._tracker.put_tag(TAG_ACTIVITY, f"{self._attempt}/{self._beats}")

    def restore_best(self, tag: str | None) -> None:
        """Go on from the best value of an earlier attempt; a tag that can't be read counts as none."""
        with suppress(ValidationError):
            self._best = BestMetric.model_validate_json(tag).value if tag else None

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Report now and then."""
        del pl_module, outputs, batch, batch_idx
        self._first_step_time = self._first_step_time or datetime.now(UTC)
        now = time.monotonic()
        if now - self._last_report >= PROGRESS_EVERY_S:
            # The steps of a module that makes them past Lightning stand still. The first batch promises the others.
            if self._reported in (None, trainer.global_step):
                self.beat()
            self._reported = int(trainer.global_step)
            self._report(trainer)
        if self._lines and now - self._last_line >= LINE_EVERY_S:
            self._line(trainer)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Report each epoch, and the best value so far."""
        del pl_module
        value = trainer.callback_metrics.get(self._monitor)
        if value is None:
            self._tell_that_it_is_not_logged(trainer)
        elif not math.isfinite(value):
            self.diverged = self.diverged or (int(trainer.current_epoch), float(value))
        else:
            self.diverged = None
            self._note(trainer, float(value))
        self._report(trainer, epoch_done=True)
        if self._lines:
            self._line(trainer)

    def on_validation_batch_end(self, *_: Any) -> None:
        """Not every step is training's."""
        self.beat()

    def on_test_batch_end(self, *_: Any) -> None:
        """Not every step is training's."""
        self.beat()

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """By now a module has logged what it logs."""
        del trainer, pl_module
        self._has_validated = True

    def state_dict(self) -> dict[str, Any]:
        """What an attempt that goes on must know."""
        return {"diverged": self.diverged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Know it."""
        self.diverged = state_dict.get("diverged")

    def _note(self, trainer: Any, number: float) -> None:
        if self._best is None or self._sign * number < self._sign * self._best:
            self._best = number
            best = BestMetric(name=self._monitor, value=number, step=int(trainer.global_step))
            self._put(trainer, TAG_BEST, best.model_dump_json())

    def _tell_that_it_is_not_logged(self, trainer: Any) -> None:
        # A validation that was broken off, and is not made up for, has logged nothing.
        if not self._to_be_logged or (trainer.enable_validation and not self._has_validated):
            return
        self._to_be_logged = False
        if group.is_first():
            log.warning(
                "the monitored metric is not logged: nothing stops training early, and the last checkpoint is the best",
                monitor=self._monitor,
                logged=sorted(trainer.callback_metrics),
            )

    def _report(self, trainer: Any, *, epoch_done: bool = False) -> None:
        self._last_report = time.monotonic()
        total = trainer.estimated_stepping_batches
        progress = Progress(
            epoch=int(trainer.current_epoch) + int(epoch_done),
            epochs=int(trainer.max_epochs or 0),
            step=int(trainer.global_step),
            # Of data without a length Lightning says -1; of a module that steps its optimizers itself, nobody knows.
            steps=int(total) if 0 <= total < math.inf and trainer.lightning_module.automatic_optimization else None,
            first_step=self._first_step,
            first_step_time=self._first_step_time,
            time=datetime.now(UTC),
        )
        self._put(trainer, TAG_PROGRESS, progress.model_dump_json(exclude_none=True))

    def _line(self, trainer: Any) -> None:
        self._last_line = time.monotonic()
        shown = {name: round(float(value), 4) for name, value in trainer.callback_metrics.items()}
        place = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}"
        print(f"{place}: {json.dumps(shown)}", file=sys.stderr, flush=True)

    def _put(self, trainer: Any, tag: str, value: str) -> None:
        if trainer.is_global_zero:
            self._tracker.put_tag(tag, value)


def as_callback(pl: Any, callback: Any) -> Any:
    """Make one of ours a Callback of a Lightning package.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.
        callback: Beginning, Checkpointing, ProgressReport or Repeatable.

    Returns:
        The same object, of a class that the package's Trainer takes.
    """
    # Lightning calls Checkpoints at an epoch's end behind everything else, the module and early stopping included: what
    # these log and decide belongs to the epoch that is saved and reported.
    kind = type(callback)
    # Lightning leaves out what can't be called. To call what does nothing takes it longer than what ours do in a step.
    left_out = dict.fromkeys(name for name in HOOKS_OF_A_STEP if not hasattr(kind, name))
    callback.__class__ = type(kind.__name__, (kind, pl.callbacks.Checkpoint), left_out)
    return callback
