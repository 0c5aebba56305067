"""What is given to the run at the end: nothing behind a fence, nothing that is not whole."""

from __future__ import annotations

import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs

from heimdall_api.types import TrainingRunSpec
from heimdall_trainer import export, modelling
from heimdall_trainer.data.module import HeimdallDataModule
from heimdall_trainer.data.split import Split
from heimdall_trainer.errors import ConfigurationError, ExportError, FencedError
from heimdall_trainer.results import Results
from tests.unit.trainer.user_modules import LineWithExample


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


class Data(HeimdallDataModule):
    split = Split(train=("a",), validation=(), test=("b",))  # type: ignore[assignment]

    def __init__(self) -> None:
        """Without settings: nothing is read."""

    def dataset(self, session_ids: tuple[str, ...], *, training: bool = False) -> Any:
        raise RuntimeError("no such recording at https://key:canary@minio")


class OwnData:
    """A user's data, which means something of its own by `split`."""

    split = "train"

    def train_dataloader(self) -> Any:
        return [{"spectrograms": torch.zeros(2, 1), "receivers": torch.zeros(2, 1)}]


class Late(LineWithExample):
    """Its layer is made when training begins."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = None  # type: ignore[assignment]

    def configure_model(self) -> None:
        self.layer = torch.nn.Linear(1, 1)


class Lazy(LineWithExample):
    """Its layer waits for the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.LazyLinear(1)


class Needy(LineWithExample):
    """Its forward needs what training gives it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("not before training")


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


class TornDown(OwnData):
    """It has freed what it had, as Lightning asks of it."""

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(None)  # type: ignore[arg-type]


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
    assert ("no plots were made", "RuntimeError: no such recording at https://***@minio") in [
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


def refuse(net: Any, file: Path) -> export.Exported:
    raise ExportError("its output y differs")


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each logged model was given."""
    made: list[dict[str, Any]] = []
    monkeypatch.setattr(modelling, "log_localizer", lambda *_, **given: made.append(given))
    return made


@pytest.mark.parametrize("error", [ExportError("its output y differs"), RuntimeError("no memory")])
def test_a_graph_that_fails_after_the_training_costs_neither_model_nor_plots(
    error: Exception, monkeypatch: pytest.MonkeyPatch, logged: list[dict[str, Any]]
) -> None:
    def fail(net: Any, file: Path) -> export.Exported:
        raise error

    monkeypatch.setattr(export, "export_localizer", fail)
    monkeypatch.setattr(Results, "_draw", lambda *_: Path("plots"))
    tracker = Tracker()
    spec = results(tracker, export={"onnx": True}, registration={"model": "m"})
    expected = (
        pytest.raises(
            ConfigurationError,
            match=r"^spec\.export\.onnx: its output y differs; or set it to false\. The model was logged without it\.",
        )
        if isinstance(error, ExportError)
        else pytest.raises(RuntimeError, match="no memory")
    )
    with expected:
        spec.publish(Module(), OwnData(), no_fence)
    assert tracker.given == ["plots"]
    assert [each["onnx"] for each in logged] == [None]


def test_data_of_one_s_own_may_have_a_split_of_its_own(logged: list[dict[str, Any]]) -> None:
    tracker = Tracker()
    results(tracker, registration={"model": "m"}).publish(Module(), OwnData(), no_fence)
    assert tracker.given == []
    assert [each["known"] for each in logged] == [{}]


OWN = {"model": {"module": "tests.unit.trainer.user_modules:LineWithExample"}, "export": {"onnx": True}}


def test_data_that_were_torn_down_cost_the_example_and_not_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(modelling, "log_module", lambda tracker, module, example, **_: given.append(example))
    monkeypatch.setattr(modelling, "log_localizer", lambda tracker, net, example, **_: given.append(example))
    with capture_logs() as logs:
        results(Tracker(), model={"module": "a:B"}, registration={"model": "m"}).publish(Module(), TornDown(), no_fence)
        localizer = Module()
        localizer.example_input_array = (torch.ones(2, 1), torch.zeros(2, 1))  # type: ignore[assignment]
        results(Tracker(), registration={"model": "m"}).publish(localizer, TornDown(), no_fence)
    assert given[0] is None
    assert {name: each.tolist() for name, each in given[1].items()} == {"spectrograms": [[1.0]], "receivers": [[0.0]]}
    assert len([line for line in logs if "can't be read after it" in line["event"]]) == 2


@pytest.mark.parametrize(
    ("first", "example"),
    [
        (torch.ones(2, 1, requires_grad=True), [[1.0]]),
        (torch.ones(2, 1, dtype=torch.bfloat16), [[1.0]]),
        (torch.ones(()), None),
        (torch.ones(2, 2).to_sparse(), None),
        ({"image": torch.ones(2, 1)}, None),
    ],
    ids=["needs a gradient", "bfloat16", "no axis", "sparse", "named"],
)
def test_a_batch_of_any_kind_costs_no_model(first: Any, example: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(modelling, "log_module", lambda tracker, module, example, **_: given.append(example))
    data = SimpleNamespace(train_dataloader=lambda: [(first, torch.ones(2))])

    results(Tracker(), model={"module": "a:B"}, registration={"model": "m"}).publish(Module(), data, no_fence)

    assert [each if each is None else each.tolist() for each in given] == [example]


def test_a_module_of_one_s_own_is_rehearsed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "export_module", refuse)
    results(Tracker(), **OWN).check(LineWithExample(), rehearse=False)
    with pytest.raises(ConfigurationError, match=r"^spec\.export\.onnx: its output y differs"):
        results(Tracker(), **OWN).check(LineWithExample(), rehearse=True)


def test_a_module_that_can_not_be_kept_as_a_model_is_told_before_it_is_trained() -> None:
    asked = {"model": OWN["model"], "registration": {"model": "m"}}
    module = LineWithExample()
    results(Tracker(), **asked).check(module, rehearse=True)
    module.guard = threading.Lock()
    with pytest.raises(
        ConfigurationError, match=r"^spec\.registration: LineWithExample can't be kept .*'_thread\.lock'"
    ):
        results(Tracker(), **asked).check(module, rehearse=True)
    results(Tracker(), **asked).check(module, rehearse=False)
    results(Tracker(), model=OWN["model"]).check(module, rehearse=True)


@pytest.mark.parametrize("module", [Late, Lazy])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_a_module_whose_layers_come_later_is_not_rehearsed(
    module: type[LineWithExample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "export_module", refuse)
    results(Tracker(), **OWN).check(module(), rehearse=True)


def test_a_forward_that_fails_before_training_is_no_reason_to_refuse_it() -> None:
    with capture_logs() as lines:
        results(Tracker(), **OWN).check(Needy(), rehearse=True)
    assert [line["event"] for line in lines] == ["the ONNX export could not be rehearsed"]
