"""The images: a change of code makes a small layer, not the whole anew."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cluster import ROOT

pytestmark = pytest.mark.beside

ROOMS = {"operator": "operator/heimdall_operator/decide.py", "trainer": "trainer/heimdall_trainer/pipeline.py"}
"""Images, and a file of the code in each."""
MOST_BYTES = 2_000_000
"""Of what moves when code changes: the rooms, with their bytecode."""
BUILD_S = 900


class Docker:
    """The client of the cluster's engine."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment = environment | {"DOCKER_BUILDKIT": "1"}

    def __call__(self, *arguments: str) -> str:
        done = subprocess.run(
            ["docker", *arguments], env=self._environment, capture_output=True, text=True, timeout=BUILD_S, check=False
        )
        assert done.returncode == 0, f"docker {' '.join(arguments)}:\n{done.stderr[-3000:]}"
        return done.stdout

    def layers(self, image: str) -> list[str]:
        """The checksums of an image's layers, the lowest first."""
        found: list[str] = json.loads(self("image", "inspect", "--format", "{{json .RootFS.Layers}}", image))
        return found

    def sizes(self, image: str) -> list[int]:
        """Bytes of an image's layers, the lowest first; steps that made none are left out."""
        listed = self("history", "--human=false", "--no-trunc", "--format", "{{.Size}}", image).split()
        return [int(size) for size in reversed(listed) if size != "0"]


@pytest.fixture
def docker(cluster: dict[str, str]) -> Docker:
    return Docker(cluster)


@pytest.fixture
def changed(tmp_path: Path) -> Iterator[Path]:
    """What the images are made of, to be changed; it is large for what it is looked at for, and goes afterwards."""
    for name in ("api", "tracking", "operator", "trainer", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in (".dockerignore", "Dockerfile.operator", "Dockerfile.trainer"):
        shutil.copy(ROOT / name, tmp_path / name)
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", ROOMS)
def test_a_change_of_code_moves_kilobytes(docker: Docker, changed: Path, name: str) -> None:
    file = changed / ROOMS[name]
    file.write_text(f"{file.read_text()}\nCHANGED = True\n")
    tag = f"heimdall/{name}:changed"
    docker("build", "--quiet", "--tag", tag, "--file", str(changed / f"Dockerfile.{name}"), str(changed))
    try:
        before, after = docker.layers(f"heimdall/{name}:dev"), docker.layers(tag)

        differ = [index for index, (one, other) in enumerate(zip(before, after, strict=True)) if one != other]
        # Above the code there is the empty folder to work in, where it is made for that.
        assert 1 <= len(before) - differ[0] <= 2
        dependencies, code = docker.sizes(tag)[-2:]
        assert 0 < code < MOST_BYTES < dependencies
    finally:
        docker("image", "rm", tag)
