"""Each room imports what belongs to it alone: import-linter knows what is forbidden, this what is allowed."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
ALLOWED = {
    "api/heimdall_api": {"pydantic", "pydantic_core"},
    # requests is what mlflow asks servers with: how it judges a certificate is asked of it.
    "tracking/heimdall_tracking": {
        *("heimdall_api", "mlflow", "pydantic", "pydantic_settings", "requests", "structlog"),
    },
    "operator/heimdall_operator": {
        *("heimdall_api", "heimdall_tracking", "kopf", "kubernetes", "mlflow"),
        *("prometheus_client", "pydantic", "pydantic_settings", "structlog"),
    },
    "trainer/heimdall_trainer": {
        *("heimdall_api", "heimdall_tracking", "mlflow", "pydantic", "structlog", "yaml"),
        *("pytorch_lightning", "timm", "torch", "torchmetrics", "numpy", "matplotlib", "onnxruntime"),
        *("boto3", "botocore", "redis", "sigmf", "sqlalchemy", "urllib3"),
    },
}
"""Packages beside the standard library and the room's own, by the room's folder."""
GENERATORS = {"api/heimdall_api/crd.py": {"yaml"}}
"""What a file needs that contributors alone run: nothing that is installed does."""


def imports(file: Path) -> Iterator[str]:
    """The packages that a file imports anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name.partition(".")[0] for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("room", ALLOWED, ids=lambda room: room.partition("/")[0])
def test_a_room_imports_what_belongs_to_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    known = {Path(room).name, *sys.stdlib_module_names, *ALLOWED[room]}
    foreign = set()
    for file in files:
        name = str(file.relative_to(ROOT))
        foreign |= {f"{name}: {found}" for found in {*imports(file)} - known - GENERATORS.get(name, set())}

    assert files
    assert foreign == set()


@pytest.mark.parametrize("room", ALLOWED, ids=lambda room: room.partition("/")[0])
def test_nothing_is_allowed_that_nobody_imports(room: str) -> None:
    imported = {found for file in (ROOT / room).rglob("*.py") for found in imports(file)}

    assert ALLOWED[room] - imported == set()
