"""What the README's commands say of a machine that lacks something."""

from __future__ import annotations

import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.programs import hack

ROOT = Path(__file__).resolve().parents[3]
ENGINE = ["docker", "version", "--format", "{{.Server.Version}}"]
BUILDX = ["docker", "buildx", "version"]
GO = ["go", "version"]


@pytest.fixture
def needs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return hack("needs.py", monkeypatch)


@pytest.fixture
def machine(needs: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """A machine of somebody who is not root, with nothing on its PATH and what its commands say."""

    def make(says: dict[str, str], *, user: int = 1000) -> ModuleType:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(os, "geteuid", lambda: user)
        monkeypatch.setattr(needs, "_output", lambda command: says.get(" ".join(command)))
        monkeypatch.setattr(needs, "Path", lambda *parts: tmp_path.joinpath("nowhere", *parts[1:]))
        return needs

    return make


@pytest.mark.parametrize(
    ("check", "says", "words"),
    [
        ("_engine", {}, "a Docker engine that answers (docker version), or root on Debian"),
        ("_engine", {" ".join(ENGINE): "28"}, "Docker's buildx, .*apt-get install docker-buildx"),
        ("_kubernetes", {}, "Go 1.26 or newer (https://go.dev/dl)"),
        ("_kubernetes", {" ".join(GO): "go version go1.25.9 linux/amd64"}, "Go 1.26 or newer"),
        ("_kubernetes", {" ".join(ENGINE): "28", " ".join(GO): "go version go1.26.1 linux/amd64"}, "kubectl (https://"),
        ("_postgresql", {}, "PostgreSQL's server programs, .*apt-get install postgresql"),
        ("_redis", {}, "Redis's server, .*apt-get install redis-tools"),
        ("_prometheus", {}, "Prometheus and promtool, .*https://prometheus.io/download"),
    ],
)
def test_what_is_missing_is_told_with_the_remedy(machine: Any, check: str, says: dict[str, str], words: str) -> None:
    said = getattr(machine(says), check)()

    assert re.search(".*".join(map(re.escape, words.split(".*"))), said), said


@pytest.mark.parametrize("check", ["_engine", "_kubernetes"])
def test_nothing_is_said_of_what_is_there(machine: Any, check: str) -> None:
    there = {" ".join(ENGINE): "28", " ".join(BUILDX): "0.30", " ".join(GO): "go version go1.26.0 linux/amd64"}
    module = machine(there)
    Path(os.environ["PATH"], "kubectl").touch(mode=0o755)

    assert getattr(module, check)() is None


def test_an_old_python_is_refused(needs: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "PYTHON", (99, 0))

    assert re.fullmatch(r"Python 3\.11 or newer \(this is 3[\d.]+\): set PYTHON=/path/to/python3\.11", needs._python())


def test_everything_that_is_missing_is_told_at_once(
    machine: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = machine({})
    monkeypatch.setattr(module, "_room", lambda: "8 GB of disk are needed")
    monkeypatch.setattr("sys.argv", ["needs.py", "--test"])

    with pytest.raises(SystemExit) as ended:
        module.main()

    told = str(ended.value.code).splitlines()
    assert told[0] == "Missing on this machine:"
    assert [line[:3] for line in told[1:]] == ["- a", "- G", "- 8", "- P", "- R", "- P"]
