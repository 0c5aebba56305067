"""The same training in several ways: a plain loop, bare Lightning, Lightning with its own logger, and the trainer.

Each begins with the same weights and is given the same batches; `Marks` tells when each of its steps began.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytorch_lightning as L  # noqa: N812 - the name its users know
import structlog
import torch
from torch.utils.data import DataLoader

from heimdall_tracking import initialize_mlflow, load_settings
from heimdall_trainer.callbacks import Checkpointing
from heimdall_trainer.config import parse
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.model.module import LocalizationModule
from heimdall_trainer.pipeline import TrainingPipeline

RECEIVERS: Final = 5
BATCHES: Final = 4
"""Different batches, which are given again and again."""
SEED: Final = 1
DELIVERY_TIMEOUT_S: Final = 300
EXPERIMENT: Final = "heimdall-bench"
NEVER_MINUTES: Final = 1440
"""Between checkpoints, so that those alone are made that are asked for, and one at the end."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is trained."""

    make: Callable[[], L.LightningModule]
    """Makes the module, always with the same weights."""
    batches: Sequence[Batch]
    warmup: int = 5
    """First steps, which are not measured."""

    def loader(self) -> DataLoader[Batch]:
        return DataLoader(self.batches, batch_size=None)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Pace:
    """What a step takes in the mean."""

    step_s: float
    """By the wall clock."""
    thread_s: float
    """Processor time of the training thread."""
    process_s: float
    """Processor time of all threads of the process."""


class Marks(L.Callback):
    """When each step began, from the end of the warm-up on."""

    def __init__(self, load: Load) -> None:
        self._first, self._last = load.warmup, len(load.batches) - 1
        self.times: list[tuple[float, float, float]] = []
        """Wall clock, processor time of this thread and of the process."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.note(batch_idx)

    def note(self, index: int) -> None:
        if index in (self._first, self._last) and torch.cuda.is_available():
            torch.cuda.synchronize()
        if index >= self._first:
            self.times.append((time.perf_counter(), time.thread_time(), time.process_time()))

    @property
    def intervals_s(self) -> list[float]:
        """From the beginning of each step to that of the next."""
        return [end[0] - begin[0] for begin, end in zip(self.times, self.times[1:], strict=False)]

    def pace(self) -> Pace:
        steps = len(self.times) - 1
        wall, thread, process = (end - begin for begin, end in zip(self.times[0], self.times[-1], strict=True))
        return Pace(step_s=wall / steps, thread_s=thread / steps, process_s=process / steps)


class CheckpointsAt(L.Callback):
    """Makes a checkpoint due at some steps."""

    def __init__(self, checkpointing: Checkpointing, steps: Set[int]) -> None:
        self._checkpointing = checkpointing
        self._steps = steps

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx in self._steps:
            self._checkpointing._last_time = -math.inf


class Tiny(L.LightningModule):
    """Its steps cost next to nothing, so that what is around them shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        loss: torch.Tensor = self.layer(batch["x"]).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=1)
        return loss

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def tiny(steps: int) -> Load:
    """A load that costs next to nothing."""
    return Load(make=Tiny, batches=[{"x": torch.ones(1, 8)}] * (steps + 21), warmup=20)


def localizer(backbone: str, *, batch_size: int, steps: int, warmup: int = 5) -> Load:
    """The localizer on random spectrograms of five receivers.

    Args:
        backbone: Name in timm.
        batch_size: Samples in a batch.
        steps: Steps that are measured.
        warmup: Steps before.
    """

    def make() -> L.LightningModule:
        torch.manual_seed(SEED)
        return LocalizationModule(backbone)

    generator = torch.Generator().manual_seed(SEED)
    batches = [_batch(batch_size, generator) for _ in range(BATCHES)]
    every = [batches[index % BATCHES] for index in range(warmup + steps + 1)]
    return Load(make=make, batches=every, warmup=warmup)


def _batch(size: int, generator: torch.Generator) -> Batch:
    return {
        "spectrograms": torch.randn(size, RECEIVERS, *SHAPE, generator=generator),
        "receivers": 1000 * torch.randn(size, RECEIVERS, 2, generator=generator),
        "position": 500 * torch.randn(size, 2, generator=generator),
        "origin": torch.zeros(size, 2, dtype=torch.float64),
        "mask": torch.ones(size, RECEIVERS, dtype=torch.bool),
    }


# --- the ways ----------------------------------------------------------------------------------------------------


def plain(load: Load, module: Any = None) -> Marks:
    """A loop of torch alone, with the module's network, loss, optimizer and schedule."""
    module = module or load.make()
    cuda = torch.cuda.is_available()
    module.to("cuda" if cuda else "cpu").train()
    module._trainer = SimpleNamespace(estimated_stepping_batches=len(load.batches))
    chosen = module.configure_optimizers()
    optimizer, schedule = chosen["optimizer"], chosen["lr_scheduler"]["scheduler"]
    marks = Marks(load)
    for index, given in enumerate(load.loader()):
        marks.note(index)
        batch: Any = {name: value.to(module.device, non_blocking=True) for name, value in given.items()}
        with torch.autocast(module.device.type, torch.bfloat16, enabled=cuda and torch.cuda.is_bf16_supported()):
            loss = module._loss(module._predict(batch), batch["position"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return marks


def bare(load: Load, module: Any = None, *, logger: Any = False) -> Marks:
    """Lightning, with nothing that it can do without."""
    marks = Marks(load)
    half = torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    trainer = L.Trainer(
        max_epochs=1,
        precision="bf16-mixed" if half else "32-true",
        logger=logger,
        callbacks=[L.callbacks.LearningRateMonitor("step"), marks] if logger else [marks],
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        devices=1,
    )
    trainer.fit(module or load.make(), train_dataloaders=load.loader())
    return marks


def with_mlflow_logger(load: Load, tracking_uri: str) -> Marks:
    """Lightning with its own logger for MLflow."""
    from pytorch_lightning.loggers import MLFlowLogger

    return bare(load, logger=MLFlowLogger(experiment_name=EXPERIMENT, tracking_uri=tracking_uri))


def tracked(load: Load, tracking_uri: str, *, checkpoints_at: Set[int] = frozenset()) -> Marks:
    """The trainer: its own Trainer, logger and callbacks. Everything is delivered when this returns.

    Args:
        load: What is trained.
        tracking_uri: MLflow.
        checkpoints_at: Steps that a checkpoint is due at; there is one after the last in any case.
    """
    tracker = initialize_mlflow(load_settings(tracking_uri=tracking_uri, experiment_name=EXPERIMENT))
    tracker.start_run()
    training = {"epochs": 1, "earlyStopping": {"patience": 0}, "checkpoints": {"everyMinutes": NEVER_MINUTES}}
    run = parse({"metadata": {"name": "bench"}, "spec": {"training": training}})
    with tempfile.TemporaryDirectory() as name:
        pipeline = TrainingPipeline(run, tracker, output_dir=Path(name))
        pipeline.module = load.make()
        trainer = pipeline._make_trainer()
        marks = Marks(load)
        trainer.callbacks += [CheckpointsAt(pipeline._checkpointing, checkpoints_at), marks]
        trainer.fit(pipeline.module, train_dataloaders=load.loader())
        pipeline._publisher.flush(DELIVERY_TIMEOUT_S)
        pipeline.close(DELIVERY_TIMEOUT_S)
        assert tracker.undelivered is None, tracker.undelivered
        tracker.end_run()
    return marks


@contextmanager
def quiet(log: Path) -> Iterator[None]:
    """What the trainings say to people goes to a file: the table is what is read, and there is no progress bar."""
    log.parent.mkdir(parents=True, exist_ok=True)
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    for name in ("pytorch_lightning", "lightning_fabric", "mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    before = os.dup(2)
    with log.open("w") as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.dup2(stream.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
