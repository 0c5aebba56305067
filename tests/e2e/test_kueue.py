"""Kueue itself, on what docs/howto/kueue.md shows: it holds the operator's Jobs, places them, and takes places back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.cluster import Cluster, condition, hack, wait_for
from tests.e2e.conftest import (
    GPU_NODE,
    Mlflow,
    cluster_tool,
    contract_run,
    restrict,
    wait_for_admission,
    wait_for_step,
)
from tests.unit.documents.documents import blocks

PAGE = "docs/howto/kueue.md"
SETUP, (LABELLED,) = (list(yaml.safe_load_all(block.text)) for block in blocks("yaml") if block.where == PAGE)
LABELS: dict[str, str] = LABELLED["metadata"]["labels"]
QUEUE, PRIORITY, LIMIT = LABELS
PLACE: dict[str, str] = SETUP[0]["spec"]["nodeLabels"]

MODULE, IMAGE = "sigs.k8s.io/kueue", "registry.k8s.io/kueue/kueue:v0.17.0"
NAMESPACE = "kueue-system"
OBJECTS = ("workloads", "localqueues", "clusterqueues", "resourceflavors", "workloadpriorityclasses")
KINDS = (
    "customresourcedefinitions,apiservices,validatingwebhookconfigurations,mutatingwebhookconfigurations,"
    "clusterroles,clusterrolebindings,rolebindings,namespaces"
)
INSTALL_TIMEOUT = "240s"
LIFE_S = 240.0
LIMIT_S = 30


# --- Kueue and its queue -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kueue(release: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Kueue by its own chart and with its own settings; nothing of it stays."""
    hack("hack/images", "build", "kueue")
    hack("hack/cluster", "load", IMAGE)
    chart = chart_of_kueue(tmp_path_factory.mktemp("kueue") / "chart")
    installed = Cluster(release.env, NAMESPACE)
    remove(installed)
    repository, _, tag = IMAGE.rpartition(":")
    image = {"repository": repository, "tag": tag, "pullPolicy": "IfNotPresent"}
    options = ",".join(f"controllerManager.manager.image.{name}={value}" for name, value in image.items())
    try:
        installed.run("kubectl", "create", "namespace", NAMESPACE)
        restrict(installed)
        installed.helm("install", "kueue", str(chart), "--set", options, "--wait", "--timeout", INSTALL_TIMEOUT)
        yield installed
    finally:
        remove(installed)
        wait_for(lambda: not left_of_kueue(installed), what="Kueue's end", timeout_s=60)


def chart_of_kueue(folder: Path) -> Path:
    """Kueue's chart, out of the module that its program is built from."""
    parts = cluster_tool("parts")
    with cluster_tool("cli").locked():
        shutil.copytree(parts.module_dir(MODULE, "kueue") / "charts/kueue", folder)
    return folder


def remove(installed: Cluster) -> None:
    """Its objects first, while there is somebody who takes their finalizers away."""
    if installed.run("helm", "-n", NAMESPACE, "status", "kueue", check=False).returncode == 0:
        for kind in OBJECTS:
            every = (f"{kind}.kueue.x-k8s.io", "--all", "--all-namespaces")
            installed.run("kubectl", "delete", *every, "--timeout=60s", check=False)
        installed.helm("uninstall", "kueue", "--wait", "--timeout", "120s")
    installed.run("kubectl", "delete", "namespace", NAMESPACE, "--ignore-not-found", "--timeout=120s")


def left_of_kueue(installed: Cluster) -> list[str]:
    listed = installed.run("kubectl", "get", KINDS, "--all-namespaces", "-o", "name").stdout
    return [name for name in listed.splitlines() if "kueue" in name]


@pytest.fixture(scope="module")
def queue(release: Cluster, kueue: Cluster) -> Iterator[None]:
    """The queue that the page shows, for the release's namespace and the node with the GPUs."""
    (label, value), *_ = PLACE.items()
    release.run("kubectl", "label", "--overwrite", "node", GPU_NODE, f"{label}={value}")
    try:
        for manifest in SETUP:
            take(release, manifest)
        release.kubectl("wait", "--for=condition=Active", "localqueue", LABELS[QUEUE], "--timeout=60s")
        yield
    finally:
        release.run("kubectl", "label", "node", GPU_NODE, f"{label}-")


def take(release: Cluster, manifest: dict[str, Any]) -> None:
    """Apply what the page shows, in the release's namespace, once Kueue's webhooks let it."""
    own = {"namespace": release.namespace} if "namespace" in manifest["metadata"] else {}
    text = json.dumps({**manifest, "metadata": {**manifest["metadata"], **own}})
    said: list[str] = []

    def is_taken() -> bool:
        done = release.run("kubectl", "apply", "-f", "-", text=text, check=False)
        said.append(done.stderr)
        return done.returncode == 0

    wait_for(is_taken, what=f"a {manifest['kind']}", timeout_s=60, tell=lambda: said[-1])


@pytest.fixture
def names(release: Cluster, queue: None, name: str) -> Iterator[tuple[str, str]]:
    """Names of two runs, which are deleted afterwards."""
    pair = (f"{name}-one", f"{name}-two")
    yield pair
    release.kubectl("delete", "trainingrun", *pair, "--ignore-not-found", "--timeout=150s")


def queued(name: str, *more: str, gpus: int = 2, workers: int = 1, **args: Any) -> dict[str, Any]:
    """A run with labels of the page; with two GPUs it takes all that the queue has."""
    run = contract_run(name, **args)
    run["spec"]["resources"] |= {"gpusPerWorker": gpus, "workers": workers}
    run["metadata"]["labels"] = {label: LABELS[label] for label in (QUEUE, *more)}
    return run


def workload_of(release: Cluster, job: str) -> dict[str, Any]:
    """What Kueue has made of a Job; empty where it has not taken it up."""
    found = release.get("job", job)
    assert found is not None, f"there is no Job {job}"
    selector = f"kueue.x-k8s.io/job-uid={found['metadata']['uid']}"
    return next(iter(release.list("workloads.kueue.x-k8s.io", selector)), {})


def wait_for_workload(release: Cluster, job: str, kind: str, word: str) -> dict[str, Any]:
    """Wait until a condition of a Job's Workload says something."""

    def look() -> dict[str, Any] | None:
        workload = workload_of(release, job)
        told = condition(workload.get("status", {}), kind)
        return workload if word in f"{told.get('reason')}: {told.get('message')}" else None

    return wait_for(
        look,
        what=f"a word of {word!r}",
        timeout_s=LIFE_S,
        tell=lambda: yaml.safe_dump(workload_of(release, job).get("status", {})),
    )


def pods_of(release: Cluster, name: str) -> list[dict[str, Any]]:
    return release.list("pods", f"training.heimdall.dev/run={name}")


def came_after(release: Cluster, first: str, second: str) -> dict[str, Any]:
    """The Job of a run whose place another one's Job had before: it began, or began again, when that had ended."""
    ended, followed = (release.get("job", f"{name}-a1") for name in (first, second))
    assert ended is not None
    assert followed is not None
    assert ended["status"]["completionTime"] <= followed["status"]["startTime"]
    return followed


def succeeded(release: Cluster, mlflow: Mlflow, name: str, *, attempt: int = 1) -> dict[str, Any]:
    """The status of a run that has trained to its end, in one MLflow run and without beginning again."""
    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert (status["phase"], status["attempt"]) == ("Succeeded", attempt), release.explain(name)
    (run,) = mlflow.runs_of(release.training_run(name)["metadata"]["uid"])
    assert (run.info.run_id, run.info.status) == (status["runID"], "FINISHED")
    steps = [metric.step for metric in mlflow.client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps.count(0) == 1, "it goes on from its checkpoint"
    return status


def suspend(release: Cluster, name: str, *, to: bool) -> None:
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", f'{{"spec": {{"suspend": {str(to).lower()}}}}}')


# --- what users see ----------------------------------------------------------------------------------------------


def test_a_run_waits_for_the_quota_and_goes_where_the_flavor_says(
    release: Cluster, mlflow: Mlflow, names: tuple[str, str]
) -> None:
    first, second = names
    release.apply(queued(first, steps=30, stepSeconds=0.5))
    release.wait_for_phase(first, "Running", timeout_s=LIFE_S)
    release.apply(queued(second, steps=3))

    assert wait_for_admission(release, second, "Queued", LIFE_S)["phase"] == "Pending"
    assert pods_of(release, second) == []
    wait_for_workload(release, f"{second}-a1", "QuotaReserved", "insufficient unused quota for nvidia.com/gpu")

    for name in names:
        status = succeeded(release, mlflow, name)
        assert condition(status, "Admitted")["message"] == f"Queue {LABELS[QUEUE]} has admitted Job {name}-a1."
    followed = came_after(release, first, second)
    assert followed["spec"]["template"]["spec"]["nodeSelector"] == PLACE
    (pod,) = pods_of(release, second)
    assert (pod["spec"]["nodeSelector"], pod["spec"]["nodeName"]) == (PLACE, GPU_NODE)


def test_a_run_of_higher_priority_takes_the_place_of_one_that_goes_on_afterwards(
    release: Cluster, mlflow: Mlflow, names: tuple[str, str]
) -> None:
    low, high = names
    release.apply(queued(low, steps=40, stepSeconds=0.5))
    run_id = release.wait_for_phase(low, "Running", timeout_s=LIFE_S)["runID"]
    wait_for_step(release, mlflow, run_id, 3, LIFE_S)

    release.apply(queued(high, PRIORITY, LIMIT, steps=10, stepSeconds=0.5))

    assert wait_for_admission(release, low, "Evicted", LIFE_S)["phase"] == "Pending"
    wait_for_workload(release, f"{low}-a1", "Evicted", "Preempted")
    succeeded(release, mlflow, high)
    assert succeeded(release, mlflow, low)["runID"] == run_id
    came_after(release, high, low)


def test_a_suspended_and_a_deleted_run_give_the_quota_back(
    release: Cluster, mlflow: Mlflow, names: tuple[str, str]
) -> None:
    first, second = names
    release.apply(queued(first, steps=30, stepSeconds=0.5))
    run_id = release.wait_for_phase(first, "Running", timeout_s=LIFE_S)["runID"]
    wait_for_step(release, mlflow, run_id, 3, LIFE_S)
    release.apply(queued(second, steps=1000, stepSeconds=0.5))
    wait_for_admission(release, second, "Queued", LIFE_S)

    suspend(release, first, to=True)

    assert condition(release.wait_for_phase(second, "Running", timeout_s=LIFE_S), "Admitted")["status"] == "True"
    suspended = release.wait_for_phase(first, "Suspended", timeout_s=LIFE_S)
    assert condition(suspended, "Admitted")["reason"] == "Released"

    suspend(release, first, to=False)
    wait_for_admission(release, first, "Queued", LIFE_S)
    uid = release.training_run(second)["metadata"]["uid"]
    release.kubectl("delete", "trainingrun", second, "--timeout=120s")

    assert succeeded(release, mlflow, first, attempt=2)["runID"] == run_id
    assert [run.info.status for run in mlflow.runs_of(uid)] == ["KILLED"]


def test_a_group_is_admitted_whole_or_not_at_all(release: Cluster, mlflow: Mlflow, names: tuple[str, str]) -> None:
    single, group = names
    release.apply(queued(single, gpus=1, steps=30, stepSeconds=0.5))
    release.wait_for_phase(single, "Running", timeout_s=LIFE_S)
    run = queued(group, gpus=1, workers=2, steps=3)
    del run["spec"]["registration"]  # the script makes a model in each worker
    release.apply(run)

    wait_for_admission(release, group, "Queued", LIFE_S)
    wait_for_workload(release, f"{group}-a1", "QuotaReserved", "insufficient unused quota for nvidia.com/gpu")
    assert pods_of(release, group) == [], "one GPU is free, and none is taken"

    succeeded(release, mlflow, single)
    status = release.wait_for_phase(group, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert (status["phase"], status["attempt"]) == ("Succeeded", 1), release.explain(group)
    # The operator sees its pods end before their Job counts them.
    release.kubectl("wait", "--for=condition=Complete", f"job/{group}-a1", "--timeout=60s")
    job = release.get("job", f"{group}-a1")
    assert job is not None
    assert (job["spec"]["completionMode"], job["status"]["succeeded"]) == ("Indexed", 2)
    assert [pod["spec"]["nodeSelector"] for pod in pods_of(release, group)] == [PLACE, PLACE]


def test_an_attempt_whose_time_is_over_says_how_it_goes_on(
    release: Cluster, mlflow: Mlflow, names: tuple[str, str]
) -> None:
    name, _ = names
    run = queued(name, LIMIT, steps=80, stepSeconds=0.5)
    run["metadata"]["labels"][LIMIT] = str(LIMIT_S)
    release.apply(run)
    run_id = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)["runID"]

    told = condition(wait_for_admission(release, name, "Evicted", LIFE_S), "Admitted")["message"]
    workload = wait_for_workload(release, f"{name}-a1", "Evicted", "exceeding the maximum execution time")

    assert f"{LIMIT} ({LIMIT_S})" in told
    assert workload["spec"]["active"] is False, "it is not admitted again"

    release.kubectl("label", "trainingrun", name, f"{LIMIT}-")
    suspend(release, name, to=True)
    release.wait_for_phase(name, "Suspended", timeout_s=LIFE_S)
    suspend(release, name, to=False)
    assert succeeded(release, mlflow, name, attempt=2)["runID"] == run_id


def test_a_time_that_is_none_is_told(release: Cluster, names: tuple[str, str]) -> None:
    name, _ = names
    run = queued(name, LIMIT)
    run["metadata"]["labels"][LIMIT] = "soon"
    release.apply(run)

    def look() -> str | None:
        message: str = condition(release.status(name), "Complete").get("message", "")
        return message if LIMIT in message else None

    told = wait_for(look, what="a word about the label", timeout_s=LIFE_S, tell=lambda: release.explain(name))
    assert '"soon"' in told


def test_a_priority_class_that_is_not_there_is_waited_for(
    release: Cluster, mlflow: Mlflow, names: tuple[str, str]
) -> None:
    name, other = names
    run = queued(name, PRIORITY, steps=3)
    run["metadata"]["labels"][PRIORITY] = name
    release.apply(run)
    wait_for_admission(release, name, "Queued", LIFE_S)
    release.apply(queued(other, steps=3))
    succeeded(release, mlflow, other)
    assert workload_of(release, f"{name}-a1") == {}

    release.apply({**SETUP[-1], "metadata": {"name": name}})

    succeeded(release, mlflow, name)


def test_a_default_queue_takes_runs_without_a_label(release: Cluster, mlflow: Mlflow, names: tuple[str, str]) -> None:
    name, _ = names
    default = {**SETUP[2], "metadata": {"name": "default", "namespace": release.namespace}}
    release.apply(default)
    try:
        release.kubectl("wait", "--for=condition=Active", "localqueue", "default", "--timeout=60s")
        run = queued(name, steps=3)
        del run["metadata"]["labels"]
        release.apply(run)

        status = succeeded(release, mlflow, name)
    finally:
        release.kubectl("delete", "trainingrun", name, "--ignore-not-found", "--timeout=150s")
        release.kubectl("delete", "localqueue", "default", "--timeout=60s")

    assert condition(status, "Admitted")["message"] == f"Queue default has admitted Job {name}-a1."
