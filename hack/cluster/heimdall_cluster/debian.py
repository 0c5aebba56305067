"""Programs taken out of Debian packages into the cache: nothing is installed, so nobody's machine is changed."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heimdall_cluster.paths import BIN, LOGS, PARTS
from heimdall_cluster.steps import ClusterError, run, step

TIMEOUT_S: Final = 600


@dataclass(frozen=True)
class Program:
    """A program of a package that would take very long to build."""

    package: str
    path: str
    """Within the package."""


CATALOGUE: Final = {"promtool": Program("prometheus", "usr/bin/promtool")}


def ensure(name: str) -> None:
    """Put a program on the user's PATH, unless it is there.

    Args:
        name: Its name in the catalogue.

    Raises:
        ClusterError: This is no Debian, or its packages can't be reached.
    """
    program = CATALOGUE[name]
    target = PARTS / name / program.path
    if not target.exists():
        if shutil.which("apt-get") is None:
            raise ClusterError(
                f"{name} is missing: install it (on Debian it is taken from the package {program.package})"
            )
        with step(f"taking {name} out of Debian's package {program.package}"):
            _extract(name, program)
    link = BIN / name
    if not link.is_symlink() or link.readlink() != target:
        BIN.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(target)


def _extract(name: str, program: Program) -> None:
    fresh, target, log = PARTS / f"{name}.new", PARTS / name, LOGS / f"{name}.log"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", program.package]
    try:
        run(command, log=log, cwd=fresh, timeout_s=TIMEOUT_S)
    except ClusterError:
        if os.getuid() != 0:
            raise
        # A fresh machine knows of no packages yet.
        run(["apt-get", "-q", "update"], log=log, timeout_s=TIMEOUT_S)
        run(command, log=log, cwd=fresh, timeout_s=TIMEOUT_S)
    (package,) = fresh.glob("*.deb")
    run(["dpkg-deb", "--extract", package, fresh], log=log, timeout_s=TIMEOUT_S)
    package.unlink()
    _keep_only(fresh, fresh / program.path)
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _keep_only(folder: Path, file: Path) -> None:
    """Remove everything but one file."""
    if not file.is_file():
        raise ClusterError(f"the package has no {file.relative_to(folder)}")
    kept = folder.with_suffix(".kept")
    file.rename(kept)
    shutil.rmtree(folder)
    file.parent.mkdir(parents=True)
    kept.rename(file)
