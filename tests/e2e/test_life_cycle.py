"""The operator on a real cluster, with the tiny image that keeps the trainer's contract."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import pytest

from heimdall_api.contract import LABEL_QUEUE
from heimdall_operator.decide import RETRY_DELAY_S
from tests.e2e.cluster import Cluster, condition, wait_for
from tests.e2e.conftest import ON_GPU, Mlflow, contract_run, wait_for_step

pytestmark = pytest.mark.beside
LIFE_S = 240.0
TOLD = Counter(["RunCreated", "AttemptStarted", "Training", "AttemptCompleted", "ModelRegistered", "Completed"])
"""The transitions of a life in which nothing happens."""


def check_whole(release: Cluster, mlflow: Mlflow, name: str, *, attempts: int = 1) -> dict[str, Any]:
    """A run that succeeded: one MLflow run, one Job an attempt, one version, and nothing held up."""
    resource = release.training_run(name)
    status = resource["status"]
    runs = mlflow.runs_of(resource["metadata"]["uid"])
    assert [run.info.run_id for run in runs] == [status["runID"]]
    assert runs[0].info.status == "FINISHED"
    assert len(release.list("jobs", f"training.heimdall.dev/run={name}")) == attempts
    assert [item.version for item in mlflow.versions_of("steps", status["runID"])] == [status["modelVersion"]]
    wait_for(
        lambda: "finalizers" not in release.training_run(name)["metadata"], what="the finalizer's end", timeout_s=30
    )
    return dict(status)


def test_a_life_from_apply_to_version(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, spec=ON_GPU, steps=10))

    release.kubectl("wait", "--for=condition=Complete", f"trainingrun/{name}", f"--timeout={LIFE_S:.0f}s")

    status = check_whole(release, mlflow, name)
    assert status["modelURI"] == f"models:/steps/{status['modelVersion']}"
    assert condition(status, "ModelRegistered")["status"] == "True"
    assert status["attempts"][0]["node"] == "heimdall-worker2", "the simulated GPUs are there"
    events = wait_for(
        lambda: (found := told(release, name)) >= TOLD and found,
        what="its Events",
        timeout_s=60,
        tell=lambda: str(told(release, name)),
    )
    assert events == TOLD, "one for each transition, and none twice"


def told(release: Cluster, name: str) -> Counter[str]:
    """How often each reason was told by Events about a TrainingRun."""
    events = (item for item in release.list("events.events.k8s.io") if item["regarding"]["name"] == name)
    return Counter(item["reason"] for item in events if item["regarding"]["kind"] == "TrainingRun")


def test_a_killed_pod_is_followed_by_one_that_goes_on(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=15, stepSeconds=0.6, fail="crash", failAt=5, failAttempt=1))

    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)

    status = check_whole(release, mlflow, name, attempts=2)
    assert [item["reason"] for item in status["attempts"]] == ["Unknown", "Completed"]
    job = release.get("job", f"{name}-a2")
    assert job is not None
    ended, began = status["attempts"][0]["endTime"], job["metadata"]["creationTimestamp"]
    paused = datetime.fromisoformat(began) - datetime.fromisoformat(ended)
    assert paused >= timedelta(seconds=RETRY_DELAY_S), "whatever it was, it may need time to pass"
    log = release.kubectl("logs", f"job/{name}-a2")
    assert "steps 5 to 15" in log, "it went on from the checkpoint"


def test_a_run_deleted_while_training_leaves_nothing(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=600, stepSeconds=0.2))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    resource = release.training_run(name)

    release.kubectl("delete", "trainingrun", name, "--timeout=120s")

    runs = mlflow.runs_of(resource["metadata"]["uid"])
    assert [run.info.status for run in runs] == ["KILLED"]
    selector = f"training.heimdall.dev/run={name}"
    wait_for(lambda: not release.list("jobs,pods", selector), what="the end of its Job and pods", timeout_s=120)


NOWHERE: dict[str, Any] = {"podTemplate": {"spec": {"nodeSelector": {"nowhere": "at-all"}}}}
DELETED = {
    "while it finds no node": ({"spec": NOWHERE}, "Pending", ["KILLED"]),
    "while a queue holds it": ({"queue": "team-queue"}, "Pending", ["KILLED"]),
    "before it began": ({"spec": {"suspend": True}}, "Suspended", []),
    "after it failed": ({"fail": "configuration"}, "Failed", ["FAILED"]),
    "after it succeeded": ({"steps": 1}, "Succeeded", ["FINISHED"]),
}


@pytest.mark.parametrize("case", DELETED.values(), ids=DELETED.keys())
def test_a_run_can_be_deleted_in_every_phase(
    release: Cluster, mlflow: Mlflow, name: str, case: tuple[dict[str, Any], str, list[str]]
) -> None:
    how, phase, ends = dict(case[0]), case[1], case[2]
    queue = how.pop("queue", None)
    run = contract_run(name, **how)
    run["metadata"]["labels"] = {LABEL_QUEUE: queue} if queue else {}
    release.apply(run)
    release.wait_for_phase(name, phase, timeout_s=LIFE_S)
    if phase == "Pending":
        selector = f"training.heimdall.dev/run={name}"
        wait_for(lambda: release.list("jobs", selector), what="its Job", timeout_s=LIFE_S)

    check_deletion(release, mlflow, name, ends)


def check_deletion(release: Cluster, mlflow: Mlflow, name: str, ends: list[str]) -> None:
    """Delete a run: its MLflow runs have ended in a certain way, and nothing else is left of it."""
    uid, selector = release.training_run(name)["metadata"]["uid"], f"training.heimdall.dev/run={name}"

    release.kubectl("delete", "trainingrun", name, "--timeout=120s")

    runs = mlflow.runs_of(uid)
    assert [run.info.status for run in runs] == ends
    versions = [item for run in runs for item in mlflow.versions_of("steps", run.info.run_id)]
    assert len(versions) == ends.count("FINISHED"), "what was registered stays"
    wait_for(
        lambda: not release.list("jobs,pods,services", selector), what="the end of its Job and pods", timeout_s=120
    )


def test_a_run_that_has_trained_can_be_deleted_while_it_is_suspended(
    release: Cluster, mlflow: Mlflow, name: str
) -> None:
    release.apply(contract_run(name, steps=600, stepSeconds=0.2))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    release.wait_for_phase(name, "Suspended", timeout_s=LIFE_S)

    check_deletion(release, mlflow, name, ["KILLED"])


def test_a_run_can_be_deleted_between_two_attempts(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, spec={"retries": {"limit": 20}}, fail="crash", failAt=0))
    wait_for(
        lambda: (
            condition(status := release.status(name), "Complete").get("reason") == "Retrying"
            and "endTime" in status["attempts"][-1]
        ),
        what="a pause before the next attempt",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )

    check_deletion(release, mlflow, name, ["KILLED"])


def test_suspend_frees_the_gpu_and_resume_goes_on(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, spec=ON_GPU, steps=20, stepSeconds=0.8, checkpointEvery=1000))
    status = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    step = wait_for_step(release, mlflow, status["runID"], 3, LIFE_S)

    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    suspended = release.wait_for_phase(name, "Suspended", timeout_s=LIFE_S)
    assert condition(suspended, "Suspended")["status"] == "True"
    wait_for(lambda: not holding_gpus(release, name), what="the GPU being free", timeout_s=120)
    checkpoint = wait_for(
        lambda: release.status(name).get("lastCheckpoint"), what="the checkpoint on the status", timeout_s=LIFE_S
    )
    assert checkpoint["step"] >= step, "it was made when the pod was told to end"
    wait_for(
        lambda: mlflow.client.get_run(status["runID"]).info.status == "SCHEDULED",
        what="MLflow saying that nothing trains",
        timeout_s=LIFE_S,
    )

    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": false}}')
    done = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    assert done["runID"] == status["runID"]
    assert done["failures"] == 0
    assert "steps 0 to" not in release.kubectl("logs", f"job/{name}-a2")


def test_a_pod_whose_job_is_deleted_without_it_trains_to_its_end(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=40, stepSeconds=0.8))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)

    release.kubectl("delete", "job", f"{name}-a1", "--cascade=orphan")
    told = wait_for(
        lambda: condition(status := release.status(name), "Complete").get("reason") == "JobDeleted" and status,
        what="what became of its Job being told",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )
    done = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    release.kubectl("delete", "pods", "-l", f"training.heimdall.dev/run={name}")  # nobody owns it

    assert f"its pod {told['attempts'][0]['pod']} goes on without it" in condition(told, "Complete")["message"]
    assert (told["phase"], done["attempt"], done["attempts"][0]["pod"]) == ("Running", 1, told["attempts"][0]["pod"])
    assert mlflow.runs_of(release.training_run(name)["metadata"]["uid"])[0].info.status == "FINISHED"


@dataclass(frozen=True)
class Failure:
    """What goes wrong, and what a user is told."""

    reason: str
    message: str
    args: dict[str, Any] = field(default_factory=dict)
    spec: dict[str, Any] = field(default_factory=dict)


FAILURES = {
    "an exception": Failure("UserError", "ValueError: the loss became NaN", {"fail": "user"}),
    "a configuration error": Failure("InvalidConfiguration", "remove it", {"fail": "configuration"}),
    "memory of the GPU": Failure("CudaOutOfMemory", "use a smaller batch", {"fail": "cuda"}),
    "memory": Failure("HostOutOfMemory", "spec.resources.memory", {"fail": "memory"}),
    "memory that may not grow": Failure(
        "HostOutOfMemory",
        "It had all that spec.retries.memoryGrowth.max allows (256Mi).",
        {"fail": "memory"},
        {"retries": {"memoryGrowth": {"max": "256Mi"}}},
    ),
    "a wrong image": Failure(
        "ImagePull",
        "check spec.image",
        spec={"image": "registry.invalid/no/such:image", "pendingDeadlineSeconds": 10},
    ),
    "an impossible image name": Failure(
        "ImagePull", "spec.image is no valid image name", spec={"image": "Not An Image"}
    ),
    "more GPUs than there are": Failure(
        "Unschedulable",
        "Insufficient nvidia.com/gpu",
        spec={"resources": {"gpusPerWorker": 9, "cpu": "20m", "memory": "64Mi"}, "pendingDeadlineSeconds": 10},
    ),
    "retries used up": Failure("Unknown", "spec.retries.limit is 0", {"fail": "crash"}, {"retries": {"limit": 0}}),
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES.keys())
def test_a_failure_says_why_and_frees_the_gpu(release: Cluster, mlflow: Mlflow, name: str, failure: Failure) -> None:
    release.apply(contract_run(name, spec=ON_GPU | failure.spec, **failure.args))

    judged(release, mlflow, name, failure)


def test_a_hang_says_since_when_and_frees_the_gpu(release: Cluster, mlflow: Mlflow, name: str) -> None:
    hang = Failure("Stalled", "No training step since step 3 for 10 s")
    release.apply(contract_run(name, spec=ON_GPU | {"retries": {"limit": 0}}, fail="hang", steps=20))
    status = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)
    wait_for_step(release, mlflow, status["runID"], 3, LIFE_S)

    # Not before: how long a pod takes to its first steps depends on what else there is to do.
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"stallTimeoutSeconds": 10}}')

    judged(release, mlflow, name, hang)


def judged(release: Cluster, mlflow: Mlflow, name: str, failure: Failure) -> None:
    """See a run fail for its reason, at its first attempt, and leave nothing behind that holds a GPU."""
    status = release.wait_for_phase(name, "Failed", timeout_s=LIFE_S)

    failed = condition(status, "Failed")
    assert (failed["status"], failed["reason"]) == ("True", failure.reason)
    assert failure.message in failed["message"]
    [attempt] = status["attempts"]
    assert attempt["reason"] == failure.reason, "once: it is not tried again"
    assert attempt["endTime"] >= attempt["startTime"]
    assert attempt["message"]
    assert [run.info.status for run in mlflow.runs_of(release.training_run(name)["metadata"]["uid"])] == ["FAILED"]
    wait_for(lambda: not holding_gpus(release, name), what="the GPU being free", timeout_s=120)


def holding_gpus(release: Cluster, name: str) -> list[str]:
    """Pods of a run that the scheduler still counts."""
    pods = release.list("pods", f"training.heimdall.dev/run={name}")
    return [pod["metadata"]["name"] for pod in pods if pod["status"]["phase"] not in ("Failed", "Succeeded")]


FINISHED = {"Succeeded": {"steps": 2}, "Failed": {"fail": "configuration"}}


@pytest.mark.parametrize(("phase", "args"), FINISHED.items(), ids=FINISHED.keys())
def test_a_finished_run_never_trains_again(release: Cluster, name: str, phase: str, args: dict[str, Any]) -> None:
    release.apply(contract_run(name, **args))
    release.wait_for_phase(name, phase, timeout_s=LIFE_S)
    # Where its log is kept may still have been on its way.
    before = wait_for(
        lambda: "logs" in (status := release.status(name))["attempts"][0] and status,
        what="its log being kept",
        timeout_s=LIFE_S,
    )

    release.kubectl("delete", "job", f"{name}-a1")
    # Whatever the operator does about it, it has done when a later run is through.
    release.apply(contract_run(f"{name}-b", steps=1))
    release.wait_for_phase(f"{name}-b", "Succeeded", timeout_s=LIFE_S)
    release.kubectl("delete", "trainingrun", f"{name}-b")

    assert release.status(name) == before
    assert release.list("jobs", f"training.heimdall.dev/run={name}") == []


def test_the_same_manifest_applied_again_changes_nothing(release: Cluster, name: str) -> None:
    manifest = contract_run(name, steps=2)
    release.apply(manifest)
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    before = json.dumps(release.training_run(name)["status"], sort_keys=True)

    release.apply(manifest)

    assert json.dumps(release.training_run(name)["status"], sort_keys=True) == before
    assert release.training_run(name)["metadata"]["generation"] == 1


def test_fields_that_others_set_are_theirs(release: Cluster, name: str) -> None:
    """As a GitOps controller applies it, while somebody suspends it by hand: neither takes the other's field."""
    manifest = contract_run(name, spec=NOWHERE)
    apply = ("apply", "--server-side", "--field-manager=gitops", "-f", "-")
    release.kubectl(*apply, text=json.dumps(manifest))
    release.wait_for_phase(name, "Pending", timeout_s=LIFE_S)
    patch = ("patch", "trainingrun", name, "--type=merge", "--field-manager=human")
    release.kubectl(*patch, "-p", '{"spec": {"suspend": true}}')
    release.wait_for_phase(name, "Suspended", timeout_s=LIFE_S)

    release.kubectl(*apply, text=json.dumps(manifest))

    there = release.training_run(name)
    assert (there["spec"]["suspend"], there["metadata"]["generation"]) == (True, 2)
    managed = json.loads(release.kubectl("get", "trainingrun", name, "-o", "json", "--show-managed-fields"))
    owners: dict[str, set[str]] = {}
    for entry in managed["metadata"]["managedFields"]:
        owners.setdefault(entry["manager"], set()).update(entry["fieldsV1"])
    assert owners.keys() >= {"gitops", "human"}
    others = {manager: fields for manager, fields in owners.items() if manager not in ("gitops", "human")}
    assert others
    assert all(fields <= {"f:status", "f:metadata"} for fields in others.values()), others


def test_a_run_that_is_deleted_and_applied_again_is_a_new_one(release: Cluster, mlflow: Mlflow, name: str) -> None:
    """As somebody does who corrects a mistake: nothing of the old one's pods may be taken for the new one's."""
    release.apply(contract_run(name, fail="configuration"))
    first = release.wait_for_phase(name, "Failed", timeout_s=LIFE_S)

    release.kubectl("delete", "trainingrun", name, "--timeout=120s")
    release.apply(contract_run(name, steps=3))

    second = release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=LIFE_S)
    assert second["phase"] == "Succeeded", release.explain(name)
    assert second["runID"] != first["runID"]
    assert mlflow.client.get_run(first["runID"]).info.status == "FAILED"
