"""Argo CD's and Flux's health of a TrainingRun in every phase, by a Lua and a CEL engine over recorded resources.

`HEIMDALL_UPDATE_GOLDEN=1 pytest …` records the resources anew: review the diff.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.helm import ROOT
from tests.unit.gitops.record import PHASES

RECORDED = Path(__file__).parent / "recorded"
GITOPS = ROOT / "manifests/gitops"
HEALTH_KEY = "resource.customizations.health.training.heimdall.dev_TrainingRun"
EXPECTED = {
    # phase: (Argo CD, a part of its message, Flux)
    "new": ("Progressing", "Waiting for the operator", "InProgress"),
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


# --- Argo CD -----------------------------------------------------------------------------------------------------


def argo_health(resource: dict[str, Any]) -> tuple[str, str]:
    """What Argo CD does: the resource is the global `obj`, the script returns a table."""
    from lupa import lua51  # the language of Argo CD's own engine (gopher-lua)

    runtime = lua51.LuaRuntime(unpack_returned_tuples=True)
    for name in ("os", "io", "require", "dofile", "loadfile", "debug", "package"):
        runtime.globals()[name] = None  # Argo CD gives scripts none of these
    runtime.globals()["obj"] = runtime.table_from(resource, recursive=True)
    health = runtime.execute((GITOPS / "argocd/health.lua").read_text())
    return health["status"], health["message"]


def test_argo_cd_tells_the_health_of_every_phase(phase: str) -> None:
    status, said, _ = EXPECTED[phase]
    found, message = argo_health(recorded(phase))
    assert (found, said in message) == (status, True), message
    assert message


def test_the_config_map_holds_the_script_word_for_word() -> None:
    config = yaml.safe_load((GITOPS / "argocd/argocd-cm.yaml").read_text())
    assert config["data"][HEALTH_KEY] == (GITOPS / "argocd/health.lua").read_text()


# --- Flux --------------------------------------------------------------------------------------------------------


def flux_health(resource: dict[str, Any]) -> str:
    """What Flux does (its RFC 0009): first the generation, then inProgress, failed, current; an error is waited out."""
    from cel_expr_python import cel

    kustomization = yaml.safe_load((GITOPS / "flux/kustomization.yaml").read_text())
    (checks,) = kustomization["spec"]["healthCheckExprs"]
    assert (checks["apiVersion"], checks["kind"]) == (resource["apiVersion"], resource["kind"])
    seen = resource.get("status", {}).get("observedGeneration")
    if seen is not None and seen != resource["metadata"]["generation"]:
        return "InProgress"
    for name, health in (("inProgress", "InProgress"), ("failed", "Failed"), ("current", "Current")):
        value = cel.NewEnv().compile(checks[name], True).eval(data=resource)
        if value.type().name() == "ERROR":
            assert "status" not in resource, f"{name}: {value.plain_value()}"
            return "InProgress"
        if value.plain_value() is True:
            return health
    return "InProgress"


def test_flux_tells_the_health_of_every_phase(phase: str) -> None:
    assert flux_health(recorded(phase)) == EXPECTED[phase][2]
