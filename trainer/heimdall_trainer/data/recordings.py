"""Recordings as SigMF (sigmf.org), the field's standard for IQ: in S3, or in a folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from heimdall_trainer.data.sessions import Recording
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings

DATATYPE: Final = "cf32_le"
META: Final = ".sigmf-meta"
DATA: Final = ".sigmf-data"
S3_TIMEOUT_S: Final = 30
S3_TRIES: Final = 5


class UnreadableError(Exception):
    """A recording is missing, short, corrupt or of another sampling rate; the message says which."""


class ObjectStore(Protocol):
    """Objects by key."""

    def get(self, key: str) -> bytes:
        """The object's bytes; UnreadableError where there is none."""

    def put(self, key: str, content: bytes) -> None:
        """Store an object."""


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
        """Store an object."""
        file = self._root / key
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


class Bucket:
    """Objects of an S3 bucket."""

    def __init__(self, settings: DataSettings, name: str, prefix: str) -> None:
        self._settings = settings
        self._bucket = name
        self._prefix = prefix
        self._made: Any = None

    @property
    def _client(self) -> Any:
        # Made where it is used: a client does not survive a fork or a pickle.
        if self._made is None:
            import boto3
            from botocore.config import Config

            settings = self._settings
            self._made = boto3.client(
                "s3",
                endpoint_url=settings.s3_endpoint_url or None,
                aws_access_key_id=settings.s3_access_key.get_secret_value() or None,
                aws_secret_access_key=settings.s3_secret_key.get_secret_value() or None,
                region_name=settings.s3_region,
                verify=settings.s3_ca_bundle or None,
                config=Config(
                    connect_timeout=S3_TIMEOUT_S,
                    read_timeout=S3_TIMEOUT_S,
                    retries={"max_attempts": S3_TRIES, "mode": "standard"},
                    max_pool_connections=settings.read_threads,
                    s3={"addressing_style": "path"} if settings.s3_endpoint_url else {},
                ),
            )
        return self._made

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_made": None}

    def get(self, key: str) -> bytes:
        """The object's bytes."""
        from botocore.exceptions import ClientError

        try:
            content: bytes = self._client.get_object(Bucket=self._bucket, Key=self._prefix + key)["Body"].read()
        except ClientError as error:
            if error.response["Error"]["Code"] in {"NoSuchKey", "404"}:
                raise UnreadableError(f"{key} is missing in bucket {self._bucket}") from None
            raise
        return content

    def put(self, key: str, content: bytes) -> None:
        """Store an object."""
        self._client.put_object(Bucket=self._bucket, Key=self._prefix + key, Body=content)


def open_store(settings: DataSettings) -> ObjectStore:
    """The store that `HEIMDALL_RECORDINGS_URL` names.

    Raises:
        ConfigurationError: It names none.
    """
    scheme, _, rest = settings.recordings_url.partition(":")
    if scheme == "file" and rest:
        return Folder(Path(rest.removeprefix("//")))
    if scheme == "s3" and rest.startswith("//"):
        bucket, _, prefix = rest[2:].partition("/")
        if bucket:
            return Bucket(settings, bucket, f"{prefix.strip('/')}/" if prefix.strip("/") else "")
    raise ConfigurationError(
        f"HEIMDALL_RECORDINGS_URL is {settings.recordings_url!r}: use s3://BUCKET[/PREFIX] or file:FOLDER"
    )


def key_of(session_id: str, transmission_id: str, receiver_id: str) -> str:
    """Key of a recording's metadata; its data lies beside it."""
    return f"sessions/{session_id}/{transmission_id}/{receiver_id}{META}"


def write_recording(
    store: ObjectStore,
    key: str,
    signal: NDArray[np.complex128],
    *,
    sample_rate_hz: float,
    frequency_hz: float,
    geolocation: tuple[float, float],
    author: str,
) -> str:
    """Write a recording, data before metadata.

    Args:
        store: Where to.
        key: Key of the metadata.
        signal: Samples, shape (samples,); mean squared magnitude is power in milliwatts.
        sample_rate_hz: Sampling rate in hertz.
        frequency_hz: Carrier frequency in hertz.
        geolocation: The receiver's latitude and longitude in degrees.
        author: Who made it.

    Returns:
        SHA-512 of the data, hexadecimal.
    """
    from sigmf import SigMFFile

    content = signal.astype("<c8").tobytes()
    digest = hashlib.sha512(content).hexdigest()
    meta = SigMFFile(
        global_info={
            SigMFFile.DATATYPE_KEY: DATATYPE,
            SigMFFile.SAMPLE_RATE_KEY: sample_rate_hz,
            SigMFFile.AUTHOR_KEY: author,
            SigMFFile.DESCRIPTION_KEY: "Mean squared magnitude is power in milliwatts.",
            SigMFFile.HASH_KEY: digest,
            SigMFFile.VERSION_KEY: "1.2.0",
        }
    )
    latitude, longitude = geolocation
    point = {"type": "Point", "coordinates": [longitude, latitude]}
    meta.add_capture(0, metadata={SigMFFile.FREQUENCY_KEY: frequency_hz, SigMFFile.GEOLOCATION_KEY: point})
    store.put(key.removesuffix(META) + DATA, content)
    store.put(key, meta.dumps().encode())
    return digest


def read_recording(store: ObjectStore, recording: Recording) -> NDArray[np.complex64]:
    """Read a recording and check it.

    Args:
        store: Where from.
        recording: Which one, and what the database says of it.

    Returns:
        Samples, shape (samples,); mean squared magnitude is power in milliwatts.

    Raises:
        UnreadableError: It is missing, short, corrupt, of another sampling rate or type.
    """
    try:
        about = json.loads(store.get(recording.object_key))["global"]
    except (ValueError, KeyError, TypeError):
        raise UnreadableError(f"{recording.object_key} is no SigMF metadata") from None
    if about.get("core:datatype") != DATATYPE:
        raise UnreadableError(f"its datatype is {about.get('core:datatype')}, not {DATATYPE}")
    if about.get("core:sample_rate") != recording.sample_rate_hz:
        raise UnreadableError(
            f"it was sampled at {about.get('core:sample_rate')} Hz, not at {recording.sample_rate_hz}"
        )
    content = store.get(recording.object_key.removesuffix(META) + DATA)
    if len(content) != 8 * recording.samples:
        raise UnreadableError(f"it has {len(content) // 8} samples, not {recording.samples}")
    if hashlib.sha512(content).hexdigest() != recording.sha512:
        raise UnreadableError("its checksum is not the one that was recorded")
    return np.frombuffer(content, dtype="<c8")
