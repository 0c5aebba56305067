"""Argo CD's and Flux's health of a TrainingRun in every phase, by their own engines over recorded resources.

`HEIMDALL_UPDATE_GOLDEN=1 pytest …` records the resources anew: review the diff.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tests.e2e.chart.openapi import closed
from tests.programs import program
from tests.unit.chart.helm import ROOT
from tests.unit.gitops.record import PHASES

RECORDED = Path(__file__).parent / "recorded"
GITOPS = ROOT / "manifests/gitops"
HEALTH_LUA = GITOPS / "argocd/health.lua"
KUSTOMIZATION = GITOPS / "flux/kustomization.yaml"
TIMEOUT_S = 60
Verdicts = dict[str, dict[str, dict[str, str]]]
HEALTH_KEY = "resource.customizations.health.training.heimdall.dev_TrainingRun"
EXPECTED = {
    # phase: (Argo CD, a part of its message, Flux)
    "new": ("Progressing", "Waiting for the operator", "Unknown"),  # Flux waits until the expressions say something
    "waiting-for-mlflow": ("Progressing", "MLflow", "InProgress"),
    "pending": ("Progressing", "", "InProgress"),
    "running": ("Progressing", "Training", "InProgress"),
    "between-attempts": ("Progressing", "", "InProgress"),
    "suspended": ("Suspended", "", "InProgress"),
    "resumed-and-not-yet-seen": ("Progressing", "Waiting for the operator", "InProgress"),
    "succeeded": ("Healthy", "", "Current"),
    "succeeded-and-changed": ("Healthy", "", "Current"),
    "failed": ("Degraded", "UserError: boom", "Failed"),
    "being-deleted": ("Progressing", "being deleted", "InProgress"),
}


@pytest.fixture(params=PHASES)
def phase(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def recorded(phase: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECORDED / f"{phase}.yaml").read_text())
    return loaded


def test_the_operator_leaves_what_was_recorded(phase: str) -> None:
    file = RECORDED / f"{phase}.yaml"
    text = yaml.safe_dump(PHASES[phase]().resource, sort_keys=False, width=120)
    if os.environ.get("HEIMDALL_UPDATE_GOLDEN"):
        file.write_text(text)
    assert file.read_text() == text, "the operator writes another status: HEIMDALL_UPDATE_GOLDEN=1, and review the diff"


def test_every_phase_is_recorded() -> None:
    assert {path.stem for path in RECORDED.glob("*.yaml")} == set(PHASES) == set(EXPECTED)
    phases = {recorded(name).get("status", {}).get("phase") for name in PHASES}
    assert phases == {None, "Pending", "Suspended", "Running", "Succeeded", "Failed"}


def violations(resource: dict[str, Any]) -> list[str]:
    """What the API server would refuse of a TrainingRun, or drop, by the schema of its definition."""
    (version,) = yaml.safe_load((ROOT / "manifests/crd/trainingruns.yaml").read_text())["spec"]["versions"]
    schema = closed(version["schema"]["openAPIV3Schema"])
    # The bounds of OpenAPI 3.0 are those of this draft.
    found = jsonschema.Draft4Validator(schema).iter_errors(resource)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def test_what_was_recorded_is_what_a_cluster_would_keep(phase: str) -> None:
    """The operator's stand-ins take every status; a field that the definition lacks is gone in a cluster."""
    assert violations(recorded(phase)) == []


def test_what_a_cluster_would_not_keep_is_seen() -> None:
    resource = recorded("running")
    resource["status"] |= {"phase": "Walking", "mood": "good"}
    resource["spec"]["data"] = {"validationFraction": 1}
    found = {text.partition(":")[0] for text in violations(resource)}
    assert found == {"spec.data.validationFraction", "status", "status.phase"}


@pytest.fixture(scope="module")
def verdicts() -> Verdicts:
    """What the engines take the recorded resources for, by phase and engine."""
    files = [str(RECORDED / f"{name}.yaml") for name in PHASES]
    command = [program("gitops-health"), str(HEALTH_LUA), str(KUSTOMIZATION), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return {Path(file).stem: verdict for file, verdict in json.loads(done.stdout).items()}


def test_argo_cd_tells_the_health_of_every_phase(phase: str, verdicts: Verdicts) -> None:
    status, said, _ = EXPECTED[phase]
    found = verdicts[phase]["argo"]
    assert (found["status"], said in found["message"]) == (status, True), found
    assert found["message"]


def test_argo_cds_own_package_says_the_same(verdicts: Verdicts) -> None:
    """It takes minutes to build, so that `make argo` does."""
    resources = json.dumps([recorded(name) for name in PHASES])
    command = [program("argo-health"), str(HEALTH_LUA)]
    done = subprocess.run(command, input=resources, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    found = dict(zip(PHASES, json.loads(done.stdout), strict=True))
    assert found == {name: verdict["argo"] for name, verdict in verdicts.items()}


def test_flux_tells_the_health_of_every_phase(phase: str, verdicts: Verdicts) -> None:
    found = verdicts[phase]["flux"]
    assert found["status"] == EXPECTED[phase][2], found


def test_the_config_map_holds_the_script_word_for_word() -> None:
    config = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text())
    assert config["data"][HEALTH_KEY] == HEALTH_LUA.read_text()
