"""What is kept of logs: their end, without secrets, within bounds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio import client as kubernetes
from kubernetes.aio.client.exceptions import ApiException

from heimdall_operator import accounts, kube

LINE = "GET http://alice:hunter2@store/x?token=abc done\n"


def test_no_secret_is_left_where_a_long_log_is_cut_into_pieces() -> None:
    text = LINE * (5 * accounts.PIECE // len(LINE)) + "x" * (2 * accounts.PIECE) + LINE

    redacted = asyncio.run(accounts._redacted(text))

    assert "hunter2" not in redacted
    assert "abc" not in redacted
    assert redacted.count("http://***@store/x?token=*** done\n") == text.count(LINE)


def test_of_a_log_with_very_long_lines_the_end_is_kept() -> None:
    lines = [f"{number:06} {'#' * 2000}\n" for number in range(9000)]
    asked: list[dict[str, str]] = []

    async def text(path: str, query: list[tuple[str, str]]) -> bytes:
        asked.append(dict(query))
        tail = "".join(lines[-int(asked[-1]["tailLines"]) :]).encode()
        return tail[: int(asked[-1]["limitBytes"])]  # as the API server does: from the first of the lines on

    client: Any = kube.Kube.__new__(kube.Kube)
    client._text = text

    kept = asyncio.run(client.read_log("team", "pod", "trainer"))

    assert kept.endswith(lines[-1])
    assert len(kept) <= kube.LOG_BYTES
    assert len(asked) == 2


@asynccontextmanager
async def server(pieces: Iterable[bytes], status: int = 200) -> AsyncIterator[tuple[kube.Kube, list[dict[str, str]]]]:
    """An API server that hands a log out piece by piece."""
    asked: list[dict[str, str]] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(dict(request.query))
        response = web.StreamResponse(status=status)
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_get("/api/v1/namespaces/team/pods/pod/log", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    reached = kube.Kube(timeout_s=10)
    reached._client = kubernetes.ApiClient(kubernetes.Configuration(host=f"http://127.0.0.1:{runner.addresses[0][1]}"))
    try:
        yield reached, asked
    finally:
        await reached._client.close()
        await runner.cleanup()


def test_a_pod_that_is_about_to_end_is_listened_to_until_it_has_ended() -> None:
    async def scenario() -> None:
        heard = bytearray()
        async with server(b"%06d\n" % number for number in range(1000)) as (reached, asked):
            await reached.follow_log("team", "pod", "trainer", heard, limit=70, timeout_s=10)
        assert asked == [{"container": "trainer", "follow": "true", "tailLines": str(kube.LOG_LINES)}]
        assert heard.endswith(b"000998\n000999\n")
        assert 70 <= len(heard) <= 140, "the end is left"

    asyncio.run(scenario())


def test_a_pod_that_can_not_be_listened_to_is_told_of() -> None:
    async def scenario() -> None:
        async with server([b'{"message": "the node is away"}'], status=502) as (reached, _):
            with pytest.raises(ApiException, match="the node is away"):
                await reached.follow_log("team", "pod", "trainer", bytearray(), limit=70, timeout_s=10)

    asyncio.run(scenario())


@pytest.mark.parametrize("words", kube.LOG_GONE, ids=lambda words: words.decode())
@pytest.mark.parametrize("more", [b"", b"\nis what the trainer says"], ids=["the kubelet's", "a trainer's"])
def test_what_a_kubelet_says_of_a_container_that_it_has_removed_is_no_log(words: bytes, more: bytes) -> None:
    words = words + b"containerd://dd9ba1e6" + more

    async def scenario() -> str:
        async with server([words]) as (reached, _):
            return await reached.read_log("team", "pod", "trainer")

    if more:
        assert asyncio.run(scenario()) == words.decode()
    else:
        with pytest.raises(kube.LogGoneError):
            asyncio.run(scenario())
