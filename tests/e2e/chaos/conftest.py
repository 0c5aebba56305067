"""One report of all that is done here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.e2e.chaos.report import Report


@pytest.fixture(scope="package")
def report() -> Iterator[Report]:
    """The report, written when the last of these tests is over, however they end."""
    report = Report()
    yield report
    report.write()
