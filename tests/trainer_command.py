"""The trainer's command, run as people run it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 600


def heimdall_train(*arguments: str, env: Mapping[str, str], cwd: Path) -> str:
    """What `heimdall-train` prints; it must succeed."""
    program = Path(sys.executable).parent / "heimdall-train"
    done = subprocess.run(
        [program, *arguments], env=env, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
