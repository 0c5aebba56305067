"""Stand-ins for API server and MLflow that keep their rules: conflicts, names that are taken, creations that add up."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from datetime import datetime
from typing import Any

from heimdall_api.contract import LABEL_ATTEMPT, LABEL_UID
from heimdall_operator.accounts import Keeper
from heimdall_operator.act import Actor
from heimdall_operator.controller import Controller
from heimdall_operator.kube import ConflictError, ForbiddenError, RefusedError
from heimdall_operator.manifests import TrainerDefaults
from heimdall_operator.observe import LOST_POD_S
from heimdall_operator.store import JOB_NAME, Key, Store
from heimdall_tracking.registry import Registration
from heimdall_tracking.runs import RunFacts
from tests.unit.operator.builders import NOW, UID

DEFAULTS = TrainerDefaults(
    image="trainer:1", image_pull_policy="IfNotPresent", secret="heimdall-trainer", tracking_uri="http://mlflow:5000"
)
KEY = Key("team", "run")
STAMP = NOW.isoformat().replace("+00:00", "Z")


class CrashError(BaseException):
    """The operator dies: no handler may catch this."""


class World:
    """API server and MLflow; it counts writes and lets the operator die after any of them."""

    def __init__(self) -> None:
        self.run: dict[str, Any] | None = None
        self.jobs: dict[str, dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.events: list[str] = []
        self.event_names: set[str] = set()
        self.mlflow_runs: dict[str, dict[str, Any]] = {}
        self.versions: list[str] = []
        self.services: set[str] = set()
        self.kept: dict[str, str] = {}
        self.writes: list[str] = []
        self.overlaps: list[str] = []
        """Pods that may have trained when another attempt's Job was made."""
        self.unfenced: list[str] = []
        """Jobs that were made before older attempts were kept from publishing."""
        self.unseen: set[int] = set()
        """Attempts that were seen to train, and of which a trainer may run on that no pod tells of any more."""
        self.refused: dict[str, datetime] = {}
        """Since when there was no room in the namespace's quota for a Job."""
        self.refuses_status = False
        """Whether the API server calls every status invalid, as one with an older definition may."""
        self.is_full = False
        """Whether the namespace's quota is used up."""
        self.takes_no_pods = ""
        """Why the API server takes no pod of a Job's; empty where it does."""
        self.asked: list[str] = []
        """Jobs whose events were read."""
        self.most_jobs = math.inf
        """How many Jobs the namespace's quota has room for."""
        self.refusals = 0
        self.crash_after: int | None = None
        self.lost_answer: int | None = None
        """Which write is made, but its answer gets lost."""
        self.mlflow_away = False
        self.store_away = False
        """Whether the object store takes no artifacts; MLflow does all else."""
        self._version = 1

    def wrote(self, what: str) -> None:
        self.writes.append(what)
        if self.crash_after is not None and len(self.writes) == self.crash_after:
            raise CrashError(what)
        if len(self.writes) == self.lost_answer:
            raise ConnectionError(f"no answer: {what}")

    def apply(self, spec: dict[str, Any]) -> None:
        self.run = self.stamp(
            {
                "metadata": {
                    "name": "run",
                    "namespace": "team",
                    "uid": UID,
                    "generation": 1,
                    "creationTimestamp": STAMP,
                },
                "spec": spec,
            }
        )

    def stamp(self, item: dict[str, Any]) -> dict[str, Any]:
        self._version += 1
        item["metadata"]["resourceVersion"] = str(self._version)
        return item

    def made(self, job: dict[str, Any]) -> None:
        """What Kubernetes does at once about a Job that was created."""
        if not self.takes_no_pods:
            self.pod_of(job, phase="Pending")

    def pod_of(self, job: dict[str, Any], **state: Any) -> None:
        """The Job controller's and kubelet's part: a pod in a state."""
        name = f"{job['metadata']['name']}-x"
        self.pods[name] = self.stamp(
            {
                "metadata": {
                    "name": name,
                    "namespace": "team",
                    "uid": f"pod of {job['metadata']['uid']}",
                    "labels": {**job["metadata"]["labels"], JOB_NAME: job["metadata"]["name"]},
                    "ownerReferences": [owner_of(job)],
                    "creationTimestamp": STAMP,
                },
                "spec": {"nodeName": "node1"},
                "status": {"phase": state.pop("phase"), "containerStatuses": [{"name": "trainer", "state": state}]},
            }
        )

    def ask_for_deletion(self, when: str) -> None:
        """What the API server does about `kubectl delete`."""
        run = self.run
        if run is None or "deletionTimestamp" in run["metadata"]:
            return
        if not run["metadata"].get("finalizers"):
            self.run = None
            self.collect_garbage()
            return
        run["metadata"]["deletionTimestamp"] = when
        run["metadata"]["generation"] += 1
        self.stamp(run)

    def collect_garbage(self) -> None:
        """What Kubernetes does to what a resource that is gone owned."""
        self.jobs.clear()
        for name in [name for name, pod in self.pods.items() if is_owned(pod)]:
            del self.pods[name]

    def living(self, now: datetime) -> list[str]:
        """Pods that may be training; one that does not end in time is given up, and its attempt's number fences it."""
        living = [name for name, pod in self.pods.items() if is_living(pod) and not is_given_up(pod, now)]
        return [name for name in living if not self._is_abandoned(self.pods[name], now)]

    def _is_abandoned(self, pod: dict[str, Any], now: datetime) -> bool:
        """Whether a pod that nobody owns has not ended in time after its attempt was to."""
        if is_owned(pod) or "deletionTimestamp" in pod["metadata"] or self.run is None:
            return False
        number, status = int(pod["metadata"]["labels"][LABEL_ATTEMPT]), self.run.get("status") or {}
        attempt = next((item for item in status.get("attempts", ()) if item["number"] == number), None)
        if attempt is None:
            return number < int(status.get("attempt", 0))
        since = attempt.get("endingTime") or attempt.get("endTime")
        return since is not None and (now - datetime.fromisoformat(since)).total_seconds() > LOST_POD_S

    def orphan(self, job: str) -> None:
        """What is left of a Job that is deleted without its pods."""
        for name in [name for name in self.pods if self.pods[name]["metadata"]["labels"][JOB_NAME] == job]:
            self.pods[name]["metadata"]["ownerReferences"] = []
            self.stamp(self.pods[name])

    def terminate(self, job: str, now: datetime) -> None:
        """What the deletion of a Job does to its pods: those that train are told to end, and do when they do."""
        for name in [name for name in self.pods if name.startswith(f"{job}-") and is_owned(self.pods[name])]:
            if is_living(self.pods[name]) and self.pods[name]["status"]["phase"] == "Running":
                self.pods[name]["metadata"].setdefault("deletionTimestamp", f"{now:%Y-%m-%dT%H:%M:%SZ}")
                self.stamp(self.pods[name])
            else:
                del self.pods[name]


def owner_of(job: dict[str, Any]) -> dict[str, Any]:
    """How a pod names its Job."""
    metadata = job["metadata"]
    return {"kind": "Job", "name": metadata["name"], "uid": metadata["uid"], "controller": True}


def is_living(pod: dict[str, Any]) -> bool:
    return pod["status"]["phase"] in ("Pending", "Running")


def is_owned(pod: dict[str, Any]) -> bool:
    """Whether a pod goes with its Job."""
    return bool(pod["metadata"].get("ownerReferences"))


def is_given_up(pod: dict[str, Any], now: datetime) -> bool:
    deleted = pod["metadata"].get("deletionTimestamp")
    return deleted is not None and (now - datetime.fromisoformat(deleted)).total_seconds() > LOST_POD_S


class FakeKube:
    def __init__(self, world: World, clock: Callable[[], datetime] = lambda: NOW) -> None:
        self.world = world
        self._clock = clock

    async def list_training_runs(self, namespace: str | None) -> list[dict[str, Any]]:
        return [copy.deepcopy(self.world.run)] if self.world.run else []

    async def list_jobs(self, namespace: str | None) -> list[dict[str, Any]]:
        return copy.deepcopy(list(self.world.jobs.values()))

    async def list_pods(self, namespace: str | None, uid: str | None = None) -> list[dict[str, Any]]:
        pods = self.world.pods.values()
        return copy.deepcopy([pod for pod in pods if uid in (None, pod["metadata"]["labels"].get(LABEL_UID))])

    async def get_training_run(self, namespace: str, name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self.world.run)

    async def get_job(self, namespace: str, name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self.world.jobs.get(name))

    async def create_job(self, namespace: str, job: dict[str, Any]) -> dict[str, Any]:
        name = job["metadata"]["name"]
        # Admission comes before the name is looked at.
        if self.world.is_full or len(self.world.jobs) >= self.world.most_jobs:
            self.world.refused.setdefault(name, self._clock())
            raise ForbiddenError("exceeded quota.")
        if name in self.world.jobs:
            raise ConflictError(name)
        is_fenced = self._is_fenced(job) and int(job["metadata"]["labels"][LABEL_ATTEMPT]) not in self.world.unseen
        self.world.unfenced += [name] * (not is_fenced)
        self.world.overlaps += [f"{pod} and {name}" for pod in self.world.living(self._clock())]
        job = copy.deepcopy(job)
        job["metadata"]["uid"] = f"{name}, number {len(self.world.writes)}"
        job["metadata"]["creationTimestamp"] = self._clock().isoformat().replace("+00:00", "Z")
        self.world.jobs[name] = self.world.stamp(job)
        answer = copy.deepcopy(job)
        self.world.made(job)
        if self.world.run is None:
            self.world.collect_garbage()
        self.world.wrote(f"create job {name}")
        return answer

    async def delete_job(self, namespace: str, name: str, uid: str) -> None:
        if uid and name in self.world.jobs and self.world.jobs[name]["metadata"]["uid"] != uid:
            raise ConflictError(name)
        self.world.jobs.pop(name, None)
        self.world.terminate(name, self._clock())
        self.world.wrote(f"delete job {name}")

    async def patch_finalizers(self, namespace: str, name: str, finalizers: list[str], version: str) -> dict[str, Any]:
        run = self._checked(version)
        run["metadata"]["finalizers"] = finalizers
        self.world.stamp(run)
        if not finalizers and "deletionTimestamp" in run["metadata"]:
            self.world.run = None
            self.world.collect_garbage()
        self.world.wrote("patch finalizers")
        return copy.deepcopy(run)

    async def patch_status(self, namespace: str, name: str, status: dict[str, Any], version: str) -> dict[str, Any]:
        run = self._checked(version)
        if self.world.refuses_status:
            self.world.refusals += 1
            raise RefusedError('TrainingRun "run" is invalid: status.phase: Unsupported value', ("status.phase",))
        run["status"] = _merged(run.get("status", {}), status)
        self.world.stamp(run)
        self.world.wrote("patch status")
        return copy.deepcopy(run)

    async def create_service(self, namespace: str, service: dict[str, Any]) -> None:
        self.world.services.add(service["metadata"]["name"])

    async def read_log(self, namespace: str, pod: str, container: str, limit: int) -> str:
        return f"log of {pod}\n"

    async def follow_log(
        self, namespace: str, pod: str, container: str, heard: bytearray, *, limit: int, timeout_s: float
    ) -> None:
        heard += f"heard of {pod}\n".encode()

    async def event_names(self, namespace: str | None, kind: str) -> set[tuple[str, str]]:
        return {("team", name) for name in self.world.event_names}

    async def list_events(self, namespace: str, kind: str, name: str) -> list[dict[str, Any]]:
        seen = {"metadata": {"name": f"{name}.1"}, "reason": "Seen"}
        if kind != "Job":
            return [seen]
        self.world.asked.append(name)
        message = f'Error creating: pods "{name}-k2x9q" is forbidden: {self.world.takes_no_pods}'
        told = {**seen, "reason": "FailedCreate", "message": message, "lastTimestamp": STAMP}
        return [seen, told] if self.world.takes_no_pods else [seen]

    async def create_event(self, namespace: str, event: dict[str, Any]) -> None:
        if event["metadata"]["name"] not in self.world.event_names:
            self.world.event_names.add(event["metadata"]["name"])
            self.world.events.append(event["reason"])

    def _is_fenced(self, job: dict[str, Any]) -> bool:
        """Whether MLflow knows of a Job's attempt, so that no older one publishes any more."""
        run = self.world.mlflow_runs.get(UID, {})
        return run.get("status") == "RUNNING" and run["attempt"] >= int(job["metadata"]["labels"][LABEL_ATTEMPT])

    def _checked(self, version: str) -> dict[str, Any]:
        run = self.world.run
        if run is None or run["metadata"]["resourceVersion"] != version:
            raise ConflictError("changed")
        return run


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7396."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            merged.pop(name, None)
        else:
            merged[name] = _merged(merged.get(name), value)
    return merged


class FakeMlflow:
    def __init__(self, world: World) -> None:
        self.world = world

    async def ensure_run(self, observed: Any) -> RunFacts:
        self._check()
        # Only where nobody can have made one is nothing searched for.
        known = observed.uid in self.world.mlflow_runs
        if observed.is_fresh or not known:
            key = f"{observed.uid}-again" if known else observed.uid
            self.world.mlflow_runs[key] = {"id": "r1", "status": "RUNNING", "attempt": 1, "created": 1}
            self.world.wrote("create mlflow run")
        return self._facts(observed.uid)

    async def open_attempt(self, run_id: str, attempt: int) -> RunFacts:
        self._check()
        wanted = {"status": "RUNNING", "attempt": max(attempt, self.world.mlflow_runs[UID]["attempt"])}
        if not wanted.items() <= self.world.mlflow_runs[UID].items():
            self.world.mlflow_runs[UID].update(wanted)
            self.world.wrote(f"open attempt {attempt}")
        return self._facts(UID)

    async def park_run(self, run_id: str) -> RunFacts:
        self._check()
        if self.world.mlflow_runs[UID]["status"] == "RUNNING":
            self.world.mlflow_runs[UID]["status"] = "SCHEDULED"
            self.world.wrote("park run")
        return self._facts(UID)

    async def end_run(self, observed: Any, status: str, *, fence: bool) -> RunFacts | None:
        self._check()
        if observed.uid not in self.world.mlflow_runs:
            return None
        past = observed.status.attempt + 1
        if fence and self.world.mlflow_runs[observed.uid]["attempt"] < past:
            self.world.mlflow_runs[observed.uid]["attempt"] = past
            self.world.wrote(f"fence attempt {observed.status.attempt}")
        if self.world.mlflow_runs[observed.uid]["status"] != status:
            self.world.mlflow_runs[observed.uid]["status"] = status
            self.world.wrote(f"end run {status}")
        return self._facts(observed.uid)

    async def end_running(self, observed: Any, status: str) -> None:
        self._check()
        if (self.world.mlflow_runs.get(observed.uid) or {}).get("status") == "RUNNING":
            self.world.mlflow_runs[observed.uid]["status"] = status
            self.world.wrote(f"end running {status}")

    async def register(self, observed: Any) -> tuple[Registration, RunFacts]:
        self._check()
        if not self.world.versions:
            self.world.versions.append("1")
            self.world.wrote("create version")
        return Registration(name="localizer", version="1", message="Registered."), self._facts(observed.uid)

    async def keep_files(self, run_id: str, folder: str, files: dict[str, str]) -> str:
        self._check()
        if self.world.store_away:
            raise ConnectionError("the object store is away")
        wanted = {f"{folder}/{name}": text for name, text in files.items()}
        if not wanted.items() <= self.world.kept.items():
            self.world.kept |= wanted
            self.world.wrote(f"keep {folder}")
        return f"runs:/{run_id}/{folder}"

    async def active_facts(self, active: Any) -> dict[str, RunFacts]:
        self._check()
        running = [uid for uid, item in self.world.mlflow_runs.items() if item["status"] == "RUNNING"]
        return {self.world.mlflow_runs[uid]["id"]: self._facts(uid) for uid in running}

    def _check(self) -> None:
        if self.world.mlflow_away:
            raise ConnectionError("MLflow is away")

    def _facts(self, uid: str) -> RunFacts:
        item = self.world.mlflow_runs[uid]
        return RunFacts(
            run_id=item["id"],
            experiment_id="1",
            status=item["status"],
            attempt=item["attempt"],
            progress=item.get("progress"),
            checkpoints=item.get("checkpoints", ()),
        )


def controller(world: World, clock: Callable[[], datetime] = lambda: NOW) -> Controller:
    """A new operator process: it knows nothing but what it lists."""
    kube: Any = FakeKube(world, clock)
    mlflow: Any = FakeMlflow(world)
    store = Store()
    return Controller(
        kube=kube,
        mlflow=mlflow,
        store=store,
        actor=Actor(kube, mlflow, store, DEFAULTS, Keeper(kube, mlflow, clock), clock=clock),
        public_url="http://mlflow",
        namespaces=[],
        clock=clock,
    )


async def look(world: World) -> Controller:
    """Start an operator and let it look at the run until it is settled; one that dies records nothing any more."""
    operator = controller(world)
    await operator.refresh()
    await operator.events.recall()
    try:
        await operator.reconcile(KEY)
    except Exception:
        await operator.events.record_waiting()
        raise
    await operator.events.record_waiting()
    return operator
