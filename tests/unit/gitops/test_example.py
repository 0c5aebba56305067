"""The example of a repository: what Argo CD and Flux would apply of it can be trained."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import yaml

from heimdall_trainer.config import parse
from tests.programs import program
from tests.unit.gitops.test_health import GITOPS, TIMEOUT_S, violations

EXAMPLE = GITOPS / "example"
PAGE = GITOPS.parents[1] / "docs/gitops.md"


@pytest.fixture(scope="module")
def rendered() -> list[dict[str, Any]]:
    command = [program("kubectl", "kubernetes"), "kustomize", str(EXAMPLE / "runs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_every_run_can_be_trained(rendered: list[dict[str, Any]]) -> None:
    runs = [item for item in rendered if item["kind"] == "TrainingRun"]
    assert len(runs) == 2
    for run in runs:
        assert violations(run) == []
        assert parse(run).metadata.name == run["metadata"]["name"]
        assert "suspend" not in run["spec"], "it is for humans and schedulers"


def test_a_run_lies_in_a_file_of_its_name() -> None:
    files = {path: yaml.safe_load(path.read_text()) for path in (EXAMPLE / "runs").glob("*.yaml")}
    runs = {path.stem: item["metadata"]["name"] for path, item in files.items() if item["kind"] == "TrainingRun"}
    assert all(file == name for file, name in runs.items())
    (listed,) = [item["resources"] for item in files.values() if item["kind"] == "Kustomization"]
    assert set(listed) == {path.name for path in files} - {"kustomization.yaml"}, "what is not listed is not applied"


def test_argo_cd_and_flux_apply_it_where_it_says(rendered: list[dict[str, Any]]) -> None:
    (namespace,) = [item["metadata"]["name"] for item in rendered if item["kind"] == "Namespace"]
    assert {item["metadata"]["namespace"] for item in rendered if item["kind"] == "TrainingRun"} == {namespace}
    application = yaml.safe_load((GITOPS / "argocd/application.yaml").read_text())["spec"]
    kustomization = yaml.safe_load((GITOPS / "flux/kustomization.yaml").read_text())["spec"]
    assert (application["source"]["path"], application["destination"]["namespace"]) == ("runs", namespace)
    assert (kustomization["path"], kustomization["targetNamespace"]) == ("./runs", namespace)


def test_flux_does_not_wait_for_trainings_before_it_applies_the_next_run() -> None:
    assert yaml.safe_load((GITOPS / "flux/kustomization.yaml").read_text())["spec"]["wait"] is False


def test_the_page_shows_its_files() -> None:
    (tree,) = re.findall(r"^```\ntraining/.*?^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    shown = set(re.findall(r"[├└]── ([\w.-]+\w)(?!/)\b", tree))
    assert shown == {path.name for path in EXAMPLE.rglob("*") if path.is_file()}
