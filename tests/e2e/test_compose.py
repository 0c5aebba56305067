"""compose.yaml, started with Docker: the same settings file serves the servers and `heimdall-train`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import requests
import yaml

from tests.e2e.cluster import ROOT, cluster_environment, hack

PROJECT = "heimdall-test"
"""Beside the project of whoever works here, whose volumes are not ours."""
WANTED = ("tracking", "database", "cache")
UP_S, TRAINING_S = 600, 900
TRACKING = "http://localhost:5000"
NOBODY_S = 10


@dataclass(frozen=True)
class Compose:
    """Docker Compose with the project's file, and a folder of somebody who has copied the example of the settings."""

    folder: Path
    env: dict[str, str]

    def call(self, *arguments: str) -> str:
        """Call Compose; what it prints."""
        where = ("--project-name", PROJECT, "--project-directory", str(ROOT), "--env-file", str(self.folder / ".env"))
        return self._run("docker-compose", *where, *arguments, timeout_s=UP_S)

    def docker(self, *arguments: str) -> str:
        """Call Docker; what it prints."""
        return self._run("docker", *arguments, timeout_s=UP_S)

    def train(self, *arguments: str) -> str:
        """Call `heimdall-train` in the folder; what it prints."""
        return self._run(str(Path(sys.executable).with_name("heimdall-train")), *arguments, timeout_s=TRAINING_S)

    def _run(self, *command: str, timeout_s: float) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout


@pytest.fixture(scope="module")
def compose(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Compose]:
    """Compose and the images; in the end nothing of the project is left, nor an engine that was not there before."""
    status = subprocess.run(
        [sys.executable, "hack/cluster", "status"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    hack("hack/cluster", "parts", "compose")
    hack("hack/images", "build", "mlflow", "postgresql", "minio", "redis")
    folder = tmp_path_factory.mktemp("compose")
    shutil.copy(ROOT / ".env.example", folder / ".env")
    # What is set in the shell would beat the file.
    own = {
        name: value for name, value in cluster_environment().items() if not name.startswith(("HEIMDALL_", "MLFLOW_"))
    }
    made = Compose(folder, own | {"HEIMDALL_CACHE_DIR": str(folder / "cache"), "COMPOSE_PROGRESS": "plain"})
    before = made.docker("volume", "ls", "--quiet")
    try:
        yield made
    finally:
        made.call("down", "--volumes", "--timeout", "20")
        left = made.docker("volume", "ls", "--quiet")
        if "not running" in status.stdout:
            hack("hack/cluster", "down")
        assert left == before, "volumes stay behind"


@pytest.fixture(scope="module")
def trained(compose: Compose) -> str:
    """Everything is up, recordings are made, and a small localizer is trained and registered: its manifest's model."""
    compose.call("up", "--detach", "--wait", "--pull", "never", *WANTED)
    compose.train("data", "generate", "--sessions", "6")
    manifest = yaml.safe_load((ROOT / "manifests/examples/localizer.yaml").read_text())
    manifest["spec"]["model"]["backbone"] = "resnet10t"
    manifest["spec"]["training"]["epochs"] = 1
    del manifest["spec"]["export"]
    file = compose.folder / "localizer.yaml"
    file.write_text(yaml.safe_dump(manifest))
    compose.train("run", "-f", str(file))
    model: str = manifest["spec"]["registration"]["model"]
    return model


def version(model: str) -> dict[str, str]:
    """The version 1 of a model, asked as the administrator."""
    answer = requests.get(
        f"{TRACKING}/api/2.0/mlflow/model-versions/get",
        params={"name": model, "version": "1"},
        auth=("admin", "local-admin-password"),
        timeout=30,
    )
    answer.raise_for_status()
    found: dict[str, str] = answer.json()["model_version"]
    return found


def test_a_training_with_the_settings_file_ends_as_a_version(trained: str) -> None:
    assert version(trained)["status"] == "READY"


def test_features_lie_in_redis(compose: Compose, trained: str) -> None:
    del trained
    assert int(compose.call("exec", "-T", "cache", "redis-cli", "dbsize")) > 0


def test_nobody_is_let_in_without_a_password(trained: str) -> None:
    del trained
    answer = requests.post(f"{TRACKING}/api/2.0/mlflow/experiments/search", json={"max_results": 1}, timeout=NOBODY_S)
    assert answer.status_code == requests.codes.unauthorized


def test_every_port_is_bound_to_the_loopback_address(compose: Compose, trained: str) -> None:
    del trained
    names = compose.call("ps", "--quiet").split()
    bound = [
        binding["HostIp"]
        for item in json.loads(compose.docker("inspect", *names))
        for bindings in item["NetworkSettings"]["Ports"].values()
        for binding in bindings or ()
    ]
    assert len(bound) == 5
    assert set(bound) == {"127.0.0.1"}


def test_down_keeps_the_volumes_and_up_takes_them_up(compose: Compose, trained: str) -> None:
    before = version(trained)
    compose.call("down", "--timeout", "20")
    assert compose.docker("ps", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}") == ""

    compose.call("up", "--detach", "--wait", "--pull", "never", *WANTED)

    assert version(trained) == before
    assert compose.train("data", "inspect").strip()
