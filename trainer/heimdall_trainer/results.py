"""What a finished training leaves in its run beside metrics and checkpoints: plots, ONNX, the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import structlog

from heimdall_api.contract import ONNX_FILE, PLOTS_DIR
from heimdall_tracking.redact import described
from heimdall_tracking.waiting import in_time
from heimdall_trainer.errors import ConfigurationError, ExportError
from heimdall_trainer.imports import lightning_of

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from heimdall_api.types import TrainingRunSpec
    from heimdall_tracking import MLflowTracker
    from heimdall_trainer.plots import History

LOSSES: Final = ("train/loss_step", "val/loss")
"""Metrics of the loss curves."""
HISTORY_TIMEOUT_S: Final = 60
"""How long the plots wait for what MLflow knows."""
INPUTS: Final = ("spectrograms", "receivers")
"""What a localizer is given of a batch."""

log = structlog.get_logger()


class Results:
    """Makes them in a folder, and gives them to the run."""

    def __init__(self, spec: TrainingRunSpec, tracker: MLflowTracker, folder: Path) -> None:
        """Nothing is made yet.

        Args:
            spec: What was asked for.
            tracker: The run.
            folder: Where files are until they are delivered.
        """
        self._spec = spec
        self._tracker = tracker
        self._folder = folder
        self._localizer = spec.model.module is None

    def check(self, module: Any, *, rehearse: bool) -> None:
        """Refuse, before anything is trained, what could not be given out afterwards.

        Args:
            module: The module, untrained.
            rehearse: Save and export it once as it is: seconds now, instead of an error after hours.

        Raises:
            ConfigurationError: The module can't be saved as a model, or can't be exported.
        """
        if rehearse and self._spec.registration is not None and not self._localizer:
            from heimdall_trainer.modelling import check_saveable

            check_saveable(module)
        if not self._spec.export.onnx:
            return
        if not self._localizer:
            from heimdall_trainer.export import check_exportable

            with _naming_the_field():
                check_exportable(module)
        if rehearse and (self._localizer or _is_whole(module)):
            self._rehearse(module)

    def publish(self, module: Any, data: Any, check_fence: Callable[[], None]) -> None:
        """Give the run what was asked for; artifacts and model are uploaded behind this, and to be waited for.

        Args:
            module: The module with its best weights.
            data: Its data; None where it brings its own.
            check_fence: Raises where a newer attempt has taken over.

        Raises:
            ConfigurationError: The module can't be exported; everything else was published.
            FencedError: A newer attempt has taken over: nothing is published.
        """
        plots = self._draw(module, data)
        onnx, failure = None, None
        if self._spec.export.onnx:
            try:
                onnx = self._export(module)
            except Exception as error:  # noqa: BLE001 - raised below, when what hours have made is published
                failure = error
        if plots is not None or onnx is not None or self._spec.registration is not None:
            check_fence()
        if plots is not None:
            self._tracker.log_artifacts_dir(plots, PLOTS_DIR)
        if onnx is not None:
            self._tracker.log_artifact(onnx, str(Path(ONNX_FILE).parent))
        if self._spec.registration is not None:
            self._log_model(module, data, onnx)
        if isinstance(failure, ConfigurationError):
            rest = "The model was logged" if self._spec.registration is not None else "All else was published"
            raise ConfigurationError(f"{failure}. {rest} without it.") from failure
        if failure is not None:
            raise failure

    def _rehearse(self, module: Any) -> None:
        """Export the untrained module, and forget it."""
        try:
            self._export(module).unlink()
        except ConfigurationError:
            raise
        except Exception as error:
            if self._localizer:
                raise
            # A forward may need what training gives it; exported it will be when that is there.
            log.warning("the ONNX export could not be rehearsed", error=described(error))

    def _export(self, module: Any) -> Path:
        from heimdall_trainer.export import export_localizer, export_module

        file = self._folder / ONNX_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        with _naming_the_field():
            module.cpu()
            exported = export_localizer(module.net, file) if self._localizer else export_module(module, file)
        log.info("exported to ONNX", differences=exported.differences, size=file.stat().st_size)
        return file

    def _draw(self, module: Any, data: Any) -> Path | None:
        """Plots of the localizer on the test split, or None where there is nothing to plot."""
        from heimdall_trainer.data.module import HeimdallDataModule

        if not (self._localizer and isinstance(data, HeimdallDataModule) and data.split.test):
            return None
        from heimdall_trainer.evaluation import predict
        from heimdall_trainer.plots import draw

        folder = self._folder / PLOTS_DIR
        try:
            history = self._history()
            # Once more over the test split: it is small, and the metrics of a group lie in several processes.
            draw(predict(module.net, data.dataset(data.split.test)), history, folder)
        except Exception as error:  # noqa: BLE001 - they are for people: a training is no failure without them
            log.warning("no plots were made", error=described(error))
            return None
        return folder

    def _history(self) -> dict[str, History]:
        """The losses so far; none where MLflow is away, which the other plots can do without."""
        client, run_id = self._tracker.client, self._tracker.run_id
        try:
            return in_time(lambda: loss_history(client, run_id), HISTORY_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other plots
            log.warning("no loss curves are drawn", error=described(error))
            return {}

    def _log_model(self, module: Any, data: Any, onnx: Path | None) -> None:
        from heimdall_trainer import modelling
        from heimdall_trainer.data.module import HeimdallDataModule

        if self._localizer:
            batch = _batch_of(module, data) or dict(zip(INPUTS, module.example_input_array, strict=True))
            example = {name: batch[name][:1].numpy() for name in INPUTS}
            sessions = data.state_dict() if isinstance(data, HeimdallDataModule) else {}
            modelling.log_localizer(self._tracker, module.net, example, folder=self._folder, onnx=onnx, known=sessions)
        else:
            example = _single_array(_batch_of(module, data))
            modelling.log_module(self._tracker, module, example, folder=self._folder, onnx=onnx)


def loss_history(client: MlflowClient, run_id: str) -> dict[str, History]:
    """A run's losses by step, over all its attempts."""
    return {name: [(item.step, item.value) for item in client.get_metric_history(run_id, name)] for name in LOSSES}


@contextmanager
def _naming_the_field() -> Iterator[None]:
    """Errors of the export as errors of the field that asks for it."""
    try:
        yield
    except ExportError as error:
        raise ConfigurationError(f"spec.export.onnx: {error}; or set it to false") from error


def _is_whole(module: Any) -> bool:
    """Whether a module's layers are all there: none is made when training begins, or waits for its first batch."""
    from torch.nn.parameter import is_lazy

    base = lightning_of(module).LightningModule
    late = any(getattr(type(module), hook) is not getattr(base, hook) for hook in ("configure_model", "setup"))
    return not late and not any(is_lazy(each) for each in (*module.parameters(), *module.buffers()))


def _batch_of(module: Any, data: Any) -> Any:
    """A batch of the training's data; None where they can't be read any more: Lightning has had them torn down."""
    try:
        return next(iter((data if data is not None else module).train_dataloader()))
    except Exception as error:  # noqa: BLE001 - an example is no reason to lose what hours have made
        log.warning(
            "the training's data can't be read after it, so no example is taken from them", error=described(error)
        )
        return None


def _single_array(batch: Any) -> Any:
    """A batch's input as a numpy array of one row, or None where it is no single tensor."""
    import torch

    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(first, torch.Tensor):
        return None
    try:
        row = first[:1].detach().cpu()
        # bfloat16 is nothing that numpy knows.
        return (row.float() if row.dtype == torch.bfloat16 else row).numpy()
    except Exception as error:  # noqa: BLE001 - an example is no reason to lose what hours have made
        log.warning("no example is taken from a batch", error=described(error))
        return None
