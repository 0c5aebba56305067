"""Recordings as SigMF: what is written is read, and what is wrong is said."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import IncompleteReadError, ReadTimeoutError, ResponseStreamingError
from structlog.testing import capture_logs
from urllib3.exceptions import SSLError

from heimdall_trainer import group
from heimdall_trainer.data import physics, recordings
from heimdall_trainer.data.recordings import (
    Bucket,
    Capture,
    Datatype,
    Folder,
    RecordingStore,
    UnreadableError,
    open_objects,
    write_whole,
)
from heimdall_trainer.data.sessions import Recording
from heimdall_trainer.errors import ConfigurationError
from tests.unit.trainer.builders import STARTED_AT, data_settings, receiver

SAMPLES = 600
KEY = "sessions/s1/t1/rx1.sigmf-meta"
DATA = "sessions/s1/t1/rx1.sigmf-data"


def capture(datatype: Datatype = "ci16_le") -> Capture:
    return Capture(
        session_id="s1",
        transmission_id="t1",
        receiver=receiver(1),
        sample_rate_hz=200e3,
        frequency_hz=433.92e6,
        started_at=STARTED_AT,
        full_scale_dbm=-60.0,
        datatype=datatype,
        author="a test",
    )


def signal() -> physics.Signal:
    return physics.scale_to_dbm(physics.white_noise(SAMPLES, 0.0, np.random.default_rng(1)), -80.0)


@pytest.fixture
def store(tmp_path: Path) -> RecordingStore:
    return RecordingStore(Folder(tmp_path))


@pytest.fixture
def written(store: RecordingStore) -> Recording:
    return store.write(signal(), capture())


@pytest.mark.parametrize(("datatype", "step"), [("ci16_le", 10**-3 / 2**15), ("cf32_le", 1e-10)])
def test_samples_come_back_with_their_absolute_power(store: RecordingStore, datatype: Datatype, step: float) -> None:
    recording = store.write(signal(), capture(datatype))
    samples = store.read(recording)
    assert samples.dtype == np.complex64
    assert np.abs(samples - signal()).max() <= step
    assert physics.power_dbm(samples) == pytest.approx(-80.0, abs=0.01)


def test_a_recording_says_in_the_database_what_lies_in_the_store(written: Recording) -> None:
    assert (written.object_key, written.sample_count) == (KEY, SAMPLES)
    assert (written.full_scale_dbm, written.sample_rate_hz) == (-60.0, 200e3)
    assert len(written.sha256) == 64


def test_metadata_is_valid_sigmf_that_any_tool_reads(written: Recording, tmp_path: Path) -> None:
    from sigmf import sigmffile

    found = sigmffile.fromfile(str(tmp_path / KEY))
    found.validate()
    about, first = found.get_global_info(), found.get_captures()[0]
    assert about["core:datatype"] == "ci16_le"
    assert about["core:sample_rate"] == 200e3
    assert about["heimdall:full_scale_dbm"] == -60.0
    assert first["core:frequency"] == 433.92e6
    assert first["core:datetime"] == "2026-01-01T00:00:00.000000Z"
    assert first["core:geolocation"]["coordinates"] == [receiver(1).longitude, receiver(1).latitude, 12.0]


def test_what_is_louder_than_full_scale_is_clipped_and_not_wrapped(store: RecordingStore) -> None:
    loud = np.full(SAMPLES, 10**-2 * (1 - 1j))
    samples = store.read(store.write(loud, capture()))
    assert samples == pytest.approx(np.full(SAMPLES, 10**-3 * (1 - 1j)), rel=1e-3)


def change_metadata(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(root: Path) -> None:
        about = json.loads((root / KEY).read_text())
        change(about["global"])
        (root / KEY).write_text(json.dumps(about))

    return apply


def change_data(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda root: (root / DATA).write_bytes(change((root / DATA).read_bytes())) and None


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "its metadata is gone": (lambda root: (root / KEY).unlink(), "sigmf-meta is missing"),
    "its data is gone": (lambda root: (root / DATA).unlink(), "sigmf-data is missing"),
    "its data is cut": (change_data(lambda data: data[:-4]), "599 samples, not 600"),
    "its data is half a sample longer": (change_data(lambda data: data + b"\0\0"), "samples, not 600"),
    "its data is empty": (change_data(lambda _: b""), "0 samples, not 600"),
    "a bit of its data has turned": (change_data(lambda data: bytes([data[0] ^ 1]) + data[1:]), "does not fit"),
    "its metadata is no JSON": (lambda root: (root / KEY).write_bytes(b"{"), "does not fit"),
    "its metadata is no text": (lambda root: (root / KEY).write_bytes(b"\xff\xfe"), "does not fit"),
    "its metadata is another document": (lambda root: (root / KEY).write_bytes(b"[]"), "does not fit"),
    "its metadata says another rate": (
        change_metadata(lambda about: about.update({"core:sample_rate": 1e6})),
        "sampled at 1000000.0 Hz, its session at 200000.0 Hz",
    ),
    "its metadata says no rate": (change_metadata(lambda about: about.pop("core:sample_rate")), "sampled at None"),
    "its metadata says another type": (
        change_metadata(lambda about: about.update({"core:datatype": "cu8"})),
        "datatype is cu8",
    ),
    "its metadata says two channels": (
        change_metadata(lambda about: about.update({"core:num_channels": 2})),
        r"shape \(300, 2\), not 600 of one channel",
    ),
    "its metadata says no channel": (
        change_metadata(lambda about: about.update({"core:num_channels": 0})),
        "does not fit",
    ),
    "its metadata says another scale": (
        change_metadata(lambda about: about.update({"heimdall:full_scale_dbm": -30.0})),
        r"full scale is -30\.0 dBm, the database -60\.0 dBm",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_what_is_wrong_with_a_recording_is_said(
    damage: Callable[[Path], None], message: str, store: RecordingStore, written: Recording, tmp_path: Path
) -> None:
    damage(tmp_path)
    with pytest.raises(UnreadableError, match=message):
        store.read(written)


def test_data_and_metadata_that_were_exchanged_together_are_noticed(store: RecordingStore, written: Recording) -> None:
    with pytest.raises(UnreadableError, match="checksum is not the one in the database"):
        store.read(replace(written, sha256="0" * 64))


@pytest.mark.parametrize("dbm", [math.nan, math.inf, -math.inf, 1e6])
def test_a_full_scale_that_can_not_be_is_refused(
    dbm: float, store: RecordingStore, written: Recording, tmp_path: Path
) -> None:
    change_metadata(lambda about: about.pop("heimdall:full_scale_dbm"))(tmp_path)
    with pytest.raises(UnreadableError, match=r"full scale is -?(nan|inf|1000000\.0) dBm"):
        store.read(replace(written, full_scale_dbm=dbm))


def test_samples_that_are_no_numbers_are_refused(store: RecordingStore) -> None:
    broken = signal()
    broken[3] = complex(np.nan, 0)
    recording = store.write(broken, capture("cf32_le"))
    with pytest.raises(UnreadableError, match="no numbers"):
        store.read(recording)


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a/b"
    write_whole(file, b"old")

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_whole(file, b"new")
    assert file.read_bytes() == b"old"
    assert list(file.parent.iterdir()) == [file]


def test_metadata_is_written_last_so_that_what_is_there_is_whole(store: RecordingStore, tmp_path: Path) -> None:
    order: list[str] = []

    class Watched(Folder):
        def put(self, key: str, content: bytes) -> None:
            order.append(key)
            super().put(key, content)

    RecordingStore(Watched(tmp_path)).write(signal(), capture())
    assert order == [DATA, KEY]
    assert store.has(KEY)
    assert not store.has("sessions/s1/t1/rx2.sigmf-meta")


@pytest.mark.parametrize(
    ("url", "kind"),
    [("s3://bucket/some/prefix", Bucket), ("s3://bucket", Bucket), ("file:x", Folder), ("file:///x", Folder)],
)
def test_a_url_tells_what_kind_of_store_it_is(url: str, kind: type, tmp_path: Path) -> None:
    assert isinstance(open_objects(data_settings(tmp_path), url), kind)


@pytest.mark.parametrize("url", ["s3://", "file:", "https://host/bucket"])
def test_a_url_that_names_no_store_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="no place for objects"):
        open_objects(data_settings(tmp_path), url)


@pytest.mark.parametrize(
    "url",
    ["s3://KEY:canary@bucket/iq", "s3:KEY:canary@bucket", "s3://KEY:1/canary@bucket", "https://KEY:canary@bucket"],
)
def test_keys_in_a_url_are_refused_and_not_shown(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="s3://BUCKET") as caught:
        open_objects(data_settings(tmp_path), url)
    assert "canary" not in str(caught.value)


def test_an_endpoint_that_was_copied_past_the_checks_is_told_without_its_keys(tmp_path: Path) -> None:
    settings = data_settings(tmp_path).model_copy(update={"s3_endpoint_url": "http://KEY:canary@minio:9000"})
    assert Bucket(settings, "bucket", "")._where == "http://***@minio:9000, bucket bucket"


def s3_refusing(code: str, folder: Path) -> Bucket:
    """A bucket whose server answers with an error, and its retries cost no time."""
    from botocore.stub import Stubber

    keys = {"s3_access_key": "key", "s3_secret_key": "secret"}
    bucket = Bucket(data_settings(folder, recordings_url="s3://bucket", **keys), "bucket", "iq/")
    stubber = Stubber(bucket._client)
    stubber.add_client_error("get_object", code)
    stubber.activate()
    return bucket


@pytest.mark.parametrize(
    ("code", "raised", "words"),
    [
        ("NoSuchKey", UnreadableError, "iq/key is missing in bucket bucket"),
        (
            "AccessDenied",
            ConfigurationError,
            "refuses key .*check HEIMDALL_S3_ACCESS_KEY and .*may read the bucket and",
        ),
        ("SignatureDoesNotMatch", ConfigurationError, "check HEIMDALL_S3_ACCESS_KEY and HEIMDALL_S3_SECRET_KEY$"),
        ("PermanentRedirect", ConfigurationError, "check HEIMDALL_S3_REGION"),
        ("SlowDown", ConnectionError, "can't be used: SlowDown"),
        ("ExpiredToken", ConnectionError, "can't be used: ExpiredToken"),
        ("InternalError", ConnectionError, "can't be used: InternalError"),
    ],
)
def test_what_s3_answers_is_told_and_decides_whether_another_attempt_may_help(
    code: str, raised: type[Exception], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recordings, "PATIENCE_S", 0.0)
    with pytest.raises(raised, match=words):
        s3_refusing(code, tmp_path).get("key")


class Body:
    """An answer's bytes, or what becomes of them on their way."""

    def __init__(self, content: bytes | Exception) -> None:
        self.content = content

    def read(self) -> bytes:
        if isinstance(self.content, Exception):
            raise self.content
        return self.content


@pytest.mark.parametrize(
    "broken",
    [
        IncompleteReadError(actual_bytes=3, expected_bytes=5),
        ResponseStreamingError(error="the server has ended"),
        ReadTimeoutError(endpoint_url="http://minio:9000"),
        SSLError("unexpected end"),
        ConnectionResetError("by its peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_that_breaks_off_is_asked_for_again_and_told_once(
    broken: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = iter([broken, broken, b"whole", b"whole"])
    monkeypatch.setattr(Bucket, "_ask", lambda *_: {"Body": Body(next(answers))})
    monkeypatch.setattr(recordings, "FIRST_WAIT_S", 0.0)
    bucket = Bucket(data_settings(tmp_path), "bucket", "iq/")
    with capture_logs() as lines:
        assert [bucket.get("key"), bucket.get("key")] == [b"whole", b"whole"]
    assert [line["event"] for line in lines] == ["recordings can't be read or written; trying again"]


def test_a_store_that_stays_away_is_waited_for_ever_more_slowly_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits, tries = list[float](), list[str]()

    def away(bucket: Bucket, operation: str, key: str) -> None:
        tries.append(key)
        raise ConnectionError("does not answer")

    monkeypatch.setattr(Bucket, "_ask", away)
    monkeypatch.setattr(recordings, "time", SimpleNamespace(monotonic=lambda: sum(waits)))
    bucket = Bucket(data_settings(tmp_path), "bucket", "iq/")
    monkeypatch.setattr(bucket, "_given_up", SimpleNamespace(wait=waits.append))
    with pytest.raises(ConnectionError, match="does not answer"):
        bucket.get("key")
    assert waits[:3] == [1, 2, 4]
    assert max(waits) == recordings.LONGEST_WAIT_S
    assert sum(waits) == recordings.PATIENCE_S
    assert len(tries) == len(waits) + 1
    for _ in range(3):
        with pytest.raises(ConnectionError, match="does not answer"):
            bucket.get("another")
    assert sum(waits) == recordings.PATIENCE_S, "of many that wait in turn, none does so anew"


def test_a_store_that_is_away_for_three_minutes_and_starts_anew_is_waited_for() -> None:
    assert recordings.PATIENCE_S >= 180 + recordings.LONGEST_WAIT_S


def test_waiting_for_the_store_ends_before_the_others_of_a_group_have_waited_for_too_long() -> None:
    last_try_s = recordings.S3_TRIES * (recordings.S3_CONNECT_TIMEOUT_S + recordings.S3_READ_TIMEOUT_S)
    stalled_s = recordings.S3_READ_TIMEOUT_S
    assert recordings.PATIENCE_S + last_try_s + stalled_s < group.COLLECTIVE_TIMEOUT.total_seconds()


def test_a_bucket_of_an_impossible_name_is_no_server_that_is_away(tmp_path: Path) -> None:
    settings = data_settings(tmp_path, s3_access_key="key", s3_secret_key="secret")
    with pytest.raises(ConfigurationError, match='Invalid bucket name "my bucket"'):
        open_objects(settings, "s3://my bucket").get("key")


def test_a_store_without_keys_names_the_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    settings = data_settings(tmp_path, recordings_url="s3://bucket", s3_endpoint_url="http://127.0.0.1:9")
    with pytest.raises(ConfigurationError, match=r"set HEIMDALL_S3_ACCESS_KEY and HEIMDALL_S3_SECRET_KEY"):
        open_objects(settings).has("key")
