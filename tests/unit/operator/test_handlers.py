"""What kopf is told."""

from __future__ import annotations

import asyncio
import socket
from types import SimpleNamespace
from typing import Any

import aiohttp
import kopf
import pytest
from kopf._cogs.structs.references import Resource
from kopf._core.engines.indexing import OperatorIndexers
from kopf._core.engines.probing import health_reporter

from heimdall_api.contract import GROUP, PLURAL, VERSION
from heimdall_operator.handlers import SELECTOR, Handlers, _tune, register
from heimdall_operator.settings import OperatorSettings


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


@pytest.mark.parametrize(
    ("stuck", "answer"), [(None, 200), ("nothing was looked at for 900 s", 500)], ids=["looks", "stuck"]
)
def test_the_probe_answers_at_once(monkeypatch: pytest.MonkeyPatch, stuck: str | None, answer: int) -> None:
    controller: Any = SimpleNamespace(stuck_reason=lambda resync_s: stuck, queue=[])
    monkeypatch.setattr(Handlers, "_controller", controller)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{probe.getsockname()[1]}/healthz"

    async def scenario() -> int:
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

    assert asyncio.run(scenario()) == answer
