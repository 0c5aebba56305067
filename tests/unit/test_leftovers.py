"""What tests leave in the folder for temporary files goes with their run; what outlives them never gets that folder."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import PREFIX, pytest_configure
from tests.e2e import cluster
from tests.programs import LASTING_TEMP

USERS_OWN = 49
"""Characters of a Mac's folder for temporary files, the longest."""
LONGEST_SOCKET = "torch-shm-dir-123456/manager.sock"
"""Of those that torch and Python make in the folder for temporary files."""
SOCKET_LIMIT = 103
"""Characters of a socket's path, there."""


@pytest.fixture
def lasting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The system's folder for temporary files, in a process that has not begun with its tests yet."""
    for name in (LASTING_TEMP, "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "")  # is put back, whatever the test makes of it
        del os.environ[name]
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def test_what_is_left_lies_in_a_folder_that_goes(lasting: Path) -> None:
    afterwards: list[Callable[[], object]] = []
    config: Any = SimpleNamespace(add_cleanup=afterwards.append)

    pytest_configure(config)

    left = Path(tempfile.mkdtemp())
    (left / "model.onnx").touch()
    assert left.parent == Path(os.environ["TMPDIR"])
    assert left.parent.parent == lasting == Path(os.environ[LASTING_TEMP])
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    for clean_up in afterwards:
        clean_up()
    assert list(lasting.iterdir()) == []


def test_processes_that_run_tests_beside_each_other_have_one_in_common(lasting: Path) -> None:
    config: Any = SimpleNamespace(workerinput={})

    pytest_configure(config)

    assert list(lasting.iterdir()) == []
    assert os.environ["TMPDIR"] == str(lasting)


def test_a_socket_has_room_in_it() -> None:
    assert USERS_OWN + len(f"/{PREFIX}12345678/{LONGEST_SOCKET}") <= SOCKET_LIMIT


def test_an_engine_that_may_be_kept_does_not_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr(subprocess, "run", lambda *_, env, **__: given.append(env["TMPDIR"]))

    cluster.hack("hack/cluster", "up")

    assert given == [os.environ[LASTING_TEMP]]
    assert given != [os.environ["TMPDIR"]]
