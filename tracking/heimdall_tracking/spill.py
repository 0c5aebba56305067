"""Points on disk: what the memory's share of the metric queue can't hold while the server is away.

A row of files that are only ever appended to and read in order. A file goes when what was read from it is no longer
needed, so the disk holds what waits and little more; and whatever a kill leaves behind can be delivered later.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heimdall_tracking.files import whole
from heimdall_tracking.points import Point, from_line

FILE_BYTES: Final = 4 * 2**20
"""A file that has reached this size gets no more points."""
LIMIT_BYTES: Final = 2**30
"""Most that may lie on disk: some 15 million points."""
PATTERN: Final = "metrics-*.jsonl"


@dataclass
class File:
    """A file of the row."""

    path: Path
    size: int = 0
    """Bytes of whole lines: what lies beyond them is the rest of a write that failed."""
    points: int = 0
    read_bytes: int = 0
    read_points: int = 0

    @property
    def waiting(self) -> int:
        """Points of it that were not read yet."""
        return self.points - self.read_points


@dataclass(frozen=True)
class WriteSlot:
    """Where points are written next."""

    file: File
    end: int
    """Bytes of it that count: what lies beyond them is cut off."""


@dataclass(frozen=True)
class ReadRange:
    """Where points lie that are read next."""

    file: File
    start: int
    """Byte of the file at which they begin."""
    count: int
    """How many they are."""


@dataclass(frozen=True)
class ReadResult:
    """What was read of them."""

    part: ReadRange
    points: list[Point]
    end: int
    """Byte of the file behind them."""


class Spill:
    """Points on disk, first in, first out. Not safe for threads: the queue's lock is around it.

    What takes a disk's time goes without that lock: `prepare`, `write`, `read`, `remove`. Reading and writing each lie
    between two calls with it, which say where, and what came of it. One thread writes, and one reads: what the other
    does meanwhile lies elsewhere.
    """

    def __init__(
        self, folder: Callable[[], Path], *, file_bytes: int = FILE_BYTES, limit_bytes: int = LIMIT_BYTES
    ) -> None:
        """Nothing is written yet.

        Args:
            folder: Makes the folder at first use.
            file_bytes: Size from which a file gets no more points.
            limit_bytes: Most bytes that may lie on disk.
        """
        self._make_folder = folder
        self._folder: Path | None = None
        self._file_bytes = file_bytes
        self._limit_bytes = limit_bytes
        self._files: deque[File] = deque()
        self._reading: list[File] = []
        self._writing: File | None = None
        """Files that must stay: they are being read, and written to."""
        self._needless: deque[Path] = deque()
        """Files that nobody needs any more, to be removed."""
        self._made = 0

    @property
    def waiting(self) -> int:
        """Points that were written and not read yet."""
        return sum(file.waiting for file in self._files)

    def prepare(self) -> None:
        """Make the folder, if it is not made yet; without the lock.

        Raises:
            OSError: The disk takes nothing more.
        """
        if self._folder is None:
            self._folder = self._make_folder()

    def write_slot(self, size: int) -> WriteSlot:
        """Where so many bytes are to be written; `wrote` says what came of it.

        Raises:
            OSError: The bound was reached (ENOSPC).
        """
        if sum(file.size for file in self._files) + size > self._limit_bytes:
            raise OSError(errno.ENOSPC, f"the bound of {self._limit_bytes} bytes is reached")
        self._writing = self._newest()
        return WriteSlot(self._writing, self._writing.size)

    def wrote(self, place: WriteSlot, size: int, count: int) -> None:
        """Count what was written; nothing of it counts where that failed, or is not wanted any more.

        Args:
            place: Where.
            size: Bytes.
            count: Points.
        """
        self._writing = None
        place.file.size += size
        place.file.points += count

    def read_ranges(self, limit: int) -> list[ReadRange]:
        """Where the oldest points lie, to be read; those that were taken before are no longer needed.

        Args:
            limit: Most points.
        """
        self._leave_read()
        parts: list[ReadRange] = []
        for file in self._files:
            count = min(limit - sum(part.count for part in parts), file.waiting)
            if not count:
                break
            parts.append(ReadRange(file, file.read_bytes, count))
        self._reading = [part.file for part in parts]
        return parts

    def take(self, found: Sequence[ReadResult]) -> tuple[list[Point], int]:
        """Count points as read; what was to be read and is not among them waits as before.

        Returns:
            The points, and how many were written but are there no more.
        """
        self._reading = []
        for each in found:
            each.part.file.read_bytes = each.end
            each.part.file.read_points += each.part.count
        points = [point for each in found for point in each.points]
        return points, sum(each.part.count for each in found) - len(points)

    def oldest(self) -> File | None:
        """Take the oldest file that is in nobody's hands out of the row; it is to be removed without the lock.

        Returns:
            The file, to be given back (`restore`) where it can't be removed; None where there is none.
        """
        self._leave_read()
        oldest = next((file for file in self._files if file not in (*self._reading, self._writing)), None)
        if oldest is None:
            return None
        self._files.remove(oldest)
        return oldest

    def restore(self, oldest: File) -> None:
        """Put a file back that could not be removed."""
        self._files.appendleft(oldest)

    def remove(self) -> None:
        """Remove the files that were read; without the lock."""
        while (path := self._next_needless()) is not None:
            # One that stays there takes room, and is delivered again at worst: the server takes equal points once.
            with suppress(OSError):
                path.unlink(missing_ok=True)

    def settle(self) -> int:
        """Leave on disk exactly what was not read; how many points that is. For who has the disk alone."""
        self._leave_read()
        self.remove()
        if self._files and self._files[0].read_bytes:
            file = self._files[0]
            try:
                with file.path.open("rb") as stream:
                    stream.seek(file.read_bytes)
                    rest = stream.read(file.size - file.read_bytes)
                with whole(file.path) as part:
                    part.write_bytes(rest)
            except OSError:
                pass  # Points that were delivered are delivered again: the server takes equal ones once.
        return self.waiting

    def _newest(self) -> File:
        assert self._folder is not None  # noqa: S101 - it was prepared
        if not self._files or self._files[-1].size >= self._file_bytes:
            self._made += 1
            self._files.append(File(self._folder / f"metrics-{self._made:08}.jsonl"))
        return self._files[-1]

    def _next_needless(self) -> Path | None:
        # Two threads may remove at once.
        try:
            return self._needless.popleft()
        except IndexError:
            return None

    def _leave_read(self) -> None:
        while self._files and not self._files[0].waiting and self._files[0] is not self._writing:
            self._needless.append(self._files.popleft().path)


def write(place: WriteSlot, lines: bytes) -> None:
    """Write lines where they belong, all of them or none; without the lock.

    Raises:
        OSError: The disk is full, or does not answer.
    """
    try:
        with place.file.path.open("ab") as stream:
            stream.truncate(place.end)
            stream.write(lines)
    except OSError:
        _cut(place)
        raise


def _cut(place: WriteSlot) -> None:
    """Take half a write back. Where that fails too, the next write does it, and a reader stops before it."""
    with suppress(OSError), place.file.path.open("r+b") as stream:
        stream.truncate(place.end)


def read(parts: Sequence[ReadRange]) -> list[ReadResult]:
    """Read what lies ahead; without the lock.

    Raises:
        OSError: The oldest can't be read now.
    """
    found: list[ReadResult] = []
    for part in parts:
        try:
            found.append(_read(part))
        except OSError:
            if not found:
                raise
            break  # what was read before it goes first
    return found


def _read(part: ReadRange) -> ReadResult:
    """Points of a file; what are no points is left out, as are all those of a lost file.

    Raises:
        OSError: The file is there and can't be read.
    """
    points = []
    end = part.start
    try:
        with part.file.path.open("rb") as stream:
            stream.seek(end)
            for _ in range(part.count):
                line = stream.readline()
                end += len(line)
                point = from_line(line)
                if point is not None:
                    points.append(point)
    except FileNotFoundError:
        points = []
    return ReadResult(part, points, end)
