"""Brings Events to the API server: one for each transition, and after a restart those that are missing."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final

import structlog

from heimdall_api.contract import API_VERSION, KIND, MANAGED_BY
from heimdall_operator.events import Event, events_of
from heimdall_operator.kube import ForbiddenError, Kube, RefusedError
from heimdall_operator.mistakes import about
from heimdall_operator.observe import Observed, observe
from heimdall_operator.store import Manifest, Store

EVENTS_LIMIT: Final = 10_000
"""Events that wait while the API server is away; of more, the oldest are lost."""
EVENT_TRIES: Final = 60
EVENT_RETRY_S: Final = 5.0
EVENTS_RECALLED: Final = timedelta(hours=1)
"""How old a transition may be that is told after a restart: of older ones the API server has forgotten the Event."""
EVENT_NOTE_LIMIT: Final = 1024

log = structlog.get_logger()


@dataclass(frozen=True)
class _WaitingEvent:
    """An Event that is still to be recorded."""

    manifest: dict[str, Any]
    tries: int = 1


class EventRecorder:
    """Tells people of runs by Events; holds those that wait to be recorded."""

    def __init__(
        self, kube: Kube, store: Store, namespaces: Sequence[str | None], *, clock: Callable[[], datetime]
    ) -> None:
        """Nothing waits yet.

        Args:
            kube: Where Events are recorded.
            store: The TrainingRuns that are known.
            namespaces: The operator's; None is all of them.
            clock: The time in whole seconds.
        """
        self._kube = kube
        self._store = store
        self._namespaces = namespaces
        self._clock = clock
        self._events: deque[_WaitingEvent] = deque(maxlen=EVENTS_LIMIT)
        self._has_events = asyncio.Event()

    def tell(self, event: Event, observed: Observed) -> None:
        """Have an Event of a run recorded."""
        self._add(event_manifest(event, observed, self._clock()))

    def _add(self, manifest: dict[str, Any]) -> None:
        self._events.append(_WaitingEvent(manifest))
        self._has_events.set()

    async def recall(self) -> None:
        """Tell of what a status says happened and no Event does: its operator died between the two.

        One listing for a start, and then only what is missing: nothing has to be written down beforehand.
        """
        for namespace in self._namespaces:
            try:
                told = await self._kube.event_names(namespace, KIND)
            except Exception as error:  # noqa: BLE001 - an Event is a courtesy, never a reason to fail
                log.warning(
                    "Events could not be listed; what is missing stays so", of=namespace or "all", **about(error)
                )
                continue
            self._recall(namespace, told)

    def _recall(self, namespace: str | None, told: Collection[tuple[str, str]]) -> None:
        now = self._clock()
        keys = [key for key in self._store.known() if namespace in (None, key.namespace)]
        for resource in filter(None, map(self._store.get, keys)):
            for manifest in _recent_events(resource, now):
                if (manifest["metadata"]["namespace"], manifest["metadata"]["name"]) not in told:
                    self._add(manifest)

    async def record(self) -> None:
        """Record Events behind the looks: what is told to people must not hold the next step up."""
        while True:
            await self._has_events.wait()
            if not await self.record_waiting():
                await asyncio.sleep(EVENT_RETRY_S)

    async def record_waiting(self) -> bool:
        """Record what waits, in order, up to what can't be recorded now: that is tried again, after all others.

        Returns:
            Whether nothing waits any more.
        """
        while self._events:
            event = self._events.popleft()
            try:
                await self._kube.create_event(event.manifest["metadata"]["namespace"], event.manifest)
            except Exception as error:  # noqa: BLE001 - an Event is a courtesy, never a reason to fail
                if not isinstance(error, RefusedError | ForbiddenError) and event.tries < EVENT_TRIES:
                    self._events.append(replace(event, tries=event.tries + 1))
                    return False
                regarding = event.manifest["regarding"]
                log.warning(
                    "an Event could not be recorded",
                    namespace=regarding["namespace"],
                    trainingrun=regarding["name"],
                    uid=regarding["uid"],
                    reason=event.manifest["reason"],
                    **about(error),
                )
        self._has_events.clear()
        return True


def event_manifest(event: Event, observed: Observed, now: datetime) -> dict[str, Any]:
    """An Event; its name is made of the transition, so that one transition is one Event over every restart."""
    digest = hashlib.sha256(f"{observed.uid}/{event.key}/{event.reason}".encode()).hexdigest()[:16]
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{observed.name}.{digest}", "namespace": observed.namespace},
        "eventTime": now.isoformat(timespec="microseconds").replace("+00:00", "Z"),
        "type": event.kind,
        "reason": event.reason[:128],
        "action": event.reason[:128],
        # The API server counts bytes.
        "note": event.message.encode()[:EVENT_NOTE_LIMIT].decode(errors="ignore"),
        "reportingController": MANAGED_BY,
        "reportingInstance": MANAGED_BY,
        "regarding": {
            "apiVersion": API_VERSION,
            "kind": KIND,
            "name": observed.name,
            "namespace": observed.namespace,
            "uid": observed.uid,
        },
    }


def _recent_events(resource: Manifest, now: datetime) -> list[dict[str, Any]]:
    """Events of what a TrainingRun's status says happened lately."""
    try:
        observed = observe(resource)
    except ValueError:
        return []  # a status that can't be read keeps no other run's Events back
    recent = (item for item in events_of(observed.status) if item.time is None or now - item.time < EVENTS_RECALLED)
    return [event_manifest(event, observed, event.time or now) for event in recent]
