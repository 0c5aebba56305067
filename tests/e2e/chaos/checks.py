"""What must hold when all is over: of a TrainingRun, asked of API server and MLflow, and of what the operator says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from heimdall_api.contract import Reason
from heimdall_operator.failures import FREE
from tests.e2e.conftest import Mlflow

RUN_LABEL = "training.heimdall.dev/run"
UNCOUNTED = {str(reason) for reason in FREE} | {str(Reason.COMPLETED)}
MISTAKES = (
    *("ArithmeticError", "AssertionError", "AttributeError", "IndexError", "InvalidStateError", "KeyError"),
    *("NameError", "NotImplementedError", "OverflowError", "RecursionError", "StopIteration", "TypeError"),
    *("UnboundLocalError", "UnicodeDecodeError", "UnicodeEncodeError", "ValidationError", "ValueError"),
    "ZeroDivisionError",
)
"""Errors that nobody else's being away explains: the operator counts on something that is not so."""
SAYS_MISTAKE = re.compile(rf"Traceback|\"error\": \"(?:{'|'.join(MISTAKES)}): |a reconciliation did not settle")


def is_final(item: dict[str, Any]) -> bool:
    return item.get("status", {}).get("phase") in ("Succeeded", "Failed") and not item["metadata"].get("finalizers")


def violations_of(uid: str, item: dict[str, Any] | None, mlflow: Mlflow, jobs: list[dict[str, Any]]) -> Iterator[str]:
    """What does not hold of one TrainingRun.

    Args:
        uid: Its UID.
        item: The resource; None where it was deleted.
        mlflow: What is asked of its run.
        jobs: All Jobs that are there.
    """
    runs = mlflow.runs_of(uid)
    mine = [job["metadata"]["name"] for job in jobs if owner(job) == uid]
    if item is None:
        if len(runs) > 1:
            yield f"MLflow has the runs {[run.info.run_id for run in runs]} of one that was deleted"
        yield from (f"deleted, but MLflow says {run.info.status}" for run in runs if is_open(run))
        yield from (f"deleted, but {name} is left" for name in mine)
        return
    status = item["status"]
    if [run.info.run_id for run in runs] != [status["runID"]]:
        yield f"MLflow has the runs {[run.info.run_id for run in runs]}, the status {status['runID']}"
        return
    wanted = "FINISHED" if status["phase"] == "Succeeded" else "FAILED"
    if runs[0].info.status != wanted:
        yield f"{status['phase']}, but its run is {runs[0].info.status}"
    model = item["spec"]["registration"]["model"]
    versions = [version.version for version in mlflow.versions_of(model, status["runID"])]
    expected = [status["modelVersion"]] if status["phase"] == "Succeeded" else []
    if versions != expected:
        yield f"the registry has {versions}, the status {expected}"
    yield from wrong_aliases(item, mlflow)
    if len(mine) > status["attempt"]:
        yield f"Jobs {mine} of {status['attempt']} attempts"
    yield from wrong_attempts(status)


def wrong_aliases(item: dict[str, Any], mlflow: Mlflow) -> Iterator[str]:
    """Aliases of a run that succeeded, its promotion's too, that do not lead to its version."""
    registration, status = item["spec"]["registration"], item["status"]
    promotion = [registration["promotion"]["alias"]] if "promotion" in registration else []
    wanted = [*registration.get("aliases", ()), *promotion]
    if status["phase"] != "Succeeded" or not wanted:
        return
    aliases = mlflow.client.get_registered_model(registration["model"]).aliases
    for alias in wanted:
        if str(aliases.get(alias)) != status["modelVersion"]:
            yield f"the alias {alias} leads to {aliases.get(alias)}, the status says {status['modelVersion']}"


def wrong_attempts(status: dict[str, Any]) -> Iterator[str]:
    """What does not hold of the attempts that a status lists."""
    attempts = status["attempts"]
    numbers = [attempt["number"] for attempt in attempts]
    if numbers != list(range(numbers[0], numbers[-1] + 1)) or numbers[-1] != status["attempt"]:
        yield f"attempts {numbers}"
    counted = [item["reason"] for item in attempts if item["reason"] not in UNCOUNTED]
    if numbers[0] == 1 and len(counted) != status.get("failures", 0):
        yield f"{status.get('failures', 0)} failures counted, of attempts that ended {counted}"
    yield from overlaps(attempts)


def overlaps(attempts: list[dict[str, Any]]) -> Iterator[str]:
    """Attempts of which one trained before the one before it had ended."""
    for before, after in pairwise(attempts):
        if after.get("runningTime") and after["runningTime"] < before["endTime"]:
            yield f"attempt {after['number']} trained before attempt {before['number']} had ended"


def mistakes_said(log: str) -> list[str]:
    """Lines of the operator's log that tell of a mistake of its own: a look that fails is tried again, and told."""
    return [line for line in log.splitlines() if SAYS_MISTAKE.search(line)]


def mistakes_counted(metrics: str) -> Counter[str]:
    """Looks and readings that failed by mistakes of the operator's own, by the error: what its metrics say."""
    samples = (item for family in text_string_to_metric_families(metrics) for item in family.samples)
    return Counter(
        {
            item.labels["what"]: int(item.value)
            for item in samples
            if item.name == "heimdall_errors_total" and item.labels["what"] in MISTAKES
        }
    )


def is_open(run: Any) -> bool:
    return run.info.status not in ("FINISHED", "FAILED", "KILLED")


def owner(job: dict[str, Any]) -> str:
    return str(job["metadata"]["ownerReferences"][0]["uid"])
