"""The GPU that is there, and whether this torch can use it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from heimdall_trainer import group
from heimdall_trainer.errors import ConfigurationError, DeviceError

DEVICES: Final = Path("/dev")
GPU: Final = "nvidia[0-9]*"
NONE: Final = ("", "-1")
"""CUDA_VISIBLE_DEVICES of somebody who wants none."""
OLD_DRIVER: Final = "driver on your system is too old"
ARCHITECTURE: Final = re.compile(r"(?P<kind>sm|compute)_(?P<major>\d+)(?P<minor>\d)(?P<only>[af]?)")
"""How torch names what it was built for: machine code (`sm_86`), or what the driver makes such of (`compute_90`)."""


def check_gpu() -> None:
    """Make sure that torch can use the GPU that is there: without it training would take many times as long, unnoticed.

    Where there is none, as in a cluster that only simulates it, training is on the CPU.

    Raises:
        ConfigurationError: The node's driver is too old for this torch, or the GPU is nothing that it was built for.
        DeviceError: It can't be used for another reason; another attempt may have better luck.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in NONE or not any(DEVICES.glob(GPU)):
        return
    import torch

    cuda: Any = torch.cuda
    if cuda.is_available():
        check_architecture("use an image whose torch was built for it, or have the run placed on another GPU")
        return
    try:
        cuda.init()
        why = "no reason is known"
    except (AssertionError, RuntimeError) as error:
        why = str(error).splitlines()[0]
    text = f"The pod was given a GPU, but torch {torch.__version__} can't use it: {why}"
    if OLD_DRIVER in why:
        raise ConfigurationError(f"{text} Update the node's driver, or use an image whose torch was built for it.")
    raise DeviceError(text)


def check_architecture(
    remedy: str = "set CUDA_VISIBLE_DEVICES= to train on the CPU, or install a torch that was built for it",
) -> None:
    """Make sure that torch was built for this process's GPU: it would fail at its first computation.

    Args:
        remedy: What helps.

    Raises:
        ConfigurationError: It was not; the message names the GPU, and what torch was built for.
    """
    import torch

    cuda: Any = torch.cuda
    built_for = cuda.get_arch_list() if cuda.is_available() else []
    known = [found for each in built_for if (found := ARCHITECTURE.fullmatch(each))]
    if not known:
        return  # the CPU, or something else's names
    number = group.local_rank()
    capability = cuda.get_device_capability(number)
    if not any(_runs_on(each, capability) for each in known):
        raise ConfigurationError(
            f"torch {torch.__version__} was not built for the GPU that is here, {cuda.get_device_name(number)} "
            f"(compute capability {capability[0]}.{capability[1]}), but for {', '.join(built_for)}: {remedy}"
        )


def _runs_on(architecture: re.Match[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on later GPUs of its generation, what the driver translates on those of later ones, too."""
    built_for = int(architecture["major"]), int(architecture["minor"])
    if architecture["only"] == "a":
        return built_for == capability
    same = architecture["kind"] == "sm" or architecture["only"] == "f"
    return built_for <= capability and (not same or built_for[0] == capability[0])
