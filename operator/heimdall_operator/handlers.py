"""kopf glue: an event of a TrainingRun, a Job or a pod says only which run to look at again.

kopf watches, reconnects, serves the probe and handles signals. Its own handlers for changes are not used: they would
keep their state in annotations and finalizers, while here all state is observed anew at every look.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import Any, Final, cast

import kopf

from heimdall_api.contract import GROUP, PLURAL, VERSION
from heimdall_operator import metrics
from heimdall_operator.accounts import Keeper
from heimdall_operator.act import Actor
from heimdall_operator.controller import Controller
from heimdall_operator.kube import OURS, PAGE, SELECTOR, Kube
from heimdall_operator.manifests import TrainerDefaults
from heimdall_operator.mlflow_gateway import MlflowGateway
from heimdall_operator.settings import OperatorSettings
from heimdall_operator.store import ChildKind, Key, Store
from heimdall_tracking.pauses import doubling_s

SERVER_TIMEOUT_S: Final = 300
CLIENT_TIMEOUT_S: Final = 310
CONNECT_TIMEOUT_S: Final = 30
IDLE_TIMEOUT_S: Final = 0.1
LAST_EVENTS_TIMEOUT_S: Final = 5
START_RETRY_S: Final = 5.0
"""How soon after a failure the start is tried again: a new pod may reach nothing until its node has heard of it."""
WATCH_RETRY_S: Final = 1.0
WATCH_RETRY_LIMIT_S: Final = 30.0


class NoDiffs(kopf.DiffBaseStorage):
    """Keeps and compares nothing: kopf would copy every object of every event, for handlers that are not used."""

    def build(self, **_: Any) -> kopf.BodyEssence:
        """What a change would be seen in."""
        return cast("kopf.BodyEssence", {})

    def fetch(self, **_: Any) -> kopf.BodyEssence | None:
        """What was kept."""
        return None

    def store(self, **_: Any) -> None:
        """Keep nothing."""


class Backoffs:
    """How long kopf waits after each failure in a row of one of its calls: without end.

    Where these end, kopf ends the process: for one namespace that was deleted with its Role, all others would be left
    alone too, and what only this process knows (what hangs, since when) would be lost. Of answers that kopf does not
    try again (410, where a listing took longer than its pages are kept, say) the process still ends, and starts anew.
    """

    def __iter__(self) -> Iterator[float]:
        """Seconds before each further try."""
        return doubling_s(WATCH_RETRY_S, WATCH_RETRY_LIMIT_S)


class Handlers:
    """The operator's side of kopf's calls."""

    def __init__(self, settings: OperatorSettings) -> None:
        self._settings = settings
        self._stack = AsyncExitStack()
        self._started: Controller | None = None

    @property
    def _controller(self) -> Controller:
        assert self._started is not None  # noqa: S101 - watches and probes begin after startup
        return self._started

    async def start(self, settings: kopf.OperatorSettings, **_: Any) -> None:
        """Begin to look at runs."""
        _tune(settings)
        try:
            self._started = await _start(self._stack, self._settings)
        except BaseException:
            # It is tried again: what is open, such as the metrics' port, would be in the way.
            stack, self._stack = self._stack, AsyncExitStack()
            await stack.aclose()
            raise

    async def stop(self, **_: Any) -> None:
        """Let go of everything; a look under way is taken up by the next operator."""
        await self._stack.aclose()

    def probe(self, **_: Any) -> str:
        """Fail when nothing was looked at for too long."""
        reason = self._controller.stuck_reason(self._settings.resync_seconds)
        if reason is not None:
            # Any other error kopf would try again before it answers, for longer than a probe waits.
            raise kopf.PermanentError(f"the operator is stuck: {reason}")
        return f"{len(self._controller.queue)} waiting"

    async def training_run(self, event: kopf.RawEvent, **_: Any) -> None:
        """A TrainingRun changed."""
        body = cast("dict[str, Any]", event["object"])
        if event["type"] == "DELETED":
            key = Key(body["metadata"]["namespace"], body["metadata"]["name"])
            self._controller.store.drop(key, body["metadata"]["uid"])
            self._controller.queue.add(key)  # a look at what is gone forgets all that was known of it
        elif (known := self._controller.store.put(body)) is not None:
            self._controller.queue.add(known)

    async def job(self, event: kopf.RawEvent, **_: Any) -> None:
        """A Job of ours changed."""
        self._child("Job", event)

    async def pod(self, event: kopf.RawEvent, **_: Any) -> None:
        """A pod of ours changed."""
        self._child("Pod", event)

    def _child(self, kind: ChildKind, event: kopf.RawEvent) -> None:
        store = self._controller.store
        take = store.drop_child if event["type"] == "DELETED" else store.put_child
        key = take(kind, cast("dict[str, Any]", event["object"]))
        if key is not None:
            self._controller.queue.add(key)


def register(registry: kopf.OperatorRegistry, settings: OperatorSettings) -> None:
    """Register every handler.

    Args:
        registry: kopf's registry.
        settings: The operator's settings.
    """
    handlers = Handlers(settings)
    kopf.on.login(registry=registry)(login)
    kopf.on.startup(registry=registry, backoff=START_RETRY_S)(handlers.start)
    kopf.on.cleanup(registry=registry)(handlers.stop)
    kopf.on.probe(registry=registry, id="looking")(handlers.probe)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(handlers.training_run)
    kopf.on.event("batch", "v1", "jobs", labels=OURS, registry=registry)(handlers.job)
    kopf.on.event("", "v1", "pods", labels=OURS, registry=registry)(handlers.pod)


def login(**more: Any) -> Any:
    """In a pod its service account, elsewhere the kubeconfig."""
    return kopf.login_with_service_account(**more) or kopf.login_with_kubeconfig(**more)


def _tune(settings: kopf.OperatorSettings) -> None:
    """Bound every wait; leave batching.worker_limit unset: one slow handler would hold up all the others."""
    settings.watching.server_timeout = SERVER_TIMEOUT_S
    settings.watching.client_timeout = CLIENT_TIMEOUT_S
    settings.watching.connect_timeout = CONNECT_TIMEOUT_S
    settings.networking.request_timeout = CONNECT_TIMEOUT_S
    settings.networking.error_backoffs = Backoffs()
    # kopf gives each object a task that keeps its last event, and ends it when no other has come for so long: of a
    # listing there are as many as objects, for what is taken in at once.
    settings.watching.chunk_size = PAGE
    settings.queueing.idle_timeout = IDLE_TIMEOUT_S
    # The CRD is there before the operator is; looking out for new ones would need rights on all of them.
    settings.scanning.disabled = True
    # Events of the resource are written by the controller, one for each transition; kopf's log lines are no Events.
    settings.posting.enabled = False
    settings.posting.level = logging.CRITICAL
    settings.persistence.diffbase_storage = NoDiffs()
    # Handlers' labels are compared here; by these the server leaves out the pods and Jobs of everybody else.
    settings.watching.label_selectors["pods"] = SELECTOR
    settings.watching.label_selectors["batch", "jobs"] = SELECTOR


async def _start(stack: AsyncExitStack, settings: OperatorSettings) -> Controller:
    kube = await stack.enter_async_context(Kube(timeout_s=settings.request_timeout_seconds))
    mlflow = MlflowGateway(settings.tracking_uri)
    stack.callback(mlflow.close)
    store = Store()
    defaults = TrainerDefaults(
        image=settings.trainer_image,
        image_pull_policy=settings.image_pull_policy,
        secret=settings.trainer_secret,
        tracking_uri=settings.tracking_uri,
        grace_period_s=settings.grace_period_seconds,
        ca=settings.ca_bundle,
    )
    keeper = Keeper(kube, mlflow, kube.clock)
    stack.callback(keeper.close)
    controller = Controller(
        kube=kube,
        mlflow=mlflow,
        store=store,
        actor=Actor(kube, mlflow, store, defaults, keeper, clock=kube.clock),
        public_url=settings.public_url,
        namespaces=settings.namespace_list,
        lost_pod_s=settings.lost_pod_seconds,
        clock=kube.clock,
    )
    stack.callback(controller.queue.close)
    stack.callback(metrics.serve(controller, settings.metrics_port).shutdown)
    # Everything is known before the first look: a look that saw a run without its Job would make another.
    await controller.refresh()
    stack.push_async_callback(_say_the_last, controller)
    coroutines = [
        mlflow.prepare(),
        controller.resync(settings.resync_seconds),
        controller.progress.follow(settings.progress_seconds),
        controller.events.recall(),
        controller.events.record(),
        *(controller.work() for _ in range(settings.workers)),
    ]
    for coroutine in coroutines:
        stack.push_async_callback(_cancel, asyncio.create_task(coroutine))
    return controller


async def _say_the_last(controller: Controller) -> None:
    """Record the Events that still wait, if the API server takes them at once."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(controller.events.record_waiting(), LAST_EVENTS_TIMEOUT_S)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
