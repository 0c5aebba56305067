"""What kopf is told."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any
from urllib.parse import parse_qs, urlsplit

import aiohttp
import kopf
import pytest
from kopf._cogs.clients import fetching
from kopf._cogs.structs.references import Resource
from kopf._core.engines.activities import run_activity
from kopf._core.engines.indexing import OperatorIndexers
from kopf._core.engines.probing import health_reporter
from kopf._core.intents.causes import Activity

from heimdall_api.contract import GROUP, PLURAL, VERSION
from heimdall_operator import controller as controllers
from heimdall_operator import handlers, workqueue
from heimdall_operator.handlers import Handlers, _tune, register
from heimdall_operator.kube import SELECTOR
from heimdall_operator.settings import OperatorSettings
from heimdall_operator.store import Key
from tests.integration.servers import free_port
from tests.unit.operator.fakes import KEY, World, controller


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


def test_a_watch_that_fails_is_tried_again_for_ever() -> None:
    """kopf ends with the last of its tries: one namespace that was deleted would take the others along."""
    settings = kopf.OperatorSettings()
    _tune(settings)
    backoffs = settings.networking.error_backoffs
    assert isinstance(backoffs, Iterable)
    for _ in ("one call", "the next"):
        first = list(itertools.islice(backoffs, 2000))
        assert first[:7] == [1, 2, 4, 8, 16, 30, 30]
        assert first[-1] == 30


@pytest.mark.parametrize("resource", [Resource(GROUP, VERSION, PLURAL), Resource("batch", "v1", "jobs")], ids=str)
def test_kopf_lists_page_by_page(resource: Resource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one answer that holds all of 10,000 runs, much would stay in memory."""
    settings, asked = kopf.OperatorSettings(), []
    _tune(settings)

    async def get(url: str, **_: Any) -> dict[str, Any]:
        asked.append(parse_qs(urlsplit(url).query))
        return {"items": [], "metadata": {"resourceVersion": "1", "continue": "next" if len(asked) == 1 else ""}}

    async def fetch() -> None:
        listing = fetching.fetch_objs(settings=settings, resource=resource, namespace=None, logger=logging.getLogger())
        async for _ in listing:
            pass

    monkeypatch.setattr(fetching.api, "get", get)
    asyncio.run(fetch())
    assert [(query["limit"], query.get("continue")) for query in asked] == [(["500"], None), (["500"], ["next"])]


def test_a_start_that_fails_is_tried_again_before_the_probe_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new pod may reach nothing for some seconds; kopf would wait for a minute."""
    assert handlers.START_RETRY_S < 10
    monkeypatch.setattr(handlers, "START_RETRY_S", 0.01)
    tries = 0

    async def start(*_: object) -> object:
        nonlocal tries
        tries += 1
        if tries < 3:
            raise TimeoutError
        return object()

    monkeypatch.setattr(handlers, "_start", start)
    registry = kopf.OperatorRegistry()
    register(registry, OperatorSettings(tracking_uri="http://mlflow:5000", trainer_image="trainer:1"))
    starting = run_activity(
        lifecycle=kopf.lifecycles.all_at_once,
        registry=registry,
        settings=kopf.OperatorSettings(),
        activity=Activity.STARTUP,
        indices=OperatorIndexers().indices,
        memo=kopf.Memo(),
    )
    asyncio.run(asyncio.wait_for(starting, 30))
    assert tries == 3


async def probed() -> int:
    """What kopf's server answers a probe, from a server of its own: each keeps its answer for some seconds."""
    address = f"http://127.0.0.1:{free_port()}/healthz"
    registry, ready = kopf.OperatorRegistry(), asyncio.Event()
    register(registry, OperatorSettings(tracking_uri="http://mlflow:5000", trainer_image="trainer:1"))
    serving = health_reporter(
        address,
        memo=kopf.Memo(),
        indices=OperatorIndexers().indices,
        registry=registry,
        settings=kopf.OperatorSettings(),
        ready_flag=ready,
    )
    server = asyncio.create_task(serving)
    try:
        await asyncio.wait_for(ready.wait(), 30)
        # Less than kopf would wait before it tried the handler again.
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(20)) as client:
            return (await client.get(address)).status
    finally:
        server.cancel()
        await asyncio.gather(server, return_exceptions=True)


def test_the_probe_fails_at_once_when_a_look_has_held_up_the_others_for_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    for module in (controllers, workqueue):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))

    async def scenario() -> tuple[int, int]:
        nonlocal now
        operator, blocked = controller(World()), asyncio.Event()
        monkeypatch.setattr(Handlers, "_controller", operator)

        async def reconcile(key: Key) -> None:
            blocked.set()
            await asyncio.Event().wait()

        monkeypatch.setattr(operator, "reconcile", reconcile)
        operator.queue.add(KEY)
        worker = asyncio.create_task(operator.work())
        await blocked.wait()
        operator.queue.add(Key("team", "other"))
        before = await probed()
        now = controllers.STUCK_AFTER_S + 1
        after = await probed()
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
        return before, after

    assert asyncio.run(scenario()) == (200, 500)
