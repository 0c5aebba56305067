"""Act: carries out what was decided. Every action can be repeated after a crash and then finds what it did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import structlog

from heimdall_api.contract import FINALIZER
from heimdall_operator import metrics
from heimdall_operator.accounts import Keeper
from heimdall_operator.actions import (
    Action,
    AddFinalizer,
    AskJob,
    CreateJob,
    DeleteJob,
    EndRun,
    EnsureRun,
    KeepLogs,
    OpenAttempt,
    ParkRun,
    RegisterModel,
    RemoveFinalizer,
)
from heimdall_operator.clock import local
from heimdall_operator.decide import job_name
from heimdall_operator.kube import ConflictError, ForbiddenError, Kube, RefusedError
from heimdall_operator.manifests import AttemptPlan, TrainerDefaults, build_job, build_service
from heimdall_operator.mistakes import about
from heimdall_operator.mlflow_gateway import MlflowGateway, MlflowSilentError, RunGoneError
from heimdall_operator.observe import Observed, Podless, job_facts, pod_facts, refused_pods
from heimdall_operator.overrides import refusals
from heimdall_operator.store import Key, Store, owner_uid
from heimdall_tracking.errors import is_refusal
from heimdall_tracking.redact import described, redact
from heimdall_tracking.registry import ModelMissingError
from heimdall_tracking.runs import FinalStatus, RunFacts

FINALIZERS: Final = "finalizers"
DENIED: Final = "denied"
"""The word by which admission webhooks and policies refuse, whichever code their authors chose."""

log = structlog.get_logger()


class NameTakenError(Exception):
    """Something of another owner has the name that is wanted; it may go."""


class Actor:
    """Carries out actions; what each one learned is in the observation that it returns."""

    def __init__(
        self,
        kube: Kube,
        mlflow: MlflowGateway,
        store: Store,
        defaults: TrainerDefaults,
        keeper: Keeper,
        *,
        clock: Callable[[], datetime] = local,
    ) -> None:
        self._clock = clock
        self._kube = kube
        self._mlflow = mlflow
        self._store = store
        self._defaults = defaults
        self.keeper = keeper

    async def act(self, action: Action, observed: Observed) -> Observed:
        """Carry out one action.

        Args:
            action: What to do.
            observed: What was known before.

        Returns:
            What is known after it.

        Raises:
            ConflictError: Something changed since it was observed.
            Exception: The API server or MLflow is away; nothing is lost by doing it again.
        """
        match action:
            case AddFinalizer() | RemoveFinalizer():
                return await self._set_finalizer(observed, present=isinstance(action, AddFinalizer))
            case CreateJob(number):
                return await self._create_job(observed, number)
            case AskJob(name):
                return await self._ask_job(observed, name)
            case KeepLogs(number, pods_go):
                return await self._keep_logs(observed, number, pods_go=pods_go)
            case DeleteJob(name):
                return await self._delete_job(observed, name)
            case _:
                return await self._act_on_run(action, observed)

    async def _act_on_run(
        self, action: EnsureRun | OpenAttempt | RegisterModel | ParkRun | EndRun, observed: Observed
    ) -> Observed:
        """Carry out what is MLflow's part."""
        match action:
            case EnsureRun():
                return await self._ensure_run(observed)
            case OpenAttempt(number):
                return await self._open_attempt(observed, number)
            case RegisterModel():
                return await self._register(observed)
            case ParkRun():
                return await self._park_run(observed)
            case EndRun(status, insist, fence):
                return await self._end_run(observed, status, insist=insist, fence=fence)

    async def _set_finalizer(self, observed: Observed, *, present: bool) -> Observed:
        key = Key(observed.namespace, observed.name)
        metadata = self._store.current(key, observed.uid, observed.version)["metadata"]
        others = [item for item in metadata.get(FINALIZERS, ()) if item != FINALIZER]
        wanted = [*others, FINALIZER] if present else others
        patched = await self._kube.patch_finalizers(observed.namespace, observed.name, wanted, observed.version)
        if "deletionTimestamp" in patched["metadata"] and not wanted:
            self._store.drop(key, observed.uid)  # gone with it: its DELETED may have come before this answer
        else:
            self._store.put(patched)
        version = patched["metadata"]["resourceVersion"]
        return replace(observed, has_finalizer=present, is_fresh=present, version=version)

    async def _ensure_run(self, observed: Observed) -> Observed:
        try:
            return replace(observed, run=await self._mlflow.ensure_run(observed))
        except Exception as error:
            if not is_refusal(error):
                raise
            return replace(observed, refusal=f"MLflow refuses the run: {redact(error)}")

    async def _open_attempt(self, observed: Observed, number: int) -> Observed:
        assert observed.status.run_id is not None  # noqa: S101 - decide opens attempts of known runs
        # MLflow has no conditional writes: an operator that fell behind would open a run that another one has ended,
        # and might write nothing afterwards by which it could find out.
        await self._check_unchanged(observed)
        try:
            return replace(observed, run=await self._mlflow.open_attempt(observed.status.run_id, number))
        except RunGoneError as error:
            return replace(observed, refusal=str(error))

    async def _park_run(self, observed: Observed) -> Observed:
        assert observed.status.run_id is not None  # noqa: S101 - decide parks known runs
        await self._check_unchanged(observed)  # as when an attempt is opened: it may have been resumed
        try:
            return replace(observed, run=await self._mlflow.park_run(observed.status.run_id))
        except RunGoneError as error:
            return replace(observed, refusal=str(error))

    async def _check_unchanged(self, observed: Observed) -> None:
        fresh = await self._kube.get_training_run(observed.namespace, observed.name)
        if fresh is None or fresh["metadata"]["resourceVersion"] != observed.version:
            raise ConflictError(f"{observed.name} has changed since it was looked at")

    async def _check_alone(self, observed: Observed) -> None:
        """Make sure that no pod trains which the watches have not told of.

        The Job's name keeps a second one from being made beside it, unless somebody has deleted it under its pod.
        """
        await self._check_unchanged(observed)
        known = {pod.name for pod in observed.pods}
        for pod in await self._kube.list_pods(observed.namespace, observed.uid):
            self._store.put_child("Pod", pod)
            if pod["metadata"]["name"] not in known and pod_facts(pod).alive:
                raise ConflictError(f"{pod['metadata']['name']} was not known of")

    async def _create_job(self, observed: Observed, number: int) -> Observed:
        assert observed.spec is not None  # noqa: S101 - decide creates Jobs of readable specs only
        assert observed.status.run_id is not None  # noqa: S101
        plan = AttemptPlan(
            name=observed.name,
            namespace=observed.namespace,
            uid=observed.uid,
            spec=observed.spec,
            attempt=number,
            run_id=observed.status.run_id,
            memory=observed.status.attempts[-1].memory,
            queue_labels=observed.queue_labels,
        )
        manifest, refusal = self._build(plan)
        if refusal:
            return replace(observed, refusal=refusal)
        if await self._may_have_company(observed, plan):
            await self._check_alone(observed)
        try:
            if plan.workers > 1:
                await self._ensure_service(plan)
            job = await self._kube.create_job(observed.namespace, manifest)
        except ConflictError:
            job = await self._own_job(observed, number)
        except RefusedError as error:
            if number > 1 or DENIED in str(error):
                # Its like was taken before, or a policy of the cluster has its say: that may pass. It is bounded.
                raise ForbiddenError(str(error)) from error
            return replace(observed, refusal=f"The API server refused the attempt's Job: {error}")
        self._store.put_child("Job", job)
        return replace(observed, jobs=(*observed.jobs, job_facts(job)))

    def _build(self, plan: AttemptPlan) -> tuple[dict[str, Any], str]:
        """An attempt's Job, or why there can be none."""
        try:
            if refused := refusals(plan.spec.pod_template):
                return {}, "; ".join(refused)
            return build_job(plan, self._defaults), ""
        except Exception as error:  # noqa: BLE001 - nothing is asked of anybody: it would be the same at every try
            metrics.ERRORS.labels(type(error).__name__).inc()
            log.error("the attempt's Job can't be built from the spec", attempt=plan.attempt, **about(error))  # noqa: TRY400
            words = f"The attempt's Job can't be built from the spec ({described(error)})"
            return {}, f"{words}: correct it in a new TrainingRun."

    async def _may_have_company(self, observed: Observed, plan: AttemptPlan) -> bool:
        """Whether pods may train that are not known of."""
        if plan.attempt > observed.attempt_seen:
            return plan.attempt > 1  # the one before may have been judged by what is not seen any more
        # It was asked for in an earlier look: its Job may have been made since, and be gone again.
        return await self._kube.get_job(observed.namespace, plan.job) is None

    async def _ensure_service(self, plan: AttemptPlan) -> None:
        service = build_service(name=plan.name, namespace=plan.namespace, uid=plan.uid)
        name = service["metadata"]["name"]
        try:
            await self._kube.create_service(plan.namespace, service)
        except ConflictError:
            there = await self._kube.get_service(plan.namespace, name)
            if there is None or owner_uid(there) != plan.uid:
                raise NameTakenError(f"the name {name} is taken by a Service of another owner") from None

    async def _own_job(self, observed: Observed, number: int) -> dict[str, Any]:
        """The Job that has the attempt's name already: ours, if an earlier look created it."""
        name = job_name(observed.name, number)
        job = await self._kube.get_job(observed.namespace, name)
        if job is None:
            raise ConflictError(f"{name} was there, and is gone")
        if owner_uid(job) != observed.uid:
            raise NameTakenError(f"the name {name} is taken by a Job of another owner")
        return job

    async def _ask_job(self, observed: Observed, name: str) -> Observed:
        job = next(job for job in observed.jobs if job.name == name)
        try:
            words = refused_pods(await self._kube.list_events(observed.namespace, "Job", name), job)
        except Exception as error:  # noqa: BLE001 - what an Event tells is a courtesy, never a reason to fail
            log.warning("the Job's events could not be read", job=name, **about(error))
            words = ""
        return replace(observed, podless=Podless(job.uid, words, self._clock()))

    async def _keep_logs(self, observed: Observed, number: int, *, pods_go: bool) -> Observed:
        kept = await self.keeper.keep(observed, number, pods_go=pods_go)
        # Asked for once in a look: whatever became of that, its pods go then.
        asked = {number} if pods_go else set()
        unread = self.keeper.unread(Key(observed.namespace, observed.name), observed.uid) - asked
        return replace(observed, logs={**observed.logs, number: kept}, unread=unread)

    async def _delete_job(self, observed: Observed, name: str) -> Observed:
        uid = next((job.uid for job in observed.jobs if job.name == name), "")
        await self._kube.delete_job(observed.namespace, name, uid)
        jobs = (replace(job, deleting=True) if job.name == name else job for job in observed.jobs)
        return replace(observed, jobs=tuple(jobs))

    async def _register(self, observed: Observed) -> Observed:
        try:
            registration, facts = await self._mlflow.register(observed)
        except Exception as error:
            if not (isinstance(error, ModelMissingError | RunGoneError) or is_refusal(error)):
                raise
            return replace(observed, refusal=redact(error))
        return replace(observed, registration=registration, run=facts)

    async def _end_run(self, observed: Observed, status: FinalStatus, *, insist: bool, fence: bool) -> Observed:
        try:
            facts = await self._mlflow.end_run(observed, status, fence=fence)
        except Exception as error:
            if insist or isinstance(error, MlflowSilentError):  # the latter has asked nobody
                raise
            log.warning(
                "MLflow was away for too long: the run is left as it is",
                run_id=observed.status.run_id,
                error=described(error),
            )
            facts = None
        if facts is None:
            return replace(observed, run=_gone(observed, status))
        return replace(observed, run=facts)


def _gone(observed: Observed, status: FinalStatus) -> RunFacts:
    """A run that does not exist, or no longer: nothing of it is left to end."""
    return RunFacts(run_id=observed.status.run_id or "", experiment_id="", status=status)
