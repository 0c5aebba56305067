"""What a run is told of a training that goes on: a hang is what this does not tell of."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from heimdall_api.contract import TAG_ACTIVITY
from heimdall_api.types import TrainingSpec
from heimdall_trainer import callbacks
from heimdall_trainer.callbacks import PROGRESS_EVERY_S, ProgressReport


class Tracker:
    """Keeps what the run is told."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def put_tag(self, name: str, value: object) -> None:
        if name == TAG_ACTIVITY:
            self.told.append(str(value))


def trained(monkeypatch: pytest.MonkeyPatch, steps: list[int], *, attempt: int = 1) -> list[str]:
    """What is told of activity over batches, each of which takes long enough to be reported."""
    now = 0.0
    monkeypatch.setattr(callbacks, "time", SimpleNamespace(monotonic=lambda: now))
    tracker: Any = Tracker()
    report = ProgressReport(tracker, TrainingSpec(), attempt=attempt)
    module = SimpleNamespace(automatic_optimization=True)
    for step in steps:
        now += PROGRESS_EVERY_S
        trainer = SimpleNamespace(
            global_step=step,
            current_epoch=0,
            max_epochs=1,
            estimated_stepping_batches=9,
            is_global_zero=True,
            callback_metrics={},
            lightning_module=module,
        )
        report.on_train_batch_end(trainer, None, None, None, 0)
    return tracker.told


def test_steps_that_move_are_activity_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(monkeypatch, [1, 2, 3]) == ["1/1"]


def test_batches_whose_steps_lightning_does_not_count_are_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    assert trained(monkeypatch, [0, 0, 0], attempt=2) == ["2/1", "2/2", "2/3"]
