"""What an operator's watches bring: of each kind every event in its order, and of the kinds each in its own time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple

from heimdall_api.contract import LABEL_ATTEMPT
from heimdall_operator.controller import Controller
from heimdall_operator.handlers import Handlers
from heimdall_operator.settings import OperatorSettings
from heimdall_operator.store import JOB_NAME

Kind = Literal["TrainingRun", "Job", "Pod"]
KINDS: Final[tuple[Kind, ...]] = ("TrainingRun", "Job", "Pod")
SETTINGS: Final = OperatorSettings(tracking_uri="http://mlflow", trainer_image="trainer:1")


class Event(NamedTuple):
    """A line of a watch."""

    type: Literal["MODIFIED", "DELETED"]
    """A watch says ADDED too; who is told can't tell the two apart."""
    object: dict[str, Any]


class History:
    """All that becomes of a world's objects, kind by kind, in the order in which the API server tells it."""

    def __init__(self, there: Callable[[], Mapping[tuple[Kind, str], dict[str, Any]]]) -> None:
        self._there = there
        """What there is at the moment, by kind and name."""
        self._told: dict[tuple[Kind, str], dict[str, Any]] = {}
        self._events: dict[Kind, list[Event]] = {kind: [] for kind in KINDS}

    def add(self, item: dict[str, Any]) -> None:
        """Something was made, or has changed."""
        self.notice_ends()
        told = copy.deepcopy(item)
        self._told[kind_of(item), item["metadata"]["name"]] = told
        self._events[kind_of(item)].append(Event("MODIFIED", told))

    def notice_ends(self) -> None:
        """Tell of what is gone, as it was last."""
        there = self._there()
        for (kind, name), told in list(self._told.items()):
            now = there.get((kind, name))
            if now is None or now["metadata"].get("uid") != told["metadata"].get("uid"):
                del self._told[kind, name]
                self._events[kind].append(Event("DELETED", told))

    def length(self, kind: Kind) -> int:
        """How many events of a kind there are."""
        return len(self._events[kind])

    def since(self, kind: Kind, seen: int) -> list[Event]:
        """The events of a kind after those that were seen."""
        return self._events[kind][seen:]


class Watches:
    """One operator's watches; what there was when they began, it has listed."""

    def __init__(self, history: History, operator: Controller) -> None:
        history.notice_ends()
        self._history = history
        self._seen = {kind: history.length(kind) for kind in KINDS}
        handlers = Handlers(SETTINGS)
        handlers._started = operator
        self._told = {"TrainingRun": handlers.training_run, "Job": handlers.job, "Pod": handlers.pod}

    async def bring(self, kind: Kind, most: int | None = None) -> None:
        """Have a watch bring what is due, or only so many events of it."""
        self._history.notice_ends()
        due = self._history.since(kind, self._seen[kind])[:most]
        self._seen[kind] += len(due)
        for event in due:
            await self._told[kind](event={"type": event.type, "object": copy.deepcopy(event.object)})


def kind_of(item: dict[str, Any]) -> Kind:
    """What an object is: its labels tell."""
    labels = item["metadata"].get("labels") or {}
    if JOB_NAME in labels:
        return "Pod"
    return "Job" if LABEL_ATTEMPT in labels else "TrainingRun"
