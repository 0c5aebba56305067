"""`python3 hack/needs.py`: what the README asks for, checked before anything is begun."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

PYTHON: Final = (3, 11)
GO: Final = (1, 26)


def main() -> None:
    """Say what is missing, one line each, and fail if anything is."""
    parser = argparse.ArgumentParser(prog="hack/needs.py", description="Tell what is missing on this machine.")
    parser.add_argument("--test", action="store_true", help="for make test too, which starts servers of its own")
    checks = [_python, _engine, _kubernetes, _room]
    if parser.parse_args().test:
        checks += [_postgresql, _redis, _prometheus]
    missing = [line for check in checks if (line := check())]
    if missing:
        sys.exit("Missing on this machine:\n" + "\n".join(f"- {line}" for line in missing))


def _python() -> str | None:
    if sys.version_info < PYTHON:
        return f"Python 3.11 or newer (this is {sys.version.split()[0]}): set PYTHON=/path/to/python3.11"
    if importlib.util.find_spec("ensurepip") is None:
        return "Python's venv module: apt-get install python3-venv"
    return None


def _engine() -> str | None:
    if _docker_answers():
        if _output(["docker", "buildx", "version"]) is None:
            return "Docker's buildx, which images are built with (Debian, Ubuntu: apt-get install docker-buildx)"
        return None
    if _can_install():
        return None
    return "a Docker engine that answers (docker version), or root on Debian, where one is installed for you"


def _kubernetes() -> str | None:
    """Programs are built by Go; kubectl too, unless kind's node image can be pulled."""
    go = _version(["go", "version"], r"go(\d+)\.(\d+)")
    if go is None or go < GO:
        return "Go 1.26 or newer (https://go.dev/dl): kind and helm are built with it"
    if _docker_answers() and shutil.which("kubectl") is None:
        return "kubectl (https://kubernetes.io/docs/tasks/tools)"
    return None


def _postgresql() -> str | None:
    """The integration tests start a server of their own; as root on Debian they install it."""
    if list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) or shutil.which("initdb"):
        return None
    if _can_install():
        return None
    return "PostgreSQL's server programs, for make test (Debian: apt-get install postgresql)"


def _redis() -> str | None:
    """The integration tests start a server of their own; as root on Debian they install it."""
    if shutil.which("redis-server") or shutil.which("redis-check-rdb"):
        return None
    if _can_install():
        return None
    return "Redis's server, for make test (Debian: apt-get install redis-tools)"


def _prometheus() -> str | None:
    """Alerts and dashboard are tested by it; on Debian it is taken out of its package, and not installed."""
    if shutil.which("apt-get") or (shutil.which("prometheus") and shutil.which("promtool")):
        return None
    return "Prometheus and promtool, for make test (https://prometheus.io/download)"


def _can_install() -> bool:
    return os.geteuid() == 0 and Path("/etc/debian_version").exists()


def _room() -> str | None:
    """Disk and memory, as the cluster tool asks for them."""
    sys.path.insert(0, str(Path(__file__).parent / "cluster"))
    from heimdall_cluster.cli import check_machine
    from heimdall_cluster.steps import ClusterError

    try:
        check_machine()
    except ClusterError as error:
        return str(error)
    return None


def _docker_answers() -> bool:
    return _output(["docker", "version", "--format", "{{.Server.Version}}"]) is not None


def _version(command: list[str], pattern: str) -> tuple[int, ...] | None:
    found = re.search(pattern, _output(command) or "")
    return tuple(int(part) for part in found.groups()) if found else None


def _output(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


if __name__ == "__main__":
    main()
