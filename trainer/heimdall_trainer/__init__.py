"""The Lightning trainer of a TrainingRun. What is heavy is imported when it is first used."""

from __future__ import annotations

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


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
