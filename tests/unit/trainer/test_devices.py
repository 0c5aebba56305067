"""A pod's GPU that torch can't use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import heimdall_tracking
from heimdall_api.contract import ENV_MLFLOW_RUN_ID, ExitCode, Reason
from heimdall_trainer import devices, pipeline
from heimdall_trainer.commands import training
from heimdall_trainer.config import parse
from heimdall_trainer.grace import Grace
from heimdall_trainer.termination import judge

OLD = "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver."
LOST = "CUDA unknown error - this may be due to an incorrectly set up environment"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A pod's devices: one GPU, which torch can't use for the reason in `why`."""
    monkeypatch.setattr(devices, "DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "nvidia0").touch()
    return tmp_path


def fail_with(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError(why)

    monkeypatch.setattr(torch.cuda, "init", init)


@pytest.mark.parametrize(
    ("why", "end"),
    [
        (OLD, (ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION)),
        (LOST, (ExitCode.ERROR, Reason.UNKNOWN)),
    ],
    ids=["its driver is too old", "it fell off the bus"],
)
def test_a_gpu_that_can_not_be_used_is_told_and_not_done_without(
    why: str, end: tuple[ExitCode, Reason], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(why, monkeypatch)
    with pytest.raises(Exception, match=r"The pod was given a GPU, but torch \S+ can.t use it") as caught:
        devices.check_gpu()
    code, reason, said = judge(caught.value)
    assert (code, reason) == end
    assert why.splitlines()[0] in said


def test_where_no_gpu_is_there_or_wanted_training_is_on_the_cpu(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(OLD, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        devices.check_gpu()
    (given / "nvidia0").rename(given / "nvidiactl")
    devices.check_gpu()


BUILT_FOR = ["sm_75", "sm_80", "sm_90a", "compute_120"]


def use(capability: tuple[int, int], built_for: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that the driver can use: the second one, as that of the second process of its node."""

    def capability_of(number: int) -> tuple[int, int]:
        return capability if number == 1 else (7, 5)

    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built_for)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability_of)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: f"GPU {number}")


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (12, 0), (12, 1), (13, 0)])
def test_a_gpu_that_torch_was_built_for_or_a_later_one_can_be_used(
    capability: tuple[int, int], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(capability, BUILT_FOR, monkeypatch)
    devices.check_gpu()
    devices.check_architecture()


@pytest.mark.parametrize(
    ("capability", "built_for"),
    [
        ((6, 1), BUILT_FOR),
        ((7, 0), BUILT_FOR),
        ((10, 0), BUILT_FOR),
        ((9, 1), BUILT_FOR),
        ((8, 0), ["sm_86"]),
        ((12, 1), ["compute_120a"]),
        ((12, 0), ["sm_100f", "compute_100f"]),
    ],
)
def test_a_gpu_that_torch_was_not_built_for_is_named_with_what_it_was_built_for(
    capability: tuple[int, int], built_for: list[str], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(capability, built_for, monkeypatch)
    dotted = r"\.".join(map(str, capability))
    said = rf"not built for .*GPU 1 \(compute capability {dotted}\), but for {', '.join(built_for)}: "
    with pytest.raises(devices.ConfigurationError, match=f"{said}use an image"):
        devices.check_gpu()
    with pytest.raises(devices.ConfigurationError, match=f"{said}set CUDA_VISIBLE_DEVICES= to train on the CPU"):
        training._train_locally(parse({"metadata": {"name": "local"}}), given, Grace())


@pytest.mark.parametrize("built_for", [[], ["gfx90a", "gfx942"]])
def test_where_nobody_knows_what_torch_was_built_for_it_is_tried(
    built_for: list[str], given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use((6, 1), built_for, monkeypatch)
    devices.check_gpu()
    devices.check_architecture()


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_pod_that_asked_for_a_gpu_looks_for_it(
    gpus: int, given: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fail_with(OLD, monkeypatch)
    trained: list[Any] = []

    class Pipeline:
        def __init__(self, run: Any, *_: Any, **__: Any) -> None:
            trained.append(run)

        def train(self) -> None:
            """Nothing."""

    class Tracker:
        def attach(self, run_id: str) -> None:
            """Nothing."""

    monkeypatch.setattr(heimdall_tracking, "initialize_mlflow", Tracker)
    monkeypatch.setattr(pipeline, "TrainingPipeline", Pipeline)
    monkeypatch.setenv(ENV_MLFLOW_RUN_ID, "r")
    run = parse({"metadata": {"name": "asked"}, "spec": {"resources": {"gpusPerWorker": gpus}}})
    if gpus:
        with pytest.raises(devices.ConfigurationError, match="Update the node's driver"):
            training._train_in_pod(run, tmp_path, Grace())
    else:
        training._train_in_pod(run, tmp_path, Grace())
    assert len(trained) == 1 - gpus
