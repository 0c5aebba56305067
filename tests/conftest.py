"""Which tests stay together when processes share the work: those of one cluster, those of one set of servers."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GROUPS = {"e2e": "cluster", "chaos": "cluster", "integration": "servers"}


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in a hook of its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        group = GROUPS.get(item.path.relative_to(TESTS).parts[0])
        if group is not None:
            item.add_marker(pytest.mark.xdist_group(group))
