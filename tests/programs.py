"""Programs that tests call: those of the cluster tool's cache, or what is on PATH; and those of hack/, as modules."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CACHE = Path(
    os.environ.get("HEIMDALL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heimdall"
)

LASTING_TEMP = "PYTEST_DEBUG_TEMPROOT"
"""pytest's own variable: names the folder for temporary files that was there before the tests, and is afterwards."""


def lasting_environment() -> dict[str, str]:
    """The environment for what outlives the tests, which their folder for temporary files does not."""
    lasting = os.environ.get(LASTING_TEMP)
    return {**os.environ, **({"TMPDIR": lasting} if lasting else {})}


def program(name: str, part: str = "") -> str:
    """Path of a program; the test is skipped where there is none, which is so before `make test` has built them.

    Args:
        name: The program's name.
        part: What it is a part of for `hack/cluster parts`, where that is called otherwise.
    """
    found = shutil.which(name, path=f"{CACHE / 'bin'}:{os.environ.get('PATH', '')}")
    if found is None:
        pytest.skip(f"{name} is not there: python3 hack/cluster parts {part or name}")
    return found


def hack(path: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A program of hack/, as a module: it is no package, and finds what lies beside it by a path of its own.

    Args:
        path: The program's file, in hack/.
        monkeypatch: Takes back what importing it leaves.
    """
    name = "hack_" + path.removesuffix(".py").replace("/", "_")
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location(name, ROOT / "hack" / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module
