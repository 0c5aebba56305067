"""Whose processor time it was: what each part of the whole used while something was measured."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Final

PARTS: Final = (
    ("operator", "heimdall_operator"),
    ("API server", "kube-apiserver"),
    ("etcd", "etcd"),
    ("Job controller, scheduler", "kube-controller-manager"),
    ("Job controller, scheduler", "kube-scheduler"),
    ("MLflow", "mlflow"),
    ("PostgreSQL", "postgres"),
    ("MinIO", "minio"),
    ("the benchmark", "tests.bench"),
)
"""Parts, and a word of their processes' command lines."""
REST: Final = "the rest"


def snapshot() -> Counter[str]:
    """Seconds of processor time that each part has used so far; processes that ended are not counted."""
    tick = os.sysconf("SC_CLK_TCK")
    parents, parts, seconds = {}, {}, {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        pid = int(folder.name)
        parents[pid] = int(fields[1])
        parts[pid] = part_of(command)
        seconds[pid] = (int(fields[11]) + int(fields[12])) / tick
    used: Counter[str] = Counter()
    for pid, spent in seconds.items():
        owner = pid
        # A worker that a server forked or spawned has no name of its own.
        while parts.get(owner) is None and owner in parents:
            owner = parents[owner]
        used[parts.get(owner) or REST] += spent
    return used


def part_of(command: str) -> str | None:
    """The part that a command line belongs to, if it tells."""
    program, _, rest = command.partition(" ")
    # MLflow's address is an argument of others: the program and its module tell whose process it is.
    words = f"{Path(program).name} {' '.join(rest.split()[:3])}"
    return next((part for part, word in PARTS if word in words), None)
