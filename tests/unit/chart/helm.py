"""helm as the tests use it: the binary of the cluster's cache, or the one on PATH."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.programs import program

ROOT = Path(__file__).resolve().parents[3]
CHART = ROOT / "charts/heimdall"
TIMEOUT_S = 60
RELEASE = "heimdall"
NAMESPACE = "ml"

Manifest = dict[str, Any]
EVERY_ROLE_EXTERNAL: dict[str, Any] = {
    "tracking.external": True,
    "tracking.externalUrl": "https://mlflow.example.com",
    "database.external": True,
    "database.externalHost": "db.example.com",
    "database.existingSecret": "db",
    "objectStore.external": True,
    "objectStore.externalUrl": "https://s3.example.com",
    "objectStore.existingSecret": "s3",
    "tracking.auth.existingSecret": "logins",
    "trainer.createSecrets": False,
}
STORES_EXTERNAL = {name: it for name, it in EVERY_ROLE_EXTERNAL.items() if not name.startswith("tracking.external")}
"""MLflow is the chart's own."""


class Loader(yaml.CSafeLoader):
    """YAML as Kubernetes reads it: 1e-05 is a number, which PyYAML takes for a string."""


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^-?\d+(\.\d+)?e[-+]?\d+$"), list("-0123456789"))


def helm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program("helm"), *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)


def refused(*options: str, chart: Path = CHART) -> str:
    """Why helm does not render the chart, or a changed copy of it, with these options."""
    done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *options)
    assert done.returncode != 0, "it was rendered"
    return done.stderr


def flags(values: dict[str, Any]) -> list[str]:
    """Options of helm; dots in a name go one level down."""
    return [part for name, value in values.items() for part in ("--set-json", f"{name}={json.dumps(value)}")]


@dataclass(frozen=True)
class Rendered:
    """What the chart makes of some values."""

    manifests: list[Manifest]

    def of_kind(self, kind: str) -> list[Manifest]:
        return [manifest for manifest in self.manifests if manifest["kind"] == kind]

    def names(self, kind: str) -> set[str]:
        return {manifest["metadata"]["name"] for manifest in self.of_kind(kind)}

    def one(self, kind: str, name: str) -> Manifest:
        found = [manifest for manifest in self.of_kind(kind) if manifest["metadata"]["name"] == name]
        assert len(found) == 1, f"{len(found)} {kind} {name}; there are {self.names(kind)}"
        return found[0]

    def pods(self) -> dict[str, Manifest]:
        """The pod specs of everything that makes pods, by kind and name."""
        specs = {f"Pod/{item['metadata']['name']}": item["spec"] for item in self.of_kind("Pod")}
        for kind in ("Deployment", "StatefulSet", "Job"):
            for item in self.of_kind(kind):
                specs[f"{kind}/{item['metadata']['name']}"] = item["spec"]["template"]["spec"]
        return specs


def render(values: dict[str, Any] | None = None, *, chart: Path = CHART) -> Rendered:
    """The chart rendered without a cluster.

    Args:
        values: Values by their dotted names.
        chart: A changed copy of the chart.
    """
    done = helm("template", RELEASE, str(chart), "--namespace", NAMESPACE, *flags(values or {}))
    assert done.returncode == 0, done.stderr
    return Rendered([manifest for manifest in yaml.load_all(done.stdout, Loader) if manifest])
