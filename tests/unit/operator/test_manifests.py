"""Whole manifests against golden files. `HEIMDALL_UPDATE_GOLDEN=1 pytest …` writes them anew: review the diff."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from heimdall_api.types import TrainingRun
from heimdall_operator.manifests import build_job
from tests.unit.operator.builders import UID, spec
from tests.unit.operator.fakes import DEFAULTS

GOLDEN = Path(__file__).parent / "golden"

CASES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "own-image-without-gpu": {
        "image": "registry.example/team/trainer:7",
        "resources": {"gpusPerWorker": 0, "cpu": "500m", "memory": "2Gi", "sharedMemory": "64Mi"},
    },
    "two-gpus": {"resources": {"gpusPerWorker": 2}},
}


@pytest.mark.parametrize("case", CASES)
def test_the_job_is_the_golden_one(case: str) -> None:
    job = build_job(
        name="run", namespace="team", uid=UID, spec=spec(**CASES[case]), attempt=2, run_id="r1", defaults=DEFAULTS
    )
    file = GOLDEN / f"{case}.yaml"
    text = yaml.safe_dump(job, sort_keys=False, width=120)
    if os.environ.get("HEIMDALL_UPDATE_GOLDEN"):
        file.write_text(text)

    assert text == file.read_text()


def test_the_run_file_is_a_training_run_with_all_defaults() -> None:
    job = build_job(name="run", namespace="team", uid=UID, spec=spec(), attempt=1, run_id="r1", defaults=DEFAULTS)
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    document = json.loads(annotations["training.heimdall.dev/run-file"])

    assert TrainingRun.model_validate(document).metadata.uid == UID
    assert document["spec"]["training"]["epochs"] == 100
