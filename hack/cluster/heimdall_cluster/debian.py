"""Programs taken out of Debian packages into the cache: nothing is installed, so nobody's machine is changed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Final

from heimdall_cluster.folders import link
from heimdall_cluster.paths import BIN, LOGS, PARTS
from heimdall_cluster.steps import ClusterError, run, step

TIMEOUT_S: Final = 600
CATALOGUE: Final = {"prometheus": ("usr/bin/prometheus", "usr/bin/promtool")}
"""Packages, and the programs in them that would take very long to build."""


def ensure(package: str) -> None:
    """Put a package's programs on the user's PATH, unless they are there.

    Args:
        package: Its name in the catalogue.

    Raises:
        ClusterError: This is no Debian, or its packages can't be reached.
    """
    targets = [PARTS / package / path for path in CATALOGUE[package]]
    if not all(target.exists() for target in targets):
        if all(shutil.which(target.name) for target in targets):
            return
        names = " and ".join(target.name for target in targets)
        if shutil.which("apt-get") is None:
            raise ClusterError(
                f"{names} are missing: install them (on Debian they are taken from the package {package})"
            )
        with step(f"taking {names} out of Debian's package {package}"):
            _extract(package)
    for target in targets:
        link(BIN / target.name, target)


def _extract(package: str) -> None:
    fresh, target, log = PARTS / f"{package}.new", PARTS / package, LOGS / f"{package}.log"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    command = ["apt-get", "-q", "-o", "APT::Sandbox::User=", "download", package]
    try:
        run(command, log=log, cwd=fresh, timeout_s=TIMEOUT_S)
    except ClusterError:
        if os.getuid() != 0:
            raise
        # A fresh machine knows of no packages yet.
        run(["apt-get", "-q", "update"], log=log, timeout_s=TIMEOUT_S)
        run(command, log=log, cwd=fresh, timeout_s=TIMEOUT_S)
    (archive,) = fresh.glob("*.deb")
    run(["dpkg-deb", "--extract", archive, fresh], log=log, timeout_s=TIMEOUT_S)
    archive.unlink()
    _keep_only(fresh, CATALOGUE[package])
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def _keep_only(folder: Path, paths: tuple[str, ...]) -> None:
    """Remove everything but some files."""
    kept = folder.with_suffix(".kept")
    shutil.rmtree(kept, ignore_errors=True)
    for path in paths:
        if not (folder / path).is_file():
            raise ClusterError(f"the package has no {path}")
        (kept / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).rename(kept / path)
    shutil.rmtree(folder)
    kept.rename(folder)
