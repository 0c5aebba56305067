"""What is given to the run at the end: nothing behind a fence, nothing that is not whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from heimdall_api.types import TrainingRunSpec
from heimdall_trainer import export
from heimdall_trainer.data.split import Split
from heimdall_trainer.errors import ConfigurationError, ExportError, FencedError
from heimdall_trainer.results import Results


class Tracker:
    """Remembers what it was given."""

    run_id = "run"

    def __init__(self) -> None:
        self.client, self.given = self, []  # type: ignore[var-annotated]

    def get_metric_history(self, *_: str) -> list[Any]:
        return []

    def log_artifact(self, file: Path, folder: str) -> None:
        self.given.append(f"{folder}/{file.name}")

    def log_artifacts_dir(self, source: Path, folder: str) -> None:
        self.given.append(folder)


class Module(torch.nn.Module):
    net = torch.nn.Identity()


class Data:
    split = Split(train=("a",), validation=(), test=("b",))

    def dataset(self, sessions: tuple[str, ...]) -> Any:
        raise RuntimeError("no such recording")


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was exported."""
    made: list[Path] = []

    def write(net: Any, file: Path) -> export.Exported:
        made.append(file)
        file.write_text("onnx")
        return export.Exported(file, {})

    monkeypatch.setattr(export, "export_localizer", write)
    return made


def results(tracker: Tracker, **spec: Any) -> Results:
    return Results(TrainingRunSpec.model_validate(spec), tracker, Path("results"))  # type: ignore[arg-type]


def no_fence() -> None:
    """This attempt is the newest."""


def test_behind_a_fence_nothing_is_published(exports: list[Path]) -> None:
    tracker = Tracker()

    def fence() -> None:
        raise FencedError("attempt 2 has taken over")

    with pytest.raises(FencedError):
        results(tracker, export={"onnx": True}).publish(Module(), None, fence)
    assert tracker.given == []


def test_the_export_is_an_artifact_where_no_model_is_registered(exports: list[Path]) -> None:
    tracker = Tracker()
    results(tracker, export={"onnx": True}).publish(Module(), None, no_fence)
    assert tracker.given == ["onnx/model.onnx"]


def test_without_being_asked_for_nothing_is_exported(exports: list[Path]) -> None:
    tracker = Tracker()
    results(tracker).check(Module(), rehearse=True)
    results(tracker).publish(Module(), None, no_fence)
    assert (exports, tracker.given) == ([], [])


def test_plots_that_can_not_be_made_are_warned_about_and_fail_nothing(exports: list[Path]) -> None:
    tracker = Tracker()
    with capture_logs() as lines:
        results(tracker, export={"onnx": True}).publish(Module(), Data(), no_fence)
    assert tracker.given == ["onnx/model.onnx"]
    assert ("no plots were made", "RuntimeError: no such recording") in [
        (line["event"], line.get("error")) for line in lines
    ]


@pytest.mark.parametrize("rehearse", [True, False])
def test_a_first_attempt_rehearses_the_export_before_it_trains(exports: list[Path], rehearse: bool) -> None:
    results(Tracker(), export={"onnx": True}).check(Module(), rehearse=rehearse)
    assert len(exports) == rehearse
    assert not any(file.exists() for file in exports), "it is not the trained network"


def test_a_network_that_can_not_be_exported_names_the_field_before_it_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(net: Any, file: Path) -> export.Exported:
        raise ExportError("it can't be exported to ONNX: no such operator")

    monkeypatch.setattr(export, "export_localizer", refuse)
    with pytest.raises(ConfigurationError, match=r"^spec\.export\.onnx: it can't be exported .* or set it to false"):
        results(Tracker(), export={"onnx": True}).check(Module(), rehearse=True)
