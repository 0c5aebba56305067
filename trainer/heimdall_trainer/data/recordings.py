"""Recordings as SigMF (sigmf.org), the field's standard for IQ: in S3, or in a folder.

Absolute power is kept: `heimdall:full_scale_dbm` in the metadata is the power in dBm of a sample of magnitude 1 (the
converter's full scale), so that samples of receivers with different gains compare. Samples that were read have a mean
squared magnitude that is their power in milliwatts.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Protocol, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from heimdall_tracking.files import whole
from heimdall_tracking.pauses import doubling_s
from heimdall_tracking.redact import redact
from heimdall_trainer.data.sessions import Receiver, Recording
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import KEYS, DataSettings, holds_keys

META: Final = ".sigmf-meta"
DATA: Final = ".sigmf-data"
SIGMF_VERSION: Final = "1.2.0"
EXTENSION: Final = "heimdall"
FULL_SCALE: Final = "heimdall:full_scale_dbm"
FULL_SCALE_LIMIT_DBM: Final = 300.0
"""Far beyond any converter's, and nothing that single precision can't hold."""
READABLE: Final = 0o644
SAMPLE_BYTES: Final = {"ci16_le": 4, "cf32_le": 8}
_RIGHTS: Final = f"{KEYS}, and that they may read the bucket and list it (else what is missing is refused too)"
_REGION: Final = "HEIMDALL_S3_REGION and HEIMDALL_S3_ENDPOINT_URL"
REFUSED: Final = {
    **dict.fromkeys(("AccessDenied", "403"), _RIGHTS),
    **dict.fromkeys(("InvalidAccessKeyId", "SignatureDoesNotMatch"), KEYS),
    **dict.fromkeys(("AuthorizationHeaderMalformed", "PermanentRedirect"), _REGION),
}
"""Error codes of S3 that waiting does not help against, and what to check."""
S3_CONNECT_TIMEOUT_S: Final = 10
S3_READ_TIMEOUT_S: Final = 20
"""How long an answer may stand still."""
S3_TRIES: Final = 2
"""How often boto3 tries by itself, which knows nothing of answers that break off."""
PATIENCE_S: Final = 200.0
"""How long a store that is away is waited for: three minutes, and the longest wait between two tries. With a last try
that takes its time, and whose answer then stands still, it is less than group.COLLECTIVE_TIMEOUT, for which the other
processes of a group wait for this one's batch."""
FIRST_WAIT_S: Final = 1.0
LONGEST_WAIT_S: Final = 20.0
_MAKING_CLIENT: Final = threading.Lock()
"""boto3 makes clients in one thread at a time only."""

Datatype = Literal["ci16_le", "cf32_le"]
Answer = TypeVar("Answer")
log = structlog.get_logger(__name__)


class UnreadableError(Exception):
    """A recording is missing, short, corrupt or of another sampling rate; the message says which."""


class ObjectStore(Protocol):
    """Objects by key. A server that does not answer is a ConnectionError."""

    def get(self, key: str) -> bytes:
        """The object's bytes; UnreadableError where there is none."""

    def put(self, key: str, content: bytes) -> None:
        """Store an object, whole or not at all."""

    def has(self, key: str) -> bool:
        """Whether there is such an object."""

    def give_up(self) -> None:
        """Whoever waits for a server that is away waits no longer."""


class Folder:
    """Objects as files of a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def get(self, key: str) -> bytes:
        """The object's bytes."""
        try:
            return (self._root / key).read_bytes()
        except OSError as error:
            raise UnreadableError(f"{key} is missing ({error.strerror})") from None

    def put(self, key: str, content: bytes) -> None:
        """Store an object: written beside, then renamed."""
        write_whole(self._root / key, content)

    def has(self, key: str) -> bool:
        """Whether there is such a file."""
        return (self._root / key).is_file()

    def give_up(self) -> None:
        """Nobody waits for a folder."""


class Bucket:
    """Objects of an S3 bucket. A server that is away for a while is waited for, in every call."""

    def __init__(self, settings: DataSettings, name: str, prefix: str) -> None:
        self._settings = settings
        self._bucket = name
        self._prefix = prefix
        self._made: Any = None
        self._made_by = 0
        self._away_since: float | None = None
        self._given_up = threading.Event()

    @property
    def _client(self) -> Any:
        # Made where it is used: a client does not survive a pickle, and a fork shares its connections with its parent.
        with _MAKING_CLIENT:
            if self._made is None or self._made_by != os.getpid():
                self._made, self._made_by = _s3_client(self._settings), os.getpid()
        return self._made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None, "_away_since": None, "_given_up": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _given_up=threading.Event())

    def get(self, key: str) -> bytes:
        """The object's bytes."""
        content = self._patiently(lambda: self._read(self._ask("get_object", key)))
        if content is None:
            raise UnreadableError(f"{self._prefix}{key} is missing in bucket {self._bucket}")
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store an object."""
        if self._patiently(lambda: self._ask("put_object", key, Body=content)) is None:
            raise ConfigurationError(f"HEIMDALL_RECORDINGS_URL names the bucket {self._bucket}, which does not exist")

    def has(self, key: str) -> bool:
        """Whether there is such an object."""
        return self._patiently(lambda: self._ask("head_object", key)) is not None

    def give_up(self) -> None:
        """Have nobody wait for the server until it has answered again."""
        self._given_up.set()

    @property
    def _where(self) -> str:
        return redact(f"{self._settings.s3_endpoint_url or 'S3'}, bucket {self._bucket}")

    def _patiently(self, call: Callable[[], Answer]) -> Answer:
        """What a call gives, tried again while the server is away, however many threads wait for it."""
        began, pauses = time.monotonic(), doubling_s(FIRST_WAIT_S, LONGEST_WAIT_S)
        while True:
            try:
                answer = call()
            except ConnectionError as error:
                failure = error
                left_s = min(began, self._since(error)) + PATIENCE_S - time.monotonic()
                if left_s <= 0:
                    raise
            else:
                self._away_since = None
                self._given_up.clear()
                return answer
            if self._given_up.wait(min(next(pauses), left_s)):
                raise failure

    def _since(self, error: ConnectionError) -> float:
        """Since when the server is away; who finds out says so."""
        since = self._away_since
        if since is None:
            since = self._away_since = time.monotonic()
            log.warning("recordings can't be read or written; trying again", error=str(error), for_s=PATIENCE_S)
        return since

    def _read(self, answer: Any) -> bytes | None:
        from botocore.exceptions import BotoCoreError
        from urllib3.exceptions import HTTPError

        if answer is None:
            return None
        try:
            content: bytes = answer["Body"].read()
        except (BotoCoreError, HTTPError, OSError) as error:
            raise ConnectionError(f"{self._where} broke off: {type(error).__name__}") from None
        return content

    def _ask(self, operation: str, key: str, **more: object) -> Any:
        from botocore.exceptions import (
            BotoCoreError,
            ClientError,
            NoCredentialsError,
            ParamValidationError,
            PartialCredentialsError,
            SSLError,
        )

        where = self._where
        try:
            return getattr(self._client, operation)(Bucket=self._bucket, Key=self._prefix + key, **more)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            if code in {"NoSuchKey", "NoSuchBucket", "404"}:
                return None
            if code in REFUSED:
                raise ConfigurationError(f"{where} refuses {key} ({code}): check {REFUSED[code]}") from None
            raise ConnectionError(f"{where} can't be used: {code}") from None
        except SSLError as error:
            if "CERTIFICATE_VERIFY_FAILED" not in str(error):
                raise ConnectionError(f"{where} can't be reached: {type(error).__name__}") from None
            raise ConfigurationError(
                f"the certificate of {where} can't be trusted: set HEIMDALL_S3_CA_BUNDLE to a file with the "
                "certificate of the authority that signed it, and HEIMDALL_S3_ENDPOINT_URL to a name that it is for"
            ) from None
        except (NoCredentialsError, PartialCredentialsError):
            raise ConfigurationError(f"no keys of {where} are known: set {KEYS}") from None
        except ParamValidationError as error:
            raise ConfigurationError(f"{where} can't be asked for {key!r}: {error}") from None
        except BotoCoreError as error:
            raise ConnectionError(f"{where} can't be reached: {type(error).__name__}") from None


def _s3_client(settings: DataSettings) -> Any:
    import boto3
    from botocore.config import Config

    keys = settings.s3_access_key, settings.s3_secret_key
    return boto3.client(
        "s3",
        endpoint_url=settings.s3_endpoint_url,
        aws_access_key_id=keys[0].get_secret_value() if keys[0] else None,
        aws_secret_access_key=keys[1].get_secret_value() if keys[1] else None,
        region_name=settings.s3_region,
        verify=str(settings.s3_ca_bundle) if settings.s3_ca_bundle else None,
        config=Config(
            connect_timeout=S3_CONNECT_TIMEOUT_S,
            read_timeout=S3_READ_TIMEOUT_S,
            retries={"max_attempts": S3_TRIES, "mode": "standard"},
            max_pool_connections=settings.read_threads,
            s3={"addressing_style": "path" if settings.s3_path_style else "auto"},
        ),
    )


def open_objects(settings: DataSettings, url: str = "") -> ObjectStore:
    """The objects under a URL.

    Args:
        settings: Endpoint and credentials.
        url: `s3://BUCKET[/PREFIX]`, or `file:` and a folder; `HEIMDALL_RECORDINGS_URL` if empty.

    Raises:
        ConfigurationError: It is neither, or names keys.
    """
    url = url or settings.recordings_url
    if holds_keys(url):
        raise ConfigurationError(f"the place of objects names keys: write s3://BUCKET[/PREFIX], and set {KEYS}")
    scheme, _, rest = url.partition(":")
    if scheme == "file" and rest:
        return Folder(Path(rest.removeprefix("//")))
    bucket, _, prefix = rest.removeprefix("//").partition("/")
    if scheme == "s3" and bucket:
        return Bucket(settings, bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "")
    shown = repr(url) if "@" not in url else "what was given"
    raise ConfigurationError(f"{shown} is no place for objects: use s3://BUCKET[/PREFIX], or file: and a folder")


def write_whole(file: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that no process ever reads half of it; every user may read it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file, shared=True) as part:
        part.write_bytes(content)
        part.chmod(READABLE)


def key_of(session_id: str, transmission_id: str, receiver_id: str) -> str:
    """Key of a recording's metadata; its data lies beside it."""
    return f"sessions/{session_id}/{transmission_id}/{receiver_id}{META}"


def data_key(object_key: str) -> str:
    """Key of the data that belongs to a key of metadata."""
    return object_key.removesuffix(META) + DATA


@dataclass(frozen=True, kw_only=True)
class Capture:
    """What a recording's metadata says beside its samples."""

    session_id: str
    transmission_id: str
    receiver: Receiver
    sample_rate_hz: float
    frequency_hz: float
    started_at: datetime
    full_scale_dbm: float
    """Power in dBm of a sample of magnitude 1."""
    datatype: Datatype = "ci16_le"
    author: str = ""


class RecordingStore:
    """Writes and reads recordings."""

    def __init__(self, objects: ObjectStore) -> None:
        """Nothing is asked of the store yet.

        Args:
            objects: Where recordings lie.
        """
        self._objects = objects

    @classmethod
    def open(cls, settings: DataSettings) -> RecordingStore:
        """The store that `HEIMDALL_RECORDINGS_URL` names; nothing is asked of it yet."""
        return cls(open_objects(settings))

    @contextmanager
    def side_by_side(self, threads: int) -> Iterator[ThreadPoolExecutor]:
        """Threads to read in. Where an error or SIGTERM ends that, they begin nothing more and wait for no server."""
        pool = ThreadPoolExecutor(threads)
        try:
            yield pool
        except BaseException:
            # First, or who is let go would begin with the next.
            pool.shutdown(wait=False, cancel_futures=True)
            self._objects.give_up()
            raise
        pool.shutdown()

    def has(self, object_key: str) -> bool:
        """Whether the recording is there; its metadata is written last."""
        return self._objects.has(object_key)

    def write(self, signal: NDArray[np.complex128], capture: Capture) -> Recording:
        """Write a recording, data before metadata.

        Args:
            signal: Samples, shape (samples,); mean squared magnitude is power in milliwatts.
            capture: What is said of them.

        Returns:
            The recording as the database holds it.
        """
        content = encode(signal, capture.full_scale_dbm, capture.datatype)
        key = key_of(capture.session_id, capture.transmission_id, capture.receiver.receiver_id)
        self._objects.put(data_key(key), content)
        self._objects.put(key, _metadata(content, capture).encode())
        return Recording(
            session_id=capture.session_id,
            transmission_id=capture.transmission_id,
            receiver=capture.receiver,
            object_key=key,
            sample_count=signal.size,
            sha256=hashlib.sha256(content).hexdigest(),
            full_scale_dbm=capture.full_scale_dbm,
            sample_rate_hz=capture.sample_rate_hz,
        )

    def read(self, recording: Recording) -> NDArray[np.complex64]:
        """Read a recording and check it against its metadata and the database.

        Returns:
            Samples, shape (samples,); mean squared magnitude is power in milliwatts.

        Raises:
            UnreadableError: It is missing, short, corrupt, of another sampling rate or type.
            ConnectionError: The store does not answer.
        """
        from sigmf import SigMFFile
        from sigmf.error import SigMFError

        about = self._objects.get(recording.object_key)
        content = self._objects.get(data_key(recording.object_key))
        try:
            meta = SigMFFile(metadata=about.decode())
            _check(meta, recording, len(content))
            meta.set_data_file(data_buffer=io.BytesIO(content))  # compares core:sha512
            samples: NDArray[np.complex64] = meta.read_samples()
        except (SigMFError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, OSError) as error:
            raise UnreadableError(f"its metadata does not fit its data: {error}") from None
        if hashlib.sha256(content).hexdigest() != recording.sha256:
            raise UnreadableError("its checksum is not the one in the database")
        if samples.shape != (recording.sample_count,):
            raise UnreadableError(
                f"it holds samples of the shape {samples.shape}, not {recording.sample_count} of one channel"
            )
        if not np.isfinite(samples).all():
            raise UnreadableError("it holds samples that are no numbers")
        return samples * np.float32(10 ** (recording.full_scale_dbm / 20))


def encode(signal: NDArray[np.complex128], full_scale_dbm: float, datatype: Datatype) -> bytes:
    """Samples as a converter of a full scale gives them.

    Args:
        signal: Samples, shape (samples,); mean squared magnitude is power in milliwatts.
        full_scale_dbm: Power of a sample of magnitude 1 after scaling; larger parts are clipped for ci16_le.
        datatype: SigMF datatype.

    Returns:
        Interleaved little-endian I and Q.
    """
    scaled = signal * 10 ** (-full_scale_dbm / 20)
    if datatype == "cf32_le":
        return scaled.astype("<c8").tobytes()
    steps = np.stack([scaled.real, scaled.imag], axis=-1) * 2**15
    return np.clip(np.round(steps), -(2**15), 2**15 - 1).astype("<i2").tobytes()


def _metadata(content: bytes, capture: Capture) -> str:
    from sigmf import SigMFFile

    meta = SigMFFile(
        global_info={
            "core:datatype": capture.datatype,
            "core:sample_rate": capture.sample_rate_hz,
            "core:version": SIGMF_VERSION,
            "core:author": capture.author,
            "core:extensions": [{"name": EXTENSION, "version": "1.0.0", "optional": True}],
            FULL_SCALE: capture.full_scale_dbm,
        }
    )
    place = [capture.receiver.longitude, capture.receiver.latitude, capture.receiver.altitude_m]
    started = capture.started_at.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    meta.add_capture(
        0,
        metadata={
            "core:frequency": capture.frequency_hz,
            "core:datetime": started,
            "core:geolocation": {"type": "Point", "coordinates": place},
        },
    )
    meta.set_data_file(data_buffer=io.BytesIO(content))  # sets core:sha512
    text: str = meta.dumps()
    return text


def _check(meta: Any, recording: Recording, size: int) -> None:
    about = meta.get_global_info()
    datatype, rate = about.get("core:datatype"), about.get("core:sample_rate")
    if datatype not in SAMPLE_BYTES:
        raise UnreadableError(f"its datatype is {datatype}, not one of {', '.join(SAMPLE_BYTES)}")
    if rate != recording.sample_rate_hz:
        raise UnreadableError(f"it was sampled at {rate} Hz, its session at {recording.sample_rate_hz} Hz")
    if size != SAMPLE_BYTES[datatype] * recording.sample_count:
        raise UnreadableError(f"it has {size // SAMPLE_BYTES[datatype]} samples, not {recording.sample_count}")
    if not abs(recording.full_scale_dbm) <= FULL_SCALE_LIMIT_DBM:
        raise UnreadableError(f"its full scale is {recording.full_scale_dbm} dBm in the database")
    if about.get(FULL_SCALE, recording.full_scale_dbm) != recording.full_scale_dbm:
        raise UnreadableError(
            f"its metadata says full scale is {about[FULL_SCALE]} dBm, the database {recording.full_scale_dbm} dBm"
        )
