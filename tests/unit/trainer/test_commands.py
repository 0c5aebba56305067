"""The commands that look at a trained localizer, and how light the command line is until it does something."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from structlog.testing import capture_logs

from heimdall_api.contract import ENV_TERMINATION_MESSAGE, ExitCode, Reason, TerminationMessage
from heimdall_api.types import RegistrationSpec
from heimdall_tracking import MLflowTracker, load_settings
from heimdall_tracking.registry import register
from heimdall_tracking.runs import read_facts
from heimdall_trainer import cli
from heimdall_trainer.data.dataset import HeimdallDataset
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.split import split_sessions
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.module import LocalizationModule
from heimdall_trainer.modelling import log_localizer
from heimdall_trainer.settings import DataSettings
from heimdall_trainer.termination import EXIT_BY_HAND

pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy, and its advice.
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*inferred as AnyType"),
    pytest.mark.filterwarnings("ignore:[\\s\\S]*Add type hints to the `predict` method"),
]

HEAVY = {"torch", "mlflow", "numpy", "pandas", "matplotlib", "onnx", "onnxruntime", "pydantic", "structlog", "yaml"}
NAME = "looked-at"
IDS = [f"generated-7-{number:03}" for number in range(5)]
SESSIONS = {"train": IDS[:3], "validation": [IDS[3]], "test": [IDS[4]]}


def test_help_imports_nothing_that_is_heavy() -> None:
    code = (
        "import sys; sys.argv = ['heimdall-train', '--help']\n"
        "from heimdall_trainer.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({name.partition('.')[0] for name in sys.modules}), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    for command in ("run", "train", "validate", "export", "evaluate", "plot", "data"):
        assert f"\n    {command} " in done.stdout
    imported = set(json.loads(done.stderr.replace("'", '"')))
    assert "heimdall_trainer" in imported
    assert imported & HEAVY == set()


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGTERM, ExitCode.SIGTERM), (signal.SIGINT, EXIT_BY_HAND)])
def test_who_asks_for_the_end_before_anything_was_read_is_heard(
    asked: signal.Signals, code: int, tmp_path: Path
) -> None:
    """A container's first process would ignore it otherwise. The run file is a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "run.json")
    words = tmp_path / "termination-log"
    process = subprocess.Popen(
        [sys.executable, "-m", "heimdall_trainer.cli", "run", "-f", str(tmp_path / "run.json")],
        env={**os.environ, ENV_TERMINATION_MESSAGE: str(words)},
        stderr=subprocess.PIPE,
    )
    try:
        deadline = time.monotonic() + 60
        while not handles_sigterm(process.pid):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(asked)
        _, printed = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == code, printed
    assert TerminationMessage.model_validate_json(words.read_text()).reason is Reason.PREEMPTED


def handles_sigterm(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.partition("SigCgt:")[2].split()[0], 16)
    return bool(caught >> (signal.SIGTERM - 1) & 1)


@dataclass(frozen=True)
class Looked:
    """One localizer as a registered version and as a checkpoint."""

    module: LocalizationModule
    run_id: str
    version: str
    checkpoint: str


@pytest.fixture(scope="module")
def looked(mlflow_uri: str, recorded: DataSettings, tmp_path_factory: pytest.TempPathFactory) -> Looked:
    """Untrained: what is looked at are commands."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("looked")
    module = LocalizationModule("test_resnet").eval()
    tracker = MLflowTracker(load_settings(tracking_uri=mlflow_uri))
    run_id = tracker.start_run("looked-at")
    for step in range(4):
        tracker.log_metrics({"train/loss_step": 1.0 - 0.1 * step, "val/loss": 0.5}, step)
    sample = HeimdallDataset.open(recorded)[0]
    example = {name: sample[name][None].numpy() for name in ("spectrograms", "receivers")}  # type: ignore[literal-required]
    log_localizer(tracker, module.net, example, folder=folder, onnx=None, known={"sessions": SESSIONS})
    assert tracker.end_run(timeout_s=60)
    facts = read_facts(tracker.client, run_id)
    assert facts is not None
    registered = register(tracker.client, facts, RegistrationSpec(model=NAME, aliases=["candidate"]))
    checkpoint = {"hyper_parameters": dict(module.hparams), "state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    file = folder / "best.ckpt"
    torch.save({**checkpoint, "HeimdallDataModule": {"sessions": SESSIONS}}, file)
    return Looked(module, run_id, registered.version, str(file))


@pytest.fixture(autouse=True)
def _places(recorded: DataSettings, mlflow_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_uri)
    monkeypatch.setenv("HEIMDALL_DATABASE_URL", recorded.database_url.get_secret_value())
    monkeypatch.setenv("HEIMDALL_RECORDINGS_URL", recorded.recordings_url)
    monkeypatch.setenv("HEIMDALL_CACHE_DIR", str(recorded.cache_dir))


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        parsed = cli._parser().parse_args(arguments)
        with capture_logs():  # main() has them go to stderr
            parsed.call(parsed)
        return capsys.readouterr().out

    return run


def evaluated(call: Any, *arguments: str) -> dict[str, object]:
    said: dict[str, object] = json.loads(call("evaluate", "--json", *arguments))
    return said


def test_a_version_an_alias_and_a_checkpoint_of_one_network_are_as_good(call: Any, looked: Looked) -> None:
    models = [f"models:/{NAME}/{looked.version}", f"models:/{NAME}@candidate", looked.checkpoint]
    version, alias, checkpoint = (evaluated(call, "--model", model) for model in models)
    assert version["run"] == alias["run"] == looked.run_id
    assert checkpoint["run"] is None
    assert version["sessions"] == SESSIONS["test"]
    assert version["transmissions"] == 4
    figures = ("position_error_median_m", "position_error_p90_m", "coverage_68", "coverage_95")
    assert all(isinstance(version[name], float) for name in figures)
    for name in ("sessions", "transmissions", *figures):
        assert version[name] == alias[name] == checkpoint[name]


def test_people_are_told_in_metres_and_per_cent(call: Any, looked: Looked) -> None:
    said = call("evaluate", "--model", looked.checkpoint, "--split", "validation")
    lines = said.splitlines()
    assert lines[0] == f"model:    {looked.checkpoint}"
    assert lines[1] == "split:    validation, sessions: 1, transmissions: 4"
    assert lines[2].startswith("error:    median ")
    assert lines[2].endswith(" m")
    assert "% within the 68 % ellipse" in lines[3]


def test_places_are_told_as_latitude_and_longitude(call: Any, looked: Looked, recorded: DataSettings) -> None:
    with capture_logs():
        dataset = HeimdallDataset.open(recorded, SESSIONS["test"])
    places: Any = evaluated(call, "--model", looked.checkpoint, "--places")["places"]

    assert [place["transmission"] for place in places] == [sent.id for sent in dataset.transmissions]
    for sent, place in zip(dataset.transmissions, places, strict=True):
        found, truth = to_local([(place["latitude"], place["longitude"]), (sent.latitude, sent.longitude)], sent.origin)
        assert place["error_m"] == pytest.approx(np.linalg.norm(found - truth), abs=0.01)
    said = call("evaluate", "--model", looked.checkpoint, "--places").splitlines()
    assert said[4].startswith(f"{SESSIONS['test'][0]} {places[0]['transmission']}: {places[0]['latitude']:.6f}, ")
    assert len(said) == 4 + len(places)


def test_a_run_file_says_which_sessions_are_on_which_side(call: Any, looked: Looked) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({"data": {"testFraction": 0.4}, "training": {"seed": 3}}))
    split = split_sessions(IDS, validation_fraction=0.2, test_fraction=0.4, seed=3)
    assert evaluated(call, "--model", looked.checkpoint, "-f", "run.yaml")["sessions"] == list(split.test)
    assert list(split.test) != SESSIONS["test"]


def test_plots_are_drawn_with_the_run_s_losses_where_the_model_has_a_run(call: Any, looked: Looked) -> None:
    said = call("plot", "--model", f"models:/{NAME}/{looked.version}", "-o", "plots")
    assert said.split() == ["plots/error_map.png", "plots/calibration.png", "plots/loss.png"]
    said = call("plot", "--model", looked.checkpoint, "-o", "others")
    assert "no loss curves" in said
    assert {item.name for item in Path("others").iterdir()} == {"error_map.png", "calibration.png"}
    for file in (*Path("plots").iterdir(), *Path("others").iterdir()):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_the_export_is_written_and_says_how_near_it_is(call: Any, looked: Looked) -> None:
    from heimdall_trainer.export import open_onnx

    said = call("export", "--model", looked.checkpoint, "-o", "model.onnx")
    assert said.startswith("model.onnx: ")
    assert "verified against PyTorch" in said
    assert "largest differences: position " in said
    inputs = torch.randn(2, 3, 3, 128, 32), torch.randn(2, 3, 2)
    found = open_onnx(Path("model.onnx"))(dict(zip(("spectrograms", "receivers"), inputs, strict=True)))
    with torch.no_grad():
        assert torch.allclose(found["position"], looked.module(*inputs)[:, :2], atol=0.1)


@pytest.fixture
def changed(recorded: DataSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[sqlite3.Connection]:
    """A copy of the database, to be changed; the variables name it."""
    copy = tmp_path / "changed.db"
    shutil.copy(recorded.database_url.get_secret_value().removeprefix("sqlite:///"), copy)
    monkeypatch.setenv("HEIMDALL_DATABASE_URL", f"sqlite:///{copy}")
    with closing(sqlite3.connect(copy, isolation_level=None)) as database:
        yield database


def test_sessions_that_were_withdrawn_since_are_warned_about_and_used(
    call: Any, looked: Looked, changed: sqlite3.Connection
) -> None:
    before = evaluated(call, "--model", looked.checkpoint)
    changed.execute("UPDATE recording_sessions SET status = 'rejected' WHERE id = ?", SESSIONS["test"])
    arguments = cli._parser().parse_args(["plot", "--model", looked.checkpoint, "-o", "plots"])
    with capture_logs() as lines:
        arguments.call(arguments)
    assert [line["sessions"] for line in lines if "approved no longer" in line["event"]] == [SESSIONS["test"]]
    call("data", "inspect")  # what was printed until here
    assert evaluated(call, "--model", looked.checkpoint) == before


def test_sessions_that_are_gone_are_named_with_the_model(
    call: Any, looked: Looked, changed: sqlite3.Connection
) -> None:
    changed.execute("DELETE FROM recording_sessions WHERE id = ?", SESSIONS["test"])
    said = rf"^--model \S+ keeps .* no longer holds: {SESSIONS['test'][0]}; restore them"
    with pytest.raises(ConfigurationError, match=said):
        call("evaluate", "--model", looked.checkpoint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("evaluate --model models:/nobody/1", r"--model models:/nobody/1: .*nobody"),
        (f"evaluate --model models:/{NAME}@nobody", rf"--model models:/{NAME}@nobody: .*nobody"),
        (f"evaluate --model models:/{NAME}", "use models:/NAME/VERSION or models:/NAME@ALIAS"),
        ("evaluate --model nowhere.ckpt", r"nowhere\.ckpt is neither models:/NAME/VERSION, .* nor a file"),
        ("evaluate --model run.yaml", r"run\.yaml is no checkpoint of the localizer"),
        (
            "evaluate --model plain.ckpt",
            "does not say which sessions it was trained with: name its Tra",
        ),
        ("evaluate --model plain.ckpt -f run.yaml", "--split test holds no session"),
        ("export --model plain.ckpt -o nowhere/model.onnx", "there is no folder nowhere"),
        ("export --model nowhere.ckpt -o .", r"^--output \. is a folder: name a file in it"),
        ("plot --model nowhere.ckpt -o run.yaml", r"^--output run\.yaml: .*/run\.yaml is no folder"),
        ("plot --model nowhere.ckpt -o run.yaml/plots", r"^--output run\.yaml/plots: .*/run\.yaml is no folder"),
    ],
)
def test_what_can_not_be_looked_at_names_the_option(call: Any, looked: Looked, arguments: str, words: str) -> None:
    Path("run.yaml").write_text(yaml.safe_dump({"data": {"testFraction": 0}}))
    held = torch.load(looked.checkpoint, weights_only=False)
    torch.save({name: held[name] for name in ("hyper_parameters", "state_dict")}, "plain.ckpt")
    with pytest.raises(ConfigurationError, match=words):
        call(*arguments.split())
