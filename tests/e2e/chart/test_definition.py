"""The resource's definition when Helm upgrades it: it changes, and the runs that were there stay as they were.

The cluster's one definition is what all other cases stand on, and may be another release's. So both charts bring theirs
under other names here, in a release of an operator that no node takes.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.chart.test_again import RELEASED
from tests.e2e.cluster import ROOT, Cluster, wait_for
from tests.e2e.conftest import namespace

pytestmark = pytest.mark.beside
NAME = "older"
RENAMED = {
    "training.heimdall.dev": "older.heimdall.dev",
    "trainingrun": "olderrun",
    "TrainingRun": "OlderRun",
    "- tr\n": "- or\n",
}
DEFINITION = "olderruns.older.heimdall.dev"
VALUES = (
    *("tracking.external=true,tracking.externalUrl=http://nowhere", "operator.nodeSelector.nobody=has-this"),
    "database.external=true,database.externalHost=nowhere,database.existingSecret=none",
    "objectStore.external=true,objectStore.externalUrl=http://nowhere,objectStore.existingSecret=none",
    "trainer.createSecrets=false,crd.userRoles=false",
)
FIELD, COLUMN = "export", "Reason"
"""What the older definition lacks, whatever it was that landed last."""
RUN: dict[str, Any] = {
    "apiVersion": "older.heimdall.dev/v1alpha1",
    "kind": "OlderRun",
    "metadata": {"name": "kept"},
    "spec": {"suspend": True, "model": {"backbone": "resnet10t"}, "training": {"epochs": 7}},
}
STATUS = {"status": {"phase": "Suspended", "runID": "0" * 32, "attempt": 1}}
SERVED_S = 60.0


def rename(chart: Path) -> Path:
    """A chart, whose definition gets the names of the test."""
    file = chart / "files/crd.yaml"
    text = file.read_text()
    for name, other in RENAMED.items():
        assert name in text
        text = text.replace(name, other)
    file.write_text(text)
    return chart


def without_what_is_new(chart: Path) -> Path:
    """A chart, whose definition lacks a field and a column."""
    file = chart / "files/crd.yaml"
    definition = yaml.safe_load(file.read_text())
    (version,) = definition["spec"]["versions"]
    columns = version["additionalPrinterColumns"]
    version["additionalPrinterColumns"] = [column for column in columns if column["name"] != COLUMN]
    spec = version["schema"]["openAPIV3Schema"]["properties"]["spec"]
    del spec["properties"][FIELD], spec["default"][FIELD]
    file.write_text(yaml.safe_dump(definition, sort_keys=False))
    return chart


@pytest.fixture
def charts(tmp_path: Path) -> tuple[Path, Path]:
    """The chart that landed last, with an older definition, and the present one."""
    with tarfile.open(RELEASED) as tar:
        tar.extractall(tmp_path / "released", filter="data")
    shutil.copytree(ROOT / "charts/heimdall", tmp_path / "present")
    return without_what_is_new(rename(tmp_path / "released/heimdall")), rename(tmp_path / "present")


@pytest.fixture
def older(release: Cluster) -> Iterator[Cluster]:
    with namespace(release, NAME) as made:
        try:
            yield made
        finally:
            made.run("kubectl", "delete", "crd", DEFINITION, "--ignore-not-found", "--timeout=60s")


def versions(chart: Path) -> Any:
    return yaml.safe_load((chart / "files/crd.yaml").read_text())["spec"]["versions"]


def test_an_upgrade_changes_the_definition_and_keeps_the_runs(older: Cluster, charts: tuple[Path, Path]) -> None:
    released, present = charts
    values = [part for value in (*VALUES, f"operator.namespaces={{{older.namespace}}}") for part in ("--set", value)]
    older.helm("install", NAME, str(released), *values)
    older.kubectl("wait", "--for=condition=Established", "crd", DEFINITION, "--timeout=60s")
    older.apply(RUN)
    older.kubectl("patch", "olderrun", "kept", "--subresource=status", "--type=merge", "-p", json.dumps(STATUS))
    before = older.get("olderrun", "kept")
    assert before is not None
    assert FIELD not in before["spec"]

    older.helm("upgrade", NAME, str(present), "--reset-then-reuse-values")

    def served() -> dict[str, Any] | None:
        """The run, as soon as the API server knows the new fields."""
        found = older.get("olderrun", "kept")
        return found if found is not None and FIELD in found["spec"] else None

    after = wait_for(served, what="the new definition", timeout_s=SERVED_S)
    definition = older.get("crd", DEFINITION)
    assert definition is not None
    columns = versions(present)[0]["additionalPrinterColumns"]
    assert definition["spec"]["versions"][0]["additionalPrinterColumns"] == columns
    assert columns != versions(released)[0]["additionalPrinterColumns"]
    assert (after["metadata"]["uid"], after["status"]) == (before["metadata"]["uid"], before["status"])
    assert (after["spec"]["suspend"], after["spec"]["training"]["epochs"]) == (True, 7)
    older.kubectl("patch", "olderrun", "kept", "--type=merge", "-p", '{"spec": {"suspend": false}}')
    said = older.refused("patch", "olderrun", "kept", "--type=merge", "-p", '{"spec": {"training": {"epochs": 8}}}')
    assert "can't be changed once the run exists" in said

    kept = older.get("olderrun", "kept")
    assert kept is not None
    assert kept["metadata"]["uid"] == before["metadata"]["uid"]
    older.helm("uninstall", NAME, "--wait", "--timeout", "60s")
    assert older.get("olderrun", "kept") == kept, "the definition stays, and its runs with it"

    older.helm("install", NAME, str(present), *values)
    assert older.get("olderrun", "kept") == kept, "a second install takes them up"
