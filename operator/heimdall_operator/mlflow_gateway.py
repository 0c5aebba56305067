"""The operator's conversation with MLflow: blocking calls of `heimdall_tracking`, in threads, bounded in time."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

from heimdall_api.contract import TAG_ATTEMPT, TAG_NAME, TAG_NAMESPACE
from heimdall_operator import metrics
from heimdall_tracking import registry, runs
from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import is_permanent
from heimdall_tracking.registry import Registration
from heimdall_tracking.runs import FinalStatus, RunFacts

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

    from heimdall_operator.observe import Observed

HTTP_RETRIES: Final = "0"
"""The queue tries again, and then searches before it creates: a client that repeats by itself could create twice."""
HTTP_TIMEOUT_S: Final = "10"
UPLOAD_TIMEOUT_S: Final = 60.0
"""MLflow answers an upload once the object store has it; nothing waits for that."""
THREADS: Final = 16
SILENT_AFTER_S: Final = 5.0
"""A failure that took this long is a server that hangs, rather than one that is away."""
PAUSE_S: Final = 10.0
"""How long a server that hangs is left alone: every question would hold up a worker, and with it other runs."""
EXPERIMENT_AGE_S: Final = 60.0
"""How long an experiment's name is taken to mean what it did: somebody may rename it, and make another of its name."""
FOREIGN: Final = ("pyspark", "IPython", "dbruntime")
"""What MLflow tries to import at every request, in case it runs in somebody's cloud."""

T = TypeVar("T")


class RunGoneError(Exception):
    """The MLflow run was deleted for good: the training can't be followed."""


def bound_http() -> None:
    """Bound MLflow's HTTP calls: its own default of 7 tries of 120 s is right for a trainer, not for the operator.

    It reads them at each request, how much it logs when it is imported. It also prints links for people at a terminal,
    which have no place in a JSON log.
    """
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", HTTP_RETRIES)
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", HTTP_TIMEOUT_S)
    # One connection for each thread: those beyond the default of 10 would be made anew for every call.
    os.environ.setdefault("MLFLOW_HTTP_POOL_MAXSIZE", str(THREADS))


class MlflowSilentError(Exception):
    """MLflow did not answer a moment ago; it is asked again soon."""


class _Way:
    """The way to a server: one that hangs is asked by one look at a time."""

    def __init__(self) -> None:
        self._silent_until = 0.0

    async def ask(self, question: Callable[[], Awaitable[T]]) -> T:
        """Ask, unless the server did not answer a moment ago."""
        began = time.monotonic()
        if began < self._silent_until:
            raise MlflowSilentError("MLflow did not answer in time a moment ago; it is asked again soon")
        if self._silent_until:
            self._silent_until = began + PAUSE_S  # this one finds out; the others wait for what it finds
        try:
            result = await question()
        except Exception as error:
            is_silent = not is_permanent(error) and time.monotonic() - began >= SILENT_AFTER_S
            self._silent_until = time.monotonic() + PAUSE_S if is_silent else 0.0
            raise
        self._silent_until = 0.0
        return result


class _Experiment(NamedTuple):
    """What an experiment's name means."""

    id: str
    read: float
    """When that was read (monotonic)."""


class MlflowGateway:
    """What the operator asks of MLflow; every method may raise MlflowException while the server is away."""

    def __init__(self, tracking_uri: str) -> None:
        self._uri = tracking_uri
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="mlflow")
        self._client: MlflowClient | None = None
        self._experiments: dict[str, _Experiment] = {}
        """By name."""
        self._elsewhere: dict[str, str | None] = {}
        """Experiments of active runs that were not found in those of their names, by run ID."""
        self._registering: dict[str, asyncio.Lock] = {}
        self._tracking, self._artifacts = _Way(), _Way()
        """Two ways: an object store that hangs behind MLflow is no reason to ask it for nothing else."""

    def close(self) -> None:
        """Let the threads go; calls under way end by their own bounds."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def prepare(self) -> None:
        """Import MLflow, which takes a second or two, before the first run waits for it."""
        await asyncio.get_running_loop().run_in_executor(self._pool, self._connect)

    async def ensure_run(self, observed: Observed) -> RunFacts:
        """Find or create the run of a TrainingRun."""
        spec = observed.spec
        assert spec is not None  # noqa: S101 - decide asks for no run without a spec
        name = spec.tracking.experiment
        known = self._known_experiment(name)
        facts = await self._do(
            runs.ensure_run,
            uid=observed.uid,
            experiment=name,
            experiment_id=known,
            is_fresh=observed.is_fresh,
            name=spec.tracking.run_name or f"{observed.namespace}/{observed.name}",
            tags={
                **spec.tracking.tags,
                TAG_NAME: observed.name,
                TAG_NAMESPACE: observed.namespace,
                TAG_ATTEMPT: str(observed.status.attempt + 1),
            },
        )
        if facts.experiment_id != known:
            self._experiments[name] = _Experiment(facts.experiment_id, time.monotonic())
        return facts

    def _known_experiment(self, name: str) -> str | None:
        """ID of the experiment of a name, where it was read a moment ago."""
        known = self._experiments.get(name)
        return known.id if known is not None and time.monotonic() - known.read < EXPERIMENT_AGE_S else None

    async def open_attempt(self, run_id: str, attempt: int) -> RunFacts:
        """Make an attempt the run's newest."""
        await self._do(runs.open_attempt, await self._read(run_id), attempt)
        return await self._read(run_id)

    async def park_run(self, run_id: str) -> RunFacts:
        """Have a run say that nothing trains, until its next attempt is opened."""
        await self._do(runs.park, await self._read(run_id))
        return await self._read(run_id)

    async def end_run(self, observed: Observed, status: FinalStatus, *, fence: bool) -> RunFacts | None:
        """End the run of a TrainingRun, and where asked for keep its newest attempt from it; None where it has none."""
        run_id = observed.status.run_id
        if run_id is None:
            # The operator may have died between creating the run and writing its ID down.
            found = await self._find(observed)
            if found is None:
                return None
            run_id = found.run_id
        await self._do(runs.end_run, run_id, status, observed.status.attempt if fence else None)
        return await self._do(runs.read_facts, run_id)

    async def end_running(self, observed: Observed, status: FinalStatus) -> None:
        """End a run that runs although its TrainingRun has ended; a run that has ended stays as it is."""
        found = await self._find(observed)
        if found is not None and found.status == "RUNNING":
            await self._do(runs.end_run, found.run_id, status)

    async def discard_run(self, run_id: str) -> None:
        """Take back a run that was made beside the one that its TrainingRun names."""
        await self._do(runs.discard_run, run_id)

    async def register(self, observed: Observed) -> tuple[Registration, RunFacts]:
        """Register the run's model."""
        spec = observed.spec
        assert spec is not None  # noqa: S101
        assert spec.registration is not None  # noqa: S101
        assert observed.status.run_id is not None  # noqa: S101
        facts = await self._read(observed.status.run_id)
        # One at a time for each model: two promotions must not both beat the champion that the first of them replaces.
        async with self._registering.setdefault(spec.registration.model, asyncio.Lock()):
            return await self._do(registry.register, facts, spec.registration), facts

    async def keep_files(self, run_id: str, folder: str, files: Mapping[str, str]) -> str:
        """Keep small text files with a run; again, it overwrites them.

        Args:
            run_id: ID of the run.
            folder: Artifact folder.
            files: Texts by file name.

        Returns:
            The folder's URI.
        """
        for name, text in files.items():
            await self._artifacts.ask(partial(self._ask, _log_text, run_id, text, f"{folder}/{name}"))
        return f"runs:/{run_id}/{folder}"

    async def active_facts(self, active: Mapping[str, str]) -> dict[str, RunFacts]:
        """Facts of running runs, by run ID: one query for all.

        Args:
            active: Names of the experiments that the runs were made in, by run ID.
        """
        names = set(active.values())
        for name in [name for name in names if self._known_experiment(name) is None]:
            experiment = await self._do(_get_experiment, name)
            self._experiments.pop(name, None)
            if experiment is not None:
                self._experiments[name] = _Experiment(str(experiment.experiment_id), time.monotonic())
        ids = {self._experiments[name].id for name in names if name in self._experiments}
        self._elsewhere = {run_id: where for run_id, where in self._elsewhere.items() if run_id in active}
        ids |= {where for where in self._elsewhere.values() if where is not None}
        facts = await self._do(runs.read_active_facts, sorted(ids)) if ids else {}
        # Somebody may have renamed its experiment: a run that is not in it is looked for once by itself.
        for run_id in active.keys() - facts.keys() - self._elsewhere.keys():
            found = await self._do(runs.read_facts, run_id)
            self._elsewhere[run_id] = found.experiment_id if found is not None else None
            if found is not None and found.status == "RUNNING":
                facts[run_id] = found
        return facts

    async def _find(self, observed: Observed) -> RunFacts | None:
        """The run that carries the TrainingRun's UID, if there is one."""
        if observed.spec is None:
            return None
        return await self._do(runs.find_run, uid=observed.uid, experiment=observed.spec.tracking.experiment)

    async def _read(self, run_id: str) -> RunFacts:
        facts = await self._do(runs.read_facts, run_id)
        if facts is None:
            raise RunGoneError(f"the MLflow run {run_id} was deleted: create a new TrainingRun")
        return facts

    async def _do(self, call: Callable[..., T], *args: Any, **more: Any) -> T:
        return await self._tracking.ask(partial(self._ask, call, *args, **more))

    async def _ask(self, call: Callable[..., T], *args: Any, **more: Any) -> T:
        def bound() -> T:
            try:
                with metrics.MLFLOW_SECONDS.labels(call.__name__.strip("_")).time():
                    return call(self._connect(), *args, **more)
            except Exception as error:
                if not is_permanent(error):
                    forget_connections()
                raise

        return await asyncio.get_running_loop().run_in_executor(self._pool, bound)

    def _connect(self) -> MlflowClient:
        if self._client is None:
            from mlflow import MlflowClient
            from mlflow.store.artifact import http_artifact_repo
            from mlflow.utils.rest_utils import http_request

            for name in FOREIGN:
                if find_spec(name) is None:
                    # Known to be absent: not looked for along the whole path again.
                    sys.modules.setdefault(name, None)  # type: ignore[arg-type]
            # MLflow has one setting for all requests, and the calls that looks wait for need the shorter time.
            http_artifact_repo.http_request = partial(  # type: ignore[attr-defined]
                http_request, timeout=UPLOAD_TIMEOUT_S
            )
            self._client = MlflowClient(tracking_uri=self._uri, registry_uri=self._uri)
        return self._client


def _log_text(client: MlflowClient, run_id: str, text: str, path: str) -> None:
    client.log_text(run_id, text, path)


def _get_experiment(client: MlflowClient, name: str) -> Experiment | None:
    return client.get_experiment_by_name(name)
