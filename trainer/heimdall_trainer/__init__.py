"""The Lightning trainer of a TrainingRun. What is heavy is imported when it is first used."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from heimdall_trainer.config import load_training_config
    from heimdall_trainer.data.dataset import HeimdallDataset
    from heimdall_trainer.model.net import LocalizationNet
    from heimdall_trainer.pipeline import TrainingPipeline

__all__ = ["HeimdallDataset", "LocalizationNet", "TrainingPipeline", "load_training_config"]

_HOMES = {
    "HeimdallDataset": "heimdall_trainer.data.dataset",
    "LocalizationNet": "heimdall_trainer.model.net",
    "TrainingPipeline": "heimdall_trainer.pipeline",
    "load_training_config": "heimdall_trainer.config",
}

# oneDNN's AMX kernels convolve bfloat16 wrongly, with values that nobody wrote, where the result is 1 wide and the
# stride is more (https://github.com/pytorch/pytorch/issues/169688): what the last stage of a ResNet makes of a
# spectrogram of 32 frames. It reads this once, at its first kernel.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
