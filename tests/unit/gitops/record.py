"""TrainingRuns as the operator leaves them in every phase: recorded from the operator itself, over its stand-ins."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

from heimdall_api.contract import API_VERSION, KIND
from tests.unit.operator.builders import NOW
from tests.unit.operator.fakes import KEY, STAMP, World, controller

TIMES = {"startedAt": STAMP, "finishedAt": STAMP}
LATER_S = 5.0
LOOKS = 4
"""Looks until nothing changes any more."""


class Stage:
    """A TrainingRun on its way; each step is followed by the operator's looks."""

    def __init__(self, **spec: Any) -> None:
        self.world = World()
        self.now = NOW
        self.world.apply({"registration": {"model": "localizer"}, "retries": {"limit": 1}, **spec})

    def look(self) -> Stage:
        async def looks() -> None:
            for _ in range(LOOKS):
                operator = controller(self.world, lambda: self.now)
                await operator.refresh()
                with suppress(ConnectionError):  # MLflow is away: what is waited for is on the status
                    await operator.reconcile(KEY)

        asyncio.run(looks())
        self.now += timedelta(seconds=LATER_S)
        return self

    def pod(self, phase: str, **state: Any) -> Stage:
        """The newest attempt's pod, in a state."""
        newest = max(self.world.jobs.values(), key=lambda job: int(job["metadata"]["name"].rpartition("-a")[2]))
        self.world.pod_of(newest, phase=phase, **state)
        return self.look()

    def running(self) -> Stage:
        return self.pod("Running", running={"startedAt": STAMP})

    def ended(self, exit_code: int, **more: Any) -> Stage:
        phase = "Succeeded" if exit_code == 0 else "Failed"
        return self.pod(phase, terminated={**TIMES, "exitCode": exit_code, **more})

    def change(self, **spec: Any) -> Stage:
        """Somebody changes the spec."""
        assert self.world.run is not None
        self.world.run["spec"] |= spec
        self.world.run["metadata"]["generation"] += 1
        self.world.stamp(self.world.run)
        return self

    def delete(self) -> Stage:
        assert self.world.run is not None
        self.world.run["metadata"]["deletionTimestamp"] = STAMP
        return self

    def without_mlflow(self) -> Stage:
        self.world.mlflow_away = True
        return self.look()

    @property
    def resource(self) -> dict[str, Any]:
        assert self.world.run is not None
        return {"apiVersion": API_VERSION, "kind": KIND, **copy.deepcopy(self.world.run)}


def succeeded() -> Stage:
    return Stage().look().running().ended(0)


PHASES: dict[str, Callable[[], Stage]] = {
    "new": Stage,
    "waiting-for-mlflow": lambda: Stage().without_mlflow(),
    "pending": lambda: Stage().look(),
    "running": lambda: Stage().look().running(),
    "between-attempts": lambda: Stage().look().running().ended(3),
    "suspended": lambda: Stage(suspend=True).look(),
    "resumed-and-not-yet-seen": lambda: Stage(suspend=True).look().change(suspend=False),
    "succeeded": succeeded,
    "succeeded-and-changed": lambda: succeeded().change(ttlSecondsAfterFinished=60).look(),
    "failed": lambda: Stage().look().running().ended(1, message='{"reason": "UserError", "message": "boom"}'),
    "being-deleted": lambda: Stage().look().running().delete(),
}
"""How each recorded resource came about."""
