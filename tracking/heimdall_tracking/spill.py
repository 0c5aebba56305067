"""Points on disk: what the memory's share of the metric queue can't hold while the server is away.

A row of files that are only ever appended to and read in order. A file goes when what was read from it is no longer
needed, so the disk holds what waits and little more; and whatever a kill leaves behind can be delivered later.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heimdall_tracking.points import Point, from_line, to_lines

FILE_BYTES: Final = 4 * 2**20
"""A file that has reached this size gets no more points."""
LIMIT_BYTES: Final = 2**30
"""Most that may lie on disk: some 15 million points."""
PATTERN: Final = "metrics-*.jsonl"


@dataclass
class _File:
    path: Path
    size: int = 0
    """Bytes of whole lines: what lies beyond them is the rest of a write that failed."""
    points: int = 0
    read_bytes: int = 0
    read_points: int = 0

    @property
    def waiting(self) -> int:
        return self.points - self.read_points


@dataclass(frozen=True)
class Ahead:
    """Where points lie that are read next."""

    file: _File
    start: int
    count: int


@dataclass(frozen=True)
class Found:
    """What was read of them."""

    ahead: Ahead
    points: list[Point]
    end: int


class Spill:
    """Points on disk, first in, first out. Not safe for threads: the queue's lock is around it.

    Reading alone goes without that lock (`read`), between two calls with it that say what to read and that it was read:
    what is appended or dropped meanwhile lies behind it.
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
        self._file_bytes = file_bytes
        self._limit_bytes = limit_bytes
        self._files: deque[_File] = deque()
        self._reading: list[_File] = []
        """Files that must stay: they are being read."""
        self._made = 0

    @property
    def waiting(self) -> int:
        """Points that were written and not read yet."""
        return sum(file.waiting for file in self._files)

    def append(self, points: Collection[Point]) -> None:
        """Write points behind those that are there: all of them or none.

        Raises:
            OSError: The disk is full, or the bound was reached (ENOSPC); nothing was written.
        """
        lines = to_lines(points)
        if sum(file.size for file in self._files) + len(lines) > self._limit_bytes:
            raise OSError(errno.ENOSPC, f"the bound of {self._limit_bytes} bytes is reached")
        file = self._newest()
        try:
            with file.path.open("ab") as stream:
                stream.truncate(file.size)
                stream.write(lines)
        except OSError:
            self._cut(file)
            raise
        file.size += len(lines)
        file.points += len(points)

    def ahead(self, limit: int) -> list[Ahead]:
        """Where the oldest points lie, to be read; those that were taken before are no longer needed.

        Args:
            limit: Most points.
        """
        self._remove_read()
        parts: list[Ahead] = []
        for file in self._files:
            count = min(limit - sum(part.count for part in parts), file.waiting)
            if not count:
                break
            parts.append(Ahead(file, file.read_bytes, count))
        self._reading = [part.file for part in parts]
        return parts

    def take(self, found: Sequence[Found]) -> tuple[list[Point], int]:
        """Count points as read; what was to be read and is not among them waits as before.

        Returns:
            The points, and how many were written but are there no more.
        """
        self._reading = []
        for each in found:
            each.ahead.file.read_bytes = each.end
            each.ahead.file.read_points += each.ahead.count
        points = [point for each in found for point in each.points]
        return points, sum(each.ahead.count for each in found) - len(points)

    def drop_oldest(self) -> int:
        """Make room: remove the oldest file that is not being read, if it can be; how many points are gone with it."""
        self._remove_read()
        oldest = next((file for file in self._files if file not in self._reading), None)
        if oldest is None:
            return 0
        try:
            oldest.path.unlink(missing_ok=True)
        except OSError:
            return 0
        self._files.remove(oldest)
        return oldest.waiting

    def settle(self) -> int:
        """Leave on disk exactly what was not read; how many points that is."""
        self._remove_read()
        if self._files and self._files[0].read_bytes:
            file = self._files[0]
            try:
                with file.path.open("rb") as stream:
                    stream.seek(file.read_bytes)
                    rest = stream.read(file.size - file.read_bytes)
                fresh = file.path.with_suffix(".new")
                fresh.write_bytes(rest)
                fresh.replace(file.path)
            except OSError:
                pass  # Points that were delivered are delivered again: the server takes equal ones once.
        return self.waiting

    def _newest(self) -> _File:
        if not self._files or self._files[-1].size >= self._file_bytes:
            self._made += 1
            self._files.append(_File(self._make_folder() / f"metrics-{self._made:08}.jsonl"))
        return self._files[-1]

    def _cut(self, file: _File) -> None:
        """Take half a write back. Where that fails too, the next write does it, and a reader stops before it."""
        try:
            with file.path.open("r+b") as stream:
                stream.truncate(file.size)
        except OSError:
            return

    def _remove_read(self) -> None:
        while self._files and not self._files[0].waiting:
            # One that stays there takes room, and is delivered again at worst: the server takes equal points once.
            with suppress(OSError):
                self._files[0].path.unlink(missing_ok=True)
            self._files.popleft()


def read(parts: Sequence[Ahead]) -> list[Found]:
    """Read what lies ahead; without the lock.

    Raises:
        OSError: The oldest can't be read now.
    """
    found: list[Found] = []
    for part in parts:
        try:
            found.append(_read(part))
        except OSError:
            if not found:
                raise
            break  # what was read before it goes first
    return found


def _read(part: Ahead) -> Found:
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
    return Found(part, points, end)
