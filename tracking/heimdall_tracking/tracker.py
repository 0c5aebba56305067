"""MLflowTracker: one run of MLflow, from its start to its end. Usable without the rest of Heimdall.

What training must not wait for (metrics, parameters, tags, artifacts) goes behind it, through background threads that
try again while the server is away; `flush` waits for them. What needs an answer (starting a run, registering) is asked
at once and raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog

from heimdall_tracking.artifacts import Uploader
from heimdall_tracking.errors import TrackingError
from heimdall_tracking.experiments import ensure_experiment
from heimdall_tracking.outbox import Outbox
from heimdall_tracking.params import clean_name, clean_text, flatten
from heimdall_tracking.queue import MetricQueue, Point, now_ms
from heimdall_tracking.redact import redact
from heimdall_tracking.registry import find_version, source_of
from heimdall_tracking.runs import FinalStatus
from heimdall_tracking.settings import TrackingSettings, load_settings

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Param, Run

PARAM_BATCH: Final = 100
"""MLflow takes at most this many parameters in one call."""
REGISTER_TIMEOUT_S: Final = 300
FLUSH_TIMEOUT_S: Final = 300
INFINITY: Final = 1.79769e308
"""What MLflow's databases keep an infinity as."""
TAG_LIMIT: Final = 5000
"""Longest value of a tag."""
SEARCH_PAGE: Final = 1000

log = structlog.get_logger()


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
        self._metrics: MetricQueue | None = None
        self._outbox: Outbox | None = None
        self._uploader: Uploader | None = None
        self._params_put = 0
        self._undelivered = False

    @property
    def client(self) -> MlflowClient:
        """Client of tracking server and registry, made at first use; MLflow's global state is left alone."""
        if self._given_client is None:
            from mlflow import MlflowClient

            self.settings.export()
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
        """ID of the experiment: found, created or restored at first use."""
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
            self._experiment_id = str(run.info.experiment_id)
            if run.info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
            for name, value in (tags or {}).items():
                self.client.set_tag(run_id, name, value)
        else:
            name = run_name or f"{self.settings.run_name_prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags or {}))
        self._run_id = str(run.info.run_id)
        log.info("run started", run_id=self._run_id, resumed=run_id is not None, uri=self.settings.display_uri)
        return self._run_id

    def attach(self, run_id: str) -> None:
        """Log to a run that somebody else owns: its status is left alone.

        Args:
            run_id: ID of the run.

        Raises:
            MlflowException: The server is away, or there is no such run.
        """
        self._experiment_id = str(self.client.get_run(run_id).info.experiment_id)
        self._run_id = run_id

    def end_run(self, status: FinalStatus = "FINISHED", timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Deliver what is left, then end the run.

        Args:
            status: How it ended.
            timeout_s: How long to wait for the delivery.

        Returns:
            Whether everything was delivered.

        Raises:
            MlflowException: The server is away: the run is still RUNNING there, and may be ended by another call.
        """
        run_id = self.run_id
        delivered = self.close(timeout_s)
        self.client.set_terminated(run_id, status)
        self._run_id = None
        self._undelivered = False
        log.info("run ended", run_id=run_id, status=status, delivered=delivered)
        return delivered

    def flush_metrics(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until the metrics logged so far are delivered; whether they were."""
        return self._metrics.flush(timeout_s) if self._metrics else True

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything logged so far is delivered.

        Args:
            timeout_s: How long to wait at most, in all.

        Returns:
            Whether everything was delivered.
        """
        deadline = time.monotonic() + timeout_s
        parts = (self._metrics, self._outbox, self._uploader)
        delivered = True
        for part in parts:
            if part is not None:
                delivered = part.flush(max(0.0, deadline - time.monotonic())) and delivered
        return delivered

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Deliver what is left and stop the background threads; the run stays as it is.

        Returns:
            Whether everything was delivered.
        """
        delivered = self.flush(timeout_s) and not self._undelivered
        for part in (self._metrics, self._outbox, self._uploader):
            if part is not None:
                delivered = part.close(0) and delivered
        self._metrics = self._outbox = self._uploader = None
        # What was given up stays so: a second call, after the first could not end the run, must not call it delivered.
        self._undelivered = not delivered
        return delivered

    # --- what is logged ------------------------------------------------------------------------------------------

    def log_params(self, params: Mapping[Any, Any]) -> None:
        """Log parameters behind training: any type, nested at will. Returns at once and never raises.

        MLflow keeps a parameter's first value for ever; one that is logged again with another value is warned about.

        Args:
            params: The parameters; nested names are joined by dots, values become text of at most 6,000 characters.
        """
        from mlflow.entities import Param

        items = [Param(name, value) for name, value in flatten(params).items()]
        run_id = self.run_id
        for start in range(0, len(items), PARAM_BATCH):
            self._params_put += 1
            send = partial(self._send_params, run_id, items[start : start + PARAM_BATCH])
            self._out().put(f"params {self._params_put}", send)

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log metrics behind training: returns at once and never raises.

        Args:
            metrics: Values by name; NaN and infinities are kept as such.
            step: Training step.
        """
        stamp = now_ms()
        points = []
        for name, value in metrics.items():
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                log.warning("a metric is no number and was left out", metric=str(name))
                continue
            points.append(Point(clean_name(name), _storable(number), int(step), stamp))
        if self._metrics is None:
            run_id = self.run_id
            self._metrics = MetricQueue(lambda batch: self._send_metrics(run_id, batch))
        self._metrics.put(points)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run now.

        Raises:
            MlflowException: The server is away or refuses.
        """
        self.client.set_tag(self.run_id, name, value)

    def put_tag(self, name: str, value: object) -> None:
        """Set a tag of the run behind training; of values that wait, only the newest is sent."""
        run_id, text = self.run_id, clean_text(redact(value), TAG_LIMIT)
        self._out().put(f"tag {name}", lambda: self.client.set_tag(run_id, name, text))

    def put(self, what: str, call: Any) -> None:
        """Have an idempotent call made behind training, until it succeeds.

        Args:
            what: What it does, for logs; a newer call of the same name replaces one that waits.
            call: Makes it, or raises.
        """
        self._out().put(what, call)

    def log_artifact(self, file: str | Path, folder: str | None = None) -> Future[None]:
        """Upload a file behind training.

        Args:
            file: The file. It must stay as it is until it was uploaded.
            folder: Artifact folder to put it in.

        Returns:
            The upload, to wait for; its exception is a TrackingError where the upload is impossible.

        Raises:
            TrackingError: The file is missing or can't be read.
        """
        run_id = self.run_id
        return self._uploads().file(lambda path: self.client.log_artifact(run_id, path, folder), Path(file))

    def log_artifacts_dir(self, source: str | Path, folder: str | None = None) -> Future[None]:
        """Upload a folder behind training; see log_artifact."""
        run_id = self.run_id
        return self._uploads().folder(lambda path: self.client.log_artifacts(run_id, path, folder), Path(source))

    def _out(self) -> Outbox:
        if self._outbox is None:
            self._outbox = Outbox()
        return self._outbox

    def _uploads(self) -> Uploader:
        if self._uploader is None:
            self._uploader = Uploader()
        return self._uploader

    def _send_metrics(self, run_id: str, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        batch = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in points]
        self.client.log_batch(run_id, metrics=batch)

    def _send_params(self, run_id: str, batch: Sequence[Param]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_batch(run_id, params=batch)
        except MlflowException as error:
            if error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(batch) == 1:
                log.warning("a parameter was not logged", name=batch[0].key, error=redact(error))
                return
            # One that can't change took the others along: each by itself.
            for param in batch:
                self._send_params(run_id, [param])

    # --- registry and search -------------------------------------------------------------------------------------

    def register_model(self, name: str, model_uri: str, timeout_s: int = REGISTER_TIMEOUT_S) -> str:
        """Register a model of this run; a run's model is registered once, however often this is called.

        Args:
            name: Registered model; made when missing.
            model_uri: `models:/m-…`, `runs:/…` or a location.
            timeout_s: How long to wait until the version is ready.

        Returns:
            The version's number.

        Raises:
            MlflowException: The server is away or refuses, or the version is not ready in time.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

        found = find_version(self.client, name, self.run_id)
        if found is not None:
            return found
        try:
            self.client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        source, model_id = model_uri, None
        if model_uri.startswith("runs:/"):
            source = RunsArtifactRepository.get_underlying_uri(model_uri, self.settings.tracking_uri)
        elif model_uri.startswith("models:/m-"):
            model_id = model_uri.removeprefix("models:/")
            source = source_of(self.client, model_id)
        version = self.client.create_model_version(
            name, source, self.run_id, model_id=model_id, await_creation_for=timeout_s
        )
        return str(version.version)

    def transition_model_stage(
        self, name: str, version: str, stage: Literal["Staging", "Production", "Archived", "None"]
    ) -> None:
        """Kept for callers of stages, which MLflow 3 has replaced by aliases: sets the alias of the stage's name.

        `Archived` and `None` take the aliases `staging` and `production` from the version.

        Args:
            name: Registered model.
            version: Its version.
            stage: The stage.

        Raises:
            MlflowException: There is no such version, or the server is away.
        """
        if stage in ("Staging", "Production"):
            self.client.set_registered_model_alias(name, stage.lower(), version)
            return
        aliases: Sequence[str] = self.client.get_model_version(name, version).aliases
        for alias in ("staging", "production"):
            if alias in aliases:
                self.client.delete_registered_model_alias(name, alias)
        if stage == "Archived":
            self.client.set_registered_model_alias(name, "archived", version)

    def get_run_info(self, run_id: str | None = None) -> dict[str, Any]:
        """ID, name, status, parameters, metrics and tags of a run (this one by default)."""
        return _info(self.client.get_run(run_id or self.run_id))

    def get_best_run(self, metric: str, mode: Literal["min", "max"] = "min") -> dict[str, Any] | None:
        """The experiment's finished run with the best value of a metric, or None where there is none.

        Runs that lack the metric, or whose value is not a number, don't count; of equals the older wins.

        Args:
            metric: Name of the metric.
            mode: Whether smaller or larger is better.
        """
        order = "ASC" if mode == "min" else "DESC"
        token: str | None = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                filter_string="attributes.status = 'FINISHED'",
                order_by=[f"metrics.`{clean_name(metric)}` {order}", "attributes.start_time ASC"],
                max_results=SEARCH_PAGE,
                page_token=token,
            )
            for run in page:
                value = run.data.metrics.get(clean_name(metric))
                if value is not None and not math.isnan(value):
                    return _info(run)
            token = page.token
            if not token:
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
