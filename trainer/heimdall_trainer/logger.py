"""A Lightning logger that tracks through MLflowTracker.

Lightning's own MLFlowLogger cuts parameters, lets an outage of MLflow end the training, and ends runs that are not its
own; here metrics go through the queue, and the run's owner ends it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heimdall_trainer.group import is_first

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker


def make_logger(pl: Any, tracker: MLflowTracker, folder: Path) -> Any:
    """A logger for a Lightning package.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.
        tracker: The run.
        folder: Where files that a module logs are until they are delivered; made when it is needed.

    Returns:
        A logger that the package's Trainer takes.
    """

    class TrackerLogger(pl.loggers.logger.Logger):  # type: ignore[misc]
        """Logs to the tracker's run."""

        @property
        def name(self) -> str:
            return "mlflow"

        @property
        def version(self) -> str:
            return tracker.run_id

        @property
        def run_id(self) -> str:
            """As of Lightning's own MLFlowLogger; `experiment` and its ID too."""
            return tracker.run_id

        @property
        def experiment_id(self) -> str:
            return tracker.experiment_id

        @cached_property
        def experiment(self) -> Any:
            """MLflow's client in the first process, in the others what does nothing."""
            return make_client(tracker, folder) if is_first() else pl.loggers.logger.DummyExperiment()

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if not is_first():
                return
            # Lightning's epoch counter is no metric of the training.
            tracker.log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step or 0)

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            if not is_first():
                return
            tracker.log_params({"module": dict(params) if isinstance(params, Mapping) else vars(params)})

    return TrackerLogger()


def make_client(tracker: MLflowTracker, folder: Path) -> Any:
    """MLflow's client for modules, which waits for no server where it logs to the tracker's run.

    Args:
        tracker: The run.
        folder: Where files are until they are delivered.
    """
    from mlflow import MlflowClient

    class TrackerClient(MlflowClient):
        """Figures, images, texts and dictionaries come by `log_artifact`, too, as files that go when it returns."""

        def log_artifact(self, run_id: str, local_path: str | Path, artifact_path: str | None = None) -> None:
            source = Path(local_path)
            if run_id != tracker.run_id or not source.is_file():
                super().log_artifact(run_id, str(local_path), artifact_path)
                return
            copy = Path(shutil.copy(source, _room(folder)))
            _forget_when_delivered(tracker.log_artifact(copy, artifact_path), copy.parent)

        def log_artifacts(self, run_id: str, local_dir: str | Path, artifact_path: str | None = None) -> None:
            if run_id != tracker.run_id or not Path(local_dir).is_dir():
                super().log_artifacts(run_id, str(local_dir), artifact_path)
                return
            copy = shutil.copytree(local_dir, _room(folder), dirs_exist_ok=True)
            _forget_when_delivered(tracker.log_artifacts_dir(copy, artifact_path), copy)

        def log_metric(self, run_id: str, key: str, value: float, *rest: Any, **more: Any) -> Any:
            if run_id != tracker.run_id:
                return super().log_metric(run_id, key, value, *rest, **more)
            tracker.log_metrics({key: value}, more.get("step", rest[1] if len(rest) > 1 else 0) or 0)
            return None

        def set_tag(self, run_id: str, key: str, value: Any, *rest: Any, **more: Any) -> Any:
            if run_id != tracker.run_id:
                return super().set_tag(run_id, key, value, *rest, **more)
            tracker.put_tag(key, value)
            return None

    known: Any = tracker.client
    return TrackerClient(known.tracking_uri, known._registry_uri)  # noqa: SLF001 - there is no other way


def _room(folder: Path) -> Path:
    """A folder for one upload: two files may have one name."""
    folder.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(dir=folder))


def _forget_when_delivered(upload: Future[None], room: Path) -> None:
    """Remove a folder once it was uploaded. What was not is put away when training ends, and must be there then."""

    def forget(done: Future[None]) -> None:
        if not done.cancelled() and done.exception() is None:
            shutil.rmtree(room, ignore_errors=True)

    upload.add_done_callback(forget)
