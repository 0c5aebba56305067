"""What the operator says of itself, as long as it is not replaced: its metrics and its log."""

from __future__ import annotations

import json
import re
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import contract_run, operator_setting, scraped

LIFE_S = 240.0
WRITES = Counter({"PATCH trainingruns": 2, "PATCH trainingruns/status": 3, "POST jobs": 1})
"""Of one life, without Events: the finalizer, the run's ID, the Job, where its pod runs, how it ended, and the
finalizer's end."""
EVENTS = "POST events"
LIVES = 3
"""A machine with much else to do makes more of one: what a pod waits for after ten seconds is written too."""


def test_metrics_and_logs_tell_of_the_run(release: Cluster, name: str) -> None:
    release.apply(contract_run(name, steps=2))
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    uid = release.training_run(name)["metadata"]["uid"]

    text = scraped(release)
    lines = release.kubectl("logs", "deployment/heimdall-operator", "--tail=-1").splitlines()

    for metric in (
        'heimdall_trainingruns{phase="Succeeded",reason="Completed"}',
        'heimdall_attempts_total{reason="Completed"}',
        "heimdall_reconcile_seconds_bucket",
        'heimdall_mlflow_seconds_count{call="register"}',
        "heimdall_queue_depth",
    ):
        assert metric in text
    # Without labels they are there from the beginning.
    for timed in ("heimdall_job_seconds_count", "heimdall_first_step_seconds_count"):
        assert re.search(rf"^{timed} [1-9]", text, re.MULTILINE), timed
    said = [json.loads(line) for line in lines]
    assert [line for line in said if "trainingrun" in line and not (line.get("namespace") and line.get("uid"))] == []
    about = [line for line in said if name in json.dumps(line)]
    assert "acting" in {line["event"] for line in about}
    wanted = {"namespace": release.namespace, "trainingrun": name, "uid": uid}
    assert [line for line in about if not wanted.items() <= line.items()] == []


def test_a_life_takes_few_writes(release: Cluster, name: str) -> None:
    lives = []
    # How often progress is written is a matter of time: here it is not read.
    with operator_setting(release, "PROGRESS_SECONDS", "3600"):
        while len(lives) < LIVES and WRITES not in lives:
            made = writes_of_a_life(release, name)
            events = made.pop(EVENTS, 0)
            print(f"writes of one life: {made.total()} {dict(made)}, and {events} Events")
            lives.append(made)

    assert WRITES in lives


def writes_of_a_life(release: Cluster, name: str) -> Counter[str]:
    """What the operator writes from a TrainingRun's creation until it has let go of it."""
    before = writes(release)
    release.apply(contract_run(name, steps=2))
    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    wait_for(
        lambda: "finalizers" not in release.training_run(name)["metadata"], what="the finalizer's end", timeout_s=30
    )
    made = writes(release) - before
    release.kubectl("delete", "trainingrun", name, "--timeout=120s")
    return made


def writes(release: Cluster) -> Counter[str]:
    """What the operator has written to the API server since it started."""
    samples = (item for family in text_string_to_metric_families(scraped(release)) for item in family.samples)
    return Counter(
        {
            f"{item.labels['verb']} {item.labels['resource']}": int(item.value)
            for item in samples
            if item.name == "heimdall_api_writes_total"
        }
    )
