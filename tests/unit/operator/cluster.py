"""What Kubernetes does by itself about Jobs, pods and nodes, as far as an operator sees it.

A world whose pods start, end, are taken away and come back by the rules of Job controller, scheduler, kubelets and node
controller. Whatever it does to an attempt it writes down, so that what the operator says of it can be compared.
"""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime, timedelta
from typing import Any, Final

from heimdall_api.contract import LABEL_ATTEMPT, LABEL_QUEUE, Checkpoint, Progress
from heimdall_operator.decide import UNOWNED_LIMIT
from heimdall_operator.observe import COMPLETION_INDEX
from heimdall_operator.store import ENDED, JOB_NAME
from tests.unit.operator.builders import NOW, UID
from tests.unit.operator.fakes import World, is_living, is_owned, owner_of
from tests.unit.operator.watches import History, Kind

NODES: Final = ("node1", "node2")
GRACE: Final = timedelta(seconds=30)
SIGTERM: Final = 143
FENCED: Final = {"exitCode": 79}
REBOOTED: Final = {"exitCode": 137, "reason": "ContainerStatusUnknown"}
BY_CODE: Final = {
    0: "Completed",
    3: "Unknown",
    78: "InvalidConfiguration",
    79: "Fenced",
    137: "Killed",
    143: "Preempted",
}


class Cluster(World):
    """A world in which Kubernetes does its part."""

    def __init__(self) -> None:
        super().__init__()
        self.history = History(self._there)
        self.now = NOW
        self.away: set[str] = set()
        """Nodes that nobody hears of; what runs there may run on."""
        self.cordoned: set[str] = set()
        self.released: set[str] = set()
        """Pods that a suspension of their Job took away: the Job counts them for nothing."""
        self.uncounted: dict[int, set[str]] = defaultdict(set)
        """How such pods ended, by their attempt's number."""
        self.could_be: dict[int, set[str]] = defaultdict(set)
        """Reasons that an attempt may be said to have ended for, by number."""
        self.let_go: dict[int, datetime] = {}
        """When an attempt's Job was last let go, by number."""
        self.moved: dict[int, datetime] = {}
        """When an attempt started, or was last seen to make a step, by number."""
        self.published: list[int] = []
        """Attempts whose trainers wrote to the MLflow run, in order."""
        self.late: list[int] = []
        """Attempts whose trainers did so after it was ended."""
        self._pods_made = 0

    def stamp(self, item: dict[str, Any]) -> dict[str, Any]:
        self.history.add(super().stamp(item))
        return item

    def _there(self) -> dict[tuple[Kind, str], dict[str, Any]]:
        there: dict[tuple[Kind, str], dict[str, Any]] = {("Job", name): job for name, job in self.jobs.items()}
        there |= {("Pod", name): pod for name, pod in self.pods.items()}
        return there | ({("TrainingRun", self.run["metadata"]["name"]): self.run} if self.run is not None else {})

    # --- Job controller and scheduler ---------------------------------------------------------------------------

    def made(self, job: dict[str, Any]) -> None:
        self.sync()

    def sync(self) -> None:
        """Let the Job controller and the scheduler do what is to be done."""
        for job in self.jobs.values():
            if not is_over(job):
                job.setdefault("status", {})
                self._sync(job)
        for pod in self.pods.values():
            if pod["status"]["phase"] == "Pending" and "deletionTimestamp" not in pod["metadata"]:
                self._schedule(pod)

    def _sync(self, job: dict[str, Any]) -> None:
        pods = self.pods_of(job)
        counted = [pod for name, pod in pods.items() if name not in self.released]
        done = {worker_of(pod) for pod in counted if pod["status"]["phase"] == "Succeeded"}
        if any(pod["status"]["phase"] == "Failed" for pod in counted):
            self._fail(job)
        elif len(done) == workers_of(job):
            self._finish(job, "Complete")
        elif job["spec"].get("suspend"):
            self._hold(job)
        else:
            self._let_go(job)
            there = {worker_of(pod) for pod in pods.values() if is_living(pod)}  # podReplacementPolicy: Failed
            for worker in sorted({*range(workers_of(job))} - there - done):
                self._make_pod(job, worker)

    def _fail(self, job: dict[str, Any]) -> None:
        """One pod that fails ends the others; the Job has failed when all have ended."""
        living = [pod for pod in self.pods_of(job).values() if is_living(pod)]
        for pod in living:
            self.could_be[attempt_of(pod)].add("Preempted")
            self.delete_pod(pod["metadata"]["name"])
        if not any(map(is_living, living)):
            self._finish(job, "Failed")

    def _hold(self, job: dict[str, Any]) -> None:
        if job["status"].pop("startTime", None) is not None:
            self.stamp(job)
        for name, pod in self.pods_of(job).items():
            if is_living(pod):
                self.released.add(name)
                if LABEL_QUEUE not in job["metadata"]["labels"]:
                    self.could_be[attempt_of(pod)].add("Preempted")  # who sees its end first knows of no more
                self.delete_pod(name)

    def _let_go(self, job: dict[str, Any]) -> None:
        if "startTime" not in job["status"]:
            job["status"]["startTime"] = self.time()
            self.let_go[int(job["metadata"]["labels"][LABEL_ATTEMPT])] = self.now
            self.stamp(job)

    def _finish(self, job: dict[str, Any], kind: str) -> None:
        job["status"]["conditions"] = [{"type": kind, "status": "True", "lastTransitionTime": self.time()}]
        self.stamp(job)

    def _make_pod(self, job: dict[str, Any], worker: int) -> None:
        self._pods_made += 1
        name = f"{job['metadata']['name']}-{self._pods_made}"
        metadata = {
            "name": name,
            "namespace": "team",
            "labels": {**job["metadata"]["labels"], JOB_NAME: job["metadata"]["name"]},
            "ownerReferences": [owner_of(job)],
            "annotations": {COMPLETION_INDEX: str(worker)},
            "uid": f"pod {self._pods_made}",
            "creationTimestamp": self.time(),
        }
        spec = {"workers": workers_of(job)}
        self.pods[name] = self.stamp({"metadata": metadata, "spec": spec, "status": {"phase": "Pending"}})

    def _schedule(self, pod: dict[str, Any]) -> None:
        if "nodeName" in pod["spec"]:
            return
        # Each has room for one worker of a group.
        taken = {other["spec"].get("nodeName") for other in self._group_of(pod) if is_living(other)}
        node = next((node for node in NODES if node not in self.away | self.cordoned | taken), None)
        if node is not None:
            pod["spec"]["nodeName"] = node
            self.set_condition(pod, "PodScheduled", "True")
        elif "conditions" not in pod["status"]:
            message = "0/2 nodes are available."
            self.set_condition(pod, "PodScheduled", "False", reason="Unschedulable", message=message)

    def suspend_jobs(self, suspend: bool) -> None:
        """What a queue does, or somebody by hand: a Job is held, or let go on certain nodes."""
        if not suspend:
            self.now += timedelta(seconds=1)  # times have seconds: of two within one nobody can tell which was first
        for job in self.jobs.values():
            if not is_over(job) and bool(job["spec"].get("suspend")) != suspend:
                job["spec"]["suspend"] = suspend
                job["spec"]["template"]["spec"]["nodeSelector"] = {"pool": "a"}
                self.stamp(job)
        self.sync()

    # --- kubelets -----------------------------------------------------------------------------------------------

    def start_pods(self, *, only: int | None = None) -> None:
        """Start what waits on nodes that can be heard of."""
        self.sync()
        for pod in self._each(only):
            if pod["status"]["phase"] == "Pending" and self._is_heard(pod):
                pod["status"] |= {
                    "phase": "Running",
                    "containerStatuses": [_container(running={"startedAt": self.time()})],
                }
                self.moved[attempt_of(pod)] = self.now
                self.stamp(pod)

    def hold_pods(self, reason: str) -> None:
        """Keep pods from starting: their image or a Secret is not there."""
        for pod in self.pods.values():
            if pod["status"]["phase"] == "Pending" and self._is_heard(pod):
                waiting = {"reason": reason, "message": "It is not there."}
                pod["status"]["containerStatuses"] = [_container(waiting=waiting)]
                self.stamp(pod)

    def end_pods(self, how: dict[str, Any], *, only: int | None = None) -> None:
        """End what runs on nodes that can be heard of."""
        for pod in self._each(only):
            if pod["status"]["phase"] == "Running" and self._is_heard(pod):
                self._end(pod, how)
        self.sync()

    def _end(self, pod: dict[str, Any], how: dict[str, Any], **status: Any) -> None:
        code = how["exitCode"]
        started = pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"]
        terminated = {"startedAt": started, "finishedAt": self.time(), **how}
        pod["status"] |= {
            "phase": "Succeeded" if code == 0 else "Failed",
            "containerStatuses": [_container(terminated=terminated)],
            **status,
        }
        could_be, reason = self.could_be[attempt_of(pod)], _reason_of(how)
        if "deletionTimestamp" not in pod["metadata"]:
            could_be.add(reason)
            if code == SIGTERM and attempt_of(pod) > UNOWNED_LIMIT:
                could_be.add("Killed")  # the last time in a row may cost a retry
        elif pod["metadata"]["name"] not in self.released:
            # The Job alone may be there to tell of it, or the pod is the first to. Exit 0 is then no sign of success.
            could_be |= {"Preempted"} | ({reason} if code else set())
        elif code:
            self.uncounted[attempt_of(pod)].add(reason)
        self.stamp(pod)

    def delete_pod(self, name: str, disruption: str | None = None) -> None:
        """Ask for a pod's end: what runs has its grace period, what has ended or never ran goes."""
        pod = self.pods[name]
        if disruption is not None:
            self.set_condition(pod, "DisruptionTarget", "True", reason=disruption)
        if "deletionTimestamp" not in pod["metadata"]:
            pod["metadata"]["deletionTimestamp"] = self.time(GRACE)
            self.stamp(pod)
        if pod["status"]["phase"] == "Pending" and self._is_heard(pod, unless_placed=True):
            pod["status"]["phase"] = "Failed"
            self.stamp(pod)

    def remove_ended_pods(self) -> None:
        """Let those go whose deletion was asked for: their Job has taken notice."""
        self.sync()
        ended = [name for name, pod in self.pods.items() if pod["status"]["phase"] in ENDED]
        for name in ended:
            if "deletionTimestamp" in self.pods[name]["metadata"]:
                del self.pods[name]

    def terminate(self, job: str, now: datetime) -> None:
        """What the deletion of a Job does to its pods."""
        for name, pod in list(self.pods.items()):
            if pod["metadata"]["labels"][JOB_NAME] == job and is_owned(pod):
                self.could_be[attempt_of(pod)].add("Preempted")
                self.released.discard(name)  # no Job is left that would make another for it
                self.delete_pod(name)
                if pod["status"]["phase"] in ENDED:
                    del self.pods[name]

    def orphan(self, job: str) -> None:
        """A Job is deleted without its pods: what it alone would have told of them, nobody tells any more."""
        self._count_released(self.jobs[job])
        for name, pod in self.pods.items():
            if pod["metadata"]["labels"][JOB_NAME] == job:
                self.could_be[attempt_of(pod)].add("Preempted")
                self.released.discard(name)
        super().orphan(job)

    def remove_pods_by_force(self) -> None:
        """What somebody does with `kubectl delete pod --force`; on a node that is not heard of, it may run on."""
        status = (self.run or {}).get("status") or {}
        seen = {each["number"] for each in status.get("attempts", ()) if each.get("runningTime")}
        for name, pod in list(self.pods.items()):
            if "deletionTimestamp" not in pod["metadata"] or not is_living(pod):
                continue
            number = attempt_of(pod)
            self.unseen |= {number} & seen
            self.could_be[number].add("Preempted")
            del self.pods[name]
            job = self.jobs.get(pod["metadata"]["labels"][JOB_NAME]) if is_owned(pod) else None
            if job is not None and not is_over(job):
                self._fail(job)
                self._count_released(job)
        self.sync()

    def _count_released(self, job: dict[str, Any]) -> None:
        """Where a Job that was held fails all the same, or is gone, its pods tell how they ended, also those let go."""
        # Those that are gone, too: a watch that is behind still has them.
        self.could_be[attempt_of(job)] |= self.uncounted[attempt_of(job)]

    def evict(self, disruption: str, *, only: int | None = None, node: str | None = None) -> None:
        """Take the pods' place for something else: of all, of one worker, or of those on a node."""
        for pod in self._each(only):
            if node not in (None, pod["spec"].get("nodeName")):
                continue
            if is_living(pod) and self._is_heard(pod, unless_placed=True):
                self.could_be[attempt_of(pod)].add("Preempted")
                self.delete_pod(pod["metadata"]["name"], disruption)
        self.sync()

    def delete_pods(self, *, only: int | None = None) -> None:
        """What somebody does with `kubectl delete pod`."""
        for pod in self._each(only):
            self.could_be[attempt_of(pod)].add("Preempted")
            self.delete_pod(pod["metadata"]["name"])
        self.sync()

    def evict_for_disk(self, *, own: bool, only: int | None = None) -> None:
        """A kubelet ends pods because the disk is full: by what they wrote, or by anybody's doing."""
        for pod in self._each(only):
            if pod["status"]["phase"] != "Running" or not self._is_heard(pod):
                continue
            message = "The node was low on resource: ephemeral-storage."
            if own:
                message = "Pod ephemeral local storage usage exceeds the total limit of containers 1Gi. "
            else:
                self.set_condition(pod, "DisruptionTarget", "True", reason="TerminationByKubelet")
            self.could_be[attempt_of(pod)].add("StorageExceeded" if own else "Preempted")
            self._end(pod, {"exitCode": 137}, reason="Evicted", message=message)
            self.could_be[attempt_of(pod)].discard("Killed")
        self.sync()

    # --- nodes --------------------------------------------------------------------------------------------------

    def give_up_pods_of_lost_nodes(self) -> None:
        """What the node controller does when a node was not heard of for as long as pods tolerate."""
        for name, pod in self.pods.items():
            if is_living(pod) and pod["spec"].get("nodeName") in self.away:
                self.could_be[attempt_of(pod)] |= {"NodeLost", "Preempted"}
                self.delete_pod(name, "DeletionByTaintManager")

    def remove_lost_nodes(self) -> None:
        """A node is taken out of the cluster: the garbage collector of pods ends what nobody else will."""
        for pod in self.pods.values():
            if is_living(pod) and pod["spec"].get("nodeName") in self.away:
                self.could_be[attempt_of(pod)] |= {"NodeLost", "Preempted"}
                self.set_condition(pod, "DisruptionTarget", "True", reason="DeletionByPodGC")
                pod["metadata"].setdefault("deletionTimestamp", self.time())
                pod["status"]["phase"] = "Failed"
                self.stamp(pod)
        self.away.clear()
        self.sync()

    def nodes_come_back(self, *, rebooted: bool) -> None:
        """Nodes are heard of again; after a reboot nobody knows what became of their containers."""
        pods = [pod for pod in self.pods.values() if pod["spec"].get("nodeName") in self.away]
        self.away.clear()
        for pod in pods:
            if rebooted and pod["status"]["phase"] == "Running":
                self._end(pod, REBOOTED)
                self.could_be[attempt_of(pod)].add("NodeLost")
            elif pod["status"]["phase"] == "Pending" and "deletionTimestamp" in pod["metadata"]:
                pod["status"]["phase"] = "Failed"
                self.stamp(pod)
        self.sync()

    # --- trainers -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Every trainer makes a step and publishes it, unless a newer attempt fences it; a lost node's too."""
        run = self.mlflow_runs.get(UID)
        if run is None or self.mlflow_away:
            return
        for pod in self.pods.values():
            # The first worker speaks for a group, of which none makes a step alone.
            if worker_of(pod) > 0 or not self._trains(pod):
                continue
            number = attempt_of(pod)
            if number < run["attempt"]:
                if self._is_heard(pod):
                    self._end(pod, FENCED)
                continue
            self.late += [number] * (run["status"] in ("FINISHED", "FAILED", "KILLED"))
            step = len(self.published) + 1
            self.published.append(number)
            self.moved[number] = self.now
            run["progress"] = Progress(epoch=0, epochs=1, step=step, time=self.now)
            path = f"checkpoints/{step}"
            run["checkpoints"] = (Checkpoint(step=step, path=path, sha256="", size=1, time=self.now, last=True),)
        self.sync()

    # --- helpers ------------------------------------------------------------------------------------------------

    def _each(self, only: int | None) -> list[dict[str, Any]]:
        """Every pod, or those of one worker."""
        return [pod for pod in self.pods.values() if only is None or worker_of(pod) == only]

    def _group_of(self, pod: dict[str, Any]) -> list[dict[str, Any]]:
        """The pods of a pod's Job."""
        job = pod["metadata"]["labels"][JOB_NAME]
        return [other for other in self.pods.values() if other["metadata"]["labels"][JOB_NAME] == job]

    def _trains(self, pod: dict[str, Any]) -> bool:
        """Whether a pod runs, and every other worker of its group does."""
        running = [other for other in self._group_of(pod) if other["status"]["phase"] == "Running"]
        return pod in running and len({*map(worker_of, running)}) == pod["spec"]["workers"]

    def time(self, later: timedelta = timedelta()) -> str:
        """The time as the API server writes it."""
        return f"{self.now + later:%Y-%m-%dT%H:%M:%SZ}"

    def pods_of(self, job: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Pods of a Job, by name."""
        owners = [owner_of(job)]
        return {key: pod for key, pod in self.pods.items() if pod["metadata"].get("ownerReferences") == owners}

    def set_condition(self, pod: dict[str, Any], kind: str, status: str, **more: str) -> None:
        others = [item for item in pod["status"].get("conditions", ()) if item["type"] != kind]
        condition = {"type": kind, "status": status, "lastTransitionTime": self.time(), **more}
        pod["status"]["conditions"] = [*others, condition]
        self.stamp(pod)

    def _is_heard(self, pod: dict[str, Any], *, unless_placed: bool = False) -> bool:
        """Whether a kubelet, or where there is none the API server, does what is asked of a pod."""
        node = pod["spec"].get("nodeName")
        return unless_placed if node is None else node not in self.away


def is_over(job: dict[str, Any]) -> bool:
    """Whether a Job has succeeded or failed."""
    return any(item["status"] == "True" for item in job.get("status", {}).get("conditions", ()))


def attempt_of(pod: dict[str, Any]) -> int:
    """Number of the attempt that a pod was made for."""
    return int(pod["metadata"]["labels"][LABEL_ATTEMPT])


def worker_of(pod: dict[str, Any]) -> int:
    """A pod's place in its group."""
    return int(pod["metadata"]["annotations"][COMPLETION_INDEX])


def workers_of(job: dict[str, Any]) -> int:
    """How many pods a Job has at one time."""
    return int(job["spec"].get("completions", 1))


def _container(**state: Any) -> dict[str, Any]:
    return {"name": "trainer", "state": state}


def _reason_of(how: dict[str, Any]) -> str:
    """The reason of an attempt whose container ended so by itself."""
    reason = {"OOMKilled": "HostOutOfMemory", "ContainerStatusUnknown": "NodeLost"}.get(how.get("reason", ""))
    return reason or ("UserError" if "message" in how else BY_CODE[how["exitCode"]])
