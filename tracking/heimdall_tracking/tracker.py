"""MLflowTracker: one run of MLflow, from its start to its end. Usable without the rest of Heimdall.

What training must not wait for (metrics, parameters, tags, artifacts) goes behind it, through background threads that
try again while the server is away; `flush` waits for them. What they could not deliver when the process has to end
stays on disk (`undelivered`) and is delivered another day. What needs an answer (starting a run, registering) is asked
at once and raises.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import structlog

from heimdall_tracking.artifacts import Upload, Uploader
from heimdall_tracking.calls import Call, LogParams, SetTag
from heimdall_tracking.certificates import check_certificate
from heimdall_tracking.errors import OvertakenError, Refusal, TrackingError, is_permanent
from heimdall_tracking.experiments import ensure_experiment
from heimdall_tracking.outbox import Outbox
from heimdall_tracking.outstanding import Outstanding
from heimdall_tracking.params import Names, clean_name, clean_text, flatten
from heimdall_tracking.points import Point, is_number, is_step, storable
from heimdall_tracking.queue import DISK_WAIT_S, MetricQueue, now_ms
from heimdall_tracking.redact import redact
from heimdall_tracking.registry import create_version, find_version, source_of, wait_until_ready
from heimdall_tracking.runs import Fence, FinalStatus
from heimdall_tracking.settings import TrackingSettings, load_settings
from heimdall_tracking.spill import Spill
from heimdall_tracking.undelivered import Kept, Left, LeftCheckpoint, UndeliveredFolder
from heimdall_tracking.waiting import in_time

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

    from heimdall_api.types import RegistrationSpec

PARAM_BATCH: Final = 100
"""MLflow takes at most this many parameters in one call."""
REGISTER_TIMEOUT_S: Final = 300
FLUSH_TIMEOUT_S: Final = 300
END_TIMEOUT_S: Final = 15
"""How long an end that must not wait for the server tries to tell it."""
EXIT_TIMEOUT_S: Final = 30
"""How long a process that ends with an error, or with a run that nobody has closed, waits for the delivery."""
TAG_LIMIT: Final = 5000
"""Longest value of a tag."""
SEARCH_PAGE: Final = 1000

log = structlog.get_logger()


class MLflowTracker:
    """A run of MLflow.

    As a context manager it ends the run that `start_run` has started: FINISHED, or FAILED where the block raises. One
    that was attached to keeps its status. What can't be delivered is put away on disk and named in the log; the
    block's own exception goes on. A run that the block has ended keeps that end, where only the server could not be
    told.

    Without `with`, call `end_run` (or `close`, which leaves the run as it is). A process that ends without them
    delivers what waits or puts it away all the same, in bounded time, and the run becomes FAILED: nobody has said that
    it is done. A signal that nothing handles, SIGKILL and `os._exit` give no time for that.

    Example:
        with initialize_mlflow(load_settings(tracking_uri="http://localhost:5000")) as tracker:
            tracker.start_run("my-run")
            tracker.log_params({"lr": 1e-3})
            tracker.log_metrics({"loss": 0.5}, step=1)
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
        self._is_own = False
        """Whether the run was started here, and is to be ended here."""
        self._told: FinalStatus | None = None
        """How its owner has ended it, where the server could not be told."""
        self._metrics: MetricQueue | None = None
        self._outbox: Outbox[Call] | None = None
        self._uploader: Uploader | None = None
        self._params_put = 0
        self._names = Names()
        """What the run's metrics are called."""
        self._incomplete = False
        self._wanted_folder: Path | None = None
        self._attempt: int | None = None
        self._fence: Fence | None = None
        self._left_checkpoints: list[LeftCheckpoint] = []
        self._made_folder: UndeliveredFolder | None = None
        self._made_spill: Spill | None = None
        self._process: int | None = None
        """The process that has the threads: one that is forked from it has none, and may find their locks held."""
        self._told_of_fork = False
        self.undelivered: Kept | None = None
        """What the last close had to leave on disk, and the sentence that tells of it; None where all was delivered."""

    @property
    def client(self) -> MlflowClient:
        """Client of tracking server and registry, made at first use; MLflow's global state is left alone.

        Raises:
            SettingsError: The server's certificate can't be trusted, or another tracker of this process has another
                user or password.
        """
        if self._given_client is None:
            from mlflow import MlflowClient

            self.settings.export()
            check_certificate(self.settings)
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

    def keep_undelivered_in(self, folder: Path, *, attempt: int | None = None) -> None:
        """Say where the disk holds what waits for the server; the setting HEIMDALL_UNDELIVERED_DIR wins.

        Args:
            folder: A folder that this run alone uses; made when it is needed.
            attempt: Number of this attempt, where a newer one may take over: what this one left is not wanted then.
        """
        self._wanted_folder, self._attempt = folder, attempt

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
            TrackingError: A run was started already, and has not ended.
            MlflowException: The server is away, or there is no such run.
        """
        self._check_free()
        if run_id is not None:
            run = self.client.get_run(run_id)
            self._experiment_id = str(run.info.experiment_id)
            if run.info.status != "RUNNING":
                self.client.update_run(run_id, status="RUNNING")
            for name, value in (tags or {}).items():
                self.client.set_tag(run_id, name, value, synchronous=True)
        else:
            name = run_name or f"{self.settings.run_name_prefix}-{datetime.now(UTC):%Y%m%d-%H%M%S}"
            run = self.client.create_run(self.experiment_id, run_name=name, tags=dict(tags or {}))
        self._run_id, self._is_own, self._process = str(run.info.run_id), True, os.getpid()
        _open.add(self._end_with_process)
        log.info("run started", run_id=self._run_id, resumed=run_id is not None, uri=self.settings.display_uri)
        return self._run_id

    def adopt(self, run_id: str) -> None:
        """Own a run that could not be started, so that it can be ended; nothing is asked of the server.

        Args:
            run_id: ID of the run; one that was started stays as it is.
        """
        if self._run_id is None:
            self._run_id, self._is_own, self._process = run_id, True, os.getpid()

    def attach(self, run_id: str) -> None:
        """Log to a run that somebody else owns: its status is left alone.

        Args:
            run_id: ID of the run.

        Raises:
            TrackingError: A run was started already, and has not ended.
            MlflowException: The server is away, or there is no such run.
        """
        self._check_free()
        self._experiment_id = str(self.client.get_run(run_id).info.experiment_id)
        self._run_id, self._is_own = run_id, False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Deliver what is left, or put it away; end the run if it was started here."""
        if self._run_id is not None and not self._is_elsewhere():
            failed = kind is not None
            self.close(EXIT_TIMEOUT_S if failed else FLUSH_TIMEOUT_S)
            if self._is_own:
                self.end_run_in_time(self._told or ("FAILED" if failed else "FINISHED"))

    def _end_with_process(self) -> None:
        """The process ends, and nobody has closed this."""
        log.warning(
            "the process ends with a run that was not closed: use the tracker in a with statement, or call end_run",
            run_id=self._run_id,
        )
        self.close(EXIT_TIMEOUT_S)
        if self._is_own:
            self.end_run_in_time(self._told or "FAILED")

    def _check_free(self) -> None:
        """What waits in the background belongs to one run."""
        if self._run_id is not None:
            raise TrackingError(f"run {self._run_id} was started and has not ended: call end_run first")

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
        if self._is_elsewhere("the end of the run"):
            return False
        delivered = self.close(timeout_s)
        try:
            self.client.set_terminated(run_id, status)
        except Exception as error:
            if not is_permanent(error):
                self._told = status
                self.undelivered = self._folder().keep_status(status)
            raise
        self._forget_run()
        log.info("run ended", run_id=run_id, status=status, delivered=delivered)
        return delivered

    def end_run_in_time(self, status: FinalStatus, timeout_s: float = END_TIMEOUT_S) -> bool:
        """End the run without waiting long for the server: where it can't be told, that stays on disk with the rest.

        What was logged is delivered or put away before, by `close`.

        Args:
            status: How it ended.
            timeout_s: How long the server may take.

        Returns:
            Whether the run has ended there, and nothing is left on disk.
        """
        run_id = self.run_id
        if self._is_elsewhere("the end of the run"):
            return False
        try:
            in_time(lambda: self.client.set_terminated(run_id, status), timeout_s)
        except Exception as error:  # noqa: BLE001 - it is put away
            log.warning("the end of the run could not be told", run_id=run_id, error=redact(error))
            _open.discard(self._end_with_process)
            self.undelivered = self._folder().keep_status(status)
            done = False
        else:
            done = not self._incomplete and self.undelivered is None
            self._forget_run()
        if self.undelivered is not None:
            log.error(self.undelivered.sentence)
        return done

    def flush_metrics(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until the metrics logged so far are delivered; whether they were."""
        if self._is_elsewhere():
            return not self._told_of_fork
        return self._metrics.flush(timeout_s) if self._metrics else True

    def flush(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until everything logged so far is delivered.

        Args:
            timeout_s: How long to wait at most, in all.

        Returns:
            Whether everything was delivered.
        """
        if self._is_elsewhere():
            return not self._told_of_fork
        deadline = time.monotonic() + timeout_s
        parts = (self._metrics, self._outbox, self._uploader)
        delivered = True
        for part in parts:
            if part is not None:
                delivered = part.flush(max(0.0, deadline - time.monotonic())) and delivered
        return delivered

    def settle(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Wait until nothing waits any more: it was delivered, was refused, or is kept for later.

        Args:
            timeout_s: How long to wait at most, in all.

        Returns:
            Whether that is so. What came of it is said by `flush`.
        """
        if self._is_elsewhere():
            return True
        deadline = time.monotonic() + timeout_s
        waits = [part.flush for part in (self._metrics, self._outbox) if part is not None]
        waits += [self._uploader.settle] if self._uploader is not None else []
        settled = [wait(max(0.0, deadline - time.monotonic())) for wait in waits]
        return all(settled)

    def outstanding(self) -> Outstanding:
        """What is on its way to the server; nothing is asked of it."""
        parts = () if self._is_elsewhere() else (self._metrics, self._outbox, self._uploader)
        return sum((part.outstanding() for part in parts if part is not None), Outstanding())

    def close(self, timeout_s: float = FLUSH_TIMEOUT_S) -> bool:
        """Deliver what is left and stop the background threads; the run stays as it is.

        What could not be delivered in time stays on disk: a sentence in the log, and `undelivered`, tell of it.

        Args:
            timeout_s: How long to wait for the delivery.

        Returns:
            Whether everything was delivered.
        """
        if self._is_elsewhere():
            return not self._told_of_fork
        delivered = self.flush(timeout_s) and not self._incomplete
        for part in (self._metrics, self._outbox, self._uploader):
            if part is not None:
                delivered = part.close(0) and delivered
        delivered = not self._put_away() and delivered
        self._metrics = self._outbox = self._uploader = None
        # What was given up stays so: a second call, after the first could not end the run, must not call it delivered.
        self._incomplete = not delivered
        _open.discard(self._end_with_process)
        return delivered

    def discard(self) -> None:
        """Stop the background threads and forget what waits, on disk too: somebody else writes to the run now."""
        if self._is_elsewhere():
            return
        for part in (self._metrics, self._outbox, self._uploader):
            if part is not None:
                part.stop()
        if self._metrics is not None:
            self._metrics.rest(DISK_WAIT_S)  # what is being written would make the folder anew
        if self._made_folder is not None:
            self._made_folder.discard()
        self._metrics = self._outbox = self._uploader = None
        self._left_checkpoints, self._made_spill, self._made_folder = [], None, None
        _open.discard(self._end_with_process)

    def leave_checkpoint(self, left: LeftCheckpoint) -> None:
        """Have `close` put a checkpoint away on disk that its publisher could not deliver."""
        self._left_checkpoints.append(left)

    def leave_registration(self, spec: RegistrationSpec) -> None:
        """Put away on disk what this run's model is to be registered as, to be done when the rest is delivered."""
        self.undelivered = self._folder().keep_registration(spec) or self.undelivered

    def _put_away(self) -> bool:
        """Put on disk what the background threads could not deliver; whether there was anything."""
        if self._run_id is None or (self._made_spill is None and not self._left_checkpoints):
            return False
        before, behind = self._metrics.left() if self._metrics else ([], [])
        left = Left(
            before=before,
            behind=behind,
            calls=self._outbox.left() if self._outbox else [],
            uploads=self._uploader.left() if self._uploader else [],
            checkpoints=self._left_checkpoints,
        )
        kept = self._folder().keep(left, self._spill())
        self._left_checkpoints, self._made_spill = [], None
        if kept is None:
            return False
        self.undelivered = kept
        log.error(kept.sentence)
        return True

    def _folder(self) -> UndeliveredFolder:
        if self._made_folder is None:
            run_id, chosen = self.run_id, self.settings.undelivered_dir
            folder = chosen / run_id if chosen is not None else self._wanted_folder or Path(f"undelivered-{run_id}")
            self._made_folder = UndeliveredFolder(
                folder, run_id=run_id, tracking_uri=self.settings.tracking_uri, attempt=self._attempt
            )
        return self._made_folder

    def _spill(self) -> Spill:
        """Where points wait; asked for before anything else waits, so that the process's end sees to all of it."""
        _open.add(self._end_with_process)
        self._process = os.getpid()
        if self._made_spill is None:
            if self._made_folder is not None and self._made_folder.kept is not None:
                self._made_folder = None  # what is logged after a close has a folder of its own
            self._made_spill = Spill(self._folder().open)
        return self._made_spill

    def _is_elsewhere(self, what: str = "") -> bool:
        """Whether the threads are those of the process that this one was forked from.

        Args:
            what: What is dropped for that, which is said once.
        """
        if self._process is None or self._process == os.getpid():
            return False
        if what and not self._told_of_fork:
            self._told_of_fork = True
            log.warning(
                "this process was forked from the one that tracks: what is logged here is dropped; log there, or "
                "attach a tracker of its own",
                what=what,
                run_id=self._run_id,
            )
        return True

    def _forget_run(self) -> None:
        """The run has ended: nobody logs to it any more, and its end need not be told."""
        if self._made_folder is not None:
            self.undelivered = self._made_folder.keep_status(None)
        self._run_id, self._incomplete, self._made_folder, self._told = None, False, None, None
        self._process = None
        self._names = Names()
        _open.discard(self._end_with_process)

    # --- what is logged ------------------------------------------------------------------------------------------

    def log_params(self, params: Mapping[Any, Any]) -> None:
        """Log parameters behind training: any type, nested at will. Returns at once; in a run, it never raises.

        MLflow keeps a parameter's first value for ever; one that is logged again with another value is warned about.

        Args:
            params: The parameters; nested names are joined by dots, values become text of at most 6,000 characters.
        """
        if self._is_elsewhere("parameters"):
            return
        items = list(flatten(params).items())
        for start in range(0, len(items), PARAM_BATCH):
            self._params_put += 1
            part = dict(items[start : start + PARAM_BATCH])
            self._out().put(LogParams(number=self._params_put, params=part))

    def log_metrics(self, metrics: Mapping[str, Any], step: int) -> None:
        """Log metrics behind training: returns at once; in a run, it never raises.

        Args:
            metrics: Values by name; NaN and infinities are kept as such.
            step: Training step.
        """
        if self._is_elsewhere("metrics"):
            return
        stamp = now_ms()
        points = []
        try:
            at = int(step)
        except (TypeError, ValueError, OverflowError):
            log.warning("metrics whose step is no number were left out", metrics=sorted(map(str, metrics))[:10])
            return
        if not is_step(at):
            # It can't be sent at all, and what can't be sent is tried for ever: the server may be away.
            log.warning("metrics whose step is beyond 64 bits were left out", metrics=sorted(map(str, metrics))[:10])
            return
        for name, value in zip(self._names.of(metrics), metrics.values(), strict=True):
            try:
                number = float(value)
            except (TypeError, ValueError, RuntimeError, OverflowError):
                log.warning("a metric is no number and was left out", metric=name)
                continue
            points.append(Point(name, storable(number), at, stamp))
        if self._metrics is None:
            client, run_id, fence = self.client, self.run_id, self._fenced()
            self._metrics = MetricQueue(
                lambda batch: fence.say(lambda: send_points(client, run_id, batch)), spill=self._spill()
            )
        self._metrics.put(points)

    def set_tag(self, name: str, value: str) -> None:
        """Set a tag of the run now.

        Raises:
            MlflowException: The server is away or refuses.
        """
        self.client.set_tag(self.run_id, name, value, synchronous=True)

    def put_tag(self, name: str, value: object) -> None:
        """Set a tag of the run behind training; of values that wait, only the newest is sent."""
        if not self._is_elsewhere(f"the tag {name}"):
            self._out().put(SetTag(name=name, value=clean_text(redact(value), TAG_LIMIT)))

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
        return self._upload(Upload(path=Path(file), target=folder, attempt=self._attempt))

    def log_artifacts_dir(self, source: str | Path, folder: str | None = None) -> Future[None]:
        """Upload a folder behind training; see log_artifact."""
        return self._upload(Upload(path=Path(source), target=folder, whole_folder=True, attempt=self._attempt))

    def log_model(self, folder: str | Path) -> Future[None]:
        """Have a saved model become the run's logged model, behind training; see log_artifact.

        What waits for the server is all of it: making the logged model too. It counts when it is whole.

        Args:
            folder: The model as MLflow's flavors save it (`save_model`, with `Model(run_id=…)`).
        """
        key = uuid.uuid4().hex
        return self._upload(Upload(path=Path(folder), whole_folder=True, model=key, attempt=self._attempt))

    def _upload(self, upload: Upload) -> Future[None]:
        if not self._is_elsewhere(str(upload.path)):
            return self._uploads().put(upload)
        dropped: Future[None] = Future()
        dropped.set_exception(TrackingError(f"{upload.path} was not uploaded: the process that tracks is another one"))
        return dropped

    @property
    def refusal(self) -> Refusal | None:
        """Why the last artifact or model was refused, if it was."""
        return self._uploader.refusal if self._uploader is not None else None

    @property
    def overtaken(self) -> OvertakenError | None:
        """That a newer attempt has taken over, once it was seen: nothing that is logged since then is delivered."""
        return self._fence.overtaken if self._fence is not None else None

    def _fenced(self) -> Fence:
        if self._fence is None:
            self._fence = Fence(self.client, self.run_id, self._attempt)
        return self._fence

    def _out(self) -> Outbox[Call]:
        if self._outbox is None:
            client, run_id, fence = self.client, self.run_id, self._fenced()
            self._spill()
            self._outbox = Outbox(lambda call: fence.say(lambda: call.make(client, run_id)))
        return self._outbox

    def _uploads(self) -> Uploader:
        if self._uploader is None:
            client, run_id = self.client, self.run_id
            self._spill()
            self._uploader = Uploader(lambda upload: upload.make(client, run_id))
        return self._uploader

    # --- registry and search -------------------------------------------------------------------------------------

    def register_model(self, name: str, model_uri: str, timeout_s: float = REGISTER_TIMEOUT_S) -> str:
        """Register a model of this run; a run's model is registered once, however often this is called.

        Args:
            name: Registered model; made when missing.
            model_uri: `models:/m-…`, `runs:/…` or a location.
            timeout_s: How long to wait until the version is ready.

        Returns:
            The version's number.

        Raises:
            TrackingError: The version is not ready in time, or never will be.
            MlflowException: The server is away or refuses.
        """
        version = find_version(self.client, name, self.run_id) or self._register_uri(name, model_uri)
        wait_until_ready(self.client, name, version, timeout_s)
        return version

    def _register_uri(self, name: str, model_uri: str) -> str:
        from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository

        source, model_id = model_uri, None
        if model_uri.startswith("runs:/"):
            source = RunsArtifactRepository.get_underlying_uri(model_uri, self.settings.tracking_uri)
        elif model_uri.startswith("models:/m-"):
            model_id = model_uri.removeprefix("models:/")
            source = source_of(self.client, model_id)
        return create_version(self.client, name, source, run_id=self.run_id, model_id=model_id, timeout_s=0)

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

        Runs that lack the metric, or whose value is NaN or infinite, don't count; of equals the older wins.

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
                if value is not None and is_number(value):
                    return _info(run)
            token = page.token
            if not token:
                return None


_open: Final[set[Callable[[], None]]] = set()
"""Close the trackers that nobody has closed: their threads are daemons, which end with the process."""
os.register_at_fork(after_in_child=_open.clear)  # a child has none of the threads


@atexit.register
def _close_open() -> None:
    for close in list(_open):
        close()


def _close_open_early() -> None:
    """Close them while uploads can still be made: the pools that MLflow makes them in take nothing after this.

    A thread that its program still waits for may log until `atexit`.
    """
    from concurrent.futures import thread as pools

    expected = {threading.main_thread(), threading.current_thread(), *pools._threads_queues}  # noqa: SLF001
    if any(not each.daemon and each not in expected for each in threading.enumerate()):
        return
    try:
        _close_open()
    except Exception as error:  # noqa: BLE001 - what else is to be done at the end is done
        log.warning("what a tracker still had could not be put away", error=redact(error))


def _register_early() -> None:
    """In front of the pools' own end, which is what is registered when they are imported; Python's own, unnamed way."""
    import concurrent.futures.thread  # noqa: F401

    register = getattr(threading, "_register_atexit", None)
    if register is not None:
        register(_close_open_early)


_register_early()


def initialize_mlflow(settings: TrackingSettings | None = None) -> MLflowTracker:
    """A tracker for the given settings, or those that load_settings finds.

    Raises:
        SettingsError: A setting is wrong.
    """
    return MLflowTracker(settings or load_settings())


def send_points(client: MlflowClient, run_id: str, points: Sequence[Point]) -> None:
    """Deliver points, no more than MLflow takes in one call.

    Raises:
        MlflowException: The server is away or refuses.
    """
    from mlflow.entities import Metric

    batch = [Metric(point.name, point.value, point.timestamp_ms, point.step) for point in points]
    client.log_batch(run_id, metrics=batch, synchronous=True)


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
