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
from heimdall_trainer.data.cache import UNUSED_S, FolderCache, pack, unpack
from tests.unit.trainer.builders import ENTRY_BYTES


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


class Clock:
    """The time, set by the test."""

    def __init__(self, now: float) -> None:
        self.now = now

    def time(self) -> float:
        return self.now

    monotonic = time


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that were looked at whole, in order."""
    made: list[Path] = []
    entries = FolderCache._entries

    def counted(self: FolderCache) -> Any:
        made.append(self._folder)
        return entries(self)

    monkeypatch.setattr(FolderCache, "_entries", counted)
    return made


def test_a_full_folder_is_looked_at_once_for_all_processes_until_something_may_go(
    tmp_path: Path, looks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(time.time())
    monkeypatch.setattr(module, "time", clock)
    first, second = (FolderCache(tmp_path, limit_bytes=5 * ENTRY_BYTES) for _ in range(2))
    for number in range(5):
        first.put(key(number), features(number))
        os.utime(first._file(key(number)), (clock.now + number, clock.now + number))
    looks.clear()

    with capture_logs() as lines:
        for turn in range(100):
            clock.now += UNUSED_S / 200
            for cache in (first, second):
                cache.put(key(10 + turn), features(turn))
    assert len(looks) == 1, "the other finds what the first has found"
    assert len(lines) == 2, "each tells once"

    clock.now += UNUSED_S / 2 + 1  # the oldest has not been used for long enough now
    second.put(key(9), features(9))
    assert len(looks) == 2
    assert second.get(key(9)) is not None
    assert second.get(key(0)) is None
    assert second.get(key(4)) is not None


def test_a_mark_of_another_limit_or_far_in_the_future_counts_for_nothing(tmp_path: Path, looks: list[Path]) -> None:
    small = FolderCache(tmp_path, limit_bytes=ENTRY_BYTES)
    for number in range(2):
        small.put(key(number), features(number))
    assert small.get(key(1)) is None
    FolderCache(tmp_path, limit_bytes=3 * ENTRY_BYTES).put(key(1), features(1))
    assert small.get(key(1)) is not None

    years = time.time() + 1000 * UNUSED_S
    os.utime(small._mark, (years, years))
    looks.clear()
    FolderCache(tmp_path, limit_bytes=ENTRY_BYTES).put(key(2), features(2))
    assert len(looks) == 1


def test_what_a_full_folder_has_left_is_enough_for_what_is_small(tmp_path: Path) -> None:
    cache = FolderCache(tmp_path, limit_bytes=ENTRY_BYTES + ENTRY_BYTES // 2)
    for number in range(2):
        cache.put(key(number), features(number))
    small = np.ones((3, 2), np.float32)
    cache.put(key(7), small)
    assert cache.get(key(1)) is None
    assert np.array_equal(cache.get(key(7), (3, 2)), small)


def test_a_disk_that_takes_nothing_is_not_looked_at_each_time(
    tmp_path: Path, looks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    clock = Clock(1000.0)
    monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(module, "write_whole", full)
    cache = FolderCache(tmp_path, limit_bytes=100 * ENTRY_BYTES)
    for _ in range(10):
        cache.put(key(0), features(0))
        clock.now += 2 * module.PAUSE_S
    assert len(looks) == 1


def test_what_another_thread_is_writing_is_not_a_reason_to_call_the_folder_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = FolderCache(tmp_path, limit_bytes=3 * ENTRY_BYTES)
    write = module.write_whole

    def beside(file: Path, content: bytes) -> None:
        write(file, content)
        if file.stem == key(2):
            # There, and still under way: counted twice.
            cache.put(key(3), features(3))

    monkeypatch.setattr(module, "write_whole", beside)
    for number in (1, 2):
        cache.put(key(number), features(number))
    cache.put(key(4), features(4))

    assert cache.get(key(4)) is not None
