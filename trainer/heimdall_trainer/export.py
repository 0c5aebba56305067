"""A trained network as one ONNX file, verified against PyTorch output by output before anything is left behind.

The exporter is PyTorch's newer one, on `torch.export`: it keeps axes dynamic as a matter of constraints that it checks,
where the older one traces one example and keeps what it happened to see.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from heimdall_tracking.files import whole
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.errors import ExportError
from heimdall_trainer.model.net import PLACE_VALUES
from heimdall_trainer.termination import NO_ROOM

OPSET: Final = 20
"""Version of the operators: ONNX 1.15 of 2023 and every runtime since."""
SIZES: Final = ((1, 1), (1, 5), (3, 1), (2, 4))
"""Batches and receivers that a localizer is verified on: none is the size that it was exported with."""
SEED: Final = 7
SPREAD_M: Final = 1000.0
"""Receivers that a localizer is verified on lie about this far from the origin."""
ARRIVAL_SIGMA_M: Final = 10.0
"""Least standard deviation of the arrivals that it is verified on."""
NOTES: Final = {
    2: "metres east and north of any origin",
    4: "metres east and north of any origin, how many metres later it arrived than at any one of them, and how sure",
}
"""What `receivers` are, by how many values there are of each."""
FILE_LIMIT_BYTES: Final = 2**31 - 2**20
"""One ONNX file is one protobuf message, of less than 2 GiB; the rest is for the graph."""


@dataclass(frozen=True)
class Tolerance:
    """How far ONNX may be from PyTorch: `absolute + relative * |PyTorch|`, in the output's unit."""

    absolute: float
    relative: float

    def excess(self, found: Tensor, expected: Tensor) -> tuple[float, float]:
        """The largest difference, and by how many times the tolerance the worst value is off; at most 1 is right."""
        difference = (found.double() - expected.double()).abs()
        share = difference / (self.absolute + self.relative * expected.double().abs())
        # A value that is no number is no match, whatever it is compared with.
        return float(difference.max()), float(share.nan_to_num(math.inf).max())


LOCALIZER_TOLERANCE: Final = Tolerance(absolute=0.1, relative=1e-3)
"""Metres: far below what a position is known to, far above what single precision and another order of sums cost."""
MODULE_TOLERANCE: Final = Tolerance(absolute=1e-4, relative=1e-3)
"""For modules whose unit nobody knows."""


@dataclass(frozen=True)
class Exported:
    """An ONNX file that was verified."""

    file: Path
    differences: dict[str, float]
    """Largest difference from PyTorch of each output, in its unit."""


@dataclass(frozen=True)
class _Interface:
    """What goes in and comes out, by name, and which axes may have any length."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic_axes: tuple[Mapping[int, str], ...]
    notes: Mapping[str, str]
    tolerance: Tolerance


class _Localizer(nn.Module):
    """A LocalizationNet whose outputs are apart, so that they have names."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, spectrograms: Tensor, receivers: Tensor) -> tuple[Tensor, Tensor]:
        out = self.net(spectrograms, receivers)
        return out[:, :2], out[:, 2:]


def export_localizer(net: nn.Module, file: Path) -> Exported:
    """Write a LocalizationNet as ONNX: named as the served model's, any batch, any number of receivers.

    Inputs are `spectrograms` (B, R, 3, 128, 32) and `receivers` (B, R, 2 or, with arrivals, 4) in metres,
    outputs `position` and `sigma`, (B, 2) each in metres.

    Args:
        net: The network, on the CPU. Left as it is.
        file: The file; written whole, and only if it is right.

    Returns:
        The file and how near it is to PyTorch.

    Raises:
        ExportError: The network can't be exported, or an output differs by more than LOCALIZER_TOLERANCE.
    """
    axes = {0: "batch", 1: "receivers"}
    values = int(getattr(net, "receiver_values", 2))
    interface = _Interface(
        inputs=("spectrograms", "receivers"),
        outputs=("position", "sigma"),
        dynamic_axes=(axes, axes),
        notes={
            "spectrograms": "mel spectrograms of each receiver: I, Q, magnitude",
            "receivers": NOTES[values],
            "position": "metres east and north of the same origin",
            "sigma": "standard deviations of the position in metres",
        },
        tolerance=LOCALIZER_TOLERANCE,
    )
    # Lengths above 1: torch.export takes an axis of length 1 for one that always is.
    example = _scene(2, 3, values)
    return _export(_Localizer(net), example, [_scene(*size, values) for size in SIZES], interface, file)


def export_module(module: Any, file: Path) -> Exported:
    """Write any LightningModule as ONNX, on its `example_input_array`.

    The first axis may have any length where all inputs share its length in the example. Outputs are named as their
    dictionary's keys, or `output`, `output_1` …

    Args:
        module: The module, on the CPU. Left as it is.
        file: The file; written whole, and only if it is right.

    Returns:
        The file and how near it is to PyTorch.

    Raises:
        ExportError: It has no example, can't be exported, or an output differs by more than MODULE_TOLERANCE.
    """
    names, example = _example_of(module)
    batched = len({each.shape[0] if each.dim() else None for each in example}) == 1 and example[0].dim() > 0
    batches = [example]
    if batched:
        # Lengths above 1: torch.export takes an axis of length 1 for one that always is.
        example = tuple(torch.cat([each, each]) for each in example)
        batches = [tuple(each[:1] for each in example), tuple(torch.cat([each, each[:1]]) for each in example)]
    with _evaluated(module):
        outputs = _named(module(*example))
    axes: Mapping[int, str] = {0: "batch"} if batched else {}
    interface = _Interface(names, tuple(outputs), (axes,) * len(names), {}, MODULE_TOLERANCE)
    return _export(module, example, batches, interface, file)


def check_exportable(module: Any) -> None:
    """Refuse a module that `export_module` could not even begin with.

    Raises:
        ExportError: It has no `example_input_array` of tensors.
    """
    _example_of(module)


def _export(
    module: nn.Module,
    example: Sequence[Tensor],
    batches: Sequence[Sequence[Tensor]],
    interface: _Interface,
    file: Path,
) -> Exported:
    size = sum(each.numel() * each.element_size() for each in module.state_dict().values())
    if size > FILE_LIMIT_BYTES:
        raise ExportError(f"its {size / 2**30:.1f} GiB of weights are more than the 2 GiB that one ONNX file can hold")
    with whole(file, shared=True) as part, _evaluated(module):
        _write(module, example, interface, part)
        differences = _verify(module, batches, interface, part)
    return Exported(file, differences)


def _write(module: nn.Module, example: Sequence[Tensor], interface: _Interface, file: Path) -> None:
    dimensions = {name: torch.export.Dim(name) for axes in interface.dynamic_axes for name in axes.values()}
    shapes = tuple({axis: dimensions[name] for axis, name in axes.items()} for axes in interface.dynamic_axes)
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            # The exporter's words to its own developers; what counts is verified.
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                tuple(example),
                input_names=interface.inputs,
                output_names=interface.outputs,
                dynamic_shapes=shapes,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
            assert program is not None  # noqa: S101 - it always is, with dynamo
            for value in (*program.model.graph.inputs, *program.model.graph.outputs):
                value.doc_string = interface.notes.get(str(value.name), "")
            program.save(file)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise  # it is no fault of the graph
        raise ExportError(f"it can't be exported to ONNX: {type(error).__name__}: {_first_words(error)}") from error


def _verify(
    module: nn.Module,
    batches: Sequence[Sequence[Tensor]],
    interface: _Interface,
    file: Path,
) -> dict[str, float]:
    """Compare every output on every batch; the largest differences."""
    with _running():
        run = open_onnx(file)
    largest = dict.fromkeys(interface.outputs, 0.0)
    for batch in batches:
        expected = _named(module(*batch))
        with _running():
            found = run(dict(zip(interface.inputs, batch, strict=True)))
        shapes = ", ".join(f"{name} {tuple(each.shape)}" for name, each in zip(interface.inputs, batch, strict=True))
        for name, right in zip(interface.outputs, expected.values(), strict=True):
            if found[name].shape != right.shape:
                raise ExportError(
                    f"its output {name} has the shape {tuple(found[name].shape)} in ONNX, {tuple(right.shape)} in "
                    f"PyTorch, on {shapes}"
                )
            difference, share = interface.tolerance.excess(found[name], right)
            if share > 1:
                raise ExportError(
                    f"its output {name} differs by {difference:.6g} between ONNX and PyTorch on {shapes}: more than "
                    f"{interface.tolerance.absolute:g} + {interface.tolerance.relative:g} · |{name}|"
                )
            largest[name] = max(largest[name], difference)
    return largest


@contextmanager
def _running() -> Iterator[None]:
    """Errors of ONNX Runtime as errors of the graph: PyTorch's exporter writes what it does not know to do."""
    try:
        yield
    except Exception as error:
        raise ExportError(f"ONNX Runtime can't run it: {type(error).__name__}: {_first_words(error)}") from error


def open_onnx(file: Path) -> Any:
    """An ONNX file as a function of tensors by name, run on the CPU.

    Args:
        file: The file.

    Returns:
        Gives its outputs by name, as tensors.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Its own choice is a thread for each core of the node, bound to it, whatever the pod is given.
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]

    def run(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # What a graph does not need is no input of it.
        known = {item.name for item in session.get_inputs()}
        found = session.run(names, {name: each.numpy() for name, each in inputs.items() if name in known})
        return {name: torch.as_tensor(each) for name, each in zip(names, found, strict=True)}

    return run


@contextmanager
def _evaluated(module: nn.Module) -> Iterator[None]:
    """Without gradients and dropout, and afterwards each part as it was."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


def _scene(batch: int, receivers: int, values: int) -> tuple[Tensor, Tensor]:
    """What some receivers may have heard, always the same: spectrograms and so many values of each receiver."""
    generator = torch.Generator().manual_seed(SEED + 100 * batch + receivers)
    spectrograms = torch.randn(batch, receivers, *SHAPE, generator=generator)
    places = SPREAD_M * torch.randn(batch, receivers, PLACE_VALUES, generator=generator)
    if values == PLACE_VALUES:
        return spectrograms, places
    # Of one transmitter each: what contradicts itself may be solved in more than one way, and rounding decides which.
    sent = SPREAD_M * torch.randn(batch, 1, PLACE_VALUES, generator=generator)
    sigma = ARRIVAL_SIGMA_M * (1 + torch.rand(batch, receivers, 1, generator=generator))
    error = sigma * torch.randn(batch, receivers, 1, generator=generator)
    late = (places - sent).norm(dim=-1, keepdim=True) + error
    return spectrograms, torch.cat([places, late, sigma], dim=-1)


def _example_of(module: Any) -> tuple[tuple[str, ...], tuple[Tensor, ...]]:
    """Names and tensors that `forward` is called with."""
    example = module.example_input_array
    values = tuple(example.values()) if isinstance(example, Mapping) else _as_tuple(example)
    if not values or not all(isinstance(value, Tensor) for value in values):
        raise ExportError(
            f"{type(module).__name__} has no example input: set example_input_array to what its forward takes (a "
            "tensor, a tuple or a dictionary of tensors)"
        )
    parameters = list(inspect.signature(module.forward).parameters.values())
    positional = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    if isinstance(example, Mapping):
        names = [name for name in positional if name in example]
        if len(names) != len(example) or names != positional[: len(names)]:
            raise ExportError(
                f"example_input_array of {type(module).__name__} names {', '.join(example)}: it must name the first "
                f"positional arguments of forward, which are {', '.join(positional)}"
            )
        values = tuple(example[name] for name in names)
    else:
        if len(values) > len(positional):
            raise ExportError(
                f"example_input_array of {type(module).__name__} has {len(values)} values, and forward names "
                f"{len(positional)} arguments: name each that it takes (a graph has no *args)"
            )
        names = positional[: len(values)]
    return tuple(names), tuple(value.detach().cpu() for value in values)


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,)


def _named(outputs: Any) -> dict[str, Tensor]:
    """A module's outputs by name."""
    if isinstance(outputs, Mapping):
        named = {str(name): value for name, value in outputs.items()}
    else:
        named = {f"output_{index}" if index else "output": value for index, value in enumerate(_as_tuple(outputs))}
    if not all(isinstance(value, Tensor) for value in named.values()):
        raise ExportError("its forward must give a tensor, a tuple or a dictionary of tensors")
    return named


def _first_words(error: BaseException) -> str:
    """What lies at the root of an exporter's error, without its pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
