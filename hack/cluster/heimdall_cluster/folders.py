"""The cache folder, folders in it that are needed for a while, and how folders are removed whole."""

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
from heimdall_cluster.steps import ClusterError, read

PREFIX: Final = "scratch-"
TAG: Final = "CACHEDIR.TAG"
"""Marks the cache as ours, and as one that backups leave out: bford.info/cachedir."""
TAG_TEXT: Final = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Made by hack/cluster, which may remove this folder with all that is in it.\n"
)
BEFORE_TAG: Final = frozenset({"lock", "install.lock"})
"""What may lie in a cache that is still to be made: whoever waits for locks makes them first."""
MADE_UNTAGGED: Final = frozenset({"lock", "parts", "bin"})
"""What lies in every cache that was made before there was a tag."""
MOUNTS: Final = Path("/proc/self/mounts")


def ensure_cache() -> None:
    """Make the cache folder, or take up the one that this tool has made.

    Raises:
        ClusterError: It holds what somebody else has put there; `down --all` would remove that too.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    tag = CACHE / TAG
    if tag.exists() and tag.read_text(errors="replace") == TAG_TEXT:
        return
    new = CACHE / f"{TAG}.new"
    found = {path.name for path in CACHE.iterdir()}
    others = sorted(found - BEFORE_TAG - {new.name})
    if others and not found >= MADE_UNTAGGED:
        raise ClusterError(
            f"{CACHE} holds what this tool did not make ({others[0]}), and its cache is removed whole one day: "
            "set HEIMDALL_CACHE to a folder that is empty or not there yet"
        )
    new.write_text(TAG_TEXT)
    new.replace(tag)  # whole or not at all: one that is cut short would be taken for somebody else's


def link(place: Path, target: Path) -> None:
    """Have a link lead somewhere, unless it does."""
    if place.is_symlink() and place.readlink() == target:
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    place.unlink(missing_ok=True)
    place.symlink_to(target)


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
    if not MOUNTS.exists():
        return []  # macOS: nothing of ours mounts anything there
    ours = tuple(f"{folder}/" for folder in folders)
    lines = MOUNTS.read_text().splitlines()
    points = [line.split()[1].replace("\\040", " ") for line in lines]
    return [point for point in points if f"{point}/".startswith(ours)]
