"""Prometheus metrics of the operator: how runs fare, how long they wait, and whether the operator keeps up.

docs/operating.md explains each by the question that it answers.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Final

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from heimdall_api.contract import Reason

if TYPE_CHECKING:
    from datetime import datetime

    from heimdall_api.types import TrainingRunStatus
    from heimdall_operator.controller import Controller
    from heimdall_operator.observe import Observed

REGISTRY: Final = CollectorRegistry()
_WAITS_S: Final = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 1800, 7200)
_CALLS_S: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

JOB_SECONDS: Final = Histogram(
    "heimdall_job_seconds", "From a TrainingRun's creation to its first Job", buckets=_WAITS_S, registry=REGISTRY
)
FIRST_STEP_SECONDS: Final = Histogram(
    "heimdall_first_step_seconds",
    "From a TrainingRun's creation to its first training step",
    buckets=_WAITS_S,
    registry=REGISTRY,
)
ATTEMPTS: Final = Counter("heimdall_attempts", "Attempts that ended, by reason", ["reason"], registry=REGISTRY)
for _reason in Reason:
    # Prometheus sees an increase from a series' second sample on: the first attempt would not count.
    ATTEMPTS.labels(_reason)
RECONCILE_SECONDS: Final = Histogram(
    "heimdall_reconcile_seconds", "Time of one reconciliation of a TrainingRun", buckets=_CALLS_S, registry=REGISTRY
)
ERRORS: Final = Counter(
    "heimdall_errors", "Reconciliations and readings that failed, by what failed", ["what"], registry=REGISTRY
)
MLFLOW_SECONDS: Final = Histogram(
    "heimdall_mlflow_seconds", "Time of one call of MLflow", ["call"], buckets=_CALLS_S, registry=REGISTRY
)
WRITES: Final = Counter("heimdall_api_writes", "Writes to the API server", ["verb", "resource"], registry=REGISTRY)


class Runs(Collector):
    """What the store and the queue hold at the moment of a scrape."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller

    def collect(self) -> Iterator[Metric]:
        """Count the runs by phase and reason, and those that wait to be looked at."""
        counts: Tally[tuple[str, str]] = Tally()
        for key in self._controller.store.known():
            resource = self._controller.store.get(key)
            if resource is not None:
                counts[_state(resource.get("status") or {})] += 1
        runs = GaugeMetricFamily("heimdall_trainingruns", "TrainingRuns", labels=["phase", "reason"])
        for (phase, reason), count in counts.items():
            runs.add_metric([phase, reason], count)
        yield runs
        yield GaugeMetricFamily(
            "heimdall_queue_depth", "TrainingRuns that wait to be looked at", value=len(self._controller.queue)
        )
        yield GaugeMetricFamily(
            "heimdall_queue_oldest_seconds",
            "How long the first of them has waited",
            value=self._controller.queue.oldest_wait_s,
        )


def _state(status: dict[str, Any]) -> tuple[str, str]:
    conditions = {item["type"]: item for item in status.get("conditions", ())}
    # Of a run that failed, why; of every other, what it waits for.
    telling = conditions.get("Failed") or conditions.get("Complete") or {}
    return status.get("phase", "New"), telling.get("reason", "New")


def record_job(observed: Observed, now: datetime) -> None:
    """A run's first Job was created."""
    if observed.status.attempt == 1:
        JOB_SECONDS.observe(max(0.0, (now - observed.created).total_seconds()))


def record_status(
    created: datetime, old: TrainingRunStatus, new: TrainingRunStatus, first_step: datetime | None
) -> None:
    """A status was written: count what it tells for the first time.

    Args:
        created: When the TrainingRun was.
        old: Its status before.
        new: Its status now.
        first_step: When its trainer's first step ended; None where it does not tell, and the last step has to do.
    """
    if new.progress is not None and old.progress is None and (first_step := first_step or new.progress.time):
        FIRST_STEP_SECONDS.observe(max(0.0, (first_step - created).total_seconds()))
    known = {attempt.number: attempt.reason for attempt in old.attempts}
    for attempt in new.attempts:
        if attempt.reason is not None and known.get(attempt.number) is None:
            ATTEMPTS.labels(attempt.reason).inc()


def serve(controller: Controller, port: int) -> Any:
    """Serve the metrics; returns what ends it: call its shutdown.

    Args:
        controller: Whose runs are counted.
        port: TCP port.
    """
    runs = Runs(controller)
    REGISTRY.register(runs)
    server, _ = start_http_server(port, registry=REGISTRY)
    return _Served(server, runs)


class _Served:
    def __init__(self, server: Any, runs: Runs) -> None:
        self._server, self._runs = server, runs

    def shutdown(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        REGISTRY.unregister(self._runs)
