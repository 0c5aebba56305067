"""What is kept of logs: their end, without secrets, within bounds."""

from __future__ import annotations

import asyncio
from typing import Any

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

    async def text(method: str, path: str, query: list[tuple[str, str]]) -> bytes:
        asked.append(dict(query))
        tail = "".join(lines[-int(asked[-1]["tailLines"]) :]).encode()
        return tail[: int(asked[-1]["limitBytes"])]  # as the API server does: from the first of the lines on

    client: Any = kube.Kube.__new__(kube.Kube)
    client._text = text

    kept = asyncio.run(client.read_log("team", "pod", "trainer"))

    assert kept.endswith(lines[-1])
    assert len(kept) <= kube.LOG_BYTES
    assert len(asked) == 2
