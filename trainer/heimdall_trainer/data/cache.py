"""Where features are kept between trainings: a folder, and a Redis that several machines share.

Features are whatever is computed from recordings: spectrograms, times of arrival. Each entry is named after all that it
depends on, and carries its own checksum: what is cut short, or was changed on disk, counts as missing. A cache that is
full, broken or away costs time, never a training.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from heimdall_tracking.redact import described, redact
from heimdall_trainer.data.recordings import write_whole
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.settings import DataSettings

SUFFIX: Final = ".features"
TYPE: Final = np.dtype("<f4")
CHECKSUM_BYTES: Final = 32
TOUCH_AFTER_S: Final = 3600
"""How old a time of last use may be before a use renews it."""
UNUSED_S: Final = 2 * TOUCH_AFTER_S
"""What was not used for so long may go. A training goes through all of its features again and again: to remove what
it uses itself would have each of them computed anew every epoch."""
PART: Final = 20
"""A process looks at the whole folder again when it has written this part of the limit."""
PAUSE_S: Final = 60.0
"""How long a cache that failed is left alone."""
REDIS_TIMEOUT_S: Final = 1.0
REDIS_KEEP_S: Final = 30 * 24 * 3600
REDIS_PREFIX: Final = "heimdall:features:"

Features = NDArray[np.float32]
Shape = tuple[int, ...]

_LOOKING: Final = threading.Lock()
"""Around the room in a folder: one thread looks, and the others find what it has found."""

log = structlog.get_logger(__name__)


class FeatureCache(Protocol):
    """Features by key. Neither call ever raises because the cache can't be used."""

    def get(self, key: str, shape: Shape = SHAPE) -> Features | None:
        """The features of that shape, or None where there are none, or none that are whole."""

    def put(self, key: str, features: Features) -> None:
        """Keep features, whole or not at all."""


class Caches:
    """Several caches as one."""

    def __init__(self, caches: Sequence[FeatureCache]) -> None:
        """Make one of several.

        Args:
            caches: The nearest first.
        """
        self._caches = tuple(caches)

    @classmethod
    def open(cls, settings: DataSettings) -> Caches:
        """The caches that the settings name."""
        folder = FolderCache(settings.cache_dir / "features", limit_bytes=int(settings.cache_limit_gib * 2**30))
        if settings.redis_url is None:
            return cls([folder])
        return cls([folder, RedisCache(settings.redis_url.get_secret_value())])

    def get(self, key: str, shape: Shape, compute: Callable[[], Features]) -> Features:
        """Features from the nearest cache that holds them, or computed; kept in all that are nearer.

        Args:
            key: Names everything that they depend on, see `key_of`.
            shape: Their shape.
            compute: Makes them; what it raises is raised here.
        """
        for number, cache in enumerate(self._caches):
            found = cache.get(key, shape)
            if found is not None:
                self._keep(key, found, number)
                return found
        features = compute()
        self._keep(key, features, len(self._caches))
        return features

    def _keep(self, key: str, features: Features, count: int) -> None:
        """Keep features in the first caches, which did not have them."""
        for cache in self._caches[:count]:
            cache.put(key, features)


def key_of(about: Sequence[object]) -> str:
    """The name of features: a digest of the contents and the parameters that they are computed from.

    Args:
        about: What JSON can hold.
    """
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()


def pack(features: Features) -> bytes:
    """Features as bytes, their checksum behind them."""
    content = features.astype(TYPE, copy=False).tobytes()
    return content + hashlib.sha256(content).digest()


def unpack(entry: bytes, shape: Shape = SHAPE) -> Features | None:
    """The features of an entry; None where it is not what was kept."""
    content, checksum = entry[:-CHECKSUM_BYTES], entry[-CHECKSUM_BYTES:]
    if len(entry) != _entry_bytes(shape) or hashlib.sha256(content).digest() != checksum:
        return None
    # A copy: an array on bytes can't be written to.
    return np.frombuffer(content, dtype=TYPE).reshape(shape).astype(np.float32)


def _entry_bytes(shape: Shape) -> int:
    return math.prod(shape) * TYPE.itemsize + CHECKSUM_BYTES


class FolderCache:
    """Entries as files, which any number of processes may share: written beside, then renamed.

    It stays within about its limit: what nobody used for a while goes first; where nothing may go, nothing is added.
    To look at all files of a large folder takes seconds. Who finds it full therefore leaves a mark for all processes,
    until when nothing can have been unused for long enough, and nobody looks again before that.
    """

    def __init__(self, folder: Path, *, limit_bytes: int, unused_s: float = UNUSED_S) -> None:
        """Nothing is looked at yet.

        Args:
            folder: Made when needed.
            limit_bytes: Its size.
            unused_s: What was not used for so long may go.
        """
        self._folder = folder
        self._limit = limit_bytes
        self._unused_s = unused_s
        self._mark = folder / f".full-{limit_bytes}"
        """Full, for whoever has the same limit, until the time of its last change."""
        self._room = 0
        """Bytes that may be written before the folder is looked at again."""
        self._under_way = 0
        """Bytes that other threads are writing, which a look may find or not."""
        self._full_until = 0.0
        """The same, where the mark can't be made."""
        self._failed_until = 0.0
        self._told: set[str] = set()

    def get(self, key: str, shape: Shape = SHAPE) -> Features | None:
        """The features, read from their file."""
        file = self._file(key)
        try:
            with file.open("rb") as stream:
                features = unpack(stream.read(_entry_bytes(shape) + 1), shape)
                used = os.fstat(stream.fileno()).st_mtime
        except OSError:
            return None
        if features is not None and time.time() - used > min(TOUCH_AFTER_S, self._unused_s / 2):
            # Another's file, or a folder that is read only, is as good a cache; its owner knows when it was used.
            with suppress(OSError):
                os.utime(file)
        return features

    def put(self, key: str, features: Features) -> None:
        """Write the features' file, if there is room."""
        size = _entry_bytes(features.shape)
        try:
            if self._take_room(size):
                self._write(key, features, size)
        except OSError as error:
            self._failed_until = time.monotonic() + PAUSE_S
            self._tell("the feature cache can't be written; features are computed again", error=error.strerror)

    def _write(self, key: str, features: Features, size: int) -> None:
        written = 0
        try:
            write_whole(self._file(key), pack(features))
            written = size
        finally:
            with _LOOKING:
                self._under_way -= size
                self._room += size - written

    def _file(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}{SUFFIX}"

    def _take_room(self, wanted: int) -> bool:
        """Take so many bytes of what may be written; looks at the folder where that is not known."""
        if time.monotonic() < self._failed_until:
            return False
        with _LOOKING:
            if self._room >= wanted or (not self._is_marked() and self._look(wanted)):
                self._room -= wanted
                self._under_way += wanted
                return True
        self._tell("the feature cache is full; raise HEIMDALL_CACHE_LIMIT_GIB to keep more", limit_bytes=self._limit)
        return False

    def _is_marked(self) -> bool:
        """Whether the folder was found full, here or by another process, and nothing can have become unused since."""
        now = time.time()
        if now < self._full_until:
            return True
        try:
            until = self._mark.stat().st_mtime
        except OSError:
            return False
        # A clock that was put back leaves no mark for years.
        return now < until <= now + max(self._unused_s, PAUSE_S)

    def _look(self, wanted: int) -> bool:
        """Look how much there is, and remove what nobody uses; whether so many bytes may be written."""
        now = time.time()
        size, first_used, unused = self._under_way, now, []
        for used, length, file in self._entries():
            size += length
            if used <= now - self._unused_s:
                unused.append((used, length, file))
            else:
                first_used = min(first_used, used)
        for _, length, file in sorted(unused):
            if size + wanted <= self._limit * (PART - 1) / PART:
                break
            Path(file).unlink(missing_ok=True)
            size -= length
        self._room = min(self._limit - size, max(wanted, self._limit // PART))
        if self._room >= wanted:
            return True
        if self._under_way:
            return False  # what others are writing may be counted twice: whoever comes next looks again
        until = max(first_used + self._unused_s, now + PAUSE_S)
        try:
            self._mark.touch()
            os.utime(self._mark, (until, until))
        except OSError:
            self._full_until = until  # another user's folder: each process has to find out for itself
        return False

    def _entries(self) -> Iterator[tuple[float, int, str]]:
        """Time of last use, size and path of all files; those of writes that a kill cut short are among them."""
        if not self._folder.is_dir():
            return
        for part in self._folder.iterdir():
            if not part.is_dir():
                continue
            with os.scandir(part) as files:
                for file in files:
                    try:
                        about = file.stat()
                    except FileNotFoundError:
                        continue  # another process has removed it
                    yield about.st_mtime, about.st_size, file.path

    def _tell(self, event: str, **more: object) -> None:
        if event not in self._told:
            self._told.add(event)
            log.warning(event, folder=str(self._folder), **more)


class RedisCache:
    """Entries in a Redis. One that is away or slow is told once, and left alone for a while."""

    def __init__(self, url: str, *, timeout_s: float = REDIS_TIMEOUT_S, pause_s: float = PAUSE_S) -> None:
        """Nothing is asked of the server yet.

        Args:
            url: `redis://…`.
            timeout_s: Of each call.
            pause_s: How long one that failed is left alone.
        """
        self._url = url
        self._timeout_s = timeout_s
        self._pause_s = pause_s
        self._made: Any = None
        self._alone_until: dict[str, float] = {}
        """Until when a command is not tried."""
        self._told: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        # A client does not survive a pickle, nor does the clock of another process mean anything.
        return {**self.__dict__, "_made": None, "_alone_until": {}}

    def get(self, key: str, shape: Shape = SHAPE) -> Features | None:
        """The features, asked of the server."""
        entry = self._ask("get", REDIS_PREFIX + key)
        return unpack(entry, shape) if isinstance(entry, bytes) else None

    def put(self, key: str, features: Features) -> None:
        """Give the features to the server, which forgets them after a month, or sooner by its own rules."""
        self._ask("set", REDIS_PREFIX + key, pack(features), ex=REDIS_KEEP_S)

    def _ask(self, command: str, *arguments: object, **options: object) -> object:
        from redis.exceptions import RedisError, ResponseError

        if time.monotonic() < self._alone_until.get(command, 0.0):
            return None
        try:
            return getattr(self._client(), command)(*arguments, **options)
        except ResponseError as error:
            # One that is full, or a replica, takes nothing and gives all the same.
            self._leave_alone([command], "the Redis of HEIMDALL_REDIS_URL refuses a command", error)
        except (RedisError, OSError) as error:
            event = "the Redis of HEIMDALL_REDIS_URL can't be used; features are kept in the local cache alone"
            self._leave_alone(["get", "set"], event, error)
        return None

    def _leave_alone(self, commands: Sequence[str], event: str, error: Exception) -> None:
        self._alone_until |= dict.fromkeys(commands, time.monotonic() + self._pause_s)
        if event not in self._told:
            self._told.add(event)
            log.warning(event, commands=commands, server=redact(self._url), error=described(error))

    def _client(self) -> Any:
        if self._made is None:
            from redis import Redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry

            self._made = Redis.from_url(
                self._url,
                socket_timeout=self._timeout_s,
                socket_connect_timeout=self._timeout_s,
                retry=Retry(NoBackoff(), 0),
            )
        return self._made
