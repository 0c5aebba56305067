"""Recordings in a real PostgreSQL and MinIO: generated, read back, and what is wrong with them told."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psycopg
import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from structlog.testing import capture_logs

from heimdall_trainer.data import HeimdallDataset, RecordingStore, SessionStore, generate
from heimdall_trainer.data import recordings as recordings_module
from heimdall_trainer.data.generator import session_id
from heimdall_trainer.data.recordings import UnreadableError, data_key
from heimdall_trainer.data.sessions import POOL_SIZE, SILENCE_S, Recording, Session, Transmission
from heimdall_trainer.errors import ConfigurationError, DataError
from heimdall_trainer.settings import DataSettings
from tests.integration.servers import Minio, Postgres, wait_until
from tests.trainer_command import heimdall_train

SEED = 7
SIZE: dict[str, Any] = {"transmissions_per_session": 2, "receivers": 3, "samples": 4096, "seed": SEED}
SESSIONS = 2
RECORDINGS = SESSIONS * 2 * 3
TIMEOUT_S = 180


@pytest.fixture
def settings(postgres: Postgres, minio: Minio, name: str, tmp_path: Path) -> DataSettings:
    """A database and a bucket of the test's own."""
    place = f"{name[:30].strip('-')}-{secrets.token_hex(3)}"
    postgres.create_database(place)
    minio.s3.create_bucket(Bucket=place)
    return DataSettings(
        database_url=postgres.url(place),  # type: ignore[arg-type]
        recordings_url=f"s3://{place}/iq",
        s3_endpoint_url=minio.url,
        s3_access_key=minio.access_key,  # type: ignore[arg-type]
        s3_secret_key=minio.secret_key,  # type: ignore[arg-type]
        cache_dir=tmp_path / "cache",
    )


@pytest.fixture
def filled(settings: DataSettings) -> DataSettings:
    assert generate(settings, sessions=SESSIONS, **SIZE) == SESSIONS
    return settings


def bucket_of(settings: DataSettings) -> str:
    return settings.recordings_url.removeprefix("s3://").partition("/")[0]


def objects(settings: DataSettings, minio: Minio) -> dict[str, bytes]:
    bucket = bucket_of(settings)
    keys = [item["Key"] for item in minio.s3.list_objects_v2(Bucket=bucket).get("Contents", [])]
    return {key: minio.s3.get_object(Bucket=bucket, Key=key)["Body"].read() for key in keys}


def transmissions(settings: DataSettings) -> list[Transmission]:
    store = SessionStore.open(settings)
    try:
        return store.transmissions(store.approved())
    finally:
        store.close()


def recordings(settings: DataSettings) -> list[Recording]:
    return [recording for transmission in transmissions(settings) for recording in transmission.recordings]


def test_what_was_generated_is_read_back(filled: DataSettings, minio: Minio, tmp_path: Path) -> None:
    local = DataSettings(
        database_url=f"sqlite:///{tmp_path}/local.db",  # type: ignore[arg-type]
        recordings_url=f"file:{tmp_path}/iq",
        cache_dir=tmp_path / "local-cache",
    )
    generate(local, sessions=SESSIONS, **SIZE)

    found = recordings(filled)

    assert found == recordings(local), "the same seed makes the same sessions, wherever they are kept"
    assert len(objects(filled, minio)) == 2 * RECORDINGS
    remote_store, local_store = RecordingStore.open(filled), RecordingStore.open(local)
    for recording in found:
        samples = remote_store.read(recording)
        assert samples.shape == (4096,)
        np.testing.assert_array_equal(samples, local_store.read(recording))


def test_the_dataset_holds_every_approved_session_or_those_asked_for(filled: DataSettings) -> None:
    dataset = HeimdallDataset.open(filled)
    assert len(dataset) == 4
    sample = dataset[0]
    assert sample["spectrograms"].shape == (3, 3, 128, 32)
    assert sample["receivers"].shape == (3, 2)
    assert sample["spectrograms"].isfinite().all()
    assert float(sample["position"].norm()) < 1600

    one = HeimdallDataset.open(filled, [session_id(SEED, 1)])
    assert {item.session_id for item in one.transmissions} == {session_id(SEED, 1)}

    store = SessionStore.open(filled)
    store.set_status(session_id(SEED, 0), "rejected")
    assert store.approved() == [session_id(SEED, 1)]
    store.close()
    with pytest.raises(ConfigurationError, match=rf"{session_id(SEED, 0)} \(rejected\).*nobody \(unknown\)"):
        HeimdallDataset.open(filled, [session_id(SEED, 0), "nobody"])


def test_generating_again_adds_nothing_and_other_parameters_are_refused(filled: DataSettings, minio: Minio) -> None:
    before = objects(filled, minio)

    assert generate(filled, sessions=SESSIONS, **SIZE) == 0
    with pytest.raises(ConfigurationError, match="made with other parameters"):
        generate(filled, sessions=SESSIONS, **{**SIZE, "samples": 2048})

    assert objects(filled, minio) == before


def test_recordings_that_were_lost_are_made_again(filled: DataSettings, minio: Minio) -> None:
    before = objects(filled, minio)
    for key in before:
        minio.s3.delete_object(Bucket=bucket_of(filled), Key=key)

    assert generate(filled, sessions=SESSIONS, **SIZE) == 0

    assert objects(filled, minio) == before


def test_generators_at_once_make_one_set(settings: DataSettings, minio: Minio) -> None:
    barrier = threading.Barrier(3)

    def run() -> int:
        barrier.wait(TIMEOUT_S)
        return generate(settings, sessions=SESSIONS, **SIZE)

    with ThreadPoolExecutor(3) as pool:
        added = [future.result(TIMEOUT_S) for future in [pool.submit(run) for _ in range(3)]]

    assert sum(added) == SESSIONS
    assert len(recordings(settings)) == RECORDINGS
    assert len(objects(settings, minio)) == 2 * RECORDINGS
    assert len(HeimdallDataset.open(settings)) == 4


def test_adding_a_session_that_another_process_adds_meanwhile_leaves_it(
    filled: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore.open(filled)
    names = iter([None, "the other's"])
    monkeypatch.setattr(store, "session_name", lambda identity: next(names))
    whole = transmissions(filled)
    mine = Session(
        id=whole[0].session_id,
        name="mine",
        center_frequency_hz=1.0,
        sample_rate_hz=1.0,
        origin=(0.0, 0.0),
        receivers=(),
        transmissions=(),
    )

    assert store.add_session(mine) is False
    assert transmissions(filled) == whole
    store.close()


def test_the_command_line_writes_to_the_same_places(settings: DataSettings, minio: Minio, tmp_path: Path) -> None:
    assert settings.s3_access_key is not None
    assert settings.s3_secret_key is not None
    env = {
        **os.environ,
        "HEIMDALL_DATABASE_URL": settings.database_url.get_secret_value(),
        "HEIMDALL_RECORDINGS_URL": settings.recordings_url,
        "HEIMDALL_S3_ENDPOINT_URL": minio.url,
        "HEIMDALL_S3_ACCESS_KEY": settings.s3_access_key.get_secret_value(),
        "HEIMDALL_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
    }

    data = partial(heimdall_train, "data", env=env, cwd=tmp_path)
    size = ["--sessions", "1", "--transmissions", "1", "--receivers", "2", "--samples", "1024", "--seed", "3"]
    assert data("generate", *size) == "1 sessions added, 0 were there\n"
    assert data("inspect") == "generated-3-000: 1 transmissions, 2 recordings\n"
    assert len(objects(settings, minio)) == 4


DAMAGES = {
    "missing": "is missing in bucket",
    "short": "samples, not 4096",
    "corrupt": "does not fit its data",
    "no metadata": "is missing in bucket",
    "unreadable metadata": "does not fit its data",
    "another rate": "was sampled at",
}


def damage(settings: DataSettings, minio: Minio, recording: Recording, how: str) -> None:
    s3, bucket = minio.s3, bucket_of(settings)
    meta, data = f"iq/{recording.object_key}", f"iq/{data_key(recording.object_key)}"
    content = s3.get_object(Bucket=bucket, Key=data)["Body"].read()
    match how:
        case "missing":
            s3.delete_object(Bucket=bucket, Key=data)
        case "no metadata":
            s3.delete_object(Bucket=bucket, Key=meta)
        case "short":
            s3.put_object(Bucket=bucket, Key=data, Body=content[:-400])
        case "corrupt":
            s3.put_object(Bucket=bucket, Key=data, Body=content[:-1] + bytes([content[-1] ^ 1]))
        case "unreadable metadata":
            s3.put_object(Bucket=bucket, Key=meta, Body=b"\xff{")
        case "another rate":
            about = s3.get_object(Bucket=bucket, Key=meta)["Body"].read().decode()
            s3.put_object(Bucket=bucket, Key=meta, Body=about.replace("200000", "100000").encode())


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_recording_is_told_by_its_session_and_left_out(filled: DataSettings, minio: Minio, how: str) -> None:
    damaged = recordings(filled)[4]
    damage(filled, minio, damaged, how)
    with pytest.raises(UnreadableError, match=DAMAGES[how]):
        RecordingStore.open(filled).read(damaged)

    with capture_logs() as lines:
        dataset = HeimdallDataset.open(filled.model_copy(update={"skip_limit": 1 / RECORDINGS}))

    told = [line for line in lines if line["event"] == "recording left out"]
    assert [(line["session"], line["transmission"], line["receiver"]) for line in told] == [
        (damaged.session_id, damaged.transmission_id, damaged.receiver.receiver_id)
    ]
    assert DAMAGES[how] in told[0]["reason"]
    kept = [recording.object_key for item in dataset.transmissions for recording in item.recordings]
    assert len(kept) == RECORDINGS - 1
    assert damaged.object_key not in kept
    assert len(dataset) == 4


def test_more_damage_than_the_limit_is_a_clear_failure(filled: DataSettings, minio: Minio) -> None:
    first, second = recordings(filled)[1], recordings(filled)[-1]
    damage(filled, minio, first, "missing")
    damage(filled, minio, second, "corrupt")

    with pytest.raises(DataError, match="2 of 12 recordings can't be read, more than HEIMDALL_SKIP_LIMIT") as caught:
        HeimdallDataset.open(filled.model_copy(update={"skip_limit": 1 / RECORDINGS}))

    for damaged in (first, second):
        assert f"session {damaged.session_id}, transmission {damaged.transmission_id}" in str(caught.value)


def test_a_transmission_that_nobody_could_read_is_left_out(filled: DataSettings, minio: Minio) -> None:
    lost = transmissions(filled)[0]
    for recording in lost.recordings:
        damage(filled, minio, recording, "missing")

    dataset = HeimdallDataset.open(filled.model_copy(update={"skip_limit": 0.5}))

    assert [item.id for item in dataset.transmissions] == [item.id for item in transmissions(filled)[1:]]


def test_features_that_were_computed_once_need_no_store(filled: DataSettings, minio: Minio) -> None:
    before = HeimdallDataset.open(filled)[0]["spectrograms"]
    for key in objects(filled, minio):
        minio.s3.delete_object(Bucket=bucket_of(filled), Key=key)

    assert (HeimdallDataset.open(filled)[0]["spectrograms"] == before).all()


def test_an_empty_database_says_how_to_fill_it(settings: DataSettings) -> None:
    with pytest.raises(DataError, match=r"no recording sessions.*data generate") as caught:
        HeimdallDataset.open(settings)
    assert secret_of(settings) not in str(caught.value)

    store = SessionStore.open(settings)
    store.create_schema()
    store.close()
    with pytest.raises(DataError, match="no approved recording session"):
        HeimdallDataset.open(settings)


def test_wrong_keys_and_a_missing_bucket_name_their_variables(filled: DataSettings) -> None:
    wrong = filled.model_copy(update={"s3_access_key": filled.s3_secret_key})
    with pytest.raises(ConfigurationError, match="HEIMDALL_S3_ACCESS_KEY"):
        HeimdallDataset.open(wrong)

    nowhere = filled.model_copy(update={"recordings_url": "s3://there-is-none"})
    with pytest.raises(ConfigurationError, match=r"HEIMDALL_RECORDINGS_URL.*does not exist"):
        generate(nowhere, sessions=1, **{**SIZE, "seed": 99})


def test_a_database_that_is_away_for_a_moment_is_waited_for(
    filled: DataSettings, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SessionStore.open(filled)
    whole = store.transmissions(store.approved())
    failed, judge = threading.Event(), store._raise_unless_away

    def note(error: Any, what: str, *, tries_left: int) -> None:
        failed.set()
        judge(error, what, tries_left=tries_left)

    monkeypatch.setattr(store, "_raise_unless_away", note)
    postgres.kill()

    with ThreadPoolExecutor(1) as pool:
        ids = pool.submit(store.approved)
        wait_until(failed.is_set, what="it was asked in vain", timeout_s=TIMEOUT_S)
        postgres.start()
        assert ids.result(TIMEOUT_S) == [session_id(SEED, number) for number in range(SESSIONS)]

    assert store.transmissions(store.approved()) == whole
    store.close()


def test_a_database_that_stays_away_is_named_without_its_password(filled: DataSettings, postgres: Postgres) -> None:
    postgres.stop()

    with pytest.raises(ConnectionError, match=r"HEIMDALL_DATABASE_URL\) does not answer") as caught:
        HeimdallDataset.open(filled)

    assert secret_of(filled) not in str(caught.value)


def test_a_wrong_password_is_no_database_that_is_away(filled: DataSettings) -> None:
    url = SecretStr(filled.database_url.get_secret_value().replace(secret_of(filled), "wrong-canary"))

    wrong = filled.model_copy(update={"database_url": url})
    for ask in (HeimdallDataset.open, generate):
        with pytest.raises(ConfigurationError, match="refuses the password: check HEIMDALL_DATABASE_URL") as caught:
            ask(wrong)
        assert "wrong-canary" not in str(caught.value)


def test_a_database_that_was_never_made_is_not_told_to_be_filled(filled: DataSettings) -> None:
    url = SecretStr(f"{filled.database_url.get_secret_value()}-other")

    for ask in (HeimdallDataset.open, generate):
        with pytest.raises(ConfigurationError, match=r"is not there .*check HEIMDALL_DATABASE_URL, or make it"):
            ask(filled.model_copy(update={"database_url": url}))


def test_no_more_connections_are_open_than_the_pool_holds(filled: DataSettings, postgres: Postgres) -> None:
    store, threads, made = SessionStore.open(filled), 3 * POOL_SIZE, list[object]()
    sa.event.listen(store._engine, "connect", lambda connection, _: made.append(connection))
    barrier = threading.Barrier(threads)

    def read() -> None:
        barrier.wait(TIMEOUT_S)
        store._read(sa.text("SELECT pg_advisory_xact_lock_shared(1)"))

    with (
        psycopg.connect(postgres.url(bucket_of(filled)), autocommit=True) as holder,
        ThreadPoolExecutor(threads) as pool,
    ):

        def others(condition: str = "true") -> int:
            mine = "datname = current_database() AND backend_type = 'client backend' AND pid <> pg_backend_pid()"
            row = holder.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {mine} AND {condition}").fetchone()
            return int(row[0]) if row else 0

        holder.execute("SELECT pg_advisory_lock(1)")
        held = [pool.submit(read) for _ in range(threads)]
        wait_until(lambda: others("wait_event = 'advisory'") >= POOL_SIZE, what="all wait", timeout_s=TIMEOUT_S)
        open_at_once = others()
        holder.execute("SELECT pg_advisory_unlock(1)")
        for each in held:
            each.result(TIMEOUT_S)

    assert (open_at_once, len(made)) == (POOL_SIZE, POOL_SIZE)
    with store._engine.connect() as connection:
        assert silence_s(connection.connection.driver_connection.fileno()) == SILENCE_S
    store.close()


def silence_s(descriptor: int) -> float:
    """How long what was sent on a connection may stay unanswered."""
    with socket.socket(fileno=os.dup(descriptor)) as other:
        return other.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) / 1000


def test_a_store_that_is_away_for_a_moment_is_waited_for(filled: DataSettings, minio: Minio) -> None:
    dataset = HeimdallDataset.open(filled)
    whole = dataset[0]["spectrograms"]
    shutil.rmtree(filled.cache_dir)
    bucket: Any = dataset._source._store._objects
    minio.kill()

    with ThreadPoolExecutor(1) as pool:
        sample = pool.submit(dataset.__getitem__, 0)
        wait_until(lambda: bucket._away_since is not None, what="it was asked in vain", timeout_s=TIMEOUT_S)
        minio.start()
        assert (sample.result(TIMEOUT_S)["spectrograms"] == whole).all()


def test_a_store_that_stays_away_is_no_damaged_recording(
    filled: DataSettings, minio: Minio, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings_module, "PATIENCE_S", 0.0)
    minio.kill()

    with pytest.raises(ConnectionError, match="can't be reached"):
        HeimdallDataset.open(filled.model_copy(update={"skip_limit": 1.0}))


def test_threads_that_read_side_by_side_share_one_client(filled: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    make, barrier = recordings_module._s3_client, threading.Barrier(8)

    def count(settings: DataSettings) -> Any:
        made.append(settings)
        return make(settings)

    monkeypatch.setattr(recordings_module, "_s3_client", count)
    store, recording = RecordingStore.open(filled), recordings(filled)[0]

    def read() -> int:
        barrier.wait(TIMEOUT_S)
        return int(store.read(recording).size)

    with ThreadPoolExecutor(8) as pool:
        sizes = [future.result(TIMEOUT_S) for future in [pool.submit(read) for _ in range(8)]]

    assert sizes == [4096] * 8
    assert len(made) == 1


def secret_of(settings: DataSettings) -> str:
    return settings.database_url.get_secret_value().split(":")[2].split("@")[0]
