"""What a TrainingRun may ask for: places, volumes, queues, expiry; and what is kept of it."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, condition, wait_for
from tests.e2e.conftest import (
    GPU_NODE,
    Mlflow,
    contract_run,
    kept_log,
    namespace,
    wait_for_admission,
    wait_for_step,
)

pytestmark = pytest.mark.beside

LIFE_S = 240.0
QUEUE = "kueue.x-k8s.io/queue-name"


def test_a_pod_template_is_merged_into_the_pod(release: Cluster, name: str) -> None:
    release.kubectl("create", "configmap", f"{name}-mine", "--from-literal=answer=42")
    release.kubectl("create", "secret", "generic", f"{name}-mine", "--from-literal=MINE=secret")
    trainer = {
        "name": "trainer",
        "env": [{"name": "EXTRA", "value": "1"}],
        "envFrom": [{"secretRef": {"name": f"{name}-mine"}}],
        "volumeMounts": [{"name": "mine", "mountPath": "/mine"}, {"name": "hidden", "mountPath": "/hidden"}],
    }
    template = {
        "metadata": {"labels": {"team": "radio"}},
        "spec": {
            "nodeSelector": {"heimdall.dev/gpu": "simulated"},
            "tolerations": [{"key": "gpu", "operator": "Exists"}],
            "containers": [trainer],
            "volumes": [
                {"name": "mine", "configMap": {"name": f"{name}-mine"}},
                {"name": "hidden", "secret": {"secretName": f"{name}-mine"}},
            ],
        },
    }
    release.apply(contract_run(name, spec={"podTemplate": template}, steps=600, stepSeconds=0.2))

    status = release.wait_for_phase(name, "Running", "Failed", timeout_s=LIFE_S)
    assert status["phase"] == "Running", release.explain(name)
    pod = release.list("pods", f"training.heimdall.dev/run={name}")[0]
    read = "echo $EXTRA $MINE $(cat /mine/answer) $(cat /hidden/MINE)"
    seen = release.kubectl("exec", pod["metadata"]["name"], "-c", "trainer", "--", "sh", "-c", read)
    release.kubectl("delete", f"configmap/{name}-mine", f"secret/{name}-mine")

    assert seen.split() == ["1", "secret", "42", "secret"], "what the training itself is given"
    assert pod["metadata"]["labels"]["team"] == "radio"
    assert {"key": "gpu", "operator": "Exists"} in pod["spec"]["tolerations"]
    container = pod["spec"]["containers"][0]
    assert {"name": "EXTRA", "value": "1"} in container["env"]
    assert [item["secretRef"]["name"] for item in container["envFrom"]] == ["heimdall-trainer", f"{name}-mine"]
    mounts = {item["name"] for item in container["volumeMounts"]}
    assert {"run-file", "scratch", "shared-memory", "mine", "hidden"} <= mounts


def test_a_pod_template_that_breaks_isolation_is_refused(release: Cluster, mlflow: Mlflow, name: str) -> None:
    template = {"spec": {"hostNetwork": True, "volumes": [{"name": "root", "hostPath": {"path": "/"}}]}}
    release.apply(contract_run(name, spec={"podTemplate": template}))

    status = release.wait_for_phase(name, "Failed", timeout_s=LIFE_S)

    failed = condition(status, "Failed")
    assert failed["reason"] == "InvalidConfiguration"
    assert "spec.podTemplate.spec.hostNetwork: it would break the pod's isolation: remove it" in failed["message"]
    assert "spec.podTemplate.spec.volumes[root].hostPath" in failed["message"]
    assert release.list("jobs", f"training.heimdall.dev/run={name}") == []
    assert [run.info.status for run in mlflow.runs_of(release.training_run(name)["metadata"]["uid"])] == ["FAILED"]


def test_a_queue_holds_and_evicts_the_job_and_it_stays_the_same_attempt(
    release: Cluster, mlflow: Mlflow, name: str
) -> None:
    """What Kueue does to a Job, done by hand: it lets it go on certain nodes, takes it back, and lets it go again."""
    run = contract_run(name, steps=20, stepSeconds=0.8, checkpointEvery=2)
    run["metadata"]["labels"] = {QUEUE: "team-queue", "kueue.x-k8s.io/priority-class": "high"}
    release.apply(run)

    assert wait_for_admission(release, name, "Queued", LIFE_S)["phase"] == "Pending"
    job = release.list("jobs", f"training.heimdall.dev/run={name}")[0]
    assert job["spec"]["suspend"] is True
    assert {QUEUE: "team-queue", "kueue.x-k8s.io/priority-class": "high"}.items() <= job["metadata"]["labels"].items()

    place = {"spec": {"nodeSelector": {"kubernetes.io/hostname": GPU_NODE}, "tolerations": [{"operator": "Exists"}]}}
    patch_job(release, name, {"suspend": False, "template": place})
    assert wait_for_admission(release, name, "Admitted", LIFE_S)
    run_id = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)["runID"]
    wait_for_step(release, mlflow, run_id, 3, LIFE_S)

    patch_job(release, name, {"suspend": True})
    assert wait_for_admission(release, name, "Evicted", LIFE_S)["phase"] == "Pending"
    wait_for(
        lambda: not release.list("pods", f"training.heimdall.dev/run={name}"), what="the pods' end", timeout_s=LIFE_S
    )
    assert release.status(name)["attempts"][0].get("reason") is None

    patch_job(release, name, {"suspend": False})
    status = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert (status["phase"], status["attempt"], status["runID"]) == ("Succeeded", 1, run_id)
    assert "steps 0 to" not in release.kubectl("logs", f"job/{name}-a1")
    assert release.list("jobs", f"training.heimdall.dev/run={name}")[0]["spec"]["template"]["spec"]["nodeSelector"] == {
        "kubernetes.io/hostname": GPU_NODE
    }, "what the queue wrote is left alone"


def patch_job(release: Cluster, name: str, spec: dict[str, Any]) -> None:
    release.kubectl("patch", "job", f"{name}-a1", "--type=merge", "-p", json.dumps({"spec": spec}))


def test_jobs_and_pods_go_when_their_time_is_over_and_logs_stay(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, spec={"ttlSecondsAfterFinished": 2}, steps=3))
    before = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)

    selector = f"training.heimdall.dev/run={name}"
    wait_for(lambda: not release.list("jobs,pods", selector), what="the end of Jobs and pods", timeout_s=120)

    after = release.status(name)
    run_id, attempt = after["runID"], after["attempts"][0]
    assert attempt["logs"] == f"runs:/{run_id}/attempts/1"
    before["attempts"][0]["logs"] = attempt["logs"]  # it may still have been on its way
    assert after == before
    assert "steps 0 to 3" in kept_log(release, mlflow, name, 1)
    events = [json.loads(line) for line in mlflow.artifact(run_id, "attempts/1/events.jsonl").splitlines()]
    assert {"Scheduled", "SuccessfulCreate", "AttemptStarted"} <= {event["reason"] for event in events}


def test_a_namespace_without_the_secret_says_so(release: Cluster, name: str) -> None:
    with namespace(release, "bare") as bare:
        bare.apply(contract_run(name, steps=3))
        said = wait_for(
            lambda: (
                "heimdall-trainer" in (words := condition(bare.status(name), "Complete").get("message", "")) and words
            ),
            what="a word about the Secret",
            timeout_s=LIFE_S,
            tell=lambda: bare.explain(name),
        )
        assert 'secret "heimdall-trainer" not found' in said

        there = release.get("secret", "heimdall-trainer")
        assert there is not None
        bare.apply({**there, "metadata": {"name": "heimdall-trainer"}})
        assert bare.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)


def test_a_namespace_whose_quota_takes_no_pod_says_so(release: Cluster, name: str) -> None:
    with namespace(release, "full") as full:
        quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}}
        full.apply({**quota, "spec": {"hard": {"pods": "0"}}})
        full.kubectl("wait", "--for=jsonpath={.status.hard.pods}=0", "resourcequota/none", "--timeout=60s")
        full.apply(contract_run(name, steps=3))
        wait_for(
            lambda: "exceeded quota" in condition(full.status(name), "Complete").get("message", ""),
            what="a word about the quota",
            timeout_s=LIFE_S,
            tell=lambda: full.explain(name),
        )

        full.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"pendingDeadlineSeconds": 5}}')
        failed = condition(full.wait_for_phase(name, "Failed", timeout_s=LIFE_S), "Failed")
        assert failed["reason"] == "PodNotStarted"
        assert "exceeded quota" in failed["message"]


PROMOTIONS: dict[str, tuple[dict[str, Any], str, set[str]]] = {
    "nobody before it": ({"metric": "val/loss"}, "; promoted to champion", {"candidate", "champion"}),
    "no such metric": ({"metric": "nowhere"}, "its nowhere is missing", {"candidate"}),
    "a threshold out of reach": (
        {"metric": "val/loss", "threshold": 0.1},
        "val/loss 0.333333 does not reach the threshold 0.1",
        {"candidate"},
    ),
}


@pytest.mark.parametrize("case", PROMOTIONS.values(), ids=PROMOTIONS.keys())
def test_a_promotion_says_what_decided_it(
    release: Cluster, mlflow: Mlflow, name: str, case: tuple[dict[str, Any], str, set[str]]
) -> None:
    decides, word, aliases = case
    promotion = {"alias": "champion", "mode": "min", **decides}
    spec = {"registration": {"model": name, "aliases": ["candidate"], "promotion": promotion}}
    release.apply(contract_run(name, spec=spec, steps=3))

    status = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)

    assert word in condition(status, "ModelRegistered")["message"]
    assert mlflow.client.get_registered_model(name).aliases.keys() == aliases


def test_only_a_better_model_becomes_champion(release: Cluster, mlflow: Mlflow, name: str) -> None:
    champions = []
    for suffix, steps, word in (
        ("good", 4, "; promoted to champion"),
        ("bad", 2, "; not promoted to champion: val/loss 0.5 does not beat version 1's 0.25"),
        ("better", 5, "; promoted to champion over version 1 (val/loss 0.2 against 0.25)"),
    ):
        assert word in told_of_the_model(release, f"{name}-{suffix}", name, steps)
        champions.append(mlflow.client.get_model_version_by_alias(name, "champion").version)

    assert champions == ["1", "1", "3"]


def told_of_the_model(release: Cluster, name: str, model: str, steps: int) -> str:
    """What people are told, by an Event, when the model of a run is registered."""
    spec = {"registration": {"model": model, "promotion": {"metric": "val/loss", "mode": "min"}}}
    release.apply(contract_run(name, spec=spec, steps=steps))
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)

    def note() -> str | None:
        events = release.list("events.events.k8s.io")
        about = (item for item in events if item["regarding"]["name"] == name and item["reason"] == "ModelRegistered")
        return next((str(item["note"]) for item in about), None)

    told = wait_for(note, what="the Event", timeout_s=60, tell=lambda: release.explain(name))
    release.kubectl("delete", "trainingrun", name, "--timeout=120s")
    return told


def test_progress_best_metric_and_an_estimate_are_there_while_it_runs(release: Cluster, name: str) -> None:
    release.apply(contract_run(name, steps=40, stepSeconds=0.5))

    status = wait_for(
        lambda: "estimatedCompletionTime" in (status := release.status(name)).get("progress", {}) and status,
        what="an estimate",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )

    assert status["phase"] == "Running"
    assert 0 < status["progress"]["step"] < 40
    assert status["bestMetric"] == {"name": "val/loss", "value": f"{1 / status['progress']['step']:.6g}"}
    assert status["progress"]["percent"] < 100
    assert datetime.fromisoformat(status["progress"]["estimatedCompletionTime"]) > datetime.fromisoformat(
        status["progress"]["time"]
    )
    checkpoint = wait_for(
        lambda: release.status(name).get("lastCheckpoint"), what="a checkpoint on the status", timeout_s=LIFE_S
    )
    assert checkpoint["uri"].startswith(f"runs:/{status['runID']}/checkpoints/")
