"""Ownership of MLflow runs: one TrainingRun is one MLflow run, found again by the resource's UID.

Creating a run is not idempotent in MLflow, so it is searched for by its tag first. Whoever calls `ensure_run` for
one UID must be the only one to do so at a time: the operator serialises its looks at one TrainingRun.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

import structlog
from pydantic import ValidationError

from heimdall_api.contract import (
    MODEL_NAME,
    TAG_ACTIVITY,
    TAG_ATTEMPT,
    TAG_BEST,
    TAG_CHECKPOINTS,
    TAG_PROGRESS,
    TAG_UID,
    BestMetric,
    Checkpoint,
    Progress,
    parse_checkpoints,
)
from heimdall_tracking.errors import OvertakenError, is_permanent
from heimdall_tracking.experiments import ensure_experiment

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

FinalStatus = Literal["FINISHED", "FAILED", "KILLED"]
FINAL_STATUSES: Final = frozenset({"FINISHED", "FAILED", "KILLED"})
SEARCH_LIMIT: Final = 1000
"""Most runs that one search asks for."""
LOOK_EVERY_S: Final = 10.0
"""How often an attempt looks whether a newer one has taken over, while it says something."""

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """What an MLflow run says of a training."""

    run_id: str
    experiment_id: str
    status: str
    """RUNNING, SCHEDULED, FINISHED, FAILED or KILLED."""
    uid: str = ""
    """UID of the TrainingRun that it was made for."""
    attempt: int = 0
    """Number of the newest attempt that it was opened for."""
    progress: Progress | None = None
    activity: str = ""
    """Changes while the trainer does something that is no step; empty where it does not tell."""
    best: BestMetric | None = None
    checkpoints: tuple[Checkpoint, ...] = ()
    """Whole checkpoints, newest last."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Newest value of each metric."""

    @property
    def last_checkpoint(self) -> Checkpoint | None:
        """The checkpoint that a next attempt goes on from."""
        last = [item for item in self.checkpoints if item.last] or self.checkpoints
        return last[-1] if last else None


def ensure_run(
    client: MlflowClient,
    *,
    uid: str,
    experiment: str,
    name: str,
    tags: Mapping[str, str] | None = None,
    experiment_id: str | None = None,
    is_fresh: bool = False,
) -> RunFacts:
    """Find the run of a TrainingRun by its UID, or create it.

    Args:
        client: Client of the tracking server.
        uid: UID of the TrainingRun.
        experiment: Name of the experiment; made when missing.
        name: Name of a new run.
        tags: Further tags of a new run.
        experiment_id: ID of the experiment, where the caller has seen it.
        is_fresh: Whether the caller knows that nobody can have created the run yet: then it is not searched for.

    Returns:
        The run's facts.

    Raises:
        MlflowException: The server is away or refuses.
    """
    from mlflow.exceptions import MlflowException

    all_tags = {**(tags or {}), TAG_UID: uid}
    if is_fresh and experiment_id is not None:
        try:
            return facts_of(client.create_run(experiment_id, run_name=name, tags=all_tags))
        except MlflowException as error:
            if not is_permanent(error):
                raise
            # The experiment was deleted since it was seen.
    experiment_id = ensure_experiment(client, experiment)
    found = _find_run(client, uid=uid, experiment_id=experiment_id)
    return facts_of(found or client.create_run(experiment_id, run_name=name, tags=all_tags))


def find_run(client: MlflowClient, *, uid: str, experiment: str) -> RunFacts | None:
    """The run of a TrainingRun, or None where there is none.

    Raises:
        MlflowException: The server is away or refuses.
    """
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return None
    run = _find_run(client, uid=uid, experiment_id=found.experiment_id)
    return None if run is None else facts_of(run)


def _find_run(client: MlflowClient, *, uid: str, experiment_id: str) -> Run | None:
    runs = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{TAG_UID}` = '{uid}'",
        order_by=["attributes.start_time ASC"],
        max_results=1,
    )
    return runs[0] if runs else None


def facts_of(run: Run) -> RunFacts:
    """What an MLflow run says of a training."""
    tags = run.data.tags
    return RunFacts(
        run_id=run.info.run_id,
        experiment_id=str(run.info.experiment_id),
        status=str(run.info.status),
        uid=tags.get(TAG_UID, ""),
        attempt=_number(tags.get(TAG_ATTEMPT)),
        progress=_parsed(Progress, tags.get(TAG_PROGRESS)),
        activity=tags.get(TAG_ACTIVITY, ""),
        best=_parsed(BestMetric, tags.get(TAG_BEST)),
        checkpoints=tuple(parse_checkpoints(tags.get(TAG_CHECKPOINTS))),
        metrics=dict(run.data.metrics),
    )


def read_facts(client: MlflowClient, run_id: str) -> RunFacts | None:
    """The facts of one run, or None where the run was deleted.

    Raises:
        MlflowException: The server is away or refuses.
    """
    run = _read_run(client, run_id)
    return None if run is None else facts_of(run)


def _read_run(client: MlflowClient, run_id: str) -> Run | None:
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def read_active_facts(client: MlflowClient, experiment_ids: Iterable[str]) -> dict[str, RunFacts]:
    """The facts of all running runs of some experiments that belong to a TrainingRun, by run ID: one query a page.

    Raises:
        MlflowException: The server is away or refuses.
    """
    facts: dict[str, RunFacts] = {}
    token: str | None = None
    ids = list(experiment_ids)
    while ids:
        page = client.search_runs(
            ids,
            filter_string=f"attributes.status = 'RUNNING' AND tags.`{TAG_UID}` LIKE '%'",
            max_results=SEARCH_LIMIT,
            page_token=token,
        )
        facts.update((run.info.run_id, facts_of(run)) for run in page)
        token = page.token
        if not token:
            break
    return facts


def open_attempt(client: MlflowClient, facts: RunFacts, attempt: int) -> None:
    """Make an attempt the run's newest, and the run RUNNING: from here on an older attempt publishes nothing.

    Args:
        client: Client of the tracking server.
        facts: What the run says now.
        attempt: The attempt's number, from 1.

    Raises:
        MlflowException: The server is away or refuses.
    """
    if facts.attempt < attempt:
        client.set_tag(facts.run_id, TAG_ATTEMPT, str(attempt), synchronous=True)
    if facts.status != "RUNNING":
        client.update_run(facts.run_id, status="RUNNING")


def park(client: MlflowClient, facts: RunFacts) -> None:
    """Make a running run SCHEDULED: nothing trains until its next attempt is opened.

    Args:
        client: Client of the tracking server.
        facts: What the run says now.

    Raises:
        MlflowException: The server is away or refuses.
    """
    if facts.status == "RUNNING":
        client.update_run(facts.run_id, status="SCHEDULED")


def check_attempt(run: Run, attempt: int | None) -> None:
    """Make sure that an attempt may still publish.

    Args:
        run: The run, as it is now.
        attempt: The attempt's number; None where none takes over.

    Raises:
        OvertakenError: A newer one has taken over, or somebody has deleted the run.
    """
    if attempt is not None and run.info.lifecycle_stage == "deleted":
        raise OvertakenError(f"the run was deleted in MLflow: attempt {attempt} publishes nothing more")
    newest = _number(run.data.tags.get(TAG_ATTEMPT))
    if attempt is not None and newest > attempt:
        raise OvertakenError(f"attempt {newest} has taken over: attempt {attempt} publishes nothing more")


class Fence:
    """Keeps what an attempt says from a run that a newer one has taken over.

    An attempt may be given up while its machine is cut off or stands still: so it looks now and then, and, after it
    could say nothing for a while, before it says anything more.
    """

    def __init__(self, client: MlflowClient, run_id: str, attempt: int | None) -> None:
        """Nothing is asked yet.

        Args:
            client: The tracking server.
            run_id: The run.
            attempt: This attempt's number; None where none takes over.
        """
        self._client = client
        self._run_id = run_id
        self._attempt = attempt
        self._looked = time.monotonic()
        self.overtaken: OvertakenError | None = None
        """Set when a newer attempt has taken over."""

    def say(self, call: Callable[[], object]) -> None:
        """Make a call to the server, unless a newer attempt has taken over: then it is left out.

        Args:
            call: The call.

        Raises:
            Exception: The server is away, or what the call raises.
        """
        if self._attempt is not None and self.overtaken is None and time.monotonic() - self._looked > LOOK_EVERY_S:
            run = self._client.get_run(self._run_id)
            self._looked = time.monotonic()
            try:
                check_attempt(run, self._attempt)
            except OvertakenError as error:
                log.warning("nothing more is said to the run", reason=str(error))
                self.overtaken = error
        if self.overtaken is None:
            call()


def end_run(client: MlflowClient, run_id: str, status: FinalStatus, past: int | None = None) -> None:
    """End a run, once: a run that has ended this way, or was deleted, is left as it is.

    Args:
        client: Client of the tracking server.
        run_id: ID of the run.
        status: How it has ended.
        past: Number of an attempt that may not know of its end: from here on it publishes nothing. None where there
            is none.

    Raises:
        MlflowException: The server is away or refuses.
    """
    run = _read_run(client, run_id)
    if run is None:
        return
    if past is not None and _number(run.data.tags.get(TAG_ATTEMPT)) <= past:
        client.set_tag(run_id, TAG_ATTEMPT, str(past + 1), synchronous=True)
    if run.info.status != status:
        client.set_terminated(run_id, status)


def discard_run(client: MlflowClient, run_id: str) -> None:
    """End and delete a run that nobody knows of: it can be restored in MLflow.

    Raises:
        MlflowException: The server is away or refuses.
    """
    end_run(client, run_id, "KILLED")
    client.delete_run(run_id)


def find_model(client: MlflowClient, facts: RunFacts) -> str | None:
    """ID of the newest whole model that a run logged under the contract's name, or None where it logged none.

    Raises:
        MlflowException: The server is away or refuses.
    """
    ready = [
        model
        for model in logged_models(client, facts.run_id, experiment_id=facts.experiment_id)
        if str(model.status) == "READY"
    ]
    return str(ready[0].model_id) if ready else None


def logged_models(client: MlflowClient, run_id: str, *, experiment_id: str) -> list[LoggedModel]:
    """The models that a run has logged under the contract's name, the newest first, those that are not whole too.

    Raises:
        MlflowException: The server is away or refuses.
    """
    return list(
        client.search_logged_models(
            [experiment_id],
            filter_string=f"source_run_id = '{run_id}' AND name = '{MODEL_NAME}'",
            order_by=[{"field_name": "creation_timestamp", "ascending": False}],
        )
    )


def _number(tag: str | None) -> int:
    """An attempt's number; a tag that holds none counts as absent: whoever may write to the run may write it."""
    try:
        return int(tag or 0)
    except ValueError:
        return 0


def _parsed(model: type[Any], tag: str | None) -> Any:
    """A tag that a trainer wrote; one that can't be read counts as absent: any image may write it."""
    if not tag:
        return None
    try:
        return model.model_validate_json(tag)
    except ValidationError:
        return None
