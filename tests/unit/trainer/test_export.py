"""ONNX files of every family, right for any batch and any number of receivers, or not there at all."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from heimdall_trainer import export
from heimdall_trainer.errors import ExportError
from heimdall_trainer.export import Tolerance, export_localizer, export_module, open_onnx
from heimdall_trainer.model.net import LocalizationNet
from tests.unit.trainer.test_net import REAL, SMALLEST, scene, step, timed_scene
from tests.unit.trainer.user_modules import Line

pytestmark = pytest.mark.slow
FILE = Path("model.onnx")
"""In the test's own folder."""


@pytest.mark.parametrize("backbone", [*SMALLEST, *REAL])
def test_every_family_is_exported_after_a_step_for_any_batch_and_any_number_of_receivers(backbone: str) -> None:
    torch.manual_seed(1)
    net = LocalizationNet(backbone)
    first = next(net.parameters())
    before = first.detach().clone()
    step(net)
    assert not torch.equal(first, before)
    assert all(each.isfinite().all() for each in net.parameters())
    exported = export_localizer(net, FILE)

    assert set(exported.differences) == {"position", "sigma"}
    assert net.training, "left as it was"
    run, net = open_onnx(FILE), net.eval()
    for batch, receivers in [(1, 1), (4, 1), (1, 6), (3, 2)]:
        inputs = scene(batch, receivers)
        with torch.no_grad():
            expected = net(*inputs)
        found = run(dict(zip(("spectrograms", "receivers"), inputs, strict=True)))
        assert torch.allclose(found["position"], expected[:, :2], atol=0.1)
        assert torch.allclose(found["sigma"], expected[:, 2:], rtol=1e-3)


def test_a_localizer_with_arrivals_is_exported_with_all_that_it_takes() -> None:
    torch.manual_seed(1)
    net = LocalizationNet("test_vit", arrivals=True)
    step(net)
    net.set_sigma_scale(1.7)
    export_localizer(net, FILE)
    (_, receivers) = onnx.load(FILE).graph.input
    assert receivers.type.tensor_type.shape.dim[2].dim_value == 4
    assert "later it arrived" in receivers.doc_string
    run, net = open_onnx(FILE), net.eval()
    inputs = timed_scene(3, 2)
    with torch.no_grad():
        expected = net(*inputs)
    found = run(dict(zip(("spectrograms", "receivers"), inputs, strict=True)))
    assert torch.allclose(found["position"], expected[:, :2], atol=0.1)
    assert torch.allclose(found["sigma"], expected[:, 2:], rtol=1e-3)


class Loudest(torch.nn.Module):
    """As a localizer is called, but small: exporting takes the longer, the more operators there are."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1000))
        self.drift, self.asked = drift, 0

    def forward(self, spectrograms: torch.Tensor, receivers: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            self.asked += 1  # with drift, its sigma is another each time that it is asked
        shares = torch.softmax(spectrograms.mean((-3, -2, -1)), dim=-1).unsqueeze(-1)
        sigma = receivers.std(1, correction=0) * self.weight[0]
        return torch.cat([(receivers * shares).sum(1), sigma + self.drift * self.asked], dim=-1)


def test_the_file_is_one_and_tells_names_shapes_and_units() -> None:
    export_localizer(Loudest(), FILE)

    model = onnx.load(FILE)
    onnx.checker.check_model(model, full_check=True)
    values = {item.name: item for item in (*model.graph.input, *model.graph.output)}
    shapes = {
        name: [axis.dim_param or axis.dim_value for axis in item.type.tensor_type.shape.dim]
        for name, item in values.items()
    }
    assert shapes == {
        "spectrograms": ["batch", "receivers", 3, 128, 32],
        "receivers": ["batch", "receivers", 2],
        "position": ["batch", 2],
        "sigma": ["batch", 2],
    }
    assert "metres" in values["sigma"].doc_string
    assert [item.name for item in Path.cwd().iterdir()] == [FILE.name]


@pytest.mark.parametrize(("drift", "words"), [(5.0, r"differs by 5\b"), (float("nan"), "differs by nan")])
def test_a_difference_beyond_the_tolerance_names_output_and_difference_and_leaves_no_file(
    drift: float, words: str
) -> None:
    FILE.write_text("what was there before")
    expected = rf"its output sigma {words} between ONNX and PyTorch on spectrograms \(1, 1, 3, 128, 32\), receivers"
    with pytest.raises(ExportError, match=expected + r".*more than 0\.1 \+ 0\.001"):
        export_localizer(Loudest(drift), FILE)
    assert FILE.read_text() == "what was there before"
    assert [item.name for item in Path.cwd().iterdir()] == [FILE.name]


@pytest.mark.parametrize("when", ["opened", "run"])
def test_a_graph_that_onnx_runtime_takes_no_part_in_is_told_in_a_sentence(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED\nand a page of advice")

    monkeypatch.setattr(export, "open_onnx", refuse if when == "opened" else lambda _: refuse)
    with pytest.raises(ExportError, match=r"^ONNX Runtime can't run it: RuntimeError: .* NOT_IMPLEMENTED$"):
        export_localizer(Loudest(), FILE)
    assert list(Path.cwd().iterdir()) == []


def test_the_tolerance_grows_with_the_value() -> None:
    tolerance = Tolerance(absolute=0.1, relative=1e-3)
    difference, share = tolerance.excess(torch.tensor([1000.9, 0.0]), torch.tensor([1000.0, 0.05]))
    assert difference == pytest.approx(0.9, rel=1e-4)
    assert 0.5 < share < 1


def test_more_weights_than_one_file_can_hold_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "FILE_LIMIT_BYTES", 1000)
    with pytest.raises(ExportError, match="GiB of weights are more than the 2 GiB"):
        export_localizer(Loudest(), FILE)


# --- modules of a user's own ---------------------------------------------------------------------------------------


class Example(Line):
    def __init__(self, example: Any = None) -> None:
        super().__init__()
        self.example_input_array = example


class Pair(Example):
    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> Any:
        weight = torch.ones(()) if weight is None else weight
        return {"double": 2 * x, "weighed": self.layer(x) * weight}


class Odd(Example):
    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x) if float(x.sum()) > 0 else x


@pytest.mark.parametrize("example", [torch.ones(1, 1), torch.ones(4, 1), (torch.ones(2, 1),), {"x": torch.ones(2, 1)}])
def test_a_module_of_one_s_own_is_exported_on_its_example_for_any_batch(example: Any) -> None:
    module = Example(example)
    exported = export_module(module, FILE)
    assert exported.differences == pytest.approx({"output": 0.0}, abs=1e-5)
    x = torch.linspace(-1, 1, 5).unsqueeze(1)
    assert torch.allclose(open_onnx(FILE)({"x": x})["output"], module(x), atol=1e-5)


def test_outputs_have_their_dictionary_s_names_and_inputs_of_several_lengths_keep_them() -> None:
    module = Pair((torch.ones(3, 1), torch.tensor([2.0])))
    assert set(export_module(module, FILE).differences) == {"double", "weighed"}
    shapes = [[axis.dim_value for axis in item.type.tensor_type.shape.dim] for item in onnx.load(FILE).graph.input]
    assert shapes == [[3, 1], [1]]


@pytest.mark.parametrize("example", [None, "text", (torch.ones(1, 1), 3), {}])
def test_a_module_without_an_example_is_refused_with_the_remedy(example: Any) -> None:
    with pytest.raises(ExportError, match="Example has no example input: set example_input_array"):
        export_module(Example(example), FILE)


class Optional(Example):
    def forward(self, x: torch.Tensor, mask: Any = None, y: Any = None) -> Any:
        return self.layer(x) if y is None else self.layer(x) + y


class Variadic(Example):
    def forward(self, *xs: torch.Tensor) -> Any:
        return self.layer(xs[0]) + xs[1]


@pytest.mark.parametrize("names", [("y",), ("x", "y"), ("x", "z")])
def test_an_example_that_would_be_given_to_other_arguments_is_refused(names: tuple[str, ...]) -> None:
    with pytest.raises(ExportError, match=r"must name the first positional arguments of forward, which are x, mask, y"):
        export_module(Optional(dict.fromkeys(names, torch.ones(2, 1))), FILE)


def test_arguments_without_names_are_refused_with_the_remedy() -> None:
    with pytest.raises(ExportError, match=r"Variadic has 2 values, and forward names 0 arguments: name each"):
        export_module(Variadic((torch.ones(2, 1), torch.ones(2, 1))), FILE)


def test_what_the_exporter_does_not_understand_is_told_in_a_sentence() -> None:
    with pytest.raises(ExportError, match=r"^it can't be exported to ONNX: \w+: .+") as caught:
        export_module(Odd(torch.ones(2, 1)), FILE)
    assert len(str(caught.value)) < 450


def test_a_full_disk_is_no_fault_of_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="No space left"):
        export_localizer(Loudest(), FILE)
    assert list(Path.cwd().iterdir()) == []
