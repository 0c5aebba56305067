"""Progress of active runs, read from MLflow in one query, and since when each of them stands still."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Container, Mapping
from datetime import datetime, timedelta

import structlog

from heimdall_operator import metrics
from heimdall_operator.mistakes import about
from heimdall_operator.mlflow_gateway import MlflowGateway
from heimdall_operator.store import Key, Manifest, Store
from heimdall_operator.workqueue import WorkQueue
from heimdall_tracking.runs import RunFacts

log = structlog.get_logger()


class ProgressPoller:
    """Polls MLflow for progress; queues each run that moved."""

    def __init__(
        self,
        mlflow: MlflowGateway,
        store: Store,
        queue: WorkQueue[Key],
        *,
        unwritten: Container[Key],
        clock: Callable[[], datetime],
    ) -> None:
        """Nothing was read yet.

        Args:
            mlflow: Where progress is read.
            store: The TrainingRuns that are known.
            queue: Where those that moved wait to be looked at.
            unwritten: Runs whose status is refused: the store holds an older one.
            clock: The time in whole seconds.
        """
        self._mlflow = mlflow
        self._store = store
        self._queue = queue
        self._unwritten = unwritten
        self._clock = clock
        self._facts: dict[str, RunFacts] = {}
        """Progress of active runs, as the last poll read it: only to be shown."""
        self._moved: dict[str, datetime] = {}
        """When an active run's step was last seen to change, or since when it is active. Nodes' clocks may be wrong: a
        hang is told by this one."""
        self._polled: datetime | None = None
        """When progress was last read."""
        self._is_deaf = False
        """Whether it could not be read the last time."""

    def facts(self, run_id: str) -> RunFacts | None:
        """A run's progress, as the last poll read it."""
        return self._facts.get(run_id)

    def moved(self, run_id: str) -> datetime | None:
        """Since when a run stands still; None where nobody can tell."""
        return None if self._is_deaf else self._moved.get(run_id)

    async def follow(self, every_s: float) -> None:
        """Read the progress of all active runs, in one query."""
        while True:
            await asyncio.sleep(every_s)
            try:
                await self.poll()
            except Exception as error:  # noqa: BLE001 - MLflow away never stops a run from being watched
                self._is_deaf = True
                metrics.ERRORS.labels("reading progress").inc()
                log.warning("reading progress from MLflow failed; trying again", **about(error))

    async def poll(self) -> None:
        """Read the progress of all active runs and look at those that moved."""
        # Of one whose status is refused, the phase is not known here: a hang must not be read out of not looking.
        items = ((key, self._store.get(key)) for key in self._store.known())
        known = [(key, item) for key, item in items if item is not None and "runID" in (item.get("status") or {})]
        active = {key: item for key, item in known if key in self._unwritten or _is_active(item)}
        waits = {key: item for key, item in known if key not in active and _is_evicted(item)}
        runs = {str(item["status"]["runID"]): _experiment(item) for item in [*active.values(), *waits.values()]}
        facts = await self._mlflow.active_facts(runs) if runs else {}
        moved = {run_id for run_id, item in facts.items() if self._facts.get(run_id) != item}
        # What waits makes no steps: that is no silence.
        self._moved = self._last_moves([item["status"]["runID"] for item in active.values()], facts, self._clock())
        self._facts = facts
        for key, item in (active | waits).items():
            # A suspended one that MLflow still calls running is to be parked.
            if (run_id := item["status"]["runID"]) in moved or (run_id in facts and _is_suspended(item)):
                self._queue.add(key)
        await self._discard_strays([item for run_id, item in facts.items() if run_id not in runs])

    def _last_moves(self, runs: Collection[str], facts: Mapping[str, RunFacts], now: datetime) -> dict[str, datetime]:
        """When each active run moved last, after a poll."""
        # Time in which nobody could hear is no silence; one question that fails must not begin all counts anew either.
        unheard = now - self._polled if self._is_deaf and self._polled is not None else timedelta()
        self._polled, self._is_deaf = now, False
        # What is seen for the first time may have moved just now.
        still = {
            run_id for run_id in runs if run_id in self._moved and _place(facts, run_id) == _place(self._facts, run_id)
        }
        return {run_id: self._moved[run_id] + unheard if run_id in still else now for run_id in runs}

    async def _discard_strays(self, others: Collection[RunFacts]) -> None:
        """Take back runs beside those that TrainingRuns name.

        A server may carry out a creation long after its answer was given up, and the next try has made another by then.
        """
        if not others:
            return
        named: dict[str, tuple[Key, str]] = {}
        for key in self._store.known():
            resource = self._store.get(key)
            if resource is not None and (run_id := (resource.get("status") or {}).get("runID")) is not None:
                named[resource["metadata"]["uid"]] = key, run_id
        for item in others:
            if item.uid not in named or named[item.uid][1] == item.run_id:
                continue
            (namespace, name), kept = named[item.uid]
            with structlog.contextvars.bound_contextvars(namespace=namespace, trainingrun=name, uid=item.uid):
                log.warning("MLflow has made a run twice; taking one back", run_id=item.run_id, kept=kept)
                try:
                    await self._mlflow.discard_run(item.run_id)
                except Exception as error:  # noqa: BLE001 - progress was read all the same: a hang must be noticed
                    log.warning("the run could not be taken back; it is tried again as long as it runs", **about(error))


def _place(facts: Mapping[str, RunFacts], run_id: str) -> tuple[object, ...]:
    """Where a training is: an attempt is a move too, the end of an epoch, and whatever else its trainer does."""
    known = facts.get(run_id)
    if known is None:
        return ()
    step = (known.progress.epoch, known.progress.step) if known.progress is not None else ()
    return (known.attempt, known.activity, *step)


def _is_active(resource: Manifest) -> bool:
    """Whether what MLflow says of a run may change: what a suspended one made last is delivered while it ends."""
    return resource["status"].get("phase") in ("Running", "Suspended")


def _is_suspended(resource: Manifest) -> bool:
    return bool(resource["status"].get("phase") == "Suspended")


def _is_evicted(resource: Manifest) -> bool:
    """Whether a run waits to go on as the same attempt: what it made last is delivered while its pods end, too."""
    status = resource["status"]
    newest: Manifest = next(reversed(status.get("attempts") or ()), {})
    return status.get("phase") == "Pending" and "runningTime" in newest and "reason" not in newest


def _experiment(resource: Manifest) -> str:
    return str(resource["spec"]["tracking"]["experiment"])
