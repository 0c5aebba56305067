"""The examples of the chart from Git: what Argo CD and Flux would make of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.helm import ROOT, helm
from tests.unit.gitops.test_health import GITOPS


def of_kind(file: Path, kind: str) -> dict[str, Any]:
    (found,) = [item for item in yaml.safe_load_all(file.read_text()) if item["kind"] == kind]
    spec: dict[str, Any] = found["spec"]
    return spec


ARGO_CD = of_kind(GITOPS / "argocd/chart.yaml", "Application")
FLUX = of_kind(GITOPS / "flux/chart.yaml", "HelmRelease")
VALUES = {"argocd": ARGO_CD["source"]["helm"]["valuesObject"], "flux": FLUX["values"]}


def rendered(values: dict[str, Any], folder: Path) -> str:
    file = folder / "values.yaml"
    file.write_text(json.dumps(values))
    done = helm("template", "heimdall", str(ROOT / "charts/heimdall"), "-n", "heimdall", "-f", str(file))
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_the_chart_takes_the_values(values: dict[str, Any], tmp_path: Path) -> None:
    assert "image: registry.example.com/heimdall/operator:" in rendered(values, tmp_path)


def test_argo_cd_renders_the_same_each_time_and_no_secret(tmp_path: Path) -> None:
    first = rendered(VALUES["argocd"], tmp_path)

    assert first == rendered(VALUES["argocd"], tmp_path)
    assert "Secret" not in {item["kind"] for item in yaml.safe_load_all(first) if item}


def test_both_take_the_chart_from_where_it_lies() -> None:
    assert (ROOT / ARGO_CD["source"]["path"] / "Chart.yaml").is_file()
    assert (ROOT / FLUX["chart"]["spec"]["chart"] / "Chart.yaml").is_file()
