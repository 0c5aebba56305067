"""Programs that tests call: those of the cluster tool's cache, or what is on PATH."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

CACHE = Path(
    os.environ.get("HEIMDALL_CACHE") or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heimdall"
)


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
