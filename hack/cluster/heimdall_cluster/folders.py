"""Folders that are needed for a while, and how folders are removed whole."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from heimdall_cluster.paths import CACHE
from heimdall_cluster.steps import read

PREFIX: Final = "tmp"


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder in the cache that goes in the end: where this call is killed, with the next one."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=CACHE))
    try:
        yield folder
    finally:
        remove_tree(folder)


def remove_leftovers() -> None:
    """Remove what calls that were killed needed for a while. No other call may be at work."""
    for leftover in CACHE.glob(f"{PREFIX}*"):
        remove_tree(leftover)


def remove_tree(tree: Path) -> None:
    """Remove a folder, also one with Go's module cache, which is read-only, and one that something is mounted in."""
    for mount in reversed(mounts_under(tree)):
        read(["umount", "--lazy", mount])
    if mounts_under(tree):
        return  # what is mounted is not the folder's
    for folder, names, _ in os.walk(tree):
        for name in names:
            path = Path(folder) / name
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o755)
    shutil.rmtree(tree, ignore_errors=True)


def mounts_under(*folders: Path) -> list[str]:
    """What is mounted in folders, in the order in which it was mounted."""
    ours = tuple(f"{folder}/" for folder in folders)
    lines = Path("/proc/self/mounts").read_text().splitlines()
    points = [line.split()[1].replace("\\040", " ") for line in lines]
    return [point for point in points if f"{point}/".startswith(ours)]
