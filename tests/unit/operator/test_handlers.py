"""What kopf is told."""

from __future__ import annotations

import kopf
import pytest
from kopf._cogs.structs.references import Resource

from heimdall_api.contract import GROUP, PLURAL, VERSION
from heimdall_operator.handlers import SELECTOR, _tune


@pytest.mark.parametrize(
    ("resource", "selectors"),
    [
        (Resource("", "v1", "pods"), [SELECTOR]),
        (Resource("batch", "v1", "jobs"), [SELECTOR]),
        (Resource(GROUP, VERSION, PLURAL), []),
    ],
    ids=["pods", "jobs", "training runs"],
)
def test_the_server_leaves_out_pods_and_jobs_of_others(resource: Resource, selectors: list[str]) -> None:
    settings = kopf.OperatorSettings()
    _tune(settings)
    assert list(settings.watching.label_selectors.collect(resource)) == selectors
