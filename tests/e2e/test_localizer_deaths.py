"""The real localizer loses a process in the middle: what goes on, goes on from the last whole checkpoint."""

from __future__ import annotations

import json
from typing import Any

import pytest

from heimdall_api.contract import parse_checkpoints
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import GPU_NODE, IS_SPREAD, OTHER_NODE, Mlflow, signal_container
from tests.e2e.test_localizer import TRAINING_S, example

pytestmark = pytest.mark.beside


def without_gpu(name: str, **training: Any) -> dict[str, Any]:
    """The example where its image is; GPUs and a processor are left to the tests beside."""
    run = example(name, epochs=3, batchSize=8, **training)
    run["spec"]["model"]["backbone"] = "resnet10t"
    run["spec"]["resources"] |= {"gpusPerWorker": 0, "cpu": "400m"}
    run["spec"]["podTemplate"] = {"spec": {"nodeSelector": {"kubernetes.io/hostname": GPU_NODE}}}
    del run["spec"]["export"]
    return run


def one_a_node(name: str) -> dict[str, Any]:
    """A pod template that spreads workers, as docs/howto/several-nodes.md has it."""
    constraint = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"training.heimdall.dev/run": name}},
    }
    return {"spec": {"topologySpreadConstraints": [constraint]}}


def going_on(log: str) -> int | None:
    """The step of the checkpoint that a trainer's log says it goes on from."""
    found = (json.loads(line) for line in log.splitlines() if "going on from a checkpoint" in line)
    return next((int(line["step"]) for line in found), None)


def test_a_pod_suspended_and_one_killed_in_mid_epoch_are_followed_by_one_that_goes_on(
    release: Cluster, mlflow: Mlflow, recordings: None, name: str
) -> None:
    del recordings
    release.apply(without_gpu(name, checkpoints={"keep": 2, "everyMinutes": 0.05}))
    status = release.wait_for_phase(name, "Running", timeout_s=TRAINING_S)
    run_id = status["runID"]

    def checkpointed() -> int | None:
        listed = parse_checkpoints(mlflow.client.get_run(run_id).data.tags.get("heimdall.checkpoints"))
        return listed[-1].step if listed and not listed[-1].path.endswith("-end.ckpt") else None

    step = wait_for(
        checkpointed, what="a checkpoint in mid-epoch", timeout_s=TRAINING_S, tell=lambda: release.explain(name)
    )
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    suspended = release.wait_for_phase(name, "Suspended", timeout_s=TRAINING_S)
    assert (suspended["attempts"][0]["reason"], suspended["attempts"][0]["exitCode"]) == ("Suspended", 143)
    left = parse_checkpoints(mlflow.client.get_run(run_id).data.tags["heimdall.checkpoints"])[-1].step
    assert left > step, "one was made before the pod went"

    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": false}}')

    def again() -> int | None:
        logs = release.run("kubectl", "-n", release.namespace, "logs", f"job/{name}-a2", check=False)
        return going_on(logs.stdout)

    what = "the second attempt training"
    assert wait_for(again, what=what, timeout_s=TRAINING_S, tell=lambda: release.explain(name)) == left
    signal_container(release, f"{name}-a2", "KILL")

    done = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=TRAINING_S)

    assert done["phase"] == "Succeeded", release.explain(name)
    assert done["runID"] == run_id
    assert [(item["number"], item["reason"], item["exitCode"]) for item in done["attempts"]] == [
        (1, "Suspended", 143),
        (2, "Killed", 137),
        (3, "Completed", 0),
    ]
    third = going_on(release.kubectl("logs", f"job/{name}-a3"))
    assert third is not None
    assert third >= left
    again = mlflow.client.get_metric_history(run_id, "train/loss_step")
    assert {item.step for item in again} == set(range(max(item.step for item in again) + 1)), "no step is missing"
    assert [item.version for item in mlflow.versions_of("heimdall-localizer", run_id)] == [done["modelVersion"]]


def test_two_workers_train_together_and_go_on_when_one_is_killed(
    release: Cluster, mlflow: Mlflow, recordings: None, name: str
) -> None:
    del recordings
    run = without_gpu(name, checkpoints={"keep": 1, "everyMinutes": 0.05})
    run["spec"]["resources"] |= {"workers": 2, "memory": "3Gi"}
    if IS_SPREAD:
        run["spec"]["podTemplate"] = one_a_node(name)
    release.apply(run)
    status = release.wait_for_phase(name, "Running", "Failed", timeout_s=TRAINING_S)
    run_id = status["runID"]
    pods = release.list("pods", f"training.heimdall.dev/run={name}")
    assert sorted(pod["spec"]["hostname"] for pod in pods) == [f"{name}-a1-0", f"{name}-a1-1"]
    assert {pod["spec"]["nodeName"] for pod in pods} == ({GPU_NODE, OTHER_NODE} if IS_SPREAD else {GPU_NODE})

    def checkpointed() -> int | None:
        listed = parse_checkpoints(mlflow.client.get_run(run_id).data.tags.get("heimdall.checkpoints"))
        return listed[-1].step if listed else None

    step = wait_for(checkpointed, what="a checkpoint", timeout_s=TRAINING_S, tell=lambda: release.explain(name))
    second = next(pod for pod in pods if pod["spec"]["hostname"].endswith("-1"))
    signal_container(release, f"{name}-a1", "KILL", pod=second["metadata"]["name"])

    done = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=TRAINING_S)

    assert done["phase"] == "Succeeded", release.explain(name)
    assert [item["number"] for item in done["attempts"]] == [1, 2]
    assert (done["attempts"][0]["reason"], done["attempts"][0]["exitCode"]) == ("Killed", 137)
    where = (second["metadata"]["name"], second["spec"]["nodeName"])
    assert (done["attempts"][0]["pod"], done["attempts"][0]["node"]) == where, "where to look why"
    parameters = mlflow.client.get_run(run_id).data.params
    assert (parameters["environment.devices"], parameters["resources.workers"]) == ("2", "2")
    first = next(
        pod["metadata"]["name"]
        for pod in release.list("pods", f"batch.kubernetes.io/job-name={name}-a2")
        if pod["spec"]["hostname"].endswith("-0")
    )
    log = release.kubectl("logs", first)
    resumed = going_on(log)
    assert resumed is not None
    assert resumed >= step > 0
    assert len(mlflow.versions_of("heimdall-localizer", run_id)) == 1
