"""docs/howto/own-model.md, done as it says: its files, its commands, without a cluster."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.trainer_command import heimdall_train
from tests.unit.documents.documents import ROOT, blocks, commands

PAGE = ROOT / "docs/howto/own-model.md"
pytestmark = pytest.mark.slow


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
