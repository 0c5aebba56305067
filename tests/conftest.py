"""All tests: what they leave in the folder for temporary files goes with their run, and none of them takes a GPU."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.programs import LASTING_TEMP

PREFIX = "heimdall-"
"""Short: sockets are made in there too, and the path of one has a hundred bytes or so."""


def pytest_configure(config: pytest.Config) -> None:
    """Here and not in a fixture: processes that run tests beside each other take all this over from the first one."""
    if hasattr(config, "workerinput"):
        return
    # A training on a GPU has another precision, and all that train beside each other would share its memory.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    # Folders of tests that failed are there to be looked into.
    os.environ.setdefault(LASTING_TEMP, tempfile.gettempdir())
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    folder.chmod(0o1777)  # as the system's own: PostgreSQL runs as another user
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None  # it is looked for anew
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
