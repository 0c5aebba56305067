"""The operator dies at random moments under load, and what it stands on is taken away; then everything must be right.

A short form runs with the other tests; `make chaos` runs the long one (HEIMDALL_CHAOS_S, HEIMDALL_CHAOS_FAULT_S).
`build/chaos/report.json` has kills, faults and violations.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

from heimdall_api.contract import Reason
from heimdall_operator.failures import FREE
from tests.e2e.cluster import ROOT, Cluster, wait_for
from tests.e2e.conftest import Mlflow, contract_run, kill_operator

KILLS_S = float(os.environ.get("HEIMDALL_CHAOS_S", "40"))
"""How long the operator is killed again and again."""
FAULT_S = float(os.environ.get("HEIMDALL_CHAOS_FAULT_S", "10"))
"""How long API server, MLflow and PostgreSQL are away, each in turn."""
SEED = int(os.environ.get("HEIMDALL_CHAOS_SEED", "7"))
IN_FLIGHT = 5
PAUSE_S = (1.0, 5.0)
SETTLE_S = 420.0
API_MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
CONTROL_PLANE = "heimdall-control-plane"
RUN_LABEL = "training.heimdall.dev/run"
UNCOUNTED = {str(reason) for reason in FREE} | {str(Reason.COMPLETED)}


@dataclass
class Report:
    """What was done, and what was wrong afterwards."""

    seed: int = SEED
    kills: int = 0
    faults: list[str] = field(default_factory=list)
    runs: int = 0
    tracebacks: int = 0
    violations: list[str] = field(default_factory=list)

    def write(self) -> None:
        file = ROOT / "build/chaos/report.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(asdict(self), indent=1))
        print(f"\n{self.runs} runs, {self.kills} kills, faults: {self.faults}, {len(self.violations)} violations")


class Load:
    """Runs that are made, suspended, resumed and deleted at random."""

    def __init__(self, release: Cluster, rng: random.Random) -> None:
        self.release, self.rng = release, rng
        self.prefix = f"chaos-{secrets.token_hex(3)}"
        self.uids: dict[str, str] = {}
        self.deleted: set[str] = set()

    def step(self) -> None:
        """Do something to the runs; what the API server can't take now is left out."""
        try:
            alive = [item for item in self.mine() if item.get("status", {}).get("phase") not in ("Succeeded", "Failed")]
            if len(alive) < IN_FLIGHT:
                self.add()
            elif self.rng.random() < 0.3:
                self.disturb(self.rng.choice(alive))
        except AssertionError:
            return  # the API server is away: that is what is tried

    def add(self) -> None:
        name = f"{self.prefix}-{len(self.uids)}"
        args: dict[str, Any] = {"steps": self.rng.randint(2, 10), "stepSeconds": 0.4}
        if self.rng.random() < 0.4:
            args |= {"fail": self.rng.choice(["crash", "user"]), "failAt": self.rng.randint(0, 3), "failAttempt": 1}
        resources = {"gpusPerWorker": 0, "cpu": "10m", "memory": "256Mi", "sharedMemory": "16Mi"}
        self.release.apply(contract_run(name, spec={"resources": resources, "retries": {"limit": 20}}, **args))
        self.uids[self.release.training_run(name)["metadata"]["uid"]] = name

    def disturb(self, item: dict[str, Any]) -> None:
        name = item["metadata"]["name"]
        if self.rng.random() < 0.3:
            self.release.kubectl("delete", "trainingrun", name, "--wait=false")
            self.deleted.add(item["metadata"]["uid"])
        else:
            patch = {"spec": {"suspend": not item["spec"].get("suspend", False)}}
            self.release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", json.dumps(patch))

    def mine(self) -> list[dict[str, Any]]:
        listed = self.release.list("trainingruns")
        return [item for item in listed if item["metadata"]["name"].startswith(self.prefix)]

    def resume_all(self) -> None:
        for item in self.mine():
            if item["spec"].get("suspend"):
                name = item["metadata"]["name"]
                patch = '{"spec": {"suspend": false}}'
                self.release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", patch)


def kill(release: Cluster, report: Report) -> None:
    """`kill -9`, and a new pod at once: a container that dies again and again would be kept waiting."""
    try:
        note_tracebacks(release, report)  # the log goes with the pod
        kill_operator(release)
    except AssertionError:
        return  # it is just being started
    report.kills += 1
    selector = "app.kubernetes.io/component=operator"
    delete = ("delete", "pods", "-l", selector, "--grace-period=0", "--force", "--wait=false")
    release.run("kubectl", "-n", release.namespace, *delete, check=False)


def note_tracebacks(release: Cluster, report: Report) -> None:
    if "Traceback" in release.kubectl("logs", "deployment/heimdall-operator", "--tail=-1"):
        report.tracebacks += 1


@contextmanager
def api_server_away(release: Cluster) -> Iterator[None]:
    hidden = "/root/kube-apiserver.yaml"
    release.run("docker", "exec", CONTROL_PLANE, "mv", API_MANIFEST, hidden)
    try:
        wait_for(lambda: not is_ready(release), what="the API server's end", timeout_s=120)
        yield
    finally:
        release.run("docker", "exec", CONTROL_PLANE, "mv", hidden, API_MANIFEST)
        wait_for(lambda: is_ready(release), what="the API server", timeout_s=180)


def is_ready(release: Cluster) -> bool:
    return release.run("kubectl", "get", "--raw", "/readyz", check=False).returncode == 0


@contextmanager
def scaled_down(release: Cluster, workload: str) -> Iterator[None]:
    selector = f"app.kubernetes.io/component={workload.rpartition('heimdall-')[2]}"
    try:
        release.kubectl("scale", workload, "--replicas=0")
        # The controller manager may have to come back first: the API server was away before.
        release.kubectl("wait", "--for=delete", "pod", "-l", selector, "--timeout=280s")
        yield
    finally:
        release.kubectl("scale", workload, "--replicas=1")
        release.kubectl("rollout", "status", workload, "--timeout=240s")


FAULTS: dict[str, Callable[[Cluster], Any]] = {
    "API server": api_server_away,
    "MLflow": lambda release: scaled_down(release, "deployment/heimdall-tracking"),
    "PostgreSQL": lambda release: scaled_down(release, "statefulset/heimdall-database"),
}


def test_kills_and_faults_leave_everything_right(release: Cluster, mlflow: Mlflow) -> None:
    rng, report = random.Random(SEED), Report()
    load = Load(release, rng)
    try:
        run_for(KILLS_S, load, rng, lambda: kill(release, report))
        for name, fault in FAULTS.items():
            with fault(release):
                run_for(FAULT_S, load, rng, lambda: None)
            report.faults.append(f"{name} away for {FAULT_S:.0f} s")
        load.resume_all()
        report.violations.append("the runs did not all end")
        wait_for(lambda: settled(load), what="the end of every run", timeout_s=SETTLE_S, tell=lambda: unsettled(load))
        note_tracebacks(release, report)
        report.violations = list(violations(release, mlflow, load, report))
    finally:
        report.runs = len(load.uids)
        report.write()
    for item in load.mine():
        release.kubectl("delete", "trainingrun", item["metadata"]["name"], "--timeout=120s")

    assert report.violations == []
    assert report.kills > 0


def run_for(seconds: float, load: Load, rng: random.Random, disturb: Callable[[], None]) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        load.step()
        disturb()
        # Not to wait for anything: the moment of the next kill is to be random.
        time.sleep(rng.uniform(*PAUSE_S))


def settled(load: Load) -> bool:
    try:
        items = load.mine()
    except AssertionError:
        return False
    return all(is_final(item) and "deletionTimestamp" not in item["metadata"] for item in items)


def is_final(item: dict[str, Any]) -> bool:
    return item.get("status", {}).get("phase") in ("Succeeded", "Failed") and not item["metadata"].get("finalizers")


def unsettled(load: Load) -> str:
    left = [item for item in load.mine() if not is_final(item)]
    return json.dumps([{item["metadata"]["name"]: item.get("status")} for item in left], indent=1)[:6000]


def violations(release: Cluster, mlflow: Mlflow, load: Load, report: Report) -> Iterator[str]:
    """Everything that must hold, asked of API server and MLflow."""
    there = {item["metadata"]["uid"]: item for item in load.mine()}
    jobs = release.list("jobs", RUN_LABEL)
    for uid, name in load.uids.items():
        runs, item = mlflow.runs_of(uid), there.get(uid)
        if item is None:
            if len(runs) > 1:
                yield f"{name}: MLflow has the runs {[run.info.run_id for run in runs]} of one that was deleted"
            yield from (f"{name}: deleted, but MLflow says {run.info.status}" for run in runs if is_open(run))
            yield from (f"{name}: deleted, but {job['metadata']['name']} is left" for job in jobs if owner(job) == uid)
            continue
        status = item["status"]
        if [run.info.run_id for run in runs] != [status["runID"]]:
            yield f"{name}: MLflow has the runs {[run.info.run_id for run in runs]}, the status {status['runID']}"
            continue
        wanted = "FINISHED" if status["phase"] == "Succeeded" else "FAILED"
        if runs[0].info.status != wanted:
            yield f"{name} is {status['phase']}, its run {runs[0].info.status}"
        versions = [version.version for version in mlflow.versions_of("steps", status["runID"])]
        expected = [status["modelVersion"]] if status["phase"] == "Succeeded" else []
        if versions != expected:
            yield f"{name}: the registry has {versions}, the status {expected}"
        mine = [job["metadata"]["name"] for job in jobs if owner(job) == uid]
        if len(mine) > status["attempt"]:
            yield f"{name}: Jobs {mine} of {status['attempt']} attempts"
        yield from (f"{name}: {wrong}" for wrong in wrong_attempts(status))
    if report.tracebacks:
        yield f"{report.tracebacks} operators logged a traceback"


def wrong_attempts(status: dict[str, Any]) -> Iterator[str]:
    """What does not hold of the attempts that a status lists."""
    attempts = status["attempts"]
    numbers = [attempt["number"] for attempt in attempts]
    if numbers != list(range(numbers[0], numbers[-1] + 1)) or numbers[-1] != status["attempt"]:
        yield f"attempts {numbers}"
    counted = [item["reason"] for item in attempts if item["reason"] not in UNCOUNTED]
    if numbers[0] == 1 and len(counted) != status.get("failures", 0):
        yield f"{status.get('failures', 0)} failures counted, of attempts that ended {counted}"
    yield from overlaps(attempts)


def overlaps(attempts: list[dict[str, Any]]) -> Iterator[str]:
    """Attempts of which one trained before the one before it had ended."""
    for before, after in pairwise(attempts):
        if after.get("runningTime") and after["runningTime"] < before["endTime"]:
            yield f"attempt {after['number']} trained before attempt {before['number']} had ended"


def is_open(run: Any) -> bool:
    return run.info.status not in ("FINISHED", "FAILED", "KILLED")


def owner(job: dict[str, Any]) -> str:
    return str(job["metadata"]["ownerReferences"][0]["uid"])
