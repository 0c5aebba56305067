"""The cluster tool is a program, not a package: it is found by its folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "hack/cluster"))


@pytest.fixture(autouse=True)
def no_real_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The engine that runs on this machine, with a cluster of somebody's in it, is not what these tests are about."""
    from heimdall_cluster import engine

    run = tmp_path / "run"
    for name, path in {"RUN": run, "SOCKET": "docker.sock", "PID_FILE": "docker.pid", "EXEC_ROOT": "exec"}.items():
        monkeypatch.setattr(engine, name, run / path)
    monkeypatch.setattr(engine, "POLICY", run / "policy-rc.d")
    monkeypatch.setattr(engine, "UNIT_FOLDERS", run / "units")


@pytest.fixture(autouse=True)
def quiet(capsys: pytest.CaptureFixture[str]) -> None:
    del capsys
