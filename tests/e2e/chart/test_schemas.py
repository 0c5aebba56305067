"""What the chart renders is what this cluster knows: by the schemas that it serves, and by its own word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.chart.openapi import write_schemas
from tests.e2e.cluster import ROOT, Cluster
from tests.unit.chart.helm import flags
from tests.unit.chart.variants import NOT_KUBERNETES, VARIANTS

pytestmark = pytest.mark.beside
OPTIONS = {
    "defaults": (),
    "everything": (
        *("--set", "tracking.replicas=2,monitoring.dashboard.enabled=true,caBundle.certificates=none"),
        *("--set", "operator.priorityClassName=system-cluster-critical"),
        *("--set-json", 'networkPolicies.trainer.egress=[{"ports": [{"port": 443}]}]'),
        *("--set-json", 'operator.tolerations=[{"key": "dedicated", "operator": "Exists"}]'),
    ),
}
EXAMPLES = ("manifests/examples/localizer.yaml", "manifests/examples/recordings.yaml")


@pytest.fixture(scope="module")
def schemas(release: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_schemas(release, tmp_path_factory.mktemp("schemas"))


def kubeconform(release: Cluster, schemas: str, *files: Path) -> dict[str, Any]:
    """What it finds wrong, and how many manifests of each sort there were."""
    options = ("-strict", "-summary", "-output", "json", "-skip", ",".join(NOT_KUBERNETES))
    done = release.run("kubeconform", *options, "-schema-location", schemas, *map(str, files), check=False)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_manifest_is_of_the_clusters_schemas(release: Cluster, schemas: str, tmp_path: Path) -> None:
    files = [ROOT / example for example in EXAMPLES]
    manifests = 0
    for number, values in enumerate(VARIANTS.values()):
        rendered = release.helm("template", "dry", "charts/heimdall", *flags(values))
        manifests += sum(1 for item in yaml.load_all(rendered, yaml.CSafeLoader) if item)
        files.append(tmp_path / f"{number}.yaml")
        files[-1].write_text(rendered)

    found = kubeconform(release, schemas, *files)

    assert found["resources"] == []
    assert found["summary"]["skipped"] == len(NOT_KUBERNETES)
    assert found["summary"]["valid"] == manifests + len(EXAMPLES) - len(NOT_KUBERNETES)


def test_a_field_that_there_is_not_and_a_wrong_type_are_found(release: Cluster, schemas: str, tmp_path: Path) -> None:
    run = yaml.safe_load((ROOT / "manifests/examples/localizer.yaml").read_text())
    run["spec"]["retrys"] = {"limit": 1}
    job = yaml.safe_load((ROOT / "manifests/examples/recordings.yaml").read_text())
    job["spec"]["template"]["spec"]["containers"][0]["env"] = [{"name": "A", "value": 1}]
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump_all([run, job]))

    found = kubeconform(release, schemas, tmp_path / "wrong.yaml")

    said = {item["kind"]: item["msg"] for item in found["resources"]}
    assert "'retrys' not allowed" in said["TrainingRun"]
    assert "got number, want string" in said["Job"]


@pytest.mark.parametrize("case", OPTIONS)
def test_the_api_server_takes_every_manifest(release: Cluster, case: str) -> None:
    options = ("--set", "crd.install=false", *OPTIONS[case])
    rendered = release.helm("template", "dry", "charts/heimdall", *options)
    said = release.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=rendered)
    assert "deployment.apps/dry-heimdall-tracking created (server dry run)" in said
    assert "networkpolicy.networking.k8s.io/dry-heimdall-deny created (server dry run)" in said
