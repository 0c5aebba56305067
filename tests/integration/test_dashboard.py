"""The chart's dashboard over a real Prometheus that scrapes the operator's own endpoint."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from typing import Any

import pytest

from heimdall_api.contract import Reason
from heimdall_operator import metrics
from tests.integration.servers import ROOT, Prometheus, free_port, wait_until
from tests.unit.operator.fakes import World, look
from tests.unit.operator.test_controller import SPEC

DASHBOARD = json.loads((ROOT / "charts/heimdall/files/dashboard.json").read_text())
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
RATE_INTERVAL = "10s"
"""What Grafana makes of $__rate_interval: some times the interval of scrapes."""
DATA_TIMEOUT_S = 60


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """It scrapes an operator that has looked at one run."""
    world = World()
    world.apply(SPEC)
    operator = asyncio.run(look(world))
    served = metrics.serve(operator, port := free_port())
    server = Prometheus(tmp_path_factory.mktemp("prometheus"), port)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        served.shutdown()


def work() -> None:
    """What an operator at work counts."""
    metrics.JOB_SECONDS.observe(0.2)
    metrics.FIRST_STEP_SECONDS.observe(20)
    metrics.ATTEMPTS.labels(Reason.NODE_LOST).inc()
    metrics.RECONCILE_SECONDS.observe(0.02)
    metrics.ERRORS.labels("ConnectionError").inc()
    metrics.MLFLOW_SECONDS.labels("read_facts").observe(0.01)
    metrics.WRITES.labels("PATCH", "trainingruns/status").inc()


def shown(prometheus: Prometheus, target: dict[str, Any]) -> list[dict[str, str]]:
    """Labels of the series that a panel's target shows: those with a value."""
    query = target["expr"].replace("$namespace", prometheus.namespace).replace("$__rate_interval", RATE_INTERVAL)
    found = prometheus.ask("query", query=query)["result"]
    return [series["metric"] for series in found if math.isfinite(float(series["value"][1]))]


def test_every_panel_shows_what_an_operator_at_work_counts(prometheus: Prometheus) -> None:
    waiting = list(TARGETS)

    def seen() -> bool:
        work()
        waiting[:] = [(title, target) for title, target in waiting if not shown(prometheus, target)]
        return not waiting

    wait_until(seen, what="data in every panel", timeout_s=DATA_TIMEOUT_S, tell=lambda: str(waiting))
    for title, target in TARGETS:
        named = re.findall(r"{{(\w+)}}", target["legendFormat"])
        for labels in shown(prometheus, target):
            assert all(labels.get(name) for name in named), f"{title}: {labels} has no {named}"


def test_the_namespaces_to_choose_from_are_those_of_operators(prometheus: Prometheus) -> None:
    (variable,) = [item for item in DASHBOARD["templating"]["list"] if item["type"] == "query"]
    found = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
    assert found is not None

    def seen() -> bool:
        values: list[str] = prometheus.ask(f"label/{found[2]}/values", **{"match[]": found[1]})
        return values == [prometheus.namespace]

    wait_until(seen, what="the namespace", timeout_s=DATA_TIMEOUT_S)


def test_the_first_attempt_that_ends_is_counted(prometheus: Prometheus) -> None:
    """Prometheus sees an increase from a series' second sample on: it must have been there before."""
    (target,) = [target for _, target in TARGETS if "heimdall_attempts_total" in target["expr"]]
    reason = Reason.FENCED

    def scraped() -> bool:
        return bool(prometheus.ask("query", query=f'heimdall_attempts_total{{reason="{reason}"}}')["result"])

    wait_until(scraped, what="a scrape", timeout_s=DATA_TIMEOUT_S)
    metrics.ATTEMPTS.labels(reason).inc()

    def seen() -> bool:
        return {"reason": str(reason)} in shown(prometheus, target)

    wait_until(seen, what=f"an attempt that ended with {reason}", timeout_s=DATA_TIMEOUT_S)
