"""Where everything lies: all of it under one cache folder, so that `down --all` can remove it whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

HERE: Final = Path(__file__).resolve().parents[1]
PARTS_SOURCE: Final = HERE / "parts"
IMAGES_SOURCE: Final = HERE / "images"


def cache_dir() -> Path:
    """`$HEIMDALL_CACHE`, else `$XDG_CACHE_HOME/heimdall`, else `~/.cache/heimdall`."""
    named = os.environ.get("HEIMDALL_CACHE")
    if named:
        return Path(named).resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "heimdall"


CACHE: Final = cache_dir()
BIN: Final = CACHE / "bin"
PARTS: Final = CACHE / "parts"
GO: Final = CACHE / "go"
ENGINE: Final = CACHE / "engine"
LOGS: Final = CACHE / "logs"
KUBECONFIG: Final = CACHE / "kubeconfig"
LOCK: Final = CACHE / "lock"
INSTALL_LOCK: Final = CACHE / "install.lock"
"""Held while packages are installed, by the tests too."""

RUN: Final = Path("/run/heimdall")
"""Socket, pid file and exec-root of the own engine: a socket's path must be short."""
SOCKET: Final = RUN / "docker.sock"
PID_FILE: Final = RUN / "docker.pid"
EXEC_ROOT: Final = RUN / "exec"
DATA_ROOT: Final = ENGINE / "data"
CLIENT_CONFIG: Final = ENGINE / "config"
BEFORE: Final = ENGINE / "before.json"
"""What the host was like before the own engine started: what `down` puts back."""
