"""Which tests stay together when processes share the work: those of one cluster, those of one set of servers."""

from __future__ import annotations

from pathlib import Path

import pytest

TESTS = Path(__file__).parent
GROUPS = {"e2e": "cluster", "chaos": "cluster", "integration": "servers"}


def pytest_itemcollected(item: pytest.Item) -> None:
    """As each item is made: xdist reads the groups before a conftest's turn to change the list of them."""
    group = GROUPS.get(item.path.relative_to(TESTS).parts[0])
    if group is not None:
        item.add_marker(pytest.mark.xdist_group(group))
