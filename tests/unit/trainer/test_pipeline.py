"""A whole training, real but tiny: recordings in a folder, MLflow on SQLite."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.utilities.warnings import PossibleUserWarning
from safetensors.torch import save_file
from structlog.testing import capture_logs
from torch.utils.data import DataLoader

from heimdall_api.contract import (
    ENV_ATTEMPT,
    ENV_GRACE_PERIOD,
    ENV_MLFLOW_RUN_ID,
    ENV_TERMINATION_MESSAGE,
    ENV_TRACKING_URI,
    ONNX_FILE,
    PLOTS_DIR,
    TAG_ACTIVITY,
    TAG_ATTEMPT,
    TAG_BEST,
    TAG_CHECKPOINTS,
    TAG_PROGRESS,
    BestMetric,
    ExitCode,
    Progress,
    Reason,
    TerminationMessage,
    parse_checkpoints,
)
from heimdall_api.types import DEFAULT_EXPERIMENT, TrainingRun
from heimdall_tracking import MLflowTracker, load_settings
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.runs import find_model, read_facts
from heimdall_trainer import callbacks, cli, export, modelling, patience, pipeline
from heimdall_trainer.checkpoint_io import Snapshot
from heimdall_trainer.checkpoints import CheckpointPublisher
from heimdall_trainer.commands.training import LOCAL_RUN_ID, _how_to_go_on
from heimdall_trainer.config import parse
from heimdall_trainer.data.generator import generate
from heimdall_trainer.data.sessions import SessionStore
from heimdall_trainer.data.split import split_sessions
from heimdall_trainer.errors import ConfigurationError, DataError, DivergedError, ExportError, FencedError
from heimdall_trainer.export import open_onnx
from heimdall_trainer.model.module import LocalizationModule
from heimdall_trainer.model.net import make_backbone
from heimdall_trainer.patience import Patience
from heimdall_trainer.pipeline import TrainingPipeline
from heimdall_trainer.results import Results
from heimdall_trainer.settings import DataSettings
from heimdall_trainer.termination import TerminatedError, run_to_exit_code
from tests.unit.trainer import user_modules
from tests.unit.trainer.builders import SESSIONS, data_settings

pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy, not ours.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    # Lightning's own use of torch, and its advice for larger data sets than these.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers"),
    # MLflow's own types, when they are imported.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*inferred as AnyType"),
    # MLflow asks for a schema as type hints; the signature is one.
    pytest.mark.filterwarnings("ignore:[\\s\\S]*Add type hints to the `predict` method"),
]

MODULES = "tests.unit.trainer.user_modules"
ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S, POD_TIMEOUT_S = 60, 300
EPOCHS, BATCHES = 2, 3
"""Of the localizer: 12 training transmissions in batches of 4."""
CHECKPOINT_OF_LINE = "checkpoints/step-{:08}-attempt-1-epoch-{:04}-end.ckpt"
"""Of a module with one step an epoch: step and epoch."""
LOCALIZER: dict[str, Any] = {
    "model": {"backbone": "test_resnet"},
    "data": {"testFraction": 0.2},
    "training": {"epochs": EPOCHS, "batchSize": 4, "dataLoaderWorkers": 0, "checkpoints": {"keep": 1}},
}


@dataclass
class Bench:
    """Trains in runs of one MLflow, as a pod of the operator's would."""

    client: MlflowClient
    uri: str
    folder: Path

    def new_run(self) -> str:
        experiment = self.client.get_experiment_by_name(DEFAULT_EXPERIMENT)
        assert experiment is not None
        return str(self.client.create_run(experiment.experiment_id).info.run_id)

    def train(self, spec: dict[str, Any], run_id: str, *, attempt: int = 1) -> dict[str, float]:
        tracker = MLflowTracker(load_settings(tracking_uri=self.uri))
        tracker.attach(run_id)
        training = TrainingPipeline(described(spec), tracker, output_dir=self.folder, attempt=attempt)
        try:
            return training.train()
        finally:
            training.close()

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        return [(item.step, item.value) for item in self.client.get_metric_history(run_id, metric)]


def described(spec: dict[str, Any], name: str = "tiny") -> TrainingRun:
    return parse({"metadata": {"name": name}, "spec": spec})


def user_spec(module: str, epochs: int = 4, **more: Any) -> dict[str, Any]:
    return {"model": {"module": f"{MODULES}:{module}"}, "training": {"epochs": epochs}, **more}


@pytest.fixture(autouse=True, scope="module")
def _bounded() -> Iterator[None]:
    """What can't be delivered is not waited for long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "DELIVERY_TIMEOUT_S", TIMEOUT_S)
        yield


@pytest.fixture(autouse=True)
def _process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a training changes in its process is put back."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        os.environ.pop(name, None)


@pytest.fixture(scope="module")
def bench(mlflow_uri: str, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(MlflowClient(mlflow_uri), mlflow_uri, tmp_path_factory.mktemp("outputs"))


def variables(settings: DataSettings) -> dict[str, str]:
    return {
        "HEIMDALL_DATABASE_URL": settings.database_url.get_secret_value(),
        "HEIMDALL_RECORDINGS_URL": settings.recordings_url,
        "HEIMDALL_CACHE_DIR": str(settings.cache_dir),
    }


@pytest.fixture
def localizer(recorded: DataSettings, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The spec of a small localizer; its data is where the variables say."""
    for name, value in variables(recorded).items():
        monkeypatch.setenv(name, value)
    return LOCALIZER


@dataclass
class Trained:
    run: Run
    metrics: dict[str, float]


@pytest.fixture(scope="module")
def trained(bench: Bench, recorded: DataSettings) -> Trained:
    """A localizer that was trained without interruption, and logged."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables(recorded).items():
            patch.setenv(name, value)
        run_id = bench.new_run()
        metrics = bench.train({**LOCALIZER, "registration": {"model": "tiny"}, "export": {"onnx": True}}, run_id)
    return Trained(bench.client.get_run(run_id), metrics)


# --- one training, whole -------------------------------------------------------------------------------------------


def test_a_module_that_takes_more_than_a_batch_s_first_tensor_is_logged_all_the_same(bench: Bench) -> None:
    run_id = bench.new_run()

    with capture_logs() as logs:
        bench.train({**user_spec("TwoInputs", epochs=1), "registration": {"model": "two"}}, run_id)

    assert any("without signature and example" in line["event"] for line in logs)
    run = bench.client.get_run(run_id)
    (model,) = bench.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run_id}'")
    assert str(model.status) == "READY"


def test_early_stopping_counts_the_epoch_that_a_checkpoint_is_of(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = user_spec("WorseAndWorse", epochs=10)
    spec["training"]["earlyStopping"] = {"patience": 2}

    bench.client.set_tag(run_id, TAG_BEST, "what another image has written")

    bench.train(spec, run_id)

    epochs = [0, 1, 2]
    assert [step for step, _ in bench.history(run_id, "val/loss")] == epochs
    tags = bench.client.get_run(run_id).data.tags
    assert BestMetric.model_validate_json(tags[TAG_BEST]).value == 1
    listed = parse_checkpoints(tags[TAG_CHECKPOINTS])
    assert [item.metric for item in listed] == [1.0, 2.0, 3.0], "each is ranked by its own epoch's value"

    # As after a kill while the results were being delivered: the next attempt has nothing more to train.
    bench.train(spec, run_id, attempt=2)

    assert [step for step, _ in bench.history(run_id, "val/loss")] == epochs


def test_early_stopping_says_so_once_and_why(bench: Bench) -> None:
    spec = user_spec("WorseAndWorse", epochs=10)
    spec["training"]["earlyStopping"] = {"patience": 2}
    with capture_logs() as logs:
        bench.train(spec, bench.new_run())
    (said,) = [line for line in logs if line["event"] == "training stopped early"]
    assert (said["epoch"], said["of"]) == (3, 10)
    assert said["reason"].startswith("Monitored metric val/loss did not improve in the last 2 records. Best score: 1")
    assert "Trainer" not in said["reason"]


def test_where_more_is_better_the_last_epoch_that_was_better_counts(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = user_spec("BetterAndBetter", epochs=10)
    spec["training"] |= {
        "earlyStopping": {"patience": 2, "monitor": "val/accuracy", "mode": "max"},
        "checkpoints": {"keep": 1},
    }
    bench.train(spec, run_id)
    assert [value for _, value in bench.history(run_id, "val/accuracy")] == [0, 1, 2, 1, 0]
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert facts.best is not None
    assert (facts.best.value, facts.best.step) == (2, 3)
    assert [item.step for item in facts.checkpoints] == [3, 5], "the best one, and the last"


@pytest.mark.parametrize("patience", [2, 0])
def test_a_training_that_diverges_before_it_was_any_good_is_an_error_of_the_user_s(
    patience: int, run_locally: Any, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = user_spec("Diverging", epochs=3, registration={"model": "diverged"})
    spec["training"]["earlyStopping"] = {"patience": patience}
    code, message, run = run_locally(spec, f"diverging-{patience}")
    assert (code, message.reason, run.info.status) == (ExitCode.ERROR, Reason.USER_ERROR, "FAILED")
    assert message.message.startswith("val/loss became nan in epoch 1, and no checkpoint is of an epoch in which")
    assert "lower the learning rate" in message.message
    assert bench.client.search_registered_models("name = 'diverged'") == []
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert "Go on with" not in said, "it would be no better"
    assert len(bench.history(run.info.run_id, "train/loss")) == (1 if patience else 3)

    with pytest.raises(DivergedError, match="val/loss became nan in epoch 1"):
        bench.train(spec, run.info.run_id, attempt=2)
    assert len(bench.history(run.info.run_id, "train/loss")) == (1 if patience else 3)


def test_a_training_that_diverges_later_goes_on_with_what_was_best_before(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = user_spec("Diverging", epochs=9, registration={"model": "diverged-late"})
    spec["model"]["args"] = {"since": 2}
    with capture_logs() as logs:
        bench.train(spec, run_id)
    (said,) = [line for line in logs if line["event"].startswith("training diverged: the best checkpoint before")]
    assert (said["reason"], said["value"]) == ("val/loss became nan in epoch 3", 1.0)
    assert model_of(bench, run_id) is not None
    assert len(bench.history(run_id, "train/loss")) == 3, "it stopped early"


@pytest.mark.parametrize(("module", "told"), [("Line", 1), ("BetterAndBetter", 1), ("WorseAndWorse", 0)])
def test_a_monitored_metric_that_is_never_logged_is_told_once(bench: Bench, module: str, told: int) -> None:
    with capture_logs() as logs:
        bench.train(user_spec(module, epochs=3), bench.new_run())
    said = [line for line in logs if line["event"].startswith("the monitored metric is not logged")]
    assert len(said) == told
    assert all(line["monitor"] == "val/loss" and "train/loss" in line["logged"] for line in said)


def test_metrics_are_tracked_for_every_step_and_every_epoch(trained: Trained, bench: Bench) -> None:
    run_id = trained.run.info.run_id
    steps = list(range(EPOCHS * BATCHES))
    assert [step for step, _ in bench.history(run_id, "train/loss_step")] == steps
    assert [step for step, _ in bench.history(run_id, "lr-AdamW/pg1")] == steps
    for name in ("train/loss_epoch", "val/loss", "val/position_error_median_m", "val/coverage_95"):
        assert [step for step, _ in bench.history(run_id, name)] == [2, 5]
    assert len(bench.history(run_id, "test/position_error_p90_m")) == 1
    assert "epoch" not in trained.run.data.metrics


def test_the_last_value_of_every_metric_is_given_back(trained: Trained) -> None:
    for name in ("train/loss_step", "train/loss_epoch", "val/loss", "test/loss", "test/coverage_68"):
        assert trained.metrics[name] == pytest.approx(trained.run.data.metrics[name])


def test_parameters_tell_spec_module_environment_and_data(trained: Trained) -> None:
    params = trained.run.data.params
    assert params["training.epochs"] == str(EPOCHS)
    assert params["model.backbone"] == "test_resnet"
    assert params["module.learning_rate"] == "0.001"
    assert params["module.loss"] == "gaussian"
    assert params["environment.torch"] == torch.__version__
    assert params["environment.precision"] == "32-true"
    assert params["dataset.transmissions"] == "20"
    assert len(params["dataset.digest"]) == 64


def test_a_localizer_trains_in_half_precision(bench: Bench, localizer: dict[str, Any], trained: Trained) -> None:
    run_id = bench.new_run()
    training = {**localizer["training"], "precision": "bf16-mixed"}

    metrics = bench.train({**localizer, "training": training, "export": {"onnx": True}}, run_id)

    assert bench.client.get_run(run_id).data.params["environment.precision"] == "bf16-mixed"
    assert metrics["train/loss_epoch"] != trained.metrics["train/loss_epoch"], "something was rounded"
    for name in ("train/loss_epoch", "val/loss", "test/loss"):
        assert metrics[name] == pytest.approx(trained.metrics[name], abs=0.1)


@pytest.mark.parametrize("module", ["Line", "Calling"])
def test_processes_that_would_go_on_from_different_places_do_not(
    module: str, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever callbacks the module brings."""
    monkeypatch.setattr(pipeline.group, "from_first", lambda _: "step-00000004.ckpt")
    with pytest.raises(ConnectionError, match=r"goes on from the beginning, the first of its group from step-00000004"):
        bench.train(user_spec(module, epochs=1), bench.new_run())


def test_processes_whose_gpus_have_chosen_unlike_precision_do_not_train(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.group, "from_first", lambda mine: "16-mixed" if mine == "32-true" else mine)
    said = r"spec\.training\.precision auto is 16-mixed .*, 32-true here; name one"
    with pytest.raises(ConfigurationError, match=said):
        bench.train(user_spec("Line", epochs=1), bench.new_run())


def test_the_run_tells_progress_and_the_best_value_and_is_left_to_its_owner(trained: Trained, bench: Bench) -> None:
    run = trained.run
    assert run.info.status == "RUNNING"
    progress = Progress.model_validate_json(run.data.tags[TAG_PROGRESS])
    assert (progress.epoch, progress.epochs, progress.step, progress.steps) == (EPOCHS, EPOCHS, 6, 6)
    assert progress.first_step_time is not None
    assert progress.time is not None
    assert progress.first_step_time < progress.time
    assert re.fullmatch(r"1/[1-9]\d*", run.data.tags[TAG_ACTIVITY])
    best = BestMetric.model_validate_json(run.data.tags[TAG_BEST])
    assert best.name == "val/loss"
    assert best.value == pytest.approx(min(value for _, value in bench.history(run.info.run_id, "val/loss")))


def test_the_best_checkpoint_and_the_last_are_there_whole(trained: Trained, bench: Bench, tmp_path: Path) -> None:
    run_id = trained.run.info.run_id
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert 1 <= len(facts.checkpoints) <= 2
    assert facts.last_checkpoint is not None
    assert facts.last_checkpoint.step == EPOCHS * BATCHES
    stored = {item.path for item in bench.client.list_artifacts(run_id, "checkpoints")}
    assert stored == {item.path for item in facts.checkpoints}
    for item in facts.checkpoints:
        file = Path(bench.client.download_artifacts(run_id, item.path, str(tmp_path)))
        assert hashlib.sha256(file.read_bytes()).hexdigest() == item.sha256
        module = LocalizationModule.load_from_checkpoint(file, weights_only=False)
        assert module.hparams["backbone"] == "test_resnet"


def load_model(location: str) -> Any:
    import mlflow.pyfunc  # warns when it is imported

    return mlflow.pyfunc.load_model(location)


def model_of(bench: Bench, run_id: str) -> Any:
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    model_id = find_model(bench.client, facts)
    assert model_id is not None
    return bench.client.get_logged_model(model_id)


def test_the_model_has_a_signature_and_an_example_and_predicts(trained: Trained, bench: Bench) -> None:
    location = model_of(bench, trained.run.info.run_id).artifact_location
    model = load_model(location)
    assert [item.name for item in model.metadata.signature.inputs] == ["spectrograms", "receivers"]
    assert [item.name for item in model.metadata.signature.outputs] == ["position", "sigma"]
    example = model.input_example
    one = model.predict(example)
    assert one["position"].shape == one["sigma"].shape == (1, 2)
    assert (one["sigma"] > 0).all()
    many = model.predict({name: np.repeat(value, 2, axis=0)[:, :2] for name, value in example.items()})
    assert many["position"].shape == (2, 2)


def test_the_model_is_that_of_the_best_checkpoint(trained: Trained, bench: Bench, tmp_path: Path) -> None:
    run_id = trained.run.info.run_id
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    best = min(facts.checkpoints, key=lambda item: item.metric or 0.0)
    file = bench.client.download_artifacts(run_id, best.path, str(tmp_path))
    module = LocalizationModule.load_from_checkpoint(file, weights_only=False).eval()
    model = load_model(model_of(bench, run_id).artifact_location)
    inputs = [torch.as_tensor(model.input_example[name]) for name in ("spectrograms", "receivers")]
    with torch.no_grad():
        expected = module(*inputs)
    assert model.predict(model.input_example)["position"] == pytest.approx(expected[:, :2].numpy(), rel=1e-5)


def test_a_localizer_with_arrivals_is_trained_and_takes_them_when_it_is_served(
    localizer: dict[str, Any], bench: Bench
) -> None:
    run_id = bench.new_run()
    spec = {**localizer, "data": {**localizer["data"], "arrivals": True}, "registration": {"model": "tiny"}}
    bench.train(spec, run_id)
    model = load_model(model_of(bench, run_id).artifact_location)
    assert model.metadata.signature.inputs.input_dict()["receivers"].shape == (-1, -1, 4)
    example = model.input_example
    assert example["receivers"].shape[-1] == 4
    later = {**example, "receivers": example["receivers"] + np.float32([0, 0, 500, 0]) * np.eye(3, 1, dtype="f4")}
    assert not np.allclose(model.predict(later)["position"], model.predict(example)["position"], atol=0.1)


# --- interruptions -------------------------------------------------------------------------------------------------


def sigterm_at(
    hook: str,
    step: int,
    patch: pytest.MonkeyPatch,
    module: type[Any] = LocalizationModule,
    number: signal.Signals = signal.SIGTERM,
) -> None:
    """Have the process told to end where a module is at a step."""
    whole = getattr(module, hook)

    def told_to_end(self: Any, *arguments: Any) -> Any:
        if self.global_step == step:
            signal.raise_signal(number)
        return whole(self, *arguments)

    patch.setattr(module, hook, told_to_end)


STOPS = {
    **{f"step {step}": ("training_step", step, step + 1) for step in range(EPOCHS * BATCHES)},
    **{f"validation behind step {step}": ("validation_step", step, step) for step in (BATCHES, EPOCHS * BATCHES)},
}
"""Where a training is told to end, and the step of the checkpoint that it leaves."""


@pytest.mark.parametrize(("hook", "step", "checkpoint"), STOPS.values(), ids=STOPS.keys())
def test_stopping_and_going_on_gives_the_same_losses_as_not_stopping(
    hook: str,
    step: int,
    checkpoint: int,
    *,
    trained: Trained,
    bench: Bench,
    localizer: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_id = bench.new_run()
    with monkeypatch.context() as patch:
        sigterm_at(hook, step, patch)
        with pytest.raises(TerminatedError, match=f"at step {checkpoint}; its checkpoint was delivered"):
            bench.train(localizer, run_id)
    metrics = bench.train(localizer, run_id, attempt=2)
    for name in ("train/loss_step", "train/loss_epoch", "val/loss", "val/position_error_median_m"):
        stopped, whole = (bench.history(each, name) for each in (run_id, trained.run.info.run_id))
        assert [step for step, _ in stopped] == [step for step, _ in whole]
        assert dict(stopped) == pytest.approx(dict(whole), rel=1e-6)
    tested = {name: value for name, value in trained.metrics.items() if name.startswith("test/")}
    assert {name: metrics[name] for name in tested} == pytest.approx(tested, rel=1e-6)


OWN_STOPS = (1, 4, 6)
"""Of twelve steps in three epochs: in the middle of the first and the second, and at the beginning of the second."""


def losses_when_stopped(bench: Bench, spec: dict[str, Any], patch: pytest.MonkeyPatch, step: int) -> dict[int, float]:
    """Of each step of a training that is told to end at one."""
    run_id = bench.new_run()
    with patch.context() as context:
        sigterm_at("training_step", step, context, user_modules.Line)
        with pytest.raises(TerminatedError, match=f"at step {step + 1}; its checkpoint was delivered"):
            bench.train(spec, run_id)
    bench.train(spec, run_id, attempt=2)
    return dict(bench.history(run_id, "train/loss"))


def test_a_module_that_draws_random_numbers_draws_the_same_when_it_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, whole = user_spec("Dropping", epochs=3), bench.new_run()
    bench.train(spec, whole)
    expected = dict(bench.history(whole, "train/loss"))
    assert len(expected) == 12
    for step in OWN_STOPS:
        assert losses_when_stopped(bench, spec, monkeypatch, step) == pytest.approx(expected, rel=1e-6), step


@pytest.mark.parametrize(
    ("module", "how"),
    [
        *(("Shuffled", how) for how in ("shuffle", "generator", "weighted", "distributed", "workers")),
        ("SeveralShuffled", "shuffle"),
    ],
)
def test_ordinary_loaders_of_one_s_own_go_on_in_the_order_that_they_had(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, module: str, how: str
) -> None:
    spec = user_spec(module, epochs=3)
    spec["model"]["args"] = {"how": how}
    whole = bench.new_run()
    bench.train(spec, whole)
    expected = dict(bench.history(whole, "train/loss"))
    assert len(expected) == 12
    for step in OWN_STOPS:
        assert losses_when_stopped(bench, spec, monkeypatch, step) == pytest.approx(expected, rel=1e-6), step


def test_a_loader_that_can_not_go_on_in_mid_epoch_is_warned_about(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {
        **user_spec("Shuffled", epochs=1),
        "model": {"module": f"{MODULES}:Shuffled", "args": {"how": "its own way"}},
    }
    with pytest.warns(PossibleUserWarning, match="your dataloader is not resumable"):
        losses_when_stopped(bench, spec, monkeypatch, 1)


def test_a_backbone_that_leaves_paths_out_at_random_goes_on_with_the_same_losses_too(
    bench: Bench, localizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Swin does by default, whose smallest is too large for here."""
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *names, **more: create(*names, **more, drop_path_rate=0.5))
    spec = {**localizer, "model": {"backbone": "test_convnext"}}
    whole, stopped = bench.new_run(), bench.new_run()
    bench.train(spec, whole)
    stop_in_mid_epoch(bench, spec, stopped, monkeypatch)
    bench.train(spec, stopped, attempt=2)
    for name, count in {"train/loss_step": EPOCHS * BATCHES, "val/loss": EPOCHS}.items():
        expected = dict(bench.history(whole, name))
        assert len(expected) == count
        assert dict(bench.history(stopped, name)) == pytest.approx(expected, rel=1e-6)


def test_with_processes_that_load_data_going_on_gives_the_same_losses_too(
    trained: Trained, bench: Bench, localizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Samples are varied at random, in other processes: their number changes nothing either."""
    run_id = bench.new_run()
    for attempt, workers in ((1, 2), (2, 1)):
        spec = {**localizer, "training": {**localizer["training"], "dataLoaderWorkers": workers}}
        if attempt == 1:
            stop_in_mid_epoch(bench, spec, run_id, monkeypatch)
        else:
            bench.train(spec, run_id, attempt=attempt)
    for name in ("train/loss_step", "val/loss"):
        stopped, whole = (bench.history(each, name) for each in (run_id, trained.run.info.run_id))
        assert [step for step, _ in stopped] == [step for step, _ in whole]
        assert dict(stopped) == pytest.approx(dict(whole), rel=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_who_waits_for_a_batch_that_does_not_come_saves_the_step_before(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(user_modules.Away, "reads", 0)
    # How long torch waits for a process that loads, before it ends it.
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)
    spec, run_id = user_spec("AwayFrom", epochs=2), bench.new_run()
    spec["model"]["args"] = {"num_workers": workers}
    with pytest.raises(TerminatedError, match=r"at step [0-2]; its checkpoint was delivered"):
        bench.train(spec, run_id)
    monkeypatch.setattr(user_modules.Away, "reads", 6)  # of a process that loads, as it begins
    bench.train(spec, run_id, attempt=2)
    assert [step for step, _ in bench.history(run_id, "train/loss")] == list(range(8))


def test_steps_that_lightning_does_not_count_are_saved_too(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    spec, run_id, step = user_spec("ByHandUncounted", epochs=2), bench.new_run(), user_modules.Line.training_step

    def told_to_end(module: user_modules.Line, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 2:
            signal.raise_signal(signal.SIGTERM)
        return step(module, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(user_modules.Line, "training_step", told_to_end)
        with pytest.raises(TerminatedError, match="at step 0; its checkpoint was delivered"):
            bench.train(spec, run_id)
    assert len(parse_checkpoints(bench.client.get_run(run_id).data.tags[TAG_CHECKPOINTS])) == 1
    bench.train(spec, run_id, attempt=2)
    assert [step for step, _ in bench.history(run_id, "train/loss")] == list(range(8))


def test_checkpoints_of_steps_that_are_not_counted_have_names_of_their_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, submit = list[str](), CheckpointPublisher.submit

    def named(publisher: CheckpointPublisher, file: Path, **more: Any) -> None:
        names.append(file.name)
        submit(publisher, file, **more)

    monkeypatch.setattr(CheckpointPublisher, "submit", named)
    spec = user_spec("ByHandUncounted", epochs=2)
    spec["training"]["checkpoints"] = {"everyMinutes": 1e-9}
    bench.train(spec, bench.new_run())
    assert len(names) == len(set(names)) == 8


@pytest.mark.parametrize(("where", "validations"), [("step", 1), ("validation", 1)])
def test_a_batch_that_is_read_in_a_step_or_to_validate_on_is_waited_for(
    bench: Bench, where: str, validations: int
) -> None:
    spec, run_id = user_spec("ReadsMore", epochs=2), bench.new_run()
    spec["model"]["args"] = {"where": where}
    with pytest.raises(TerminatedError, match="at step 1; its checkpoint was delivered"):
        bench.train(spec, run_id)
    assert len(bench.history(run_id, "train/loss")) == 1
    assert len(bench.history(run_id, "val/loss")) == validations


def test_a_validation_that_takes_too_long_is_broken_off_when_told_to_end(
    trained: Trained, bench: Bench, localizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(callbacks, "VALIDATION_SHARE", 0.0)
    run_id = bench.new_run()
    with monkeypatch.context() as patch:
        sigterm_at("validation_step", 3, patch)
        with pytest.raises(TerminatedError, match="at step 3; its checkpoint was delivered"):
            bench.train(localizer, run_id)
    assert bench.history(run_id, "val/loss") == []
    bench.train(localizer, run_id, attempt=2)
    for name in ("train/loss_step", "train/loss_epoch"):
        stopped, whole = (dict(bench.history(each, name)) for each in (run_id, trained.run.info.run_id))
        assert stopped == pytest.approx(whole, rel=1e-6)


def test_a_checkpoint_that_is_due_at_an_epoch_s_last_step_leaves_its_validation_to_who_goes_on(
    trained: Trained, bench: Bench, localizer: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = {**localizer, "training": {**localizer["training"], "checkpoints": {"keep": 1, "everyMinutes": 1e-9}}}
    run_id = bench.new_run()
    with monkeypatch.context() as patch:
        patch.setattr(LocalizationModule, "validation_step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            bench.train(spec, run_id)
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert facts.last_checkpoint is not None
    assert facts.last_checkpoint.step == BATCHES - 1
    bench.train(spec, run_id, attempt=2)
    stopped, whole = (bench.history(each, "val/loss") for each in (run_id, trained.run.info.run_id))
    assert [step for step, _ in stopped] == [step for step, _ in whole]
    assert dict(stopped) == pytest.approx(dict(whole), rel=1e-6)


LATE: dict[str, tuple[Any, str]] = {
    "behind the last epoch": (user_modules.LineWithoutData, "on_train_epoch_end"),
    "in the test": (user_modules.LineWithoutData, "test_step"),
    "while the model is saved": (modelling, "log_module"),
}


@pytest.mark.parametrize("place", LATE.values(), ids=LATE.keys())
def test_sigterm_between_the_last_epoch_and_the_model_publishes_nothing_by_halves(
    place: tuple[Any, str], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    epochs = 2
    spec = user_spec("LineWithoutData", epochs, data={"module": f"{MODULES}:Points"}, registration={"model": "late"})
    owner, name = place
    whole = getattr(owner, name)

    def told_to_end(*arguments: Any, **more: Any) -> Any:
        if not isinstance(arguments[0], user_modules.Line) or arguments[0].global_step == epochs:
            signal.raise_signal(signal.SIGTERM)
        return whole(*arguments, **more)

    run_id = bench.new_run()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, told_to_end)
        with pytest.raises(TerminatedError):
            bench.train(spec, run_id)
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert facts.last_checkpoint is not None
    assert facts.last_checkpoint.step == epochs
    assert find_model(bench.client, facts) is None

    metrics = bench.train(spec, run_id, attempt=2)
    assert metrics["test/loss"] == pytest.approx(min(value for _, value in bench.history(run_id, "val/loss")))
    assert load_model(model_of(bench, run_id).artifact_location).metadata.signature is not None


def test_a_scheduler_hears_of_the_epoch_whose_end_was_the_last_that_an_attempt_saw(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = user_spec("Plateau")
    whole, stopped = bench.new_run(), bench.new_run()
    bench.train(spec, whole)
    log = user_modules.Plateau.on_train_epoch_end

    def told_to_end(module: Any) -> None:
        if module.current_epoch == 1:
            signal.raise_signal(signal.SIGTERM)
        log(module)

    with monkeypatch.context() as patch:
        patch.setattr(user_modules.Plateau, "on_train_epoch_end", told_to_end)
        with pytest.raises(TerminatedError, match="at step 2"):
            bench.train(spec, stopped)
    bench.train(spec, stopped, attempt=2)
    rates = [bench.history(run_id, "lr-Adam") for run_id in (whole, stopped)]
    assert rates[0] == rates[1]
    assert [value for _, value in rates[0]] == pytest.approx([0.1, 0.1, 0.05, 0.025])


@pytest.fixture
def mine(
    recorded: DataSettings, localizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> DataSettings:
    """A copy of the shared recordings, to be changed; the variables name it."""
    source = Path(recorded.recordings_url.removeprefix("file:"))
    shutil.copytree(source, tmp_path / "recordings")
    shutil.copy(source.parent / "heimdall.db", tmp_path)
    settings = data_settings(tmp_path, cache_dir=recorded.cache_dir)
    for name, value in variables(settings).items():
        monkeypatch.setenv(name, value)
    return settings


def stop_in_mid_epoch(bench: Bench, spec: dict[str, Any], run_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        sigterm_at("training_step", 4, patch)
        with pytest.raises(TerminatedError, match="at step 5; its checkpoint was delivered"):
            bench.train(spec, run_id)


def test_sessions_that_were_approved_or_withdrawn_meanwhile_change_nothing_in_a_run_that_goes_on(
    trained: Trained, bench: Bench, localizer: dict[str, Any], mine: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = bench.new_run()
    stop_in_mid_epoch(bench, localizer, run_id, monkeypatch)
    generate(mine, **{**SESSIONS, "sessions": 10, "seed": 8})
    database = SessionStore.open(mine)
    database.set_status("generated-7-000", "rejected")
    database.close()
    with capture_logs() as lines:
        metrics = bench.train(localizer, run_id, attempt=2)

    for name in ("train/loss_step", "train/loss_epoch", "val/loss"):
        stopped, whole = (dict(bench.history(each, name)) for each in (run_id, trained.run.info.run_id))
        assert stopped == pytest.approx(whole, rel=1e-6)
    assert metrics["test/loss"] == pytest.approx(trained.metrics["test/loss"], rel=1e-6)
    told = [line["sessions"] for line in lines if "approved no longer" in line["event"]]
    assert told == [["generated-7-000"]]
    assert not [line for line in lines if line["event"] == "a parameter was not logged"], "it is the same data set"


def test_a_run_whose_sessions_are_gone_does_not_go_on_without_them(
    bench: Bench, localizer: dict[str, Any], mine: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = bench.new_run()
    stop_in_mid_epoch(bench, localizer, run_id, monkeypatch)
    Path(mine.database_url.get_secret_value().removeprefix("sqlite:///")).unlink()
    generate(mine, **{**SESSIONS, "seed": 8})
    with pytest.raises(DataError, match=r"no longer holds: generated-7-000, .*restore them, or begin a new run"):
        bench.train(localizer, run_id, attempt=2)


def test_an_attempt_that_goes_on_fetches_no_pretrained_weights(
    bench: Bench, localizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "weights"
    folder.mkdir()
    state = make_backbone("test_resnet", pretrained=False).state_dict()
    save_file({name: value.contiguous() for name, value in state.items()}, folder / "test_resnet.safetensors")
    monkeypatch.setenv("HEIMDALL_WEIGHTS_URL", f"file:{folder}")
    spec = {**localizer, "model": {**localizer["model"], "pretrained": True}}
    run_id = bench.new_run()
    stop_in_mid_epoch(bench, spec, run_id, monkeypatch)
    shutil.rmtree(folder)
    with capture_logs() as lines:
        bench.train(spec, run_id, attempt=2)
    params = bench.client.get_run(run_id).data.params
    assert params["module.pretrained"] == "True"
    assert params["weights"].endswith("/test_resnet.safetensors")
    assert not [line for line in lines if line["event"] == "a parameter was not logged"]
    with pytest.raises(ConfigurationError, match="HEIMDALL_WEIGHTS_URL"):
        bench.train(spec, bench.new_run())


def test_a_checkpoint_at_an_epoch_s_end_is_not_mistaken_for_one_of_its_last_step(bench: Bench) -> None:
    spec = user_spec("LineWithoutData", data={"module": f"{MODULES}:Points"})
    spec["training"]["checkpoints"] = {"everyMinutes": 1e-9, "keep": 10}
    run_id = bench.new_run()
    bench.train(spec, run_id)
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    paths = [item.path for item in facts.checkpoints]
    assert len(paths) == len(set(paths))
    assert {item.path for item in bench.client.list_artifacts(run_id, "checkpoints")} == set(paths)


def test_training_goes_on_while_a_checkpoint_is_being_written_and_does_not_change_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    further, write, step = threading.Event(), Snapshot.write, user_modules.Line.training_step

    def slow(snapshot: Snapshot, file: Path) -> None:
        assert further.wait(TIMEOUT_S)
        write(snapshot, file)

    def next_step(module: user_modules.Line, *batch: Any) -> Any:
        if module.global_step == 1:
            further.set()
        return step(module, *batch)

    monkeypatch.setattr(Snapshot, "write", slow)
    monkeypatch.setattr(user_modules.Line, "training_step", next_step)
    run_id = bench.new_run()
    bench.train(user_spec("WorseAndWorse", epochs=2), run_id)
    held = [
        torch.load(bench.folder / run_id / file, weights_only=False)
        for file in (CHECKPOINT_OF_LINE.format(1, 0), CHECKPOINT_OF_LINE.format(2, 1))
    ]
    assert [each["global_step"] for each in held] == [1, 2]
    assert [float(each["optimizer_states"][0]["state"][0]["step"]) for each in held] == [1, 2]


@dataclass
class Pod:
    """`heimdall-train run` as a pod's command, on a module that has itself told to end in its first attempt."""

    spec: dict[str, Any]
    run_id: str
    folder: Path
    process: subprocess.Popen[bytes]

    def finish(self) -> tuple[int, TerminationMessage | None, str]:
        """Exit code, termination message, and what it printed."""
        code = self.process.wait(POD_TIMEOUT_S)
        words = self.folder / "termination-log"
        message = TerminationMessage.model_validate_json(words.read_text()) if words.exists() else None
        return code, message, (self.folder / "printed").read_text()


@pytest.fixture(scope="module", autouse=True)
def pod(bench: Bench) -> Iterator[Pod]:
    """Started before the first test of this file, as starting takes longest."""
    spec, run_id, folder = user_spec("StoppedLine", epochs=8), bench.new_run(), bench.folder
    (folder / "run.json").write_text(described(spec).model_dump_json())
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HEIMDALL_", "MLFLOW_"))},
        ENV_TRACKING_URI: bench.uri,
        ENV_MLFLOW_RUN_ID: run_id,
        ENV_ATTEMPT: "1",
        ENV_TERMINATION_MESSAGE: str(folder / "termination-log"),
        "OMP_NUM_THREADS": "1",
    }
    arguments = ["run", "-f", str(folder / "run.json"), "--output-dir", str(folder / "pod")]
    with (folder / "printed").open("wb") as printed:
        process = subprocess.Popen(
            [sys.executable, "-m", "heimdall_trainer.cli", *arguments],
            env=environment,
            cwd=ROOT,
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    yield Pod(spec, run_id, folder, process)
    process.kill()
    process.wait()


def test_the_model_is_there_as_onnx_in_the_run_and_with_the_model_and_says_the_same(
    trained: Trained, bench: Bench
) -> None:
    artifacts = Path(bench.client.download_artifacts(trained.run.info.run_id, ONNX_FILE))
    location = model_of(bench, trained.run.info.run_id).artifact_location
    beside = Path(location.removeprefix("file://")) / ONNX_FILE
    assert beside.read_bytes() == artifacts.read_bytes()
    model = load_model(location)
    found = open_onnx(beside)({name: torch.as_tensor(value) for name, value in model.input_example.items()})
    served = model.predict(model.input_example)
    for name in ("position", "sigma"):
        assert found[name].numpy() == pytest.approx(served[name], abs=0.1)


def test_plots_of_the_test_split_are_artifacts_of_the_run(trained: Trained, bench: Bench) -> None:
    files = {Path(item.path).name for item in bench.client.list_artifacts(trained.run.info.run_id, PLOTS_DIR)}
    assert files == {"error_map.png", "calibration.png", "loss.png"}
    for name in files:
        file = bench.client.download_artifacts(trained.run.info.run_id, f"{PLOTS_DIR}/{name}")
        assert Path(file).read_bytes().startswith(b"\x89PNG")


def test_model_and_checkpoint_tell_the_sessions_of_their_training(trained: Trained, bench: Bench) -> None:
    run_id = trained.run.info.run_id
    known = load_model(model_of(bench, run_id).artifact_location).metadata.metadata["sessions"]
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    file = bench.client.download_artifacts(run_id, facts.checkpoints[0].path)
    held = torch.load(file, map_location="cpu", weights_only=False)
    assert held["HeimdallDataModule"] == {"sessions": known}
    assert f"[{', '.join(known['test'])}]" == trained.run.data.params["dataset.test_sessions"]
    assert sorted(session for side in known.values() for session in side) == sorted(
        f"generated-7-{number:03}" for number in range(5)
    )


def test_runs_that_share_an_output_folder_write_over_nothing_of_each_other(bench: Bench) -> None:
    made = set[str]()
    for lr in (0.1, 0.2):
        run_id = bench.new_run()
        bench.train({**user_spec("Line", epochs=1), "model": {"module": f"{MODULES}:Line", "args": {"lr": lr}}}, run_id)
        listed = parse_checkpoints(bench.client.get_run(run_id).data.tags[TAG_CHECKPOINTS])
        made |= {checkpoint.sha256 for checkpoint in listed}
    assert len(made) == 2
    assert made <= {hashlib.sha256(file.read_bytes()).hexdigest() for file in bench.folder.rglob("*.ckpt")}


# --- a user's own modules ------------------------------------------------------------------------------------------


def test_any_lightning_module_with_its_own_data_is_trained_and_logged(bench: Bench) -> None:
    run_id = bench.new_run()
    metrics = bench.train(user_spec("Line", epochs=30, registration={"model": "line"}), run_id)
    assert metrics["train/loss"] < bench.history(run_id, "train/loss")[0][1] / 10
    run = bench.client.get_run(run_id)
    assert run.data.params["module.lr"] == "0.1"
    model = load_model(model_of(bench, run_id).artifact_location)
    assert model.metadata.signature is not None
    assert model.predict(model.input_example).shape == (1, 1)


def test_a_module_that_keeps_its_loader_is_logged_with_it_as_it_was(run_locally: Any, bench: Bench) -> None:
    import mlflow.pytorch

    code, message, run = run_locally(user_spec("Keeping", epochs=2, registration={"model": "keeping"}), "keeping")
    assert (code, message, run.info.status) == (ExitCode.SUCCESS, None, "FINISHED")
    kept = mlflow.pytorch.load_model(model_of(bench, run.info.run_id).artifact_location).loader
    assert type(kept) is DataLoader
    assert len(list(kept)) == 4


def test_a_figure_that_a_module_logs_as_it_is_used_to_is_an_artifact_of_the_run(bench: Bench) -> None:
    run_id = bench.new_run()
    bench.train(user_spec("Drawing", epochs=2), run_id)
    drawn = [item.path for item in bench.client.list_artifacts(run_id, "lines")]
    assert drawn == ["lines/0.png", "lines/1.png"]
    assert Path(bench.client.download_artifacts(run_id, drawn[1])).read_bytes().startswith(b"\x89PNG")


def test_a_stream_that_two_optimizers_learn_from_by_hand_is_trained_and_logged(bench: Bench) -> None:
    run_id, epochs = bench.new_run(), 10
    bench.train(user_spec("ByHand", epochs, registration={"model": "by-hand"}), run_id)
    losses = [value for _, value in bench.history(run_id, "train/loss")]
    assert len(losses) == 2 * epochs
    assert losses[-1] < losses[0] / 2
    progress = Progress.model_validate_json(bench.client.get_run(run_id).data.tags[TAG_PROGRESS])
    assert (progress.epoch, progress.step, progress.steps) == (epochs, 4 * epochs, None)
    model = load_model(model_of(bench, run_id).artifact_location)
    assert model.predict(model.input_example).shape == (1, 1)


def test_what_the_spec_says_of_model_and_training_reaches_module_and_data(
    bench: Bench, localizer: dict[str, Any]
) -> None:
    told = {
        "learningRate": 0.02,
        "weightDecay": 0.3,
        "loss": "huber",
        "seed": 7,
        "batchSize": 3,
        "dataLoaderWorkers": 1,
    }
    spec = {"model": {"backbone": "test_resnet", "freezeBackbone": True}, "training": told}
    tracker = MLflowTracker(load_settings(tracking_uri=bench.uri))
    tracker.attach(bench.new_run())
    training = TrainingPipeline(described(spec), tracker, output_dir=bench.folder)
    try:
        module, data = training.setup_model(), training.setup_data_loaders()
        data.setup()
    finally:
        training.close()

    hparams = {"backbone": "test_resnet", "learning_rate": 0.02, "weight_decay": 0.3, "loss": "huber"}
    assert hparams.items() <= dict(module.hparams).items()
    assert not any(each.requires_grad for each in module.net.backbone.parameters())
    assert all(each.requires_grad for each in module.net.position_head.parameters())
    torch.manual_seed(7)
    same = LocalizationModule("test_resnet", freeze_backbone=True)
    assert torch.equal(module.net.position_head[0].weight, same.net.position_head[0].weight)
    loader = data.train_dataloader()
    assert (loader.batch_size, loader.num_workers, loader.sampler.seed) == (3, 1, 7)
    every = [session for side in data.split.sides.values() for session in side]
    fractions = {"validation_fraction": 0.2, "test_fraction": 0.1}
    assert data.split == split_sessions(sorted(every), **fractions, seed=7)
    assert data.split != split_sessions(sorted(every), **fractions, seed=42)


def test_recordings_are_left_to_the_one_process_of_a_node_that_lightning_asks(
    bench: Bench, localizer: dict[str, Any]
) -> None:
    tracker = MLflowTracker(load_settings(tracking_uri=bench.uri))
    tracker.attach(bench.new_run())
    training = TrainingPipeline(described(localizer), tracker, output_dir=bench.folder)
    try:
        assert training.setup_data_loaders()._found is None
    finally:
        training.close()


def test_how_many_steps_there_are_is_not_said_of_optimizers_that_are_stepped_by_hand(bench: Bench) -> None:
    run_id = bench.new_run()
    bench.train(user_spec("ByHandOnPoints", 3), run_id)
    progress = Progress.model_validate_json(bench.client.get_run(run_id).data.tags[TAG_PROGRESS])
    assert (progress.epoch, progress.step, progress.steps) == (3, 6, None)


def test_a_module_that_keeps_a_part_of_its_weights_finds_the_others_again(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = user_spec("Trimmed", epochs=3, registration={"model": "trimmed"})
    bench.train(spec, run_id)
    (best, *_) = read_facts(bench.client, run_id).checkpoints  # type: ignore[union-attr]
    file = bench.client.download_artifacts(run_id, best.path)
    held = torch.load(file, map_location="cpu", weights_only=False)["state_dict"]
    model = load_model(model_of(bench, run_id).artifact_location)
    expected = held["mine.layer.weight"] + held["mine.layer.bias"]
    assert model.predict(np.ones((1, 1), np.float32)) == pytest.approx(expected.numpy())


def test_a_module_with_an_example_is_there_as_onnx(bench: Bench) -> None:
    run_id = bench.new_run()
    bench.train(user_spec("LineWithExample", export={"onnx": True}), run_id)
    file = Path(bench.client.download_artifacts(run_id, ONNX_FILE))
    found = open_onnx(file)({"x": torch.tensor([[0.5], [1.0], [-1.0]])})["output"]
    assert found.shape == (3, 1)
    assert not bench.client.list_artifacts(run_id, PLOTS_DIR)


def test_a_graph_that_fails_after_the_training_leaves_the_model_in_the_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(module: Any, file: Path) -> None:
        raise ExportError("it differs")

    monkeypatch.setattr(Results, "_rehearse", lambda *_: None)
    monkeypatch.setattr(export, "export_module", refuse)
    run_id = bench.new_run()
    spec = user_spec("LineWithExample", epochs=1, export={"onnx": True}, registration={"model": "differs"})
    with pytest.raises(ConfigurationError, match=r"spec\.export\.onnx: it differs.*The model was logged without it"):
        bench.train(spec, run_id)
    assert load_model(model_of(bench, run_id).artifact_location).predict(np.ones((1, 1), np.float32)).shape == (1, 1)


@pytest.mark.parametrize("error", [RuntimeError("no memory"), FencedError("attempt 2 has taken over")])
def test_whatever_fails_after_the_training_is_raised_when_the_model_is_there(
    error: Exception, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise error

    done = list[str]()
    monkeypatch.setattr(Results, "publish", fail)
    monkeypatch.setattr(TrainingPipeline, "_deliver", lambda _: done.append("delivered"))
    with pytest.raises(type(error), match=str(error)):
        bench.train(user_spec("Line", epochs=1), bench.new_run())
    assert done == ([] if isinstance(error, FencedError) else ["delivered"])


def test_a_data_module_of_one_s_own_is_used_for_training_validation_and_test(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = user_spec("LineWithoutData", data={"module": f"{MODULES}:Points", "args": {"batch_size": 2}})
    metrics = bench.train(spec, run_id)
    assert [step for step, _ in bench.history(run_id, "train/loss")] == list(range(16))
    assert metrics["test/loss"] == pytest.approx(metrics["val/loss"])


OTHER = "tests.unit.trainer.lightning_modules"


def test_a_module_and_its_data_of_the_other_lightning_package_are_trained_tested_and_logged(bench: Bench) -> None:
    run_id = bench.new_run()
    spec = {
        "model": {"module": f"{OTHER}:Digits", "args": {"hidden": 8}},
        "data": {"module": f"{OTHER}:Images", "args": {"count": 32}},
        "training": {"epochs": 20, "checkpoints": {"keep": 1}},
        "registration": {"model": "digits"},
    }
    metrics = bench.train(spec, run_id)
    losses = bench.history(run_id, "train/loss")
    assert [step for step, _ in losses] == list(range(40))
    assert losses[-1][1] < losses[0][1] / 2
    assert "val/loss" in metrics
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert facts.last_checkpoint is not None
    assert facts.last_checkpoint.step == 40
    assert bench.client.get_run(run_id).data.params["module.hidden"] == "8"
    model = load_model(model_of(bench, run_id).artifact_location)
    assert model.predict(model.input_example).shape == (1, 4)


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_lightning_s_own_example_is_trained_from_either_package(bench: Bench, package: str) -> None:
    """Classes that know nothing of this project, and log nothing."""
    run_id = bench.new_run()
    demos = f"{package}.demos.boring_classes"
    spec = {
        "model": {"module": f"{demos}:BoringModel"},
        "data": {"module": f"{demos}:BoringDataModule"},
        "training": {"epochs": 1, "checkpoints": {"keep": 1}},
    }
    bench.train(spec, run_id)
    facts = read_facts(bench.client, run_id)
    assert facts is not None
    assert facts.progress is not None
    assert facts.progress.step == 64
    assert [item.step for item in facts.checkpoints] == [64]


def test_a_module_of_one_package_with_data_of_the_other_is_refused_by_name(bench: Bench) -> None:
    spec = {
        "model": {"module": f"{OTHER}:Digits"},
        "data": {"module": f"{MODULES}:Points"},
        "training": {"epochs": 1},
    }
    with pytest.raises(ConfigurationError, match=r"spec\.data\.module Points is made for pytorch_lightning, .*Digits"):
        bench.train(spec, bench.new_run())


@pytest.mark.parametrize("terminal", [False, True], ids=["log", "terminal"])
def test_a_terminal_gets_a_bar_and_a_log_plain_lines(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setattr(os, "isatty", lambda descriptor: terminal)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    bars: list[ProgressBar] = []
    setup = ProgressBar.setup

    def noting(bar: ProgressBar, *arguments: Any, **more: Any) -> None:
        bars.append(bar)
        setup(bar, *arguments, **more)

    monkeypatch.setattr(ProgressBar, "setup", noting)

    bench.train(user_spec("Line", epochs=2), bench.new_run())

    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("epoch 2/2, step ")]
    assert (bool(bars), bool(lines)) == (terminal, not terminal)
    assert all(json.loads(line.partition(": ")[2])["train/loss"] >= 0 for line in lines)
    assert "\r" not in said


@pytest.mark.parametrize(
    ("asked", "capability", "module", "precision"),
    [
        ("auto", None, "Line", "32-true"),
        ("auto", (9, 0), "Line", "bf16-mixed"),
        ("auto", (9, 0), "ByHand", "bf16-mixed"),
        ("auto", (7, 5), "Line", "16-mixed"),
        ("auto", (7, 5), "ByHand", "32-true"),
        ("auto", (7, 0), "Line", "16-mixed"),
        ("auto", (6, 1), "Line", "32-true"),
        ("16-mixed", (9, 0), "Line", "16-mixed"),
        ("16-mixed", (7, 5), "ByHand", "16-mixed"),
        ("32-true", (7, 5), "Line", "32-true"),
    ],
)
def test_half_precision_where_the_process_s_own_device_has_it_or_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, asked: str, capability: tuple[int, int] | None, module: str, precision: str
) -> None:
    used, own, old = [0], 1, (6, 0)

    @contextmanager
    def device(number: int) -> Iterator[None]:
        used.append(number)
        yield
        used.pop()

    def capability_of_used() -> tuple[int, int] | None:
        return capability if used[-1] == own else old

    def has_bf16(*, including_emulation: bool) -> bool:
        return not including_emulation and (capability_of_used() or old) >= (8, 0)

    monkeypatch.setenv("LOCAL_RANK", str(own))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of_used)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", has_bf16)
    spec = described(user_spec(module) | {"training": {"precision": asked}}).spec
    run: Any = SimpleNamespace(spec=spec, module=getattr(user_modules, module)())

    assert TrainingPipeline._precision(run) == precision


# --- the command, without an operator ------------------------------------------------------------------------------


@pytest.fixture
def call_in_process(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`heimdall-train`, as a process of its own would call it: its exit code."""
    monkeypatch.setenv(ENV_TRACKING_URI, bench.uri)

    def call(*words: str) -> int:
        monkeypatch.setattr(sys, "argv", ["heimdall-train", *words])
        arguments = cli._parser().parse_args(words)
        code = run_to_exit_code(lambda: arguments.call(arguments))
        os.environ.pop(LOCAL_RUN_ID, None)
        return code

    return call


@pytest.fixture
def run_locally(bench: Bench, call_in_process: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`heimdall-train run` on a spec, in this process: exit code, termination message, MLflow's run if there is one."""
    words, file = tmp_path / "termination-log", tmp_path / "run.json"
    monkeypatch.setenv(ENV_TERMINATION_MESSAGE, str(words))

    def run(
        spec: dict[str, Any], name: str, folder: Path = tmp_path
    ) -> tuple[int, TerminationMessage | None, Run | None]:
        file.write_text(json.dumps({"metadata": {"name": name}, "spec": spec}))
        code = call_in_process("run", "-f", str(file), "--output-dir", str(folder))
        message = TerminationMessage.model_validate_json(words.read_text()) if words.exists() else None
        experiment = bench.client.get_experiment_by_name(DEFAULT_EXPERIMENT)
        assert experiment is not None
        runs = bench.client.search_runs([experiment.experiment_id], f"attributes.run_name = '{name}'")
        assert len(runs) <= 1
        return code, message, runs[0] if runs else None

    return run


def test_a_training_without_an_operator_owns_its_run_and_registers_its_model(
    run_locally: Any, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = user_spec("Line", registration={"model": "local", "aliases": ["candidate"]})
    code, message, run = run_locally(spec, "local")
    assert (code, message) == (ExitCode.SUCCESS, None)
    assert run.info.status == "FINISHED"
    version = bench.client.get_model_version_by_alias("local", "candidate")
    assert version.run_id == run.info.run_id
    printed = capsys.readouterr().out
    assert f"run:     {run.info.run_id}" in printed
    assert "train/loss" in printed
    assert "model:   models:/local/1" in printed


@pytest.mark.parametrize(
    "asked",
    [
        ({}, [], "of-the-environment"),
        ({}, ["--epochs", "1"], "of-the-environment"),
        ({"tracking": {"experiment": "of-the-file"}}, [], "of-the-file"),
        ({"tracking": {"experiment": "of-the-file"}}, ["--epochs", "1"], "of-the-file"),
    ],
)
def test_an_experiment_that_the_file_does_not_name_is_the_environment_s(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: tuple[dict[str, Any], list[str], str]
) -> None:
    tracking, flags, experiment = asked
    name, file = f"{experiment}-{len(flags)}", tmp_path / "run.json"
    file.write_text(json.dumps({"metadata": {"name": name}, "spec": user_spec("Line", epochs=1) | tracking}))
    monkeypatch.setenv(ENV_TRACKING_URI, bench.uri)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of-the-environment")
    command = ["train", "--config", str(file), *flags] if flags else ["run", "-f", str(file)]
    arguments = cli._parser().parse_args([*command, "--output-dir", str(tmp_path)])

    arguments.call(arguments)

    found = bench.client.get_experiment_by_name(experiment)
    assert found is not None
    assert [run.info.run_name for run in bench.client.search_runs([found.experiment_id])].count(name) == 1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a backbone that there is not": ({"model": {"backbone": "resnet5O"}}, "spec.model.backbone names 'resnet5O'"),
    "a module that can't be imported": (
        {"model": {"module": "nowhere.at_all:Net"}},
        "spec.model.module 'nowhere.at_all:Net' can't be imported: ModuleNotFoundError",
    ),
    "a class that there is not": (
        {"model": {"module": f"{MODULES}:Nothing"}},
        f"{MODULES} has no class Nothing",
    ),
    "data that is no data module": (
        {"model": {"module": f"{MODULES}:LineWithoutData"}, "data": {"module": f"{MODULES}:NoModule"}},
        "spec.data.module NoModule is no LightningDataModule",
    ),
    "an argument that is missing": (
        {"model": {"module": f"{MODULES}:Line"}, "data": {"module": f"{MODULES}:Demanding"}},
        "spec.data.args does not fit Demanding(size: 'int') -> 'None': missing a required argument: 'size'",
    ),
    "a class that is no module": ({"model": {"module": f"{MODULES}:NoModule"}}, "NoModule is no LightningModule"),
    "an argument that it does not take": (
        {"model": {"module": f"{MODULES}:Line", "args": {"width": 3}}},
        "spec.model.args does not fit Line(lr: 'float' = 0.1) -> 'None': got an unexpected keyword argument 'width'",
    ),
    "a module without an example": (
        {"model": {"module": f"{MODULES}:Line"}, "export": {"onnx": True}},
        "spec.export.onnx: Line has no example input: set example_input_array to what its forward takes",
    ),
    "an argument that its data does not take": (
        {"model": {"module": f"{MODULES}:Line"}, "data": {"module": f"{MODULES}:Points", "args": {"size": 3}}},
        "spec.data.args does not fit Points(batch_size",
    ),
    "sessions that there are not": (
        {"model": {"backbone": "test_resnet"}, "data": {"sessions": {"ids": ["nowhere"]}}},
        "spec.data.sessions.ids names sessions that can't be used: nowhere (unknown)",
    ),
}


@pytest.mark.parametrize(("spec", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_can_not_work_exits_78_and_names_the_field(
    spec: dict[str, Any],
    words: str,
    run_locally: Any,
    localizer: dict[str, Any],
    request: pytest.FixtureRequest,
) -> None:
    code, message, run = run_locally(spec, re.sub(r"[^a-z0-9]+", "-", request.node.callspec.id))
    assert code == ExitCode.CONFIGURATION
    assert message.reason is Reason.INVALID_CONFIGURATION
    assert words in message.message
    assert run.info.status == "FAILED"


def test_a_folder_that_can_not_be_made_is_named_before_anything_is_trained(run_locally: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    code, message, run = run_locally(user_spec("Line"), "no-folder", tmp_path / "file/outputs")
    assert code == ExitCode.CONFIGURATION
    assert f"file/outputs/{run.info.run_id} can't be written to: Not a directory; name another" in message.message
    assert run.data.metrics == {}


@pytest.mark.parametrize("at", [1, 4], ids=["first", "last"])
def test_a_full_disk_is_named_with_the_remedy_and_what_was_logged_is_kept(
    at: int, run_locally: Any, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = bench.new_run()
    monkeypatch.setenv(LOCAL_RUN_ID, run_id)
    file = tmp_path / run_id / CHECKPOINT_OF_LINE.format(at, at - 1)
    file.parent.mkdir(parents=True)
    file.with_name(f"{file.name}.part").symlink_to("/dev/full")
    code, message, _ = run_locally(user_spec("Line", epochs=4), f"full-{at}")
    assert code == ExitCode.ERROR
    assert message.reason is Reason.STORAGE_EXCEEDED
    assert message.message.startswith(f"No space left on device: {file}; make room there, or use a larger disk")
    assert bench.client.get_run(run_id).info.status == "FAILED"
    # The step after it may have been made by the time that the disk refused.
    assert len(bench.history(run_id, "train/loss")) in (at, min(at + 1, 4))


def test_a_field_that_there_is_not_exits_78_before_a_run_is_made(run_locally: Any) -> None:
    code, message, run = run_locally({"training": {"epoch": 3}}, "no-field")
    assert code == ExitCode.CONFIGURATION
    assert "spec.training.epoch: Extra inputs" in message.message
    assert run is None


def test_a_script_that_ends_the_process_when_it_is_imported_is_refused(run_locally: Any, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import sys\nsys.exit(0)\n")
    code, message, run = run_locally({"model": {"module": "script:Net"}}, "script")
    assert code == ExitCode.CONFIGURATION
    assert "spec.model.module 'script:Net' can't be imported: SystemExit: 0" in message.message
    assert run.info.status == "FAILED"


def test_an_exception_in_a_user_s_module_exits_1_and_keeps_what_was_logged(run_locally: Any, bench: Bench) -> None:
    code, message, run = run_locally(user_spec("Broken"), "broken")
    assert code == ExitCode.ERROR
    assert message.reason is Reason.USER_ERROR
    assert message.message.startswith("RuntimeError: boom (")
    assert Path(user_modules.__file__).name in message.message
    assert run.info.status == "FAILED"
    assert [step for step, _ in bench.history(run.info.run_id, "train/loss")] == [0, 1]
    assert run.data.params["training.epochs"] == "4"


def test_a_training_that_is_told_to_end_without_an_operator_is_killed_in_mlflow(
    run_locally: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ENV_ATTEMPT, "1")
    code, message, run = run_locally(user_spec("StoppedLine", epochs=8), "stopped")
    assert code == ExitCode.SIGTERM
    assert message.reason is Reason.PREEMPTED
    assert run.info.status == "KILLED"


@pytest.mark.parametrize("how", ["Ctrl-C", "a crash"])
def test_a_training_without_an_operator_goes_on_by_the_command_that_its_last_words_name(
    how: str,
    *,
    run_locally: Any,
    call_in_process: Any,
    bench: Bench,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    name = f"by-hand-{how[-1].lower()}"
    with monkeypatch.context() as patch:
        if how == "Ctrl-C":
            sigterm_at("training_step", 3, patch, user_modules.Line, signal.SIGINT)
        else:
            patch.setattr(user_modules.Line, "on_train_epoch_start", lambda module: 1 / (3 - module.current_epoch))
        code, message, run = run_locally(user_spec("Line", epochs=8), name)
    said = capsys.readouterr().err.splitlines()[-1]
    if how == "Ctrl-C":
        assert (code, run.info.status) == (130, "KILLED")
        assert message.message == "Asked to end (Ctrl-C) at step 4; its checkpoint was delivered."
    else:
        assert (code, run.info.status) == (ExitCode.ERROR, "FAILED")
    assert said.startswith("Go on with: heimdall-train run -f ")
    assert said.endswith(f" --resume {run.info.run_id}")

    command = shlex.split(said.removeprefix("Go on with: "))
    assert call_in_process(*command[1:]) == ExitCode.SUCCESS
    whole = bench.new_run()
    bench.train(user_spec("Line", epochs=8), whole)
    assert bench.client.get_run(run.info.run_id).info.status == "FINISHED"
    losses = [bench.history(run_id, "train/loss") for run_id in (run.info.run_id, whole)]
    assert [len(each) for each in losses] == [8, 8]
    assert dict(losses[0]) == pytest.approx(dict(losses[1]))

    capsys.readouterr()
    assert call_in_process(*command[1:]) == ExitCode.CONFIGURATION
    assert f"--resume {run.info.run_id}: that run is finished" in capsys.readouterr().err


def test_a_run_to_go_on_in_that_there_is_not_is_refused(
    call_in_process: Any, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("run.json").write_text(json.dumps({"metadata": {"name": "nowhere"}, "spec": user_spec("Line")}))
    for run_id in ("nowhere", "'; --"):
        assert call_in_process("run", "-f", "run.json", "--resume", run_id) == ExitCode.CONFIGURATION
        assert f"--resume {run_id}: {bench.uri} has no such run" in capsys.readouterr().err
    monkeypatch.setenv(ENV_MLFLOW_RUN_ID, bench.new_run())
    assert call_in_process("run", "-f", "run.json", "--resume", "mine") == ExitCode.CONFIGURATION
    assert "--resume and MLFLOW_RUN_ID both name a run" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", [False, True], ids=["its own folder", "one that a setting names"])
def test_who_goes_on_delivers_a_checkpoint_first_that_was_left_on_disk(
    *,
    chosen: bool,
    run_locally: Any,
    call_in_process: Any,
    bench: Bench,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if chosen:
        monkeypatch.setenv("HEIMDALL_UNDELIVERED_DIR", str(tmp_path / "left"))
    monkeypatch.setenv(ENV_GRACE_PERIOD, "4")
    with monkeypatch.context() as patch:
        sigterm_at("training_step", 3, patch, user_modules.Line)
        upload = MlflowClient.log_artifact

        def late(self: MlflowClient, run_id: str, file: str, *rest: Any) -> None:
            if "step-00000004" in str(file):
                away()
            upload(self, run_id, file, *rest)

        patch.setattr(MlflowClient, "log_artifact", late)
        code, _, run = run_locally(user_spec("Line", epochs=8), f"left-{str(chosen).lower()}")
    assert code == ExitCode.SIGTERM
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("Go on with: heimdall-train deliver ")
    deliver, go_on = (shlex.split(part)[1:] for part in said.removeprefix("Go on with: ").split(" && "))

    assert call_in_process(*go_on) == ExitCode.CONFIGURATION
    refused = capsys.readouterr().err
    assert f"--resume {run.info.run_id}: its newest checkpoint was not delivered" in refused
    assert f"deliver it first, with: {shlex.join(['heimdall-train', *deliver])}" in refused

    assert call_in_process(*deliver) == ExitCode.SUCCESS
    assert call_in_process(*go_on) == ExitCode.SUCCESS
    assert [step for step, _ in bench.history(run.info.run_id, "train/loss")] == list(range(8))


def test_a_run_of_an_operator_s_is_left_to_it(
    call_in_process: Any, bench: Bench, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.json").write_text(json.dumps({"metadata": {"name": "operated"}, "spec": user_spec("Line")}))
    run_id = bench.new_run()
    bench.client.set_tag(run_id, TAG_ATTEMPT, "1")
    assert call_in_process("run", "-f", "run.json", "--resume", run_id) == ExitCode.CONFIGURATION
    assert f"--resume {run_id}: that run is an operator's" in capsys.readouterr().err
    assert not bench.history(run_id, "train/loss")


def test_the_command_to_go_on_names_the_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for old in (["--resume", "old"], ["--resume=old"], []):
        monkeypatch.setattr(sys, "argv", ["/bin/heimdall-train", "train", *old, "--run-name", "my run"])
        assert _how_to_go_on("new") == "Go on with: heimdall-train train --run-name 'my run' --resume new"


def test_one_that_is_told_so_twice_when_its_last_epoch_is_over_ends_no_otherwise(
    run_locally: Any, bench: Bench
) -> None:
    code, message, run = run_locally(user_spec("StoppedLate", registration={"model": "late"}), "late")
    assert code == ExitCode.SIGTERM
    assert message.reason is Reason.PREEMPTED
    assert "at step 4; its checkpoint was delivered" in message.message
    assert run.info.status == "KILLED"
    facts = read_facts(bench.client, run.info.run_id)
    assert facts is not None
    assert find_model(bench.client, facts) is None


MODEL_CALLS = ("create_logged_model", "log_model_artifacts", "finalize_logged_model")


def away(*_: Any, **__: Any) -> Any:
    raise MlflowException("MLflow does not answer")


@pytest.mark.parametrize("call", MODEL_CALLS)
def test_a_server_that_goes_away_while_the_model_is_logged_gets_it_when_it_is_back(
    call: str, run_locally: Any, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, calls = getattr(MlflowClient, call), list[str]()

    def away_once(*arguments: Any, **more: Any) -> Any:
        calls.append(call)
        return away() if len(calls) == 1 else whole(*arguments, **more)

    monkeypatch.setattr(MlflowClient, call, away_once)
    name = f"back-{call.replace('_', '-')}"
    code, _, run = run_locally(user_spec("Line", epochs=1, registration={"model": name}), name)
    assert code == ExitCode.SUCCESS
    assert len(calls) == 2
    (model,) = bench.client.search_logged_models([run.info.experiment_id], f"source_run_id = '{run.info.run_id}'")
    assert str(model.status) == "READY"
    assert [str(item.version) for item in bench.client.search_model_versions(f"name = '{name}'")] == ["1"]


def test_a_checkpoint_that_is_under_way_for_longer_than_the_patience_lasts_arrives(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, waited_for = threading.Event(), threading.Event()
    upload, note = MlflowClient.log_artifact, Patience._note

    def slow(*arguments: Any) -> None:
        begun.set()
        assert waited_for.wait(TIMEOUT_S)
        upload(*arguments)

    def noted(self: Patience, seen: Outstanding, waited_s: float) -> None:
        assert begun.wait(TIMEOUT_S)
        note(self, seen, waited_s)
        if self._idle_s > 2 * self.timeout_s:
            assert seen.under_way
            self.timeout_s = TIMEOUT_S  # for what comes behind it
            waited_for.set()

    monkeypatch.setattr(pipeline, "DELIVERY_TIMEOUT_S", 0.5)
    monkeypatch.setattr(patience, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(patience, "SLOWEST_BYTES_PER_S", 1)
    monkeypatch.setattr(Patience, "_note", noted)
    monkeypatch.setattr(MlflowClient, "log_artifact", slow)
    run_id = bench.new_run()
    bench.train(user_spec("Line", epochs=1), run_id)
    assert waited_for.is_set()
    assert parse_checkpoints(bench.client.get_run(run_id).data.tags[TAG_CHECKPOINTS])


@pytest.mark.parametrize("call", [*MODEL_CALLS, "create_registered_model"])
def test_a_model_whose_server_stays_away_is_delivered_and_registered_by_the_command_that_is_named(
    call: str, run_locally: Any, bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    deliver = TrainingPipeline._deliver

    def impatient(self: TrainingPipeline) -> None:
        self._patience.timeout_s = 1
        deliver(self)

    name = f"stays-{call.replace('_', '-')}"
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, call, away)
        if call in MODEL_CALLS:
            patch.setattr(TrainingPipeline, "_deliver", impatient)
        code, message, run = run_locally(user_spec("Line", epochs=1, registration={"model": name}), name)
        # A process would have ended by now. Here an upload that was under way must not find the server back.
        for thread in threading.enumerate():
            if thread.name == "heimdall-uploads":
                thread.join(TIMEOUT_S)
    assert code == ExitCode.UNDELIVERED, message
    assert f"the registration as {name}" in message.message
    facts = read_facts(bench.client, run.info.run_id)
    assert facts is not None
    assert (find_model(bench.client, facts) is None) == (call in MODEL_CALLS)

    command = shlex.split(message.message.rpartition("with: ")[2])
    arguments = cli._parser().parse_args(command[1:])
    assert run_to_exit_code(lambda: arguments.call(arguments)) == ExitCode.SUCCESS
    assert f"Registered as version 1 of {name}" in capsys.readouterr().out
    (version,) = bench.client.search_model_versions(f"name = '{name}'")
    assert version.run_id == run.info.run_id
    model = load_model(model_of(bench, run.info.run_id).artifact_location)
    assert model.predict(model.input_example).shape == (1, 1)
    assert bench.client.get_run(run.info.run_id).info.status == "FINISHED"
    assert not Path(command[2]).exists()


# --- the pod ------------------------------------------------------------------------------------------------------


def test_a_pod_that_is_told_to_end_exits_143_and_the_next_one_ends_as_if_nothing_had_been(
    pod: Pod, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, message, printed = pod.finish()
    assert code == ExitCode.SIGTERM, printed
    assert message is not None
    assert message.reason is Reason.PREEMPTED
    assert "at step 4; its checkpoint was delivered" in message.message
    assert bench.client.get_run(pod.run_id).info.status == "RUNNING"
    monkeypatch.setenv(ENV_ATTEMPT, "2")
    whole = bench.new_run()
    bench.train(pod.spec, whole)
    bench.train(pod.spec, pod.run_id, attempt=2)
    losses = [bench.history(run_id, "train/loss") for run_id in (pod.run_id, whole)]
    assert [len(each) for each in losses] == [8, 8]
    assert dict(losses[0]) == pytest.approx(dict(losses[1]))
