"""The parts of `make bench-trainer`: turns, what is compared with what, and how goals are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from heimdall_trainer.checkpoints import CheckpointPublisher
from heimdall_trainer.data.spectrogram import mel_spectrogram
from tests.bench import trainer, training
from tests.bench.spectrograms import by_librosa, torchaudio_mel
from tests.bench.trainer import Stalls, overhead_of, stall_figures, throughput_of
from tests.bench.training import Load, Marks, Pace
from tests.bench.turns import compare, in_turns

pytestmark = [
    # Lightning's own use of torch, and its advice for larger data sets than these.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    # MLflow's own use of SQLAlchemy, not ours.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
]


def test_each_round_measures_every_variant_once_and_begins_with_another() -> None:
    called: list[str] = []

    def measure(name: str) -> Callable[[], int]:
        return lambda: called.append(name) or len(called)  # type: ignore[func-returns-value]

    found = in_turns({name: measure(name) for name in "abc"}, 3)

    assert "".join(called) == "abcbcacab"
    assert found == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_variants_are_compared_within_rounds() -> None:
    # The machine was ten times slower in the second round, and the ratio is the same.
    assert compare([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).median == 2
    assert compare([2.0, 20.0, 2.0], [1.0, 10.0, 1.0]).spread == 0
    uneven = compare([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5)
    assert (uneven.median, uneven.spread) == (3, 1)
    assert compare([3.0], [2.0]).median == 1.5


def paces(*steps_s: float) -> list[Pace]:
    return [Pace(step_s=step_s, thread_s=step_s, process_s=step_s) for step_s in steps_s]


@pytest.mark.parametrize(("tracked_s", "met"), [(1.02, True), (1.04, False)])
def test_the_trainer_may_be_a_thirtieth_slower_than_a_plain_loop(tracked_s: float, met: bool) -> None:
    figures = throughput_of({"plain": paces(1, 1), "bare": paces(2, 2), "tracked": paces(tracked_s, tracked_s)})
    found = {figure.name: figure for figure in figures}
    assert found["throughput: the trainer / plain loop"].met is met
    assert found["throughput: bare Lightning / plain loop"].met is None
    assert found["throughput: bare Lightning / plain loop"].value == 0.5


@pytest.mark.parametrize(("tracked_s", "met"), [(1.005, True), (1.015, False)])
def test_tracking_may_cost_a_hundredth_of_a_step(tracked_s: float, met: bool) -> None:
    figures = overhead_of({"bare": paces(1.0), "logger": paces(1.2), "tracked": paces(tracked_s)})
    found = {figure.name: figure for figure in figures}
    assert found["tracking: the trainer over bare Lightning"].met is met
    assert found["tracking: the trainer over bare Lightning"].value == pytest.approx(100 * tracked_s - 100)
    assert found["tracking: the trainer over MLFlowLogger"].met is True
    assert found["tracking: MLFlowLogger over bare Lightning"].value == pytest.approx(20)


def test_a_stall_is_what_a_step_takes_longer_than_one_without_a_checkpoint() -> None:
    # Checkpoints are made in steps 1 and 4, and their uploads slow the steps behind them.
    stalls = Stalls.of([1.0, 1.5, 1.1, 1.0, 3.0, 1.2], [1, 4], 1.0)
    assert stalls.in_step == pytest.approx([0.5, 2.0])
    assert stalls.in_all == pytest.approx((0.5 + 0.1 + 2.0 + 0.2) / 2)


def marks(*intervals_s: float) -> Marks:
    """Marks of steps that took so long."""
    made = Marks(Load(make=training.Tiny, batches=[{}] * (len(intervals_s) + 1), warmup=0))
    made.times = [(sum(intervals_s[:index]),) * 3 for index in range(len(intervals_s) + 1)]
    return made


def test_stalls_are_judged_in_steps_of_their_own_round() -> None:
    rounds = {
        "without": [marks(1.0, 1.0, 1.0, 1.0), marks(10.0, 10.0, 10.0, 14.0)],
        "with": [marks(1.5, 1.0, 1.0, 1.0), marks(25.0, 10.0, 10.0, 10.0)],
    }
    found = {figure.name: figure for figure in stall_figures("x", rounds, [0])}
    assert found["x: stall by a checkpoint (median)"].value == pytest.approx(1)
    assert found["x: stall by a checkpoint (median)"].met is True
    assert found["x: stall by a checkpoint (longest)"].value == pytest.approx(1.5)
    assert found["x: stall by a checkpoint (longest)"].met is False
    assert found["x: stall without one, by whatever (longest)"].value == pytest.approx(0.4)
    assert found["x: all that a checkpoint adds"].value == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1039,), (2, 3, trainer.SAMPLES)])
def test_what_is_timed_beside_the_spectrogram_gives_the_same(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    iq = (1e-6 * (rng.standard_normal(shape) + 1j * rng.standard_normal(shape))).astype(np.complex64)
    ours = mel_spectrogram(torch.from_numpy(iq)).numpy()
    assert by_librosa(iq) == pytest.approx(ours, abs=1e-3)
    assert torchaudio_mel()(torch.from_numpy(iq)).numpy() == pytest.approx(ours, abs=1e-3)


def test_the_plain_loop_and_lightning_train_the_same() -> None:
    load = training.localizer(trainer.SMALL_BACKBONE, batch_size=2, steps=3, warmup=1)
    untrained, plain, bare = (load.make() for _ in range(3))
    assert len(training.plain(load, plain).intervals_s) == 3
    assert len(training.bare(load, bare).intervals_s) == 3
    learned = plain.state_dict()
    for name, value in bare.state_dict().items():
        torch.testing.assert_close(value, learned[name], msg=name)
    assert any(not torch.equal(value, learned[name]) for name, value in untrained.state_dict().items())


@pytest.mark.slow
def test_the_trainer_is_measured_with_all_that_it_tracks_and_the_checkpoints_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    client = MlflowClient(uri)
    experiment = client.create_experiment(training.EXPERIMENT, artifact_location=(tmp_path / "artifacts").as_uri())
    load = training.tiny(30)
    made: list[int] = []
    submit = CheckpointPublisher.submit

    def noted(publisher: CheckpointPublisher, file: Path, **known: Any) -> None:
        made.append(known["step"])
        submit(publisher, file, **known)

    monkeypatch.setattr(CheckpointPublisher, "submit", noted)
    training.tracked(load, uri, checkpoints_at={25, 30})
    training.with_mlflow_logger(load, uri)

    steps = len(load.batches)
    assert made == [26, 31, steps]
    runs = client.search_runs([experiment])
    assert [len(client.get_metric_history(run.info.run_id, "train/loss_step")) for run in runs] == [steps, steps]
    assert [len(client.get_metric_history(run.info.run_id, "lr-SGD")) for run in runs] == [steps, steps]
    assert [run.info.status for run in runs] == ["FINISHED", "FINISHED"]
