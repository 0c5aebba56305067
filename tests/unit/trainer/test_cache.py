"""The folder of features: what goes first, what is never believed, and disks that take nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from heimdall_trainer.data import cache as module
from heimdall_trainer.data.cache import ENTRY_BYTES, UNUSED_S, FolderCache, pack, unpack


def features(value: float) -> Any:
    return np.full((3, 128, 32), value, np.float32)


def key(number: int) -> str:
    return f"{number:064}"


@settings(deadline=None, max_examples=30)
@given(st.integers(0, ENTRY_BYTES - 1), st.integers(0, 7))
def test_one_bit_that_was_changed_is_noticed(byte: int, bit: int) -> None:
    entry = bytearray(pack(features(0.5)))
    entry[byte] ^= 1 << bit
    assert unpack(bytes(entry)) is None


def test_what_comes_out_is_what_went_in_and_may_be_written_to() -> None:
    back = unpack(pack(features(0.1)))
    assert back is not None
    assert np.array_equal(back, features(0.1))
    back += 1


def test_what_was_not_used_for_long_goes_first(tmp_path: Path) -> None:
    first = FolderCache(tmp_path, limit_bytes=100 * ENTRY_BYTES)
    for number in range(10):
        first.put(key(number), features(number))
    long_ago = time.time() - 2 * UNUSED_S
    for age, file in enumerate(sorted(tmp_path.rglob("*.features"))):
        os.utime(file, (long_ago + age, long_ago + age))
    assert first.get(key(0)) is not None, "used now"

    second = FolderCache(tmp_path, limit_bytes=11 * ENTRY_BYTES)
    for number in range(10, 13):
        second.put(key(number), features(number))

    there = [number for number in range(13) if second.get(key(number)) is not None]
    assert 0 in there
    assert 1 not in there
    assert {10, 11, 12} <= set(there)
    assert len(there) <= 11


def test_what_a_kill_left_half_written_goes_too(tmp_path: Path) -> None:
    half = tmp_path / "00" / f".{key(1)}.features.abc"
    half.parent.mkdir()
    half.write_bytes(bytes(3 * ENTRY_BYTES))
    os.utime(half, (0, 0))

    FolderCache(tmp_path, limit_bytes=3 * ENTRY_BYTES).put(key(2), features(2))

    assert not half.exists()


def test_a_disk_that_takes_nothing_is_told_once_and_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def full(file: Path, content: bytes) -> None:
        tries.append(file)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_whole", full)
    cache = FolderCache(tmp_path, limit_bytes=100 * ENTRY_BYTES)
    with capture_logs() as lines:
        for number in range(5):
            cache.put(key(number), features(number))

    assert [line["error"] for line in lines] == ["No space left on device"]
    assert len(tries) == 1, "it is left alone for a while"
    assert cache.get(key(0)) is None


def test_a_cache_of_another_user_is_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FolderCache(tmp_path, limit_bytes=100 * ENTRY_BYTES)
    cache.put(key(1), features(1))
    file = next(tmp_path.rglob("*.features"))
    assert file.stat().st_mode & 0o777 == 0o644, "every user may read it"
    os.utime(file, (0, 0))

    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.get(key(1)) is not None
