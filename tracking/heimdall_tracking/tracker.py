"""MLflowTracker: one run of MLflow, from its start to its end. Usable without the rest of Heimdall."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from heimdall_tracking.experiments import ensure_experiment
from heimdall_tracking.params import flatten
from heimdall_tracking.queue import MetricQueue, Point, now_ms
from heimdall_tracking.runs import FinalStatus
from heimdall_tracking.settings import TrackingSettings, load_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

PARAM_BATCH: Final = 100
"""MLflow takes at most this many parameters in one call."""
REGISTER_TIMEOUT_S: Final = 300
FLUSH_TIMEOUT_S: Final = 300
INFINITY: Final = 1.79769e308
"""What MLflow's databases keep an infinity as."""

log = structlog.get_logger()


class TrackingError(Exception):
    """Something can't be tracked; the message says why and what to do."""


class MLflowTracker:
    """A run of MLflow.

    Example:
        tracker = initialize_mlflow(load_settings(tracking_uri="http://localhost:5000"))
        tracker.start_run("my-run")
        tracker.log_params({"lr": 1e-3})
        tracker.log_metrics({"loss": 0.5}, step=1)
        tracker.end_run()
    """

    def __init__(self, settings: TrackingSettings, client: MlflowClient | None = None) -> None:
        """Prepare a tracker; nothing is asked of the server yet.

        Args:
            settings: Where to track.
            client: A client to use instead of one made from the settings.
        """
        self.settings = settings
        self._given_client = client
        self._experiment_id: str | None = None
        self._run_id: str | None = None
        self._queue: MetricQueue | None = None
        self._uploads: ThreadPoolExecutor | None = None
        self._pending: list[Future[None]] = []

    @property
    def client(self) -> MlflowClient:
        """Client of tracking server and registry."""
        if self._given_client is None:
            from mlflow import MlflowClient

            if self.settings.username:
                os.environ["MLFLOW_TRACKING_USERNAME"] = self.settings.username
                os.environ["MLFLOW_TRACKING_PASSWORD"] = self.settings.password.get_secret_value()
            uri = self.settings.tracking_uri
            self._given_client = MlflowClient(uri, self.settings.registry_uri or uri)
        return self._given_client

    @property
    def run_id(self) -> str:
        """ID of the run.

        Raises:
            TrackingError: No run was started.
        """
        if self._run_id is None:
            raise TrackingError("no run was started: call start_run first")
        return self._run_id

    @property
    def experiment_id(self) -> str:
        """ID of the experiment, found or created at first use."""
        if self._experiment_id is None:
            self._experiment_id = ensure_experiment(self.client, self.settings.experiment_name)
        return self._experiment_id

    # --- a run's life --------------------------------------------------------------------------------------------

    def start_run(
        self, run_name: str | None = None, tags: Mapping[str, str] | None = None, run_id: str | None = None
    ) -> str:
        """Start a run, or take one up again.

        Args:
            run_name: Name of a new run; by default the settings' prefix and the time.
            tags: Tags to set.
            run_id: ID of a run to go on with; it becomes RUNNING again.

        Returns:
            The run's ID.

        Raises:
            MlflowException: The server is away, or there is no such run.
        """
        if run_id is not None:
            run = self.client.get_run(run_id)
            self._experiment_id = run.info.experiment_id
            if run.info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
            for name, value in (tags or {}).items():
                self.client.set_tag(run_id, name, value)
        else:
            name = run_name or f"{self.settings.run_name_prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags or {}))
        self._run_id = str(run.info.run_id)
        log.info("run started", run_id=self._run_id, resumed=run_id is not None)
        return self._run_id

    def end_run(self, status: FinalStatus = "FINISHED", timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Deliver what is left, then end the run.

        Args:
            status: How it ended.
            timeout_s: How long to wait for the delivery.

        Returns:
            Whether everything was delivered.
        """
        run_id = self.run_id
        delivered = self.close(timeout_s)
        self.client.set_terminated(run_id, status)
        self._run_id = None
        log.info("run ended", run_id=run_id, status=status, delivered=delivered)
        return delivered

    def flush_metrics(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until metrics are delivered; whether all were."""
        return self._queue.flush(timeout_s) if self._queue else True

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until metrics and artifacts are delivered; whether all were."""
        delivered = self.flush_metrics(timeout_s)
        done, pending = wait_for_futures(self._pending, timeout_s)
        failed = [future for future in done if future.exception() is not None]
        for future in failed:
            log.error("an artifact was not delivered", error=str(future.exception()))
        self._pending = [*failed, *pending]
        return delivered and not self._pending

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Deliver what is left and stop the background threads; the run stays as it is."""
        delivered = self.flush(timeout_s)
        if self._queue is not None:
            delivered = self._queue.close(0) and delivered
            self._queue = None
        if self._uploads is not None:
            self._uploads.shutdown(wait=False, cancel_futures=True)
            self._uploads = None
        return delivered

    # --- what is logged ------------------------------------------------------------------------------------------

    def log_params(self, params: Mapping[Any, Any]) -> None:
        """Log parameters of any type, nested at will; what can't be logged is warned about, never raised."""
        from mlflow.entities import Param
        from mlflow.exceptions import MlflowException

        items = [Param(name, value) for name, value in flatten(params).items()]
        for start in range(0, len(items), PARAM_BATCH):
            try:
                self.client.log_batch(self.run_id, params=items[start : start + PARAM_BATCH])
            except MlflowException as error:
                # A resumed run has them already; MLflow refuses other values for the same name.
                log.warning("parameters were not logged", error=str(error))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log metrics behind training: returns at once and never raises.

        Args:
            metrics: Values by name; NaN and infinities are kept as such.
            step: Training step.
        """
        if self._queue is None:
            self._queue = MetricQueue(self._send)
        stamp = now_ms()
        points = []
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError):
                log.warning("a metric is no number and was left out", metric=name)
                continue
            points.append(Point(name, _storable(number), step, stamp))
        self._queue.put(points)

    def _send(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        batch = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in points]
        self.client.log_batch(self.run_id, metrics=batch)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run."""
        self.client.set_tag(self.run_id, name, value)

    def log_artifact(self, file: str | Path, folder: str | None = None) -> Future[None]:
        """Upload a file behind training.

        Args:
            file: The file.
            folder: Artifact folder to put it in.

        Returns:
            The upload.

        Raises:
            TrackingError: The file is missing or can't be read.
        """
        path = Path(file)
        if not path.is_file():
            raise TrackingError(f"{path} is no file: it was not logged")
        if not os.access(path, os.R_OK):
            raise TrackingError(f"{path} can't be read: give this user the right to")
        return self._upload(self.client.log_artifact, str(path), folder)

    def log_artifacts_dir(self, source: str | Path, folder: str | None = None) -> Future[None]:
        """Upload a folder behind training; see log_artifact."""
        path = Path(source)
        if not path.is_dir():
            raise TrackingError(f"{path} is no folder: it was not logged")
        return self._upload(self.client.log_artifacts, str(path), folder)

    def _upload(self, call: Any, source: str, folder: str | None) -> Future[None]:
        if self._uploads is None:
            self._uploads = ThreadPoolExecutor(1, thread_name_prefix="artifacts")
        future: Future[None] = self._uploads.submit(call, self.run_id, source, folder)
        self._pending.append(future)
        return future

    # --- registry and search -------------------------------------------------------------------------------------

    def register_model(self, name: str, model_uri: str, timeout_s: int = REGISTER_TIMEOUT_S) -> str:
        """Register a model of this run.

        Args:
            name: Registered model; made when missing.
            model_uri: `models:/m-…` or `runs:/…`.
            timeout_s: How long to wait until the version is ready.

        Returns:
            The version's number.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = self.client.create_model_version(name, model_uri, self.run_id, await_creation_for=timeout_s)
        return str(version.version)

    def transition_model_stage(
        self, name: str, version: str, stage: Literal["Staging", "Production", "Archived"]
    ) -> None:
        """Kept for callers of stages: sets the alias of the stage's name, which is what MLflow 3 has."""
        self.client.set_registered_model_alias(name, stage.lower(), version)

    def get_run_info(self, run_id: str | None = None) -> dict[str, Any]:
        """ID, status, parameters, metrics and tags of a run (this one by default)."""
        return _info(self.client.get_run(run_id or self.run_id))

    def get_best_run(self, metric: str, mode: Literal["min", "max"] = "min") -> dict[str, Any] | None:
        """The experiment's finished run with the best value of a metric, or None where there is none.

        Runs that lack the metric, or whose value is not a number, don't count; of equals the older wins.
        """
        order = "ASC" if mode == "min" else "DESC"
        runs = self.client.search_runs(
            [self.experiment_id],
            filter_string="attributes.status = 'FINISHED'",
            order_by=[f"metrics.`{metric}` {order}", "attributes.start_time ASC"],
        )
        for run in runs:
            value = run.data.metrics.get(metric)
            if value is not None and not math.isnan(value):
                return _info(run)
        return None


def initialize_mlflow(settings: TrackingSettings | None = None) -> MLflowTracker:
    """A tracker for the given settings, or those of environment and `.env`.

    Raises:
        SettingsError: A setting is wrong.
    """
    return MLflowTracker(settings or load_settings())


def _storable(value: float) -> float:
    return math.copysign(INFINITY, value) if math.isinf(value) else value


def _info(run: Run) -> dict[str, Any]:
    return {
        "run_id": run.info.run_id,
        "run_name": run.info.run_name,
        "experiment_id": run.info.experiment_id,
        "status": run.info.status,
        "params": dict(run.data.params),
        "metrics": dict(run.data.metrics),
        "tags": dict(run.data.tags),
    }
