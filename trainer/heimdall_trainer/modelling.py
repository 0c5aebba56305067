"""The trained model as MLflow keeps and serves it."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from heimdall_api.contract import ONNX_FILE
from heimdall_tracking.redact import described
from heimdall_trainer.errors import ConfigurationError

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker

PACKAGES: Final = ("torch", "timm", "numpy", "pytorch-lightning", "heimdall-trainer")
log = structlog.get_logger()


def log_localizer(
    tracker: MLflowTracker,
    net: Any,
    example: dict[str, Any],
    *,
    folder: Path,
    onnx: Path | None,
    known: dict[str, Any],
) -> Future[None]:
    """Log a LocalizationNet behind this: named arrays in, position and sigma in metres out.

    Args:
        tracker: The run.
        net: The network.
        example: `spectrograms` (B, R, 3, 128, 32) and `receivers` (B, R, 2 or, with arrivals, 4) in metres, as numpy
            arrays.
        folder: Where the model is until it is delivered.
        onnx: The same network as ONNX, to lie beside it.
        known: What is to be known of it later, as the model's metadata.

    Returns:
        The upload, to wait for.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from heimdall_trainer.data.spectrogram import SHAPE
    from heimdall_trainer.serving import Localizer

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(np.dtype("float32"), shape, name)

    inputs = Schema([tensor("spectrograms", -1, -1, *SHAPE), tensor("receivers", -1, -1, net.receiver_values)])
    outputs = Schema([tensor("position", -1, 2), tensor("sigma", -1, 2)])

    def save(place: str, model: Any) -> None:
        mlflow.pyfunc.save_model(
            place,
            python_model=Localizer(net.eval().cpu()),
            signature=ModelSignature(inputs, outputs),
            input_example=example,
            pip_requirements=requirements(),
            mlflow_model=model,
        )

    return _log(tracker, save, folder, onnx, known)


def log_module(tracker: MLflowTracker, module: Any, example: Any, *, folder: Path, onnx: Path | None) -> Future[None]:
    """Log any LightningModule behind this, with MLflow's PyTorch flavour.

    Args:
        tracker: The run.
        module: The module.
        example: A batch's input as a numpy array, or None where it is no single array.
        folder: Where the model is until it is delivered.
        onnx: The same module as ONNX, to lie beside it.

    Returns:
        The upload, to wait for.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    module = module.eval().cpu()
    module.trainer = None
    signature = None
    if example is not None:
        import torch

        try:
            with torch.no_grad():
                output = module(torch.from_numpy(example))
            signature = infer_signature(example, output.numpy()) if isinstance(output, torch.Tensor) else None
        except Exception as error:  # noqa: BLE001 - whatever the module expects of a batch, hours of training count more
            log.warning(
                "the model is logged without signature and example: it does not take the first tensor of a batch",
                error=described(error),
            )
            example = None

    def save(place: str, model: Any) -> None:
        mlflow.pytorch.save_model(
            module,
            place,
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
            mlflow_model=model,
            serialization_format="pickle",
        )

    return _log(tracker, save, folder, onnx, {})


def check_saveable(module: Any) -> None:
    """Make sure that a module can be kept as a model: its weights are written, to nowhere.

    Args:
        module: The module, as `log_module` is given it.

    Raises:
        ConfigurationError: It can't be; the message says why.
    """
    import torch
    from mlflow.pytorch import pickle_module

    try:
        with Path(os.devnull).open("wb") as nowhere:
            torch.save(module, nowhere, pickle_module=pickle_module)
    except Exception as error:
        raise ConfigurationError(
            f"spec.registration: {type(module).__name__} can't be kept as a model ({type(error).__name__}: {error}); "
            "have its __getstate__ leave out what can't be pickled, or remove the field"
        ) from error


def _log(tracker: MLflowTracker, save: Any, folder: Path, onnx: Path | None, known: dict[str, Any]) -> Future[None]:
    """Save a model, for which no server is needed, and have it delivered as it lies there."""
    from mlflow.models import Model

    folder.mkdir(parents=True, exist_ok=True)
    saved = Path(tempfile.mkdtemp(dir=folder)) / "model"
    save(str(saved), Model(run_id=tracker.run_id, metadata=known or None))
    if onnx is not None:
        (saved / ONNX_FILE).parent.mkdir()
        shutil.copyfile(onnx, saved / ONNX_FILE)
    log.info("model saved", folder=str(saved))
    return tracker.log_model(saved)


def requirements() -> list[str]:
    """What serving the model needs, as installed here."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES if _installed(name)]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
