"""The GPU that a pod was given."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Final

from heimdall_trainer.errors import ConfigurationError, DeviceError

DEVICES: Final = Path("/dev")
GPU: Final = "nvidia[0-9]*"
NONE: Final = ("", "-1")
"""CUDA_VISIBLE_DEVICES of somebody who wants none."""
OLD_DRIVER: Final = "driver on your system is too old"


def check_gpu() -> None:
    """Make sure that torch can use the GPU that is there: without it training would take many times as long, unnoticed.

    Where there is none, as in a cluster that only simulates it, training is on the CPU.

    Raises:
        ConfigurationError: The node's driver is too old for this torch.
        DeviceError: It can't be used for another reason; another attempt may have better luck.
    """
    if os.environ.get("CUDA_VISIBLE_DEVICES") in NONE or not any(DEVICES.glob(GPU)):
        return
    import torch

    cuda: Any = torch.cuda
    if cuda.is_available():
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
