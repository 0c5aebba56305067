"""docs/howto/own-model.md, done as it says: its files, its commands, without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.documents.documents import ROOT, blocks, commands

PAGE = ROOT / "docs/howto/own-model.md"
TIMEOUT_S = 600
pytestmark = pytest.mark.slow


def test_the_module_of_the_page_is_trained_exported_and_registered(tmp_path: Path) -> None:
    for block in blocks("python", "yaml"):
        if block.document == PAGE:
            (tmp_path / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HEIMDALL_"))}
    program = Path(sys.executable).parent / "heimdall-train"
    typed = [item.words for item in commands() if item.where.startswith("docs/howto/own-model.md: heimdall-train")]
    assert [words[1:] for words in typed] == [["validate", "-f", "line.yaml"], ["run", "-f", "line.yaml"]]

    for words in typed:
        done = subprocess.run(
            [program, *words[1:]],
            cwd=tmp_path,
            env=given,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    assert "val/loss" in done.stdout
    assert "model:   models:/line/1" in done.stdout
