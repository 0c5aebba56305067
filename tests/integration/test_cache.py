"""The feature cache: a folder that real processes share, and a real Redis that goes away or hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from structlog.testing import capture_logs

from heimdall_trainer.data.cache import REDIS_PREFIX, Caches, FolderCache, RedisCache, pack
from heimdall_trainer.data.features import FeatureSource
from heimdall_trainer.data.generator import generate
from heimdall_trainer.data.recordings import RecordingStore
from heimdall_trainer.data.sessions import Recording, SessionStore
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.settings import DataSettings, load_data_settings
from tests.integration.certificates import make_certificate
from tests.integration.servers import ROOT, Redis, free_port

PROCESSES = 3
TIMEOUT_S = 600
"""Only so that a test that hangs ends: importing torch takes long on a busy machine."""
ENTRY_BYTES = len(pack(np.zeros(SHAPE, np.float32)))
SLOW_S = 0.2
ENDLESS_S = 3600.0
SHARING = """
import hashlib, sys
import numpy as np
from pathlib import Path
from heimdall_trainer.data.cache import FolderCache
folder, limit = Path(sys.argv[1]), int(sys.argv[2])
cache = FolderCache(folder, limit_bytes=limit, unused_s=0)
wrong = 0
for turn in range(150):
    number = turn % 30
    key = hashlib.sha256(str(number).encode()).hexdigest()
    expected = np.full((3, 128, 32), number, np.float32)
    found = cache.get(key)
    if found is None:
        cache.put(key, expected)
    elif not np.array_equal(found, expected):
        wrong += 1
print(wrong)
"""


def features(value: float) -> Any:
    return np.full((3, 128, 32), value, np.float32)


def test_processes_that_share_a_full_folder_never_read_what_is_not_whole(tmp_path: Path) -> None:
    """All write, read and remove the same thirty entries, of which there is room for twenty."""
    limit = 20 * ENTRY_BYTES
    command = [sys.executable, "-c", SHARING, str(tmp_path), str(limit)]
    processes = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(PROCESSES)
    ]
    for process in processes:
        printed, errors = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0, errors
        # What one has just begun to write another may take for unused here: it says so, and goes on.
        assert printed.splitlines()[-1] == "0", printed
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    assert set(sizes) == {ENTRY_BYTES}
    assert sum(sizes) <= limit + PROCESSES * ENTRY_BYTES


@pytest.fixture
def recorded(tmp_path: Path) -> DataSettings:
    settings = load_data_settings(
        database_url=f"sqlite:///{tmp_path}/heimdall.db",
        recordings_url=f"file:{tmp_path}/recordings",
        cache_dir=tmp_path / "cache",
    )
    generate(settings, sessions=1, transmissions_per_session=1, receivers=1, samples=1024)
    return settings


def recording_of(settings: DataSettings) -> Recording:
    store = SessionStore.open(settings)
    try:
        return store.transmissions(store.approved())[0].recordings[0]
    finally:
        store.close()


def features_of(settings: DataSettings) -> FeatureSource:
    return FeatureSource(RecordingStore.open(settings), Caches.open(settings))


def with_redis(settings: DataSettings, url: str, folder: str) -> DataSettings:
    """Another machine: the same recordings, a cache folder of its own."""
    return load_data_settings(**{**dict(settings), "redis_url": url, "cache_dir": settings.cache_dir / folder})


def test_what_one_machine_computed_another_takes_from_redis(recorded: DataSettings, redis: Redis) -> None:
    recording = recording_of(recorded)
    first = features_of(with_redis(recorded, redis.url, "one")).get(recording)
    for file in Path(recorded.recordings_url.removeprefix("file:")).rglob("*.sigmf-*"):
        file.unlink()

    second = with_redis(recorded, redis.url, "two")
    assert np.array_equal(features_of(second).get(recording), first)
    assert len(list(second.cache_dir.rglob("*.features"))) == 1, "it is in the folder now"
    redis.stop()
    assert np.array_equal(features_of(second).get(recording), first)


def test_a_redis_that_is_asked_by_tls_is_trusted_by_its_authority_alone(recorded: DataSettings, tmp_path: Path) -> None:
    recording = recording_of(recorded)
    certificate = make_certificate(tmp_path / "certificate")
    stranger = make_certificate(tmp_path / "stranger").authority
    (tmp_path / "redis").mkdir()
    redis = Redis(tmp_path / "redis", certificate)
    redis.start()
    try:
        features_of(with_redis(recorded, redis.url, "one")).get(recording)
        with redis.client() as client:
            assert len(list(client.scan_iter(f"{REDIS_PREFIX}*"))) == 1
        with capture_logs() as lines:
            wrong = redis.url.replace(str(certificate.authority), str(stranger))
            features_of(with_redis(recorded, wrong, "two")).get(recording)
    finally:
        redis.stop()
    (told,) = [line for line in lines if "HEIMDALL_REDIS_URL" in line["event"]]
    assert "CERTIFICATE_VERIFY_FAILED" in told["error"]


def test_a_broken_entry_in_redis_is_computed_again(recorded: DataSettings, redis: Redis) -> None:
    recording = recording_of(recorded)
    first = features_of(with_redis(recorded, redis.url, "one")).get(recording)
    with redis.client() as client:
        (key,) = client.scan_iter(f"{REDIS_PREFIX}*")
        client.set(key, client.get(key)[:-7] + b"garbage")

        assert np.array_equal(features_of(with_redis(recorded, redis.url, "two")).get(recording), first)
        assert client.ttl(key) > 0, "it was written anew"


def test_a_redis_that_is_away_is_told_once_without_its_password(recorded: DataSettings) -> None:
    settings = with_redis(recorded, f"redis://:canary@127.0.0.1:{free_port()}", "one")
    with capture_logs() as lines:
        source = features_of(settings)
        for _ in range(3):
            source.get(recording_of(recorded))
            for file in settings.cache_dir.rglob("*.features"):
                file.unlink()

    told = [line for line in lines if "HEIMDALL_REDIS_URL" in line["event"]]
    assert len(told) == 1
    assert "canary" not in str(lines)


def test_a_wrong_password_costs_no_training(recorded: DataSettings, redis: Redis) -> None:
    with capture_logs() as lines:
        features_of(with_redis(recorded, redis.url.replace(redis.password, "wrong"), "one")).get(recording_of(recorded))
    assert any("HEIMDALL_REDIS_URL" in line["event"] for line in lines)


def test_a_redis_that_hangs_is_left_alone_and_taken_up_again(redis: Redis) -> None:
    cache = RedisCache(redis.url, timeout_s=SLOW_S, pause_s=ENDLESS_S)
    cache.put("k", features(1))
    assert cache.get("k") is not None
    process = redis._process
    assert process is not None

    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert cache.get("k") is None
        began = time.monotonic()
        for _ in range(1000):
            assert cache.get("k") is None
        assert time.monotonic() - began < 1000 * SLOW_S, "it is not asked each time"
    finally:
        os.kill(process.pid, signal.SIGCONT)

    cache._alone_until = {}  # the pause is over
    assert np.array_equal(cache.get("k"), features(1))


def test_a_redis_that_is_full_gives_what_it_holds(redis: Redis) -> None:
    cache = RedisCache(redis.url, pause_s=ENDLESS_S)
    cache.put("held", features(1))
    with redis.client() as client, capture_logs() as lines:
        client.config_set("maxmemory", 1)
        try:
            for number in range(3):
                cache.put(f"k{number}", features(2))
            assert np.array_equal(cache.get("held"), features(1))
        finally:
            client.config_set("maxmemory", 0)
    (told,) = [line for line in lines if "HEIMDALL_REDIS_URL" in line["event"]]
    assert "maxmemory" in told["error"]


def test_a_client_survives_a_fork_and_a_pickle(redis: Redis, tmp_path: Path) -> None:
    import multiprocessing

    source = RedisCache(redis.url)
    source.put("forked", features(2))
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            found = pool.apply_async(source.get, ("forked",)).get(TIMEOUT_S)
        assert np.array_equal(found, features(2))


def test_a_folder_that_is_full_of_what_is_used_takes_nothing_more_and_says_so_once(tmp_path: Path) -> None:
    with capture_logs() as lines:
        cache = FolderCache(tmp_path, limit_bytes=5 * ENTRY_BYTES)
        for number in range(9):
            cache.put(f"{number:064}", features(number))

    assert sum(file.stat().st_size for file in tmp_path.rglob("*.features")) <= 5 * ENTRY_BYTES
    assert [line["event"].partition(";")[0] for line in lines] == ["the feature cache is full"]
    assert np.array_equal(cache.get(f"{0:064}"), features(0))
