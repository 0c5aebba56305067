"""The trained model as MLflow keeps and serves it."""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from heimdall_api.contract import MODEL_NAME, ONNX_FILE

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker

PACKAGES: Final = ("torch", "timm", "numpy", "pytorch-lightning", "heimdall-trainer")
log = structlog.get_logger()


def log_localizer(
    tracker: MLflowTracker, net: Any, example: dict[str, Any], *, onnx: Path | None, known: dict[str, Any]
) -> str:
    """Log a LocalizationNet: named arrays in, position and sigma in metres out.

    Args:
        tracker: The run.
        net: The network.
        example: `spectrograms` (B, R, 3, 128, 32) and `receivers` (B, R, 2 or, with arrivals, 4) in metres, as numpy
            arrays.
        onnx: The same network as ONNX, to lie beside it.
        known: What is to be known of it later, as the model's metadata.

    Returns:
        ID of the logged model.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    from heimdall_trainer.serving import Localizer

    def tensor(name: str, *shape: int) -> TensorSpec:
        return TensorSpec(np.dtype("float32"), shape, name)

    inputs = Schema([tensor("spectrograms", -1, -1, 3, 128, 32), tensor("receivers", -1, -1, net.receiver_values)])
    outputs = Schema([tensor("position", -1, 2), tensor("sigma", -1, 2)])

    def save(folder: str, model: Any) -> None:
        mlflow.pyfunc.save_model(
            folder,
            python_model=Localizer(net.eval().cpu()),
            signature=ModelSignature(inputs, outputs),
            input_example=example,
            pip_requirements=requirements(),
            mlflow_model=model,
        )

    return _log(tracker, save, onnx, known)


def log_module(tracker: MLflowTracker, module: Any, example: Any, *, onnx: Path | None) -> str:
    """Log any LightningModule with MLflow's PyTorch flavour.

    Args:
        tracker: The run.
        module: The module.
        example: A batch's input as a numpy array, or None where it is no single array.
        onnx: The same module as ONNX, to lie beside it.

    Returns:
        ID of the logged model.
    """
    import mlflow.pytorch
    from mlflow.models import infer_signature

    module = module.eval().cpu()
    module.trainer = None
    signature = None
    if example is not None:
        import torch

        with torch.no_grad():
            output = module(torch.from_numpy(example))
        signature = infer_signature(example, output.numpy()) if isinstance(output, torch.Tensor) else None

    def save(folder: str, model: Any) -> None:
        mlflow.pytorch.save_model(
            module,
            folder,
            signature=signature,
            input_example=example,
            pip_requirements=requirements(),
            mlflow_model=model,
            serialization_format="pickle",
        )

    return _log(tracker, save, onnx, {})


def _log(tracker: MLflowTracker, save: Any, onnx: Path | None, known: dict[str, Any]) -> str:
    """Give a saved model to the run: it counts only when it is whole."""
    from mlflow.entities import LoggedModelStatus
    from mlflow.models import Model

    client = tracker.client
    experiment = client.get_run(tracker.run_id).info.experiment_id
    logged = client.create_logged_model(experiment, name=MODEL_NAME, source_run_id=tracker.run_id)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "model"
        save(str(folder), Model(run_id=tracker.run_id, model_id=logged.model_id, metadata=known or None))
        if onnx is not None:
            (folder / ONNX_FILE).parent.mkdir()
            shutil.copyfile(onnx, folder / ONNX_FILE)
        client.log_model_artifacts(logged.model_id, str(folder))
    client.finalize_logged_model(logged.model_id, LoggedModelStatus.READY)
    log.info("model logged", model_id=logged.model_id)
    return str(logged.model_id)


def requirements() -> list[str]:
    """What serving the model needs, as installed here."""
    return [f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES if _installed(name)]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
