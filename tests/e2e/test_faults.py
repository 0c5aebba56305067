"""What goes wrong on a real cluster, by real causes: drained, stopped and frozen nodes, preemption, hangs, memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, condition, wait_for
from tests.e2e.conftest import (
    GPU_NODE,
    ON_GPU,
    OTHER_NODE,
    Mlflow,
    contract_run,
    kept_log,
    kill_operator,
    last_words,
    signal_container,
    wait_for_step,
)

LIFE_S = 240.0
NODE_LOST_S = 300.0
AT_SIGTERM = {"checkpointEvery": 1000}
"""No checkpoint but the one that is made when the pod is told to end."""
SOON_GONE = [
    {"key": f"node.kubernetes.io/{what}", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}
    for what in ("unreachable", "not-ready")
]


def on_either_node(**more: Any) -> dict[str, Any]:
    """A spec whose pod may run on either worker, and prefers the one that nothing else runs on."""
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [GPU_NODE]}]}
    affinity = {"preferredDuringSchedulingIgnoredDuringExecution": [{"weight": 100, "preference": term}]}
    return {
        "podTemplate": {"spec": {"affinity": {"nodeAffinity": affinity}, "tolerations": SOON_GONE}},
        **more,
    }


def running_at(release: Cluster, mlflow: Mlflow, name: str, step: int) -> str:
    """Wait until a run trains and has made some steps; the ID of its MLflow run."""
    status = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    run_id: str = status["runID"]
    wait_for_step(release, mlflow, run_id, step, LIFE_S)
    return run_id


def reasons(status: dict[str, Any]) -> list[str]:
    return [attempt["reason"] for attempt in status["attempts"]]


@pytest.mark.nodes
def test_a_drained_node_costs_no_retry(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, spec=ON_GPU | {"retries": {"limit": 0}}, steps=20, stepSeconds=0.8, **AT_SIGTERM))
    run_id = running_at(release, mlflow, name, 3)
    selector = f"--pod-selector=training.heimdall.dev/run={name}"
    try:
        release.kubectl("drain", GPU_NODE, selector, "--delete-emptydir-data", "--force", "--timeout=120s")
        waiting = wait_for(
            lambda: (status := release.status(name)).get("attempt") == 2 and status["phase"] == "Pending" and status,
            what="the second attempt",
            timeout_s=LIFE_S,
        )
        assert waiting["attempts"][0]["reason"] == "Preempted"
    finally:
        release.kubectl("uncordon", GPU_NODE)

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)

    assert (status["phase"], status["failures"], status["runID"]) == ("Succeeded", 0, run_id)
    assert "steps 0 to" not in release.kubectl("logs", f"job/{name}-a2")
    log = kept_log(release, mlflow, name, 1)
    assert "steps 0 to 20" in log, "its pod is gone"
    assert "Preempted: Asked to end (SIGTERM)" in log


@pytest.mark.nodes
def test_a_preempted_run_goes_on_when_there_is_room(release: Cluster, mlflow: Mlflow, name: str) -> None:
    important = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "value": 1000}
    release.apply({**important, "metadata": {"name": "heimdall-e2e-important"}})
    spec = {"resources": {"gpusPerWorker": 2, "cpu": "20m", "memory": "256Mi"}, "retries": {"limit": 0}}
    release.apply(contract_run(name, spec=spec, steps=20, stepSeconds=0.8, **AT_SIGTERM))
    try:
        running_at(release, mlflow, name, 3)
        intruder = contract_run(
            f"{name}-b",
            spec={
                "resources": spec["resources"],
                "podTemplate": {"spec": {"priorityClassName": "heimdall-e2e-important"}},
            },
            steps=10,
        )
        release.apply(intruder)
        release.wait_for_phase(f"{name}-b", "Succeeded", timeout_s=LIFE_S)
        status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    finally:
        release.kubectl("delete", "trainingrun", f"{name}-b", "--ignore-not-found", "--timeout=150s")
        release.kubectl("delete", "priorityclass", "heimdall-e2e-important")

    assert (status["phase"], status["failures"]) == ("Succeeded", 0)
    assert reasons(status) == ["Preempted", "Completed"]
    assert "Preempted: Asked to end (SIGTERM)" in kept_log(release, mlflow, name, 1)


def stored(mlflow: Mlflow, run_id: str) -> set[str]:
    """Checkpoints of the first attempt."""
    return {item.path for item in mlflow.client.list_artifacts(run_id, "checkpoints") if "attempt-1" in item.path}


@contextmanager
def node_away(release: Cluster, away: str, back: str) -> Iterator[None]:
    """The node's container is stopped or frozen, and brought back whatever happens."""
    release.run("docker", away, GPU_NODE)
    try:
        yield
    finally:
        release.run("docker", back, GPU_NODE)
        release.kubectl("wait", "--for=condition=Ready", f"node/{GPU_NODE}", "--timeout=180s")


@pytest.mark.nodes
@pytest.mark.parametrize("how", [("stop", "start"), ("pause", "unpause")], ids=lambda how: how[0])
def test_a_lost_node_is_given_up_and_what_comes_back_publishes_nothing(
    release: Cluster, mlflow: Mlflow, trainer: None, name: str, how: tuple[str, str]
) -> None:
    del trainer  # its image must not be on its way to the node that goes
    pace = {"steps": 20, "stepSeconds": 0.7, "checkpointEvery": 2}
    release.apply(contract_run(name, spec=on_either_node(retries={"limit": 0}), **pace))
    run_id = running_at(release, mlflow, name, 3)
    assert release.status(name)["attempts"][0]["node"] == GPU_NODE

    with last_words(release, f"{name}-a1") as words:
        with node_away(release, *how):
            second = wait_for(
                lambda: (
                    (status := release.status(name)).get("attempt") == 2
                    and status["phase"] == "Running"
                    and status["attempts"][1]
                ),
                what="a second attempt on another node",
                timeout_s=NODE_LOST_S,
                tell=lambda: release.explain(name),
            )
            assert second["node"] == OTHER_NODE
            assert release.status(name)["attempts"][0]["reason"] == "NodeLost"
            before = stored(mlflow, run_id)
        # The first attempt's process lives on after a partition: the newer attempt's number keeps it from publishing.
        if how[0] == "pause":
            assert "Fenced: Attempt 2 has taken over; attempt 1 publishes nothing." in words(LIFE_S)
    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)

    assert (status["phase"], status["failures"], status["runID"]) == ("Succeeded", 0, run_id)
    assert len(stored(mlflow, run_id) - before) <= 1, "no more than what was under way when it was lost"
    tags = mlflow.client.get_run(run_id).data.tags
    assert all("attempt-2" in item["path"] for item in json.loads(tags["heimdall.checkpoints"]))
    assert len(mlflow.versions_of("steps", run_id)) == 1
    history = mlflow.client.get_metric_history(run_id, "train/loss")
    assert {item.step for item in history} == set(range(20))


@pytest.mark.beside
def test_a_stopped_process_is_taken_for_hung(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=15, stepSeconds=0.8, checkpointEvery=1))
    running_at(release, mlflow, name, 3)

    signal_container(release, f"{name}-a1", "STOP")
    # For this attempt alone: how long a pod takes to its first steps depends on what else there is to do.
    patch = ("patch", "trainingrun", name, "--type=merge", "-p")
    release.kubectl(*patch, '{"spec": {"stallTimeoutSeconds": 10}}')
    wait_for(
        lambda: release.status(name)["attempts"][0].get("reason") == "Stalled",
        what="the first attempt being taken for hung",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )
    release.kubectl(*patch, '{"spec": {"stallTimeoutSeconds": null}}')

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert reasons(status) == ["Stalled", "Completed"]
    assert status["failures"] == 1
    assert "steps 0 to" not in release.kubectl("logs", f"job/{name}-a2")


@pytest.mark.beside
def test_memory_grows_after_it_ran_out(release: Cluster, mlflow: Mlflow, name: str) -> None:
    spec = {"retries": {"limit": 1, "memoryGrowth": {"factor": 2, "max": "1Gi"}}}
    release.apply(contract_run(name, spec=spec, fail="memory", failAttempt=1))

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)

    assert reasons(status) == ["HostOutOfMemory", "Completed"]
    assert "steps 0 to 10" in kept_log(release, mlflow, name, 1)
    assert status["attempts"][1]["memory"] == "512Mi"
    container = release.list("pods", f"batch.kubernetes.io/job-name={name}-a2")[0]["spec"]["containers"][0]
    assert container["resources"]["limits"]["memory"] == "512Mi"


@pytest.mark.beside
def test_a_pod_evicted_for_what_it_wrote_is_not_tried_again(release: Cluster, name: str) -> None:
    """The kubelet looks at what pods wrote every ten seconds or so."""
    limits = {"containers": [{"name": "trainer", "resources": {"limits": {"ephemeral-storage": "16Mi"}}}]}
    release.apply(contract_run(name, spec={"podTemplate": {"spec": limits}}, fail="disk"))

    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)

    assert reasons(status) == ["StorageExceeded"]
    failed = condition(status, "Failed")
    assert failed["reason"] == "StorageExceeded"
    assert "exceed" in failed["message"]
    assert "spec.podTemplate" in failed["message"]


@pytest.mark.beside
def test_an_active_deadline_ends_the_run(release: Cluster, name: str) -> None:
    release.apply(contract_run(name, spec={"activeDeadlineSeconds": 5}, steps=600, stepSeconds=0.2))

    status = release.wait_for_phase(name, "Failed", timeout_s=LIFE_S)

    assert condition(status, "Failed")["reason"] == "DeadlineExceeded"
    assert "spec.activeDeadlineSeconds (5 s)" in condition(status, "Failed")["message"]


def test_complete_waits_for_mlflow_and_says_so(release: Cluster, name: str) -> None:
    """The pod ends while nobody looks, MLflow goes, and only then the operator comes back."""
    release.apply(contract_run(name, steps=10, stepSeconds=0.8))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    scale(release, "heimdall-operator", 0)
    try:
        release.kubectl("wait", "--for=condition=Complete", f"job/{name}-a1", f"--timeout={LIFE_S:.0f}s")
        scale(release, "heimdall-tracking", 0)
        scale(release, "heimdall-operator", 1)
        said = wait_for(
            lambda: "waiting for MLflow" in (words := condition(release.status(name), "Complete")["message"]) and words,
            what="a word about MLflow",
            timeout_s=LIFE_S,
            tell=lambda: release.explain(name),
        )
        assert said
        assert release.status(name)["phase"] != "Succeeded"
    finally:
        scale(release, "heimdall-tracking", 1)
        scale(release, "heimdall-operator", 1)

    release.kubectl("wait", "--for=condition=Complete", f"trainingrun/{name}", f"--timeout={LIFE_S:.0f}s")
    assert release.status(name)["modelVersion"]


def test_a_finished_run_that_is_applied_again_when_its_job_is_gone_does_not_train(release: Cluster, name: str) -> None:
    """As GitOps does all the time; nor does an operator that starts anew and sees no Job make one."""
    manifest = contract_run(name, spec={"ttlSecondsAfterFinished": 2}, steps=2)
    release.apply(manifest)
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    selector = f"training.heimdall.dev/run={name}"
    wait_for(lambda: not release.list("jobs,pods", selector), what="the end of Jobs and pods", timeout_s=120)
    before = wait_for(
        lambda: "logs" in (status := release.status(name))["attempts"][0] and status,
        what="its log being kept",
        timeout_s=LIFE_S,
    )

    release.apply(manifest)
    kill_operator(release)
    # Whatever the operator does about it, it has done when a later run is through.
    release.apply(contract_run(f"{name}-b", steps=1))
    release.wait_for_phase(f"{name}-b", "Succeeded", timeout_s=LIFE_S)
    release.kubectl("delete", "trainingrun", f"{name}-b", "--timeout=120s")

    assert release.status(name) == before
    assert release.list("jobs,pods", selector) == []


def scale(release: Cluster, deployment: str, replicas: int) -> None:
    release.kubectl("scale", f"deployment/{deployment}", f"--replicas={replicas}")
    release.kubectl("rollout", "status", f"deployment/{deployment}", "--timeout=180s")
    if replicas == 0:
        component = deployment.removeprefix("heimdall-")
        selector = f"app.kubernetes.io/component={component}"
        release.kubectl("wait", "--for=delete", "pod", "-l", selector, "--timeout=120s")
