"""TrainingPipeline: what happens in a training, from data to logged model."""

from __future__ import annotations

import json
import math
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from heimdall_api.contract import TAG_BEST, Checkpoint
from heimdall_api.types import CHECKPOINTS_LIMIT, DEFAULT_BACKBONE, TrainingRun
from heimdall_tracking.redact import redact
from heimdall_tracking.waiting import in_time
from heimdall_trainer import group
from heimdall_trainer.callbacks import Beginning, Checkpointing, ProgressReport, as_callback
from heimdall_trainer.checkpoint_io import make_checkpoint_io
from heimdall_trainer.checkpoints import CheckpointPublisher
from heimdall_trainer.errors import ConfigurationError, DivergedError, FencedError, UndeliveredError
from heimdall_trainer.grace import Grace
from heimdall_trainer.imports import check_data, construct, lightning_of, load_class
from heimdall_trainer.logger import make_logger
from heimdall_trainer.patience import LOOK_EVERY_S, Patience
from heimdall_trainer.repeatable import Repeatable
from heimdall_trainer.results import Results
from heimdall_trainer.settings import load_data_settings
from heimdall_trainer.termination import TerminatedError

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker
    from heimdall_tracking.errors import Refusal

DELIVERY_TIMEOUT_S: Final = 600
"""How long nothing may arrive in MLflow before the end gives up, all waits together."""
CURVES_TIMEOUT_S: Final = 60
"""How long the end waits for metrics that loss curves are to show."""
WRITING_TIMEOUT_S: Final = 600
"""How long the end waits for a checkpoint to be on disk."""
FENCE_TIMEOUT_S: Final = 10
TENSOR_CORES: Final = (7, 0)
"""Compute capability of the first GPUs (Volta) that are faster in half precision."""
FAILURE_TIMEOUT_S: Final = 30
"""How long a training that failed waits for what it logged before it puts that away."""
log = structlog.get_logger()


class TrainingPipeline:
    """Trains what a TrainingRun describes, in the tracker's run.

    Example:
        pipeline = TrainingPipeline(load_training_config("run.yaml"), tracker, output_dir=Path("outputs"))
        pipeline.train()
    """

    def __init__(
        self,
        run: TrainingRun,
        tracker: MLflowTracker,
        *,
        output_dir: Path,
        attempt: int = 1,
        fenced: bool = False,
        grace: Grace | None = None,
    ) -> None:
        """Prepare; nothing is read or built yet.

        Args:
            run: What to train.
            tracker: Its MLflow run, started.
            output_dir: Folder for what is on its way; every run has a folder of its own in it.
            attempt: Number of this attempt.
            fenced: Whether a newer attempt may take over.
            grace: Of the process, if it watches for SIGTERM already.
        """
        self.run = run
        self.spec = run.spec
        self.tracker = tracker
        self.output_dir = output_dir = output_dir / tracker.run_id
        self.grace = grace or Grace()
        """What is left of the time after SIGTERM."""
        self.is_whole = False
        """Whether everything was made that was asked for; what was not delivered of it is put away when it ends."""
        self.module: Any = None
        self.data: Any = None
        self._resumed: Path | None = None
        """The checkpoint that training goes on from."""
        self._weights: Path | None = None
        """The file that the backbone's weights came from, where it was not the library's."""
        self._publisher = CheckpointPublisher(
            tracker,
            attempt=attempt,
            keep=min(self.spec.training.checkpoints.keep, CHECKPOINTS_LIMIT),
            mode=self.spec.training.early_stopping.mode,
            fenced=fenced,
        )
        tracker.keep_undelivered_in(undelivered_in(output_dir), attempt=attempt if fenced else None)
        self._attempt = attempt
        self._results = Results(self.spec, tracker, output_dir / "results")
        self._progress = ProgressReport(tracker, self.spec.training, attempt=attempt, monitored=self._has_validation())
        self._patience = Patience(
            lambda: self._publisher.outstanding() + tracker.outstanding(), DELIVERY_TIMEOUT_S, self._progress.beat
        )
        self._repeatable = Repeatable(self.spec.training.seed)
        self._checkpointing = Checkpointing(
            self._publisher, self.spec.training, output_dir / "checkpoints", attempt, self.grace
        )

    @property
    def can_go_on(self) -> bool:
        """Whether another training in the same run has a checkpoint to go on from, if only once that is delivered."""
        kept = self.tracker.undelivered
        left = kept is not None and bool(kept.manifest.checkpoints)
        return self._progress.diverged is None and (left or bool(self._publisher.listed))

    def train(self) -> dict[str, float]:
        """Train, test, and leave in the run what was asked for.

        Returns:
            The last value of every metric.

        Raises:
            ConfigurationError: The spec can't work.
            DataError: The recordings can't be trained on.
            DivergedError: What is monitored is no number, and never was.
            FencedError: A newer attempt has taken over.
            TerminatedError: SIGTERM was received; a checkpoint was made.
            UndeliveredError: MLflow was away for too long; what it did not get is kept in the output folder.
        """
        try:
            metrics = self._train()
        except BaseException as error:
            self.grace.settle()
            self._end(error)
            kept = self.tracker.undelivered
            if isinstance(error, UndeliveredError) and kept is not None:
                raise UndeliveredError(f"{error}; {kept.sentence}") from None
            raise
        self.close()
        return metrics

    def _end(self, error: BaseException) -> None:
        """Deliver, put away or forget what waits, as the reason of the end wants it."""
        if isinstance(error, FencedError) or self._publisher.fence is not None:
            # The run is a newer attempt's: what waits here would be mixed with its metrics and progress.
            self._publisher.close()
            self.tracker.discard()
        elif isinstance(error, UndeliveredError):
            self.close()
        else:
            self.close(self.grace.left_s() if isinstance(error, TerminatedError) else FAILURE_TIMEOUT_S)

    def _train(self) -> dict[str, float]:
        self.grace.watch()
        try:
            (self.output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            why = f"{self.output_dir} can't be written to: {error.strerror}"
            raise ConfigurationError(f"{why}; name another folder (--output-dir)") from None
        self._resumed = self._publisher.newest_file(self.output_dir / "resumed")
        self.setup_model()
        trainer = self._make_trainer()
        group.begin(trainer)
        group.by_first(lambda: self._results.check(self.module, rehearse=not self._publisher.listed))
        self.setup_data_loaders()
        self._log_parameters(trainer)
        self._fit(trainer)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        metrics |= self._test(trainer)
        if group.is_first():
            self._is_delivered(CURVES_TIMEOUT_S)
            try:
                self._results.publish(self.module, self.data, self._check_fence)
            except FencedError:
                raise
            except Exception:
                self._deliver()  # what could be published was, and is worth the wait as ever
                raise
            self.is_whole = True
            self._deliver()
        return metrics

    def close(self, timeout_s: float = 0) -> None:
        """Stop the background threads, after they had some time; what they could not deliver is kept on disk.

        Args:
            timeout_s: How long they have; once SIGTERM was received, no longer than the grace period has left.
        """
        deadline = time.monotonic() + timeout_s
        self._until(deadline, self._publisher.settle)
        self._until(time.monotonic() + WRITING_TIMEOUT_S, self._publisher.written)
        for left in self._publisher.close(max(0.0, self._left_s(deadline))):
            self.tracker.leave_checkpoint(left)
        self._until(deadline, self.tracker.settle)
        self.tracker.close(0)

    def _until(self, deadline: float, settle: Callable[[float], bool]) -> None:
        """Wait until nothing is under way, looking now and then whether SIGTERM has brought the deadline nearer."""
        while (left_s := self._left_s(deadline)) > 0 and not settle(min(left_s, LOOK_EVERY_S)):
            if self._publisher.fence is not None:
                return

    def _left_s(self, deadline: float) -> float:
        """Seconds until a deadline, or until the grace period is over, if that has begun and is sooner."""
        left_s = deadline - time.monotonic()
        return min(left_s, self.grace.left_s()) if self.grace.began else left_s

    def setup_model(self) -> Any:
        """The module: the localizer on its backbone, or the user's own."""
        _seed(self.spec.training.seed)
        model, training = self.spec.model, self.spec.training
        if model.module is not None:
            found = load_class(model.module, "spec.model.module")
            self.module = construct(found, model.args or {}, "spec.model.args")
        else:
            from heimdall_trainer.model.module import LocalizationModule
            from heimdall_trainer.model.weights import find_weights

            backbone = model.backbone or DEFAULT_BACKBONE
            if model.pretrained and self._resumed is None:
                self._weights = find_weights(load_data_settings(), backbone)
            self.module = LocalizationModule(
                backbone,
                pretrained=model.pretrained,
                freeze_backbone=model.freeze_backbone,
                learning_rate=training.learning_rate,
                weight_decay=training.weight_decay,
                loss=training.loss,
                weights=self._weights,
                arrivals=self.spec.data.arrivals,
                resumed=self._resumed is not None,
            )
        return self.module

    def setup_data_loaders(self) -> Any:
        """The data: recording sessions divided by session, or the user's own; None where the module brings its own."""
        data, training = self.spec.data, self.spec.training
        if data.module is not None:
            self.data = construct(load_class(data.module, "spec.data.module"), data.args or {}, "spec.data.args")
            check_data(self.module, self.data)
        elif self.spec.model.module is None:
            from heimdall_trainer.data.module import HeimdallDataModule

            self.data = HeimdallDataModule(
                load_data_settings(),
                data,
                batch_size=training.batch_size,
                num_workers=training.data_loader_workers,
                seed=training.seed,
                beat=self._progress.beat,
            )
            if self._resumed is not None:
                self.data.load_state_dict(_state_of(self.data, self._resumed))
        return self.data

    def setup_callbacks(self, pl: Any) -> list[Any]:
        """Checkpoints, progress, early stopping, learning-rate monitor."""
        stopping = self.spec.training.early_stopping
        callbacks = [
            pl.callbacks.LearningRateMonitor("step"),
            # Only then is the data there: in a group, one process of each node reads it first, for all of the node.
            as_callback(pl, Beginning(self._begin)),
            as_callback(pl, self._repeatable),
            as_callback(pl, self._progress),
            as_callback(pl, self._checkpointing),
        ]
        if stopping.patience > 0 and self._has_validation():
            stopper = pl.callbacks.EarlyStopping(
                stopping.monitor, mode=stopping.mode, patience=stopping.patience, strict=False
            )
            callbacks.insert(0, stopper)
        return callbacks

    def _has_validation(self) -> bool:
        return (
            self.spec.data.module is not None
            or self.spec.model.module is not None
            or self.spec.data.validation_fraction > 0
        )

    def _make_trainer(self) -> Any:
        pl = lightning_of(self.module)
        pl.seed_everything(self.spec.training.seed, workers=True, verbose=False)
        return pl.Trainer(
            max_epochs=self.spec.training.epochs,
            precision=self._precision(),
            logger=make_logger(pl, self.tracker, self.output_dir / "logged"),
            callbacks=self.setup_callbacks(pl),
            plugins=[make_checkpoint_io(pl)],
            enable_model_summary=False,
            enable_progress_bar=os.isatty(2),
            log_every_n_steps=1,
            default_root_dir=self.output_dir,
            num_sanity_val_steps=0,
            **group.trainer_options(pl),
        )

    def _precision(self) -> Any:
        import torch

        if self.spec.training.precision != "auto":
            return self.spec.training.precision
        if not torch.cuda.is_available():
            return "32-true"
        with torch.cuda.device(group.local_rank()):  # the GPUs of one machine may be unlike
            # Emulated, which torch counts as supported, it would be slower than what it is to save.
            if torch.cuda.is_bf16_supported(including_emulation=False):
                return "bf16-mixed"
            capability = torch.cuda.get_device_capability()
        # Its scaler, which a checkpoint holds, leaves out the first few steps until it has found its scale. Who steps
        # the optimizers by hand may look at gradients, which are scaled then.
        return "16-mixed" if capability >= TENSOR_CORES and self.module.automatic_optimization else "32-true"

    def _log_parameters(self, trainer: Any) -> None:
        import torch

        if not group.is_first():
            return
        spec = json.loads(self.spec.model_dump_json(exclude_none=True))
        self.tracker.log_params(spec)
        environment = {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "devices": trainer.world_size,
            "precision": trainer.precision,
        }
        self.tracker.log_params({"environment": environment})
        if self._weights is not None:
            self.tracker.log_params({"weights": f"{self._weights.parent.name}/{self._weights.name}"})

    def _begin(self, trainer: Any) -> None:
        """Nothing was trained yet, and all processes are there.

        Raises:
            ConnectionError: They would go on from different places.
            ConfigurationError: They would train in unlike precision, which each has chosen for its own GPU.
        """
        mine = self._resumed.name if self._resumed is not None else "the beginning"
        first = group.from_first(mine)
        if mine != first:
            raise ConnectionError(f"this process goes on from {mine}, the first of its group from {first}")
        self._check_precision(trainer)
        self._log_data()

    def _check_precision(self, trainer: Any) -> None:
        mine = str(trainer.precision)
        first = group.from_first(mine)
        if group.any_of([mine != first], trainer)[0]:
            other = "" if mine == first else f", {mine} here"
            raise ConfigurationError(
                f"the GPUs of this group are unlike: spec.training.precision auto is {first} in its first "
                f"process{other}; name one that all of them can do"
            )

    def _log_data(self) -> None:
        if group.is_first() and hasattr(self.data, "dataset_identity"):
            self.tracker.log_params({"dataset": self.data.dataset_identity()})

    def _fit(self, trainer: Any) -> None:
        tags = self.tracker.client.get_run(self.tracker.run_id).data.tags
        self._progress.restore_best(tags.get(TAG_BEST))
        self._repeatable.follow(trainer)
        try:
            trainer.fit(self.module, datamodule=self.data, ckpt_path=self._resumed, weights_only=False)
        finally:
            self._repeatable.leave()
        for stopper in trainer.early_stopping_callbacks if group.is_first() else ():
            if stopper.stopping_reason_message is not None:
                why = stopper.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
                log.info("training stopped early", epoch=stopper.stopped_epoch + 1, of=trainer.max_epochs, reason=why)

    def _test(self, trainer: Any) -> dict[str, float]:
        """Load the best weights and test them."""
        import torch

        self._publisher.wait_for_file()
        self._deliver_checkpoints()
        folder = self.output_dir / "resumed"
        best = group.from_first(group.by_first(lambda: self._publisher.best(folder)))
        self._check_best(best)
        if best is not None:
            file = self._publisher.local_file(best, folder)
            if file is None:  # with other weights than the first process this one would spoil what they find together
                raise ConnectionError(f"the best checkpoint, {best.path}, can't be had from MLflow by every process")
            held = torch.load(file, map_location="cpu", weights_only=False)
            self.module.on_load_checkpoint(held)
            self.module.load_state_dict(held["state_dict"], strict=self.module.strict_loading)
        if not self._has_test():
            return {}
        results = trainer.test(self.module, datamodule=self.data, verbose=False)
        return {name: float(value) for result in results for name, value in result.items()}

    def _check_best(self, best: Checkpoint | None) -> None:
        """Make nothing of weights that are no numbers, in a group all together.

        Raises:
            DivergedError: There are no others.
        """
        diverged = group.from_first(self._progress.diverged)
        if diverged is None:
            return
        epoch, value = diverged
        what = f"{self.spec.training.early_stopping.monitor} became {value} in epoch {epoch + 1}"
        if best is None or best.metric is None:
            rate = "spec.training.learningRate" if self.spec.model.module is None else "of the module's own"
            raise DivergedError(
                f"{what}, and no checkpoint is of an epoch in which it was a number: lower the learning rate ({rate}), "
                "or look for values in the data that are none"
            )
        if group.is_first():
            used = {"epoch": best.epoch + 1, "value": best.metric}
            log.warning("training diverged: the best checkpoint before that is used", reason=what, **used)

    def _has_test(self) -> bool:
        if self.spec.model.module is None and self.spec.data.module is None:
            return self.spec.data.test_fraction > 0
        from importlib import import_module

        package = import_module(lightning_of(self.module).__name__)
        overrides = type(self.module).test_step is not package.LightningModule.test_step
        source = self.data if self.data is not None else self.module
        base = package.LightningDataModule if self.data is not None else package.LightningModule
        return overrides and type(source).test_dataloader is not base.test_dataloader

    def _deliver_checkpoints(self) -> None:
        """Wait until the checkpoints are published, in a group all together.

        What the first process waits for may take longer than the others can wait in a collective, so they hear of it
        at each look.

        Raises:
            UndeliveredError: They were not, in every process.
            FencedError: A newer attempt has taken over.
        """
        looks = self._patience.looks(self._publisher.settle)
        while group.from_first(next(looks) if group.is_first() else None) is None:
            pass
        problem = group.from_first(self._problem_of_checkpoints() if group.is_first() else None)
        if problem is not None:
            raise problem

    def _problem_of_checkpoints(self) -> Exception | None:
        if self._publisher.flush(0):
            return None
        return self._publisher.fence or UndeliveredError(
            f"the last checkpoint could not be delivered to MLflow in time{_because(self._publisher.refusal)}"
        )

    def _deliver(self) -> None:
        if not self._is_delivered():
            self._check_fence()
            raise UndeliveredError(
                f"metrics, artifacts or the model could not be delivered to MLflow in time"
                f"{_because(self.tracker.refusal)}"
            )

    def _check_fence(self) -> None:
        """Look whether a newer attempt has taken over; what is uploaded later looks again.

        Raises:
            FencedError: One has, and MLflow says so.
        """
        try:
            in_time(self._publisher.check_fence, FENCE_TIMEOUT_S)
        except FencedError:
            raise
        except Exception as error:  # noqa: BLE001 - MLflow is away: nobody knows
            log.warning("whether a newer attempt has taken over is not known", error=redact(error))

    def _is_delivered(self, at_most_s: float = math.inf) -> bool:
        """Wait until nothing is under way to MLflow; whether all of it was delivered."""
        self._patience.wait(self.tracker.settle, at_most_s)
        return self.tracker.flush(0)


def undelivered_in(folder: Path) -> Path:
    """Where in a run's folder lies what MLflow did not get."""
    return folder / "undelivered"


def _because(refusal: Refusal | None) -> str:
    return f" ({refusal.sentence})" if refusal is not None else ""


def _state_of(data: Any, checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds of its data module; the weights are left where they are."""
    import torch

    held = torch.load(checkpoint, map_location="cpu", weights_only=False, mmap=True)
    state: dict[str, Any] = held.get(type(data).__qualname__, {})
    return state


def _seed(seed: int) -> None:
    import random

    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
