"""Rules of the resource, shown to a real API server: the message that a user gets is asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import contract_run

pytestmark = pytest.mark.beside

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative cpu": (
        {"resources": {"cpu": "-2"}},
        'spec.resources.cpu: Invalid value: "-2": must be a positive quantity',
    ),
    "memory that is none": ({"resources": {"memory": "lots"}}, "must be a positive quantity such as 500m, 4 or 16Gi"),
    "backbone and module": ({"model": {"backbone": "a", "module": "b:C"}}, "set either backbone"),
    "args without module": ({"model": {"args": {"a": 1}}}, "args are the arguments of module: set module too"),
    "no import path": (
        {"model": {"module": "nonsense"}},
        "must be an import path of the form package.module:ClassName",
    ),
    "nothing left to train on": (
        {"data": {"validationFraction": 0.6, "testFraction": 0.5}},
        "keep their sum below 1",
    ),
    "no epochs": ({"training": {"epochs": 0}}, "spec.training.epochs in body should be greater than or equal to 1"),
    "an unknown loss": ({"training": {"loss": "l7"}}, 'supported values: "gaussian", "huber", "quantile"'),
    "a misspelt field": ({"trainings": {}}, 'unknown field "spec.trainings"'),
    "an alias that MLflow keeps to itself": (
        {"registration": {"model": "m", "aliases": ["latest"]}},
        "neither latest nor like v7 (MLflow's own)",
    ),
    "a tag that MLflow refuses": ({"tracking": {"tags": {"team@x": "rf"}}}, "names must be letters, digits"),
    "data args without module": ({"data": {"args": {"a": 1}}}, "args are the arguments of module: set module too"),
    "memory that does not grow": ({"retries": {"memoryGrowth": {"max": "1Gi", "factor": 1}}}, "greater than 1"),
    "a model name with a slash": ({"registration": {"model": "a/b"}}, "must not contain '/' or ':'"),
}


def resource(name: str, spec: dict[str, Any]) -> str:
    return json.dumps(
        {
            "apiVersion": "training.heimdall.dev/v1alpha1",
            "kind": "TrainingRun",
            "metadata": {"name": name},
            "spec": spec,
        }
    )


@pytest.mark.parametrize(("spec", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_spec_that_can_never_work_is_refused(release: Cluster, spec: dict[str, Any], message: str) -> None:
    assert message in release.refused("apply", "-f", "-", text=resource("refused", spec))


@pytest.mark.parametrize("name", ["9lives", "a" * 53, "dots.are.not.for.jobs"])
def test_a_name_that_no_job_can_have_is_refused(release: Cluster, name: str) -> None:
    said = release.refused("apply", "-f", "-", text=resource(name, {}))

    assert "metadata.name becomes the name of Jobs and Pods" in said


def test_what_defines_the_training_is_immutable(release: Cluster, name: str) -> None:
    run = contract_run(name, spec={"suspend": True}, steps=1)
    release.apply(run)
    changes: list[dict[str, Any]] = [
        {"training": {"epochs": 7}},
        {"model": {"args": {"steps": 2}}},
        {"resources": {"memory": "1Gi"}},
        {"registration": None},
        {"data": {"validationFraction": 0.3}},
        {"tracking": {"runName": "another"}},
        {"podTemplate": {"spec": {"nodeSelector": {"a": "b"}}}},
        {"image": "other"},
        {"export": {"onnx": True}},
    ]
    for change in changes:
        said = release.refused("patch", "trainingrun", name, "--type=merge", "-p", json.dumps({"spec": change}))
        assert "create a new TrainingRun instead" in said

    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"activeDeadlineSeconds": 60}}')


def test_defaults_are_filled_in(release: Cluster, name: str) -> None:
    release.kubectl("apply", "-f", "-", text=resource(name, {"suspend": True}))

    spec = release.training_run(name)["spec"]

    assert spec["training"]["epochs"] == 100
    assert spec["resources"] == {
        "workers": 1,
        "cpu": "4",
        "memory": "16Gi",
        "gpusPerWorker": 1,
        "sharedMemory": "1Gi",
    }


def test_explain_and_columns_read_well(release: Cluster, name: str) -> None:
    explained = release.kubectl("explain", "trainingrun.spec")
    assert "What becomes of the trained model" in explained
    assert "<no description>" not in explained

    release.apply(contract_run(name, spec={"suspend": True}))
    header = release.kubectl("get", "tr", name).splitlines()[0].split()
    assert header == ["NAME", "PHASE", "PROGRESS", "ATTEMPTS", "GPUS", "RUN-ID", "MODEL-VERSION", "AGE"]

    release.wait_for_phase(name, "Suspended", timeout_s=60)
    wide = [line.split() for line in release.kubectl("get", "tr", name, "-o", "wide").splitlines()]
    assert (wide[0][-2:], wide[1][-1]) == (["JOB", "REASON"], "Suspended")
    assert "Suspended by spec.suspend" in release.kubectl("describe", "trainingrun", name)


def test_the_column_of_gpus_counts_those_of_all_workers(release: Cluster, name: str) -> None:
    """More than there are, so that nothing of it trains."""
    resources = {"workers": 3, "gpusPerWorker": 9, "cpu": "20m", "memory": "64Mi", "sharedMemory": "16Mi"}
    release.apply(contract_run(name, spec={"resources": resources}))
    wait_for(
        lambda: "runID" in release.status(name),
        what="its MLflow run",
        timeout_s=60,
        tell=lambda: release.explain(name),
    )

    header, row = release.kubectl("get", "trainingrun", name).splitlines()
    assert row[header.index("GPUS") :].split()[0] == "27"
