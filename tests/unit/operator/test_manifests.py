"""Whole manifests against golden files. `HEIMDALL_UPDATE_GOLDEN=1 pytest …` writes them anew: review the diff."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from heimdall_api.types import TrainingRun
from heimdall_operator.manifests import (
    CA_FILE,
    CA_VARIABLES,
    YOUNGER_FIELDS,
    AttemptPlan,
    CABundle,
    build_job,
    build_service,
    run_file,
)
from heimdall_operator.observe import NESTING_LIMIT, observe
from heimdall_operator.overrides import refusals
from heimdall_operator.own import CA_VOLUME
from tests.unit.operator.builders import UID, spec
from tests.unit.operator.fakes import DEFAULTS, STAMP

GOLDEN = Path(__file__).parent / "golden"

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "own-image-without-gpu": {
        "image": "registry.example/team/trainer:7",
        "resources": {"gpusPerWorker": 0, "cpu": "500m", "memory": "2Gi", "sharedMemory": "64Mi"},
    },
    "two-gpus": {"resources": {"gpusPerWorker": 2}},
    "three-workers": {"resources": {"workers": 3}},
    "pod-template": {
        "podTemplate": {
            "metadata": {"labels": {"team": "radio"}},
            "spec": {
                "priorityClassName": "batch",
                "nodeSelector": {"gpu": "h100"},
                "tolerations": [{"key": "gpu", "operator": "Exists"}],
                "containers": [
                    {
                        "name": "trainer",
                        "env": [{"name": "WANDB_MODE", "value": "offline"}],
                        "envFrom": [{"secretRef": {"name": "mine"}}],
                        "volumeMounts": [{"name": "data", "mountPath": "/data"}],
                    }
                ],
                "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
            },
        }
    },
}
QUEUE = (("kueue.x-k8s.io/queue-name", "team-queue"),)


def plan(queue_labels: tuple[tuple[str, str], ...] = (), memory: str | None = None, **more: Any) -> AttemptPlan:
    return AttemptPlan(
        name="run",
        namespace="team",
        uid=UID,
        spec=spec(**more),
        attempt=2,
        run_id="r1",
        memory=memory,
        queue_labels=queue_labels,
    )


@pytest.mark.parametrize("case", CASES)
def test_the_job_is_the_golden_one(case: str) -> None:
    job = build_job(plan(**CASES[case]), DEFAULTS)
    file = GOLDEN / f"{case}.yaml"
    text = yaml.safe_dump(job, sort_keys=False, width=120)
    if os.environ.get("HEIMDALL_UPDATE_GOLDEN"):
        file.write_text(text)

    assert text == file.read_text()


def test_the_run_file_is_a_training_run_with_all_defaults() -> None:
    job = build_job(plan(), DEFAULTS)
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    document = json.loads(annotations["training.heimdall.dev/run-file"])

    assert TrainingRun.model_validate(document).metadata.uid == UID
    assert document["spec"]["training"]["epochs"] == 100


@pytest.mark.parametrize(
    ("is_secret", "source"),
    [
        (False, {"configMap": {"name": "trusted", "items": [{"key": "root.pem", "path": "ca.crt"}]}}),
        (True, {"secret": {"secretName": "trusted", "items": [{"key": "root.pem", "path": "ca.crt"}]}}),
    ],
)
def test_a_training_pod_is_given_the_authorities_of_private_servers(is_secret: bool, source: dict[str, Any]) -> None:
    defaults = replace(DEFAULTS, ca=CABundle(name="trusted", key="root.pem", is_secret=is_secret))

    pod = build_job(plan(), defaults)["spec"]["template"]["spec"]

    assert {"name": CA_VOLUME, **source} in pod["volumes"]
    container = pod["containers"][0]
    mount = next(item for item in container["volumeMounts"] if item["name"] == CA_VOLUME)
    assert (mount["mountPath"], mount["readOnly"]) == (str(Path(CA_FILE).parent), True)
    assert {item["name"] for item in container["env"] if item.get("value") == CA_FILE} == set(CA_VARIABLES)


def test_every_part_of_the_pod_is_kept_from_pod_templates() -> None:
    """What is missed there would be merged by name: into a ConfigMap's place, another one."""
    whole = replace(DEFAULTS, ca=CABundle(name="trusted", key="root.pem", is_secret=False))
    pod = build_job(plan(resources={"workers": 2}), whole)["spec"]["template"]["spec"]
    container = pod["containers"][0]

    volumes = refusals({"spec": {"volumes": [{"name": volume["name"], "emptyDir": {}} for volume in pod["volumes"]]}})
    mine = [{"name": "mine", "mountPath": mount["mountPath"]} for mount in container["volumeMounts"]]
    mounts = refusals({"spec": {"containers": [{"name": "trainer", "volumeMounts": mine}]}})
    resources = refusals({"spec": {"containers": [{"name": "trainer", "resources": container["resources"]}]}})

    assert [len(volumes), len(mounts)] == [len(pod["volumes"]), len(container["volumeMounts"])]
    assert len(resources) == sum(map(len, container["resources"].values()))


def test_an_image_of_an_earlier_release_is_told_only_of_what_it_knows() -> None:
    """A team's image, built on an earlier trainer, refuses fields that it does not know."""
    plain = json.loads(run_file(plan()))["spec"]
    asked = json.loads(run_file(plan(export={"onnx": True}, data={"arrivals": True})))["spec"]

    assert {*plain, *plain["data"]} & {path[-1] for path in YOUNGER_FIELDS} == set()
    assert (asked["export"], asked["data"]["arrivals"]) == ({"onnx": True}, True)


@pytest.mark.parametrize(
    ("cpu", "gpus", "threads"), [(4, 0, 4), ("4", 1, 4), ("7", 2, 3), ("500m", 1, 1), ("3", 8, 1), ("1e3", 1, 1000)]
)
def test_a_process_computes_with_its_share_of_the_processors(cpu: int | str, gpus: int, threads: int) -> None:
    job = build_job(plan(resources={"cpu": cpu, "gpusPerWorker": gpus}), DEFAULTS)
    container = job["spec"]["template"]["spec"]["containers"][0]

    assert {"name": "OMP_NUM_THREADS", "value": str(threads)} in container["env"]


def test_another_number_of_threads_may_be_asked_for() -> None:
    wanted = {"name": "OMP_NUM_THREADS", "value": "16"}
    template = {"spec": {"containers": [{"name": "trainer", "env": [wanted]}]}}
    container = build_job(plan(podTemplate=template), DEFAULTS)["spec"]["template"]["spec"]["containers"][0]

    assert [item for item in container["env"] if item["name"] == wanted["name"]] == [wanted]


@pytest.mark.parametrize("kind", ["containers", "initContainers"])
def test_a_container_of_the_user_s_has_no_privileges_either(kind: str) -> None:
    """A namespace of restricted Pod Security would take no pod of the Job."""
    template = {"spec": {kind: [{"name": "side", "image": "x", "securityContext": {"runAsUser": 7}}]}}
    made = build_job(plan(podTemplate=template), DEFAULTS)["spec"]["template"]["spec"]

    (side,) = [container for container in made[kind] if container["name"] == "side"]
    assert side["securityContext"] == {
        "runAsUser": 7,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_queued_job_waits_for_its_queue() -> None:
    job = build_job(plan(queue_labels=QUEUE), DEFAULTS)

    assert job["spec"]["suspend"] is True
    assert dict(QUEUE).items() <= job["metadata"]["labels"].items()


def test_a_priority_without_a_queue_suspends_nothing() -> None:
    job = build_job(plan(queue_labels=(("kueue.x-k8s.io/priority-class", "high"),)), DEFAULTS)

    assert "suspend" not in job["spec"]


def test_grown_memory_is_request_and_limit() -> None:
    container = build_job(plan(memory="24Gi"), DEFAULTS)["spec"]["template"]["spec"]["containers"][0]

    assert container["resources"]["requests"]["memory"] == container["resources"]["limits"]["memory"] == "24Gi"


def test_workers_find_each_other_by_a_headless_service() -> None:
    service = build_service(name="run", namespace="team", uid=UID)
    pod = build_job(plan(resources={"workers": 2}), DEFAULTS)["spec"]["template"]
    environment = {item["name"]: item.get("value") for item in pod["spec"]["containers"][0]["env"]}

    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert pod["spec"]["subdomain"] == service["metadata"]["name"]
    assert environment["PET_MASTER_ADDR"] == f"run-a2-0.{service['metadata']['name']}"
    assert service["metadata"]["ownerReferences"][0]["uid"] == UID


@pytest.mark.parametrize(("own", "told"), [({}, 60), ({"terminationGracePeriodSeconds": 600}, 600)])
def test_the_trainer_is_told_how_long_its_pod_has_to_end(own: dict[str, Any], told: int) -> None:
    plan = AttemptPlan(
        name="run", namespace="team", uid=UID, spec=spec(podTemplate={"spec": own}), attempt=1, run_id="r1"
    )
    pod = build_job(plan, DEFAULTS)["spec"]["template"]["spec"]
    environment = {item["name"]: item.get("value") for item in pod["containers"][0]["env"]}
    assert (pod["terminationGracePeriodSeconds"], environment["HEIMDALL_GRACE_PERIOD_S"]) == (told, str(told))


def test_a_job_can_be_built_of_whatever_is_not_nested_too_deeply() -> None:
    args: dict[str, Any] = {}
    for _ in range(NESTING_LIMIT - 3):
        args = {"a": args}
    raw = {"model": {"module": "team.model:Net", "args": args}, "podTemplate": {"spec": {"a": args["a"]}}}
    resource = {"metadata": {"name": "run", "namespace": "team", "uid": UID, "creationTimestamp": STAMP}, "spec": raw}
    seen = observe(resource)
    assert seen.spec is not None

    plan = AttemptPlan(name="run", namespace="team", uid=UID, spec=seen.spec, attempt=1, run_id="r1")

    assert refusals(seen.spec.pod_template) == []
    assert json.loads(run_file(plan))["spec"]["model"]["args"] == args
    assert build_job(plan, DEFAULTS)["spec"]["template"]["spec"]["a"] == args["a"]
