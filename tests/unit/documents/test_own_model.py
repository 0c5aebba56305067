"""docs/howto/own-model.md, done as it says: its files, its commands; and what docs/trainer.md shows to be refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.trainer_command import TIMEOUT_S, heimdall_train
from tests.unit.documents.documents import ROOT, blocks, commands, shown

PAGE = ROOT / "docs/howto/own-model.md"
pytestmark = pytest.mark.slow
CONFIGURATION_ERROR = 78


def test_the_module_of_the_page_is_trained_exported_and_registered(tmp_path: Path) -> None:
    for block in blocks("python", "yaml"):
        if block.document == PAGE:
            (tmp_path / block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    given = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW_", "HEIMDALL_"))}
    typed = [item.words for item in commands() if item.where.startswith("docs/howto/own-model.md: heimdall-train")]
    assert [words[1:] for words in typed] == [["validate", "-f", "line.yaml"], ["run", "-f", "line.yaml"]]

    printed = [heimdall_train(*words[1:], env=given, cwd=tmp_path) for words in typed]

    assert "val/loss" in printed[-1]
    assert "model:   models:/line/1" in printed[-1]


def test_a_file_that_can_not_be_trained_is_told_as_the_page_shows(tmp_path: Path) -> None:
    ((command, text),) = [item for item in shown("docs/trainer.md").items() if " validate " in item[0]]
    spec = {"model": {"backbone": "resnet18", "module": "line:Line"}}
    (tmp_path / "run.yaml").write_text(json.dumps({"metadata": {"name": "both"}, "spec": spec}))

    program = Path(sys.executable).parent / "heimdall-train"
    typed = [program, *command.split()[1:]]
    done = subprocess.run(typed, cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)

    assert (done.returncode, done.stderr) == (CONFIGURATION_ERROR, text)
