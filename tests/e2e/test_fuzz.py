"""Generated specs, valid and not: each is refused by the API server, or fails with a reason, or trains.

`HEIMDALL_FUZZ_SPECS=1000 pytest tests/e2e/test_fuzz.py` (`make fuzz`) for the long form; the seed is printed.
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from typing import Any

import pytest

from heimdall_api.types import NAME_LIMIT
from tests.e2e.chaos.checks import mistakes_counted, mistakes_said
from tests.e2e.cluster import Cluster, condition, wait_for
from tests.e2e.conftest import contract_run, kill_operator, namespace, scraped

SPECS = int(os.environ.get("HEIMDALL_FUZZ_SPECS", "120"))
SEED = int(os.environ.get("HEIMDALL_FUZZ_SEED", "7"))
LIFE_S = 240.0
SETTLE_S = 60 + 3.0 * SPECS
TRAINED_SHARE = 0.03
LABEL = "heimdall-e2e/fuzz"
WORDS = ["", "a", "9", "ü" * 40, "💥", "x" * 300, "../../etc/passwd", "{{.}}", "$(id)", "'; --", "\n\t", " ", "null"]
NUMBERS = [0, 1, -1, 2, 7, 64, 65, 1000, 1001, 2**31, 2**63 - 1, -(2**63), 0.5, 1e-9, 1e18, 3.7]
QUANTITIES = ["1", "10m", "64Mi", "-1", "0", "1e3", "1Ki", "lots", "", "\u0661", "1.5Gi", "9" * 30, 1, 0, -5]
NAMES = ["a", "a-b", "x" * 45, "x" * 52, "x" * 53, "9a", "A", "a.b", "a_b", "-a", "a-"]


def deep(rng: random.Random, levels: int) -> Any:
    return {rng.choice(["spec", "a", "env", "containers"]): deep(rng, levels - 1)} if levels else rng.choice(WORDS)


def value(rng: random.Random) -> Any:
    return rng.choice([*WORDS, *NUMBERS, *QUANTITIES, None, True, [], {}, [1], {"a": 1}, deep(rng, 15)])


def mutated(rng: random.Random, spec: dict[str, Any]) -> None:
    """Put something else in some place of a spec."""
    fields: dict[str, list[str]] = {
        "": ["suspend", "image", "pendingDeadlineSeconds", "activeDeadlineSeconds", "stallTimeoutSeconds", "nonsense"],
        "model": ["backbone", "module", "args", "pretrained"],
        "data": ["validationFraction", "testFraction", "module", "sessions"],
        "training": ["epochs", "batchSize", "learningRate", "precision", "seed", "earlyStopping", "checkpoints"],
        "resources": ["workers", "gpusPerWorker", "cpu", "memory", "sharedMemory"],
        "tracking": ["experiment", "runName", "tags"],
        "registration": ["model", "aliases", "promotion"],
        "retries": ["limit", "memoryGrowth"],
        "podTemplate": ["metadata", "spec", "x"],
    }
    part = rng.choice(sorted(fields))
    target = spec if part == "" else spec.setdefault(part, {})
    if isinstance(target, dict):
        target[rng.choice(fields[part])] = value(rng)
    if rng.random() < 0.1:
        spec[rng.choice(sorted(fields)[1:])] = value(rng)


def generated(rng: random.Random, number: int) -> dict[str, Any]:
    name = f"fuzz-{number}" if rng.random() < 0.85 else f"{rng.choice(NAMES)}{number}"
    if rng.random() < 0.05:
        name = f"{number}".rjust(NAME_LIMIT - 1, "x").rjust(NAME_LIMIT, "l")  # as long as a name may be
    spec: dict[str, Any] = {
        "image": "heimdall/contract:dev",
        "model": {"module": "contract:Script", "args": {"steps": 2}},
        "resources": {"gpusPerWorker": 0, "cpu": "10m", "memory": "256Mi", "sharedMemory": "16Mi"},
        "pendingDeadlineSeconds": 2,
        "retries": {"limit": 0},
    }
    if rng.random() < TRAINED_SHARE:
        spec["pendingDeadlineSeconds"] = 120
    else:
        # No node has this label: what is tried is the way to the pod, not the pod.
        spec["podTemplate"] = {"spec": {"nodeSelector": {"nowhere": "at-all"}}}
    if number == 0:  # one is as it should be
        return resource("fuzz-0", {**spec, "pendingDeadlineSeconds": 120, "podTemplate": {}})
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        mutated(rng, spec)
    return resource(name, spec)


def resource(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    return {
        "apiVersion": "training.heimdall.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name, "labels": {LABEL: "yes"}},
        "spec": spec,
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_every_spec_is_refused_or_fails_with_a_reason_or_trains(
    release: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from kubernetes import client, config
    from kubernetes.client.exceptions import ApiException

    api = client.CustomObjectsApi(config.new_client_from_config(release.env["KUBECONFIG"]))
    rng = random.Random(SEED)
    outcomes: Counter[str] = Counter()
    place = ("training.heimdall.dev", "v1alpha1", release.namespace, "trainingruns")
    # Those before may have had MLflow or the API server taken away; whoever did it has looked at the log.
    before, lives = mistakes(release), restarts(release)

    def create(body: dict[str, Any]) -> ApiException | None:
        try:
            api.create_namespaced_custom_object(*place, body)
        except ApiException as error:
            return error
        return None

    try:
        for number in range(SPECS):
            refusal = create(generated(rng, number))
            if refusal is not None:
                assert refusal.status in (400, 422), refusal
                assert len(json.loads(refusal.body)["message"]) > 20, "a message that a person can act on"
                outcomes["refused by the API server"] += 1

        def unsettled() -> list[str]:
            items = api.list_namespaced_custom_object(*place, label_selector=f"{LABEL}=yes")["items"]
            return [item["metadata"]["name"] for item in items if not settled(item)]

        wait_for(
            lambda: not unsettled(), what="the end of every run", timeout_s=SETTLE_S, tell=lambda: str(unsettled())
        )
        for item in api.list_namespaced_custom_object(*place, label_selector=f"{LABEL}=yes")["items"]:
            status = item["status"]
            failed = condition(status, "Failed")
            outcomes[failed.get("reason", status["phase"])] += 1
            if status["phase"] == "Failed":
                assert len(failed["message"]) > 20, failed
    finally:
        release.kubectl("delete", "trainingruns", "-l", f"{LABEL}=yes", "--timeout=250s")

    print(f"\nseed {SEED}, {SPECS} specs: {dict(outcomes)}")
    assert restarts(release) == lives, "an operator that crashed has lost its log"
    assert mistakes(release) == before
    assert outcomes["Succeeded"] > 0
    assert outcomes["refused by the API server"] > 0
    assert outcomes["Unschedulable"] > 0
    assert outcomes["InvalidConfiguration"] > 0


def test_a_run_that_is_nested_too_deeply_fails_alone(release: Cluster, name: str) -> None:
    """Every listing and every watch brings it with all the others."""
    levels, field = 3000, ("trainingrun", name, "-o")
    whole = json.dumps(contract_run(name, spec={"podTemplate": {"spec": "HERE"}}))
    deep = whole.replace('"HERE"', '{"a": ' * levels + "0" + "}" * levels)
    with namespace(release, "deep") as other:
        other.kubectl("create", "-f", "-", text=deep)
        kill_operator(release)
        release.apply(contract_run(name, steps=3))

        release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
        # As JSON it is nothing for this process to read.
        wait_for(
            lambda: other.kubectl("get", *field, "jsonpath={.status.phase}") == "Failed",
            what="its failure",
            timeout_s=LIFE_S,
        )
        message = other.kubectl("get", *field, "jsonpath={.status.conditions[?(@.type=='Failed')].message}")
    assert "nested more than 200 levels deep" in message


def settled(item: dict[str, Any]) -> bool:
    return (item.get("status") or {}).get("phase") in ("Succeeded", "Failed", "Suspended")


def restarts(release: Cluster) -> dict[str, int]:
    """How often the operator's container was started again, by pod."""
    pods = release.list("pods", "app.kubernetes.io/component=operator")
    return {pod["metadata"]["name"]: pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods}


def mistakes(release: Cluster) -> tuple[list[str], Counter[str]]:
    """What the operator has said and counted of mistakes of its own."""
    log = release.kubectl("logs", "deployment/heimdall-operator", "--tail=-1")
    return mistakes_said(log), mistakes_counted(scraped(release))
