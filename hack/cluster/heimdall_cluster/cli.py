"""The command line: `up`, `down`, `status`, `load`, `env`, `engine`, `parts`, `images`."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import math
import os
import shlex
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

from heimdall_cluster import debian, engine, folders, images, kind, parts, steps
from heimdall_cluster.paths import BEFORE, BIN, CACHE, KUBECONFIG, LOCK
from heimdall_cluster.steps import ClusterError, say, step, told

LOCK_TIMEOUT_S: Final = 3600
"""Longer than a first `up` takes, which builds everything."""
DISK_NEEDED_GB: Final = 58
DISK_NEEDED_WARM_GB: Final = 8
DOCKER_NEEDED_GB: Final = 30
"""Of the first, what images take up in an engine that was there: their layers, and once more in the cluster's nodes."""
MEMORY_NEEDED_GB: Final = 8


def main() -> None:
    """Do what the command line asks for."""
    arguments = _parser().parse_args()
    engine.forget_environment()
    with told("hack/cluster"):
        if arguments.command in ("env", "status"):
            arguments.call(arguments)
            return
        with locked():
            arguments.call(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hack/cluster", description="A local Kubernetes cluster by kind.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, call: object, text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(call=call)
        return command

    add("up", _up, "bring the cluster up, or take up what is there")
    down = add("down", _down, "take the cluster and our Docker engine down")
    down.add_argument("--all", action="store_true", help="remove the cache too")
    add("status", _status, "tell what is there")
    load = add("load", _load, "give the cluster's workers images of the engine")
    load.add_argument("images", nargs="+", metavar="IMAGE")
    load.add_argument("--gpu-node", action="store_true", help="only the worker with the GPUs")
    add("env", _env, 'print variables: eval "$(python3 hack/cluster env)"')
    add("engine", _engine, "make sure that a Docker engine answers")
    build = add("parts", _parts, "build programs from Go modules into the cache, or take them out of Debian packages")
    build.add_argument("names", nargs="+", metavar="NAME", help=", ".join([*parts.CATALOGUE, *debian.CATALOGUE]))
    add("images", _images, "make sure that the base image of the project's images is there")
    return parser


def _up(_: argparse.Namespace) -> None:
    began = time.monotonic()
    check_machine()
    engine.ensure()
    parts.ensure(["kind", "helm"])
    if kind.runs():
        kind.require_kubectl()  # or it would be taken for broken, and taken down
    if kind.recovers():
        say("the cluster is up")
        kind.settle()
    else:
        kind.create()
    # Also where the cluster was up: a call that was killed may not have come so far.
    parts.ensure(["minio", "kubeconform"])
    parts.drop_go_caches()
    say(f'cluster {kind.NAME}: up after {time.monotonic() - began:.0f} s; eval "$(python3 hack/cluster env)"')


def check_machine() -> None:
    """Refuse a machine that can't hold the cluster, before anything is begun.

    Raises:
        ClusterError: Disk or memory do not suffice.
    """
    is_cold = _is_cold()
    needed = max(DISK_NEEDED_WARM_GB, DISK_NEEDED_GB - round(_size(CACHE) / 1e9) if is_cold else 0)
    _require_room(CACHE, needed, "make room, or set HEIMDALL_CACHE to a folder on another disk")
    docker = engine.foreign_root()
    if docker is not None:
        needed = DOCKER_NEEDED_GB if is_cold else DISK_NEEDED_WARM_GB
        _require_room(docker, needed, "Docker keeps its images there; make room")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if memory < MEMORY_NEEDED_GB:
        raise ClusterError(f"{MEMORY_NEEDED_GB} GB of memory are needed, this machine has {_below(memory)}")


def _require_room(folder: Path, needed: int, remedy: str) -> None:
    # On a new machine the folder is not there yet, nor perhaps the one that it will lie in.
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(disk).free / 1e9
    if free < needed:
        raise ClusterError(f"{needed} GB of disk are needed under {folder}, {_below(free)} GB are free: {remedy}")


def _below(amount: float) -> str:
    """Never rounded up: what is a little less than is needed must not look like enough."""
    return f"{math.floor(amount * 10) / 10:g}"


def _is_cold() -> bool:
    """Whether a first `up` has still to make what a cluster is made of."""
    if KUBECONFIG.exists() or all(parts.is_built(parts.CATALOGUE[name]) for name in parts.NODE_PARTS):
        return False
    return not images.has_pulled_node()


def _size(folder: Path) -> int:
    """Bytes that a folder holds, of which what an interrupted call has made already is not needed again."""
    found = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                found += (Path(where) / name).lstat().st_size
    return found


def _down(arguments: argparse.Namespace) -> None:
    engine.refuse_another_cache()
    engine.settle_installation()
    there = engine.answers() or not engine.is_ours()
    if not there and kind.MARKER.exists() and not BEFORE.exists():
        raise ClusterError("the cluster is in a Docker engine that does not answer: start Docker first")
    try:
        if there and not kind.is_of_others() and kind.exists():
            with step("taking the cluster down"):
                kind.delete()
        if there and arguments.all and not engine.environment():
            with step("removing our images"):
                images.remove_ours()
    finally:
        engine.stop()
    KUBECONFIG.unlink(missing_ok=True)
    kind.MARKER.unlink(missing_ok=True)
    if arguments.all:
        parts.drop_go_caches()
        with step(f"removing {CACHE}"):
            shutil.rmtree(CACHE, ignore_errors=True)


def _status(_: argparse.Namespace) -> None:
    own = engine.answers()
    print(f"engine:  {'our own' if own else 'not running' if engine.is_ours() else 'the one that was there'}")
    up = (own or not engine.is_ours()) and kind.is_healthy()
    print(f"cluster: {'up' if up else 'down'}")
    print(f"parts:   {'to be built' if _is_cold() else 'built'}")
    print(f"cache:   {CACHE}")


def _load(arguments: argparse.Namespace) -> None:
    engine.ensure()
    # Nodes take images by themselves: an API server that is away for a moment is not asked.
    if not kind.runs():
        raise ClusterError("the cluster is not up: python3 hack/cluster up")
    kind.load(arguments.images, [kind.GPU_NODE] if arguments.gpu_node else list(kind.WORKERS))


def _env(_: argparse.Namespace) -> None:
    variables = {**engine.environment(), "KUBECONFIG": str(KUBECONFIG)}
    for name, value in variables.items():
        print(f"export {name}={shlex.quote(value)}")
    print(f'export PATH={shlex.quote(str(BIN))}:"$PATH"')


def _engine(_: argparse.Namespace) -> None:
    engine.ensure()


def _parts(arguments: argparse.Namespace) -> None:
    parts.ensure(name for name in arguments.names if name not in debian.CATALOGUE)
    for name in arguments.names:
        if name in debian.CATALOGUE:
            debian.ensure(name)


def _images(_: argparse.Namespace) -> None:
    engine.ensure()
    images.ensure_python()


@contextmanager
def locked() -> Iterator[None]:
    """One call at a time; what one that was killed has begun ends first."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    told = False
    while True:
        folders.ensure_cache()
        with LOCK.open("w") as lock:
            if _taken(lock):
                steps.held.append(lock.fileno())
                try:
                    folders.remove_leftovers()
                    yield
                finally:
                    steps.held.clear()
                return
        if not told:
            say("another hack/cluster is at work; waiting for it")
            told = True
        if time.monotonic() > deadline:
            raise ClusterError(f"another hack/cluster held {LOCK} for {LOCK_TIMEOUT_S} s")
        time.sleep(1)


def _taken(lock: IO[str]) -> bool:
    """Whether the lock is ours now, and no file that `down --all` has removed meanwhile."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(lock.fileno()).st_ino == LOCK.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False
