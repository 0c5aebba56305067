"""The controller: reconciles one TrainingRun after another, deciding and acting until nothing is left to do.

One reconciliation is called a look.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

import structlog

from heimdall_api.types import TrainingRunStatus
from heimdall_operator import metrics
from heimdall_operator.act import Actor, NameTakenError
from heimdall_operator.actions import AskJob, CreateJob
from heimdall_operator.clock import local
from heimdall_operator.decide import Decision, decide
from heimdall_operator.event_recorder import EventRecorder
from heimdall_operator.events import Event, events_between
from heimdall_operator.failures import shorten
from heimdall_operator.kube import ConflictError, ForbiddenError, Kube, RefusedError, answer_of
from heimdall_operator.mistakes import about
from heimdall_operator.mlflow_gateway import MlflowGateway
from heimdall_operator.observe import LOST_POD_S, Observed, Podless, Trouble, observe, read_status
from heimdall_operator.progress import ProgressPoller
from heimdall_operator.statuses import age_s
from heimdall_operator.store import Key, Manifest, Store
from heimdall_operator.workqueue import WorkQueue
from heimdall_tracking.redact import redact
from heimdall_tracking.runs import FinalStatus, RunFacts

STEP_LIMIT: Final = 20
"""Most decisions of one look: more than any life needs at once, so that a mistake can't spin."""
REFUSED: Final = frozenset({"PERMISSION_DENIED", "UNAUTHENTICATED", "CUSTOMER_UNAUTHORIZED"})
"""Codes of MLflow's errors that waiting may not mend: somebody has to be told."""
DECIDED: Final = (ForbiddenError, RefusedError, NameTakenError)
"""Errors of creating a Job that are somebody's decision: others, a webhook that is away say, pass by themselves."""
STUCK_AFTER_S: Final = 300
"""A name that has waited this long, or a silence this long beyond a resync, means that the operator is stuck."""
STILL_AFTER_S: Final = 120
"""A queue in which no look has ended for this long does not move: each of a look's calls is bounded by much less."""

REFUSED_PAUSE_S: Final = 300.0
"""After how long something is tried again that the API server called invalid: its definition may be upgraded."""

log = structlog.get_logger()


@dataclass(frozen=True)
class _Unwritten:
    """A status that the API server refused: looks go on from it, as if it had been written."""

    uid: str
    version: str
    """The TrainingRun's resourceVersion when it was refused."""
    held: Any
    """The status that the API server holds in its place."""
    status: TrainingRunStatus
    refused: datetime


class Controller:
    """Looks at TrainingRuns; holds nothing that the API server and MLflow do not."""

    def __init__(
        self,
        *,
        kube: Kube,
        mlflow: MlflowGateway,
        store: Store,
        actor: Actor,
        public_url: str,
        namespaces: list[str],
        lost_pod_s: float = LOST_POD_S,
        clock: Callable[[], datetime] = local,
    ) -> None:
        self.store = store
        self.queue: WorkQueue[Key] = WorkQueue()
        self._kube = kube
        self._mlflow = mlflow
        self._actor = actor
        self._public_url = public_url
        self._namespaces: list[str | None] = list(namespaces) or [None]
        self._lost_pod_s = lost_pod_s
        self._troubles: dict[Key, Trouble] = {}
        """Why Jobs could not be created at the last try: only to be told, and to bound the wait."""
        self._podless: dict[Key, Podless] = {}
        """What Jobs without pods have said of it: only to be told, and not to be asked at every look."""
        self._unwritten: dict[Key, _Unwritten] = {}
        self._refusals: dict[Key, tuple[str, tuple[str, ...]]] = {}
        """Of which TrainingRun it was said last that which fields are refused: it is said once."""
        self._clock = clock
        self._in_doubt: dict[Key, Observed] = {}
        """What was observed before a write whose answer was lost: it may have been made."""
        self._last_reconciled = self._last_end = time.monotonic()
        self.progress = ProgressPoller(mlflow, store, self.queue, unwritten=self._unwritten, clock=self._now)
        self.events = EventRecorder(kube, store, self._namespaces, clock=self._now)

    # --- tasks that run as long as the operator ------------------------------------------------------------------

    async def work(self) -> None:
        """Look at one name after another."""
        while True:
            key = await self.queue.get()
            try:
                await self._reconcile_safely(key)
            finally:
                self.queue.done(key)
                self._last_reconciled = self._last_end = time.monotonic()

    async def resync(self, every_s: float) -> None:
        """List everything anew every few minutes, in case an event was missed."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.refresh()
            except Exception as error:  # noqa: BLE001 - the API server may be away; the next round mends it
                log.warning("listing everything failed; trying again", **about(error), again_in_s=every_s)

    async def refresh(self) -> None:
        """List everything and look at every run."""
        # What the watches bring and take while the listing is under way is newer than the listing.
        before = self.store.snapshot()
        resources, jobs, pods = [], [], []
        for namespace in self._namespaces:
            try:
                found = await self._list(namespace)
            except ForbiddenError as error:
                if namespace is None:
                    raise
                # Its Role went with it: a namespace that was deleted is no reason to leave the others alone.
                log.warning("a namespace can't be read; take it out of operator.namespaces", error=str(error))
                before = {known: uid for known, uid in before.items() if known[1].namespace != namespace}
                continue
            resources += found[0]
            jobs += found[1]
            pods += found[2]
        self.store.replace(resources, jobs, pods, before)
        for key in dict.fromkeys([*self.store.known(), *self._remembered()]):
            self.queue.add(key)
        self._last_reconciled = time.monotonic()

    def _remembered(self) -> list[Key]:
        """Runs of which something is remembered: a look at one whose end no watch has told of forgets it."""
        return [*itertools.chain(*self._memories), *self._actor.keeper.runs()]

    @property
    def _memories(self) -> tuple[dict[Key, Any], ...]:
        return (self._troubles, self._podless, self._unwritten, self._refusals, self._in_doubt)

    async def _list(self, namespace: str | None) -> tuple[list[dict[str, Any]], ...]:
        return (
            await self._kube.list_training_runs(namespace),
            await self._kube.list_jobs(namespace),
            await self._kube.list_pods(namespace),
        )

    def stuck_reason(self, resync_s: float) -> str | None:
        """Why the operator is taken for stuck, or None: what a liveness probe asks."""
        # A long queue is no reason to begin it anew, as long as it moves: its length has an alert of its own.
        if self.queue.oldest_wait_s > STUCK_AFTER_S and time.monotonic() - self._last_end > STILL_AFTER_S:
            return f"a TrainingRun has waited for {self.queue.oldest_wait_s:.0f} s to be looked at"
        silence = time.monotonic() - self._last_reconciled
        if silence > resync_s + STUCK_AFTER_S:
            return f"nothing was looked at for {silence:.0f} s"
        return None

    def _now(self) -> datetime:
        """The time in whole seconds, as a status holds it."""
        return self._clock().replace(microsecond=0)

    # --- one look ------------------------------------------------------------------------------------------------

    async def _reconcile_safely(self, key: Key) -> None:
        known = self.store.get(key)
        uid = known["metadata"]["uid"] if known is not None else None
        with structlog.contextvars.bound_contextvars(namespace=key.namespace, trainingrun=key.name, uid=uid):
            try:
                with metrics.RECONCILE_SECONDS.time():
                    again_s = await self.reconcile(key)
            except ConflictError as error:
                # Something changed since it was observed: read it and look again.
                log.debug("observed state was out of date", error=str(error))
                await self._read_again(key, known)
            except RefusedError as error:
                if known is not None:
                    self._say_refused(observe(known), error)
                self.queue.add_later(key, REFUSED_PAUSE_S)
            except Exception as error:  # noqa: BLE001 - one run failing never stops another
                delay = self.queue.add_after_failure(key)
                metrics.ERRORS.labels(type(error).__name__).inc()
                log.warning("looking at the run failed; trying again", **about(error), again_in_s=delay)
            else:
                self.queue.forget_failures(key)
                if again_s is not None:
                    self.queue.add_later(key, again_s)

    async def reconcile(self, key: Key) -> float | None:
        """Look at one TrainingRun until nothing is left to do.

        Args:
            key: Its namespace and name.

        Returns:
            After how many seconds to look again even if nothing happens; None: when something happens.

        Raises:
            ConflictError: Something changed meanwhile.
            Exception: The API server or MLflow is away; what is waited for is on the status.
        """
        resource = self.store.get(key)
        if resource is None:
            for known in self._memories:
                known.pop(key, None)
            self._actor.keeper.forget(key)
            return None
        observed = self._observe(key, resource)
        if observed.job is not None:
            self._troubles.pop(key, None)  # it was made after all: trouble with the next one begins anew
        self._settle_doubt(key, observed)
        self._actor.keeper.listen(observed)
        for _ in range(STEP_LIMIT):
            decision = decide(observed, self._now())
            if decision.actions:
                observed = await self._act(decision, observed)
            elif decision.status != observed.status or self._refused_s_left(observed) == 0:
                observed = await self._write(decision.status, observed)
            else:
                return _sooner(decision.requeue_after_s, self._refused_s_left(observed))
        log.error("a reconciliation did not settle", steps=STEP_LIMIT)
        return STEP_LIMIT

    def _observe(self, key: Key, resource: Manifest) -> Observed:
        run_id = (resource.get("status") or {}).get("runID", "")
        observed = observe(
            resource,
            self.store.children("Job", key),
            self.store.children("Pod", key),
            self.progress.facts(run_id),
            lost_pod_s=self._lost_pod_s,
            moved=self.progress.moved(run_id),
            trouble=self._troubles.get(key),
            podless=self._podless.get(key),
        )
        keeper = self._actor.keeper
        logs = keeper.known(key, observed.uid, observed.status)
        observed = replace(observed, logs=logs, unread=keeper.unread(key, observed.uid))
        unwritten = self._unwritten.get(key)
        if unwritten is None:
            return observed
        if (unwritten.uid, unwritten.held) != (observed.uid, resource.get("status")):
            del self._unwritten[key]  # somebody else has written one
            return observed
        return replace(observed, status=unwritten.status, is_unwritten=True)

    async def _act(self, decision: Decision, observed: Observed) -> Observed:
        for action in decision.actions:
            log.info("acting", action=type(action).__name__, attempt=observed.status.attempt)
            try:
                observed = await self._actor.act(action, observed)
                if isinstance(action, CreateJob):
                    self._troubles.pop(Key(observed.namespace, observed.name), None)
                    metrics.record_job(observed, self._clock())
                if isinstance(action, AskJob) and observed.podless is not None:
                    self._podless[Key(observed.namespace, observed.name)] = observed.podless
            except ConflictError:
                raise
            except Exception as error:
                if isinstance(action, CreateJob):
                    self._note_trouble(observed, action.number, error)
                else:
                    self._leave_out(Key(observed.namespace, observed.name))
                status = with_words(decision.status, said_by_mlflow(error))
                if status != observed.status:
                    # What happened is kept, and people see what is waited for.
                    await self._write(status, observed)
                raise
        return observed

    def _note_trouble(self, observed: Observed, attempt: int, error: Exception) -> None:
        """Note why a Job was not created; only what somebody decided counts towards the deadline."""
        is_decided = isinstance(error, DECIDED)
        key = Key(observed.namespace, observed.name)
        if not is_decided:
            self._leave_out(key)
        if not is_decided and answer_of(error) is None:
            return  # the API server is away, which is no trouble of this run
        known = self._troubles.get(key)
        since = known.since if known is not None and known.is_of(observed.uid, attempt) else None
        tried = known.tried if known is not None and since is not None else None
        if is_decided:
            since, tried = since or self._now(), self._now()
        words = str(getattr(error, "reason", error))
        self._troubles[key] = Trouble(observed.uid, attempt, shorten(words), since, tried)

    def _leave_out(self, key: Key) -> None:
        """Leave the time since the last try out of a refusal's: nobody could decide."""
        known, now = self._troubles.get(key), self._now()
        if known is not None and known.since is not None and known.tried is not None:
            self._troubles[key] = replace(known, since=known.since + (now - known.tried), tried=now)

    async def _write(self, status: TrainingRunStatus, observed: Observed) -> Observed:
        """Write a status that changed, and an Event for each transition."""
        key = Key(observed.namespace, observed.name)
        resource = self.store.current(key, observed.uid, observed.version)
        if status.run_id is not None and status.run_url is None and observed.run is not None:
            status = status.model_copy(update={"run_url": self._run_url(observed.run)})
        patch = merge_patch(resource.get("status") or {}, dump(status))
        if patch and self._refused_s_left(observed):
            self._unwritten[key] = replace(self._unwritten[key], status=status)
            return replace(observed, status=status)
        if patch:
            try:
                written = await self._kube.patch_status(observed.namespace, observed.name, patch, observed.version)
            except RefusedError as error:
                return self._go_on_unwritten(status, observed, resource, error)
            except ConflictError:
                raise
            except Exception:
                if not observed.is_unwritten:
                    self._in_doubt.setdefault(key, observed)
                raise
            self.store.put(written)
            self._in_doubt.pop(key, None)
            self._tell_change(read_status(resource) if observed.is_unwritten else observed.status, status, observed)
            observed = replace(observed, version=written["metadata"]["resourceVersion"])
        self._unwritten.pop(key, None)
        return replace(observed, status=status, is_unwritten=False)

    def _settle_doubt(self, key: Key, observed: Observed) -> None:
        """Tell of a write whose answer was lost, once it is seen that it was made."""
        before = self._in_doubt.get(key)
        if before is None or before.version == observed.version:
            return
        del self._in_doubt[key]
        if before.uid == observed.uid and not observed.is_unwritten:
            self._tell_change(before.status, observed.status, observed)

    def _tell_change(self, before: TrainingRunStatus, after: TrainingRunStatus, observed: Observed) -> None:
        reported = observed.run.progress if observed.run is not None else None
        metrics.record_status(observed.created, before, after, reported.first_step_time if reported else None)
        for event in events_between(before, after):
            self.events.tell(event, observed)

    def _go_on_unwritten(
        self, status: TrainingRunStatus, observed: Observed, resource: Manifest, error: RefusedError
    ) -> Observed:
        """Have looks go on from a status that can't be written: what has to be ended is ended all the same."""
        self._say_refused(observed, error)
        self._unwritten[Key(observed.namespace, observed.name)] = _Unwritten(
            uid=observed.uid,
            version=observed.version,
            held=resource.get("status"),
            status=status,
            refused=self._now(),
        )
        return replace(observed, status=status, is_unwritten=True)

    def _refused_s_left(self, observed: Observed) -> float | None:
        """For how long a status that was refused is not tried again; None where none was."""
        if not observed.is_unwritten:
            return None
        unwritten = self._unwritten[Key(observed.namespace, observed.name)]
        if unwritten.version != observed.version:
            return 0.0  # somebody has changed the TrainingRun
        return max(0.0, REFUSED_PAUSE_S - age_s(unwritten.refused, self._now()))

    def _say_refused(self, observed: Observed, error: RefusedError) -> None:
        """Say once that the API server calls something of a run invalid, and what."""
        metrics.ERRORS.labels(type(error).__name__).inc()
        key, said = Key(observed.namespace, observed.name), (observed.uid, error.fields)
        if self._refusals.get(key) == said:
            return
        self._refusals[key] = said
        log.error(
            "the API server refuses what the operator writes; trying again when the run changes, and now and then",
            fields=error.fields,
            error=str(error),
            again_in_s=REFUSED_PAUSE_S,
        )
        event = Event("Warning", "WriteRefused", str(error), f"refused-{','.join(error.fields)}")
        self.events.tell(event, observed)

    async def _read_again(self, key: Key, known: Manifest | None) -> None:
        """Read a TrainingRun that a write did not fit any more.

        Args:
            key: Its namespace and name.
            known: What it was taken for.
        """
        try:
            fresh = await self._kube.get_training_run(*key)
            if known is not None and (status := _ended_as(known, fresh)) is not None:
                # The step before the write may have made or opened the MLflow run: whoever ended it did so before that.
                await self._mlflow.end_running(observe(known), status)
        except Exception as error:  # noqa: BLE001
            delay = self.queue.add_after_failure(key)
            log.warning("a run that changed was not settled; trying again", **about(error), again_in_s=delay)
            return
        if fresh is None:
            if known is not None:
                self.store.drop(key, known["metadata"]["uid"])
        else:
            self.store.put(fresh)
            self.queue.add_after_failure(key)

    def _run_url(self, run: RunFacts) -> str:
        return f"{self._public_url}/#/experiments/{run.experiment_id}/runs/{run.run_id}"


def dump(status: TrainingRunStatus) -> dict[str, Any]:
    """A status as the API server holds it: without what is not there."""
    return status.model_dump(mode="json", exclude_none=True)


def merge_patch(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """The JSON merge patch from one status to another: changed parts, and null for what is gone."""
    patch: dict[str, Any] = {name: None for name in old if name not in new}
    for name, value in new.items():
        before = old.get(name)
        if isinstance(before, dict) and isinstance(value, dict):
            if before != value:
                patch[name] = merge_patch(before, value)
        elif before != value:
            patch[name] = value
    return patch


def said_by_mlflow(error: Exception) -> str:
    """What MLflow has refused, if it has answered; that it is away is no news, and in other words each time."""
    code = getattr(error, "error_code", None)
    return f"MLflow says: {shorten(redact(error))}" if code in REFUSED else ""


def with_words(status: TrainingRunStatus, words: str) -> TrainingRunStatus:
    """A status that waits, with the reason why it has to."""
    if not words:
        return status
    told = [
        item.model_copy(update={"message": shorten(f"{item.message} {words}")})
        if item.type == "Complete" and not item.message.endswith(words)
        else item
        for item in status.conditions
    ]
    return status.model_copy(update={"conditions": told})


def _sooner(*delays_s: float | None) -> float | None:
    """The shortest of some delays, where there is one."""
    return min((delay for delay in delays_s if delay is not None), default=None)


def _ended_as(known: Manifest, fresh: Manifest | None) -> FinalStatus | None:
    """How the MLflow run of a TrainingRun has to have ended, going by what another operator made of it meanwhile."""
    if fresh is None or fresh["metadata"]["uid"] != known["metadata"]["uid"]:
        return "KILLED"
    finals: dict[str, FinalStatus] = {"Succeeded": "FINISHED", "Failed": "FAILED"}
    return finals.get((fresh.get("status") or {}).get("phase", ""))
