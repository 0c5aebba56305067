"""The operator dies at random moments under load, and what it stands on is taken away; then everything must be right.

A short form runs with the other tests; `make chaos` runs the long one (HEIMDALL_CHAOS_S, HEIMDALL_CHAOS_FAULT_S).
`build/chaos/report.json` has kills, faults and violations, also of `test_deaths.py`.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.e2e.chaos.checks import RUN_LABEL, is_final, mistakes_counted, mistakes_said, violations_of
from tests.e2e.chaos.report import SEED, Report
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import Mlflow, contract_run, kill_operator, scraped

KILLS_S = float(os.environ.get("HEIMDALL_CHAOS_S", "40"))
"""How long the operator is killed again and again."""
FAULT_S = float(os.environ.get("HEIMDALL_CHAOS_FAULT_S", "10"))
"""How long API server, MLflow and PostgreSQL are away, each in turn."""
IN_FLIGHT = 5
PAUSE_S = (1.0, 5.0)
SETTLE_S = 420.0
API_MANIFEST = "/etc/kubernetes/manifests/kube-apiserver.yaml"
CONTROL_PLANE = "heimdall-control-plane"


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
        spec: dict[str, Any] = {
            "resources": {"gpusPerWorker": 0, "cpu": "10m", "memory": "256Mi", "sharedMemory": "16Mi"},
            "retries": {"limit": 20},
        }
        if self.rng.random() < 0.5:  # the others register versions of one model
            promotion = {"alias": "champion", "metric": "val/loss", "mode": "min"}
            spec["registration"] = {"model": name, "aliases": ["candidate"], "promotion": promotion}
        self.release.apply(contract_run(name, spec=spec, **args))
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
        note_mistakes(release, report)  # the log goes with the pod
        kill_operator(release)
    except AssertionError:
        return  # it is just being started
    report.kills += 1
    selector = "app.kubernetes.io/component=operator"
    delete = ("delete", "pods", "-l", selector, "--grace-period=0", "--force", "--wait=false")
    release.run("kubectl", "-n", release.namespace, *delete, check=False)


def note_mistakes(release: Cluster, report: Report) -> None:
    logs = ("logs", "deployment/heimdall-operator", "--tail=-1")
    report.mistakes += mistakes_said(release.kubectl(*logs))
    # A container that ended by itself has left its log to the next one; where none has, that is refused.
    before = release.run("kubectl", "-n", release.namespace, *logs, "--previous", check=False)
    report.mistakes += mistakes_said(before.stdout)


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


def test_kills_and_faults_leave_everything_right(release: Cluster, mlflow: Mlflow, report: Report) -> None:
    rng = random.Random(SEED)
    load = Load(release, rng)
    try:
        run_for(KILLS_S, load, rng, lambda: kill(release, report))
        for name, fault in FAULTS.items():
            with fault(release):
                run_for(FAULT_S, load, rng, lambda: None)
            report.faults.append(f"{name} away for {FAULT_S:.0f} s")
        load.resume_all()
        with report.expecting("all runs of the load end"):
            wait_for(
                lambda: settled(load), what="the end of every run", timeout_s=SETTLE_S, tell=lambda: unsettled(load)
            )
        note_mistakes(release, report)
        found = list(violations(release, mlflow, load, report))
        report.violations += found
    finally:
        report.runs += len(load.uids)
    for item in load.mine():
        release.kubectl("delete", "trainingrun", item["metadata"]["name"], "--timeout=120s")

    assert found == []
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


def unsettled(load: Load) -> str:
    left = [item for item in load.mine() if not is_final(item)]
    return json.dumps([{item["metadata"]["name"]: item.get("status")} for item in left], indent=1)[:6000]


def violations(release: Cluster, mlflow: Mlflow, load: Load, report: Report) -> Iterator[str]:
    """Everything that does not hold."""
    there = {item["metadata"]["uid"]: item for item in load.mine()}
    jobs = release.list("jobs", RUN_LABEL)
    for uid, name in load.uids.items():
        yield from (f"{name}: {wrong}" for wrong in violations_of(uid, there.get(uid), mlflow, jobs))
    yield from (f"the operator said: {line}" for line in report.mistakes)
    yield from (
        f"the operator counted {count} of {error}" for error, count in mistakes_counted(scraped(release)).items()
    )
