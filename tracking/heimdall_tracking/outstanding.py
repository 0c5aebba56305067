"""What is on its way to the server, as who waits for it sees it: whether anything arrives, and how much is left."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Outstanding:
    """What is on its way at one moment."""

    settled: int = 0
    """How much of what was ever logged needs nothing more: while it grows, something arrives."""
    calls: int = 0
    """Calls that are still to be made; a batch of metric points is one."""
    size: int = 0
    """Bytes of the files that are still to be uploaded, of those under way too."""
    tries: int = 0
    """How many uploads were ever begun, those that failed among them."""
    under_way: int = 0
    """Bytes of the files that are being uploaded now, of which nobody knows how many have arrived."""

    def __add__(self, other: Outstanding) -> Outstanding:
        """Both together."""
        return Outstanding(**{name: value + getattr(other, name) for name, value in vars(self).items()})


class Tries:
    """Tries of one thread at uploading, one after the other, for others to look at."""

    def __init__(self) -> None:
        """None was begun yet."""
        self.begun = 0
        self.under_way = 0
        """Bytes of what is being uploaded; 0 between two tries."""

    @contextmanager
    def one(self, size: int) -> Iterator[None]:
        """Around a try, whatever comes of it.

        Args:
            size: Bytes of what is uploaded.
        """
        self.begun, self.under_way = self.begun + 1, size
        try:
            yield
        finally:
            self.under_way = 0


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder; what was removed has none."""
    try:
        files = path.rglob("*") if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0
