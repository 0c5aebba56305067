"""Steps: what is being done, how long it took, and on failure the last words of what failed."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from heimdall_cluster.paths import CACHE

TAIL_LINES: Final = 25
COMMAND_TIMEOUT_S: Final = 1800
INTERRUPT_TIMEOUT_S: Final = 120
"""How long what was interrupted may take to end in good order: a package that is being installed takes a while."""
INTERRUPTED: Final = 130
UNREAD: Final = 141
"""Exit codes of who was ended by Ctrl-C, and of who wrote into a pipe that nobody reads, as shells count."""


held: list[int] = []
"""Descriptors that commands inherit: a lock is held until what it is for has ended, though this process be killed."""


class ClusterError(Exception):
    """Something is missing or failed; the message tells a person what and what to do."""


class TooLongError(ClusterError):
    """A command was ended since it took too long."""


@contextmanager
def told(tool: str) -> Iterator[None]:
    """End a tool with a sentence where it can't go on for a reason that a person can do something about.

    Args:
        tool: Its name.

    Raises:
        SystemExit: Something is missing or failed, the disk is full, the cache is another user's, Ctrl-C was pressed,
            or nobody reads what is printed.
    """
    try:
        yield
        sys.stdout.flush()
    except KeyboardInterrupt:
        say(f"{tool}: interrupted; the next call takes up what is there")
        sys.exit(INTERRUPTED)
    except ClusterError as error:
        sys.exit(f"{tool}: {error}")
    except BrokenPipeError:
        # Python writes out at its end what is left; that must find somebody.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(UNREAD)
    except OSError as error:
        if (where := _full(error)) is not None:
            sys.exit(f"{tool}: no room is left on the disk ({where}): make some, then call again")
        if _of_another_user(error):
            sys.exit(
                f"{tool}: {error.filename} may not be written by you (was this called with sudo once?): "
                f"sudo chown -R $USER {CACHE}, or set HEIMDALL_CACHE to a folder of yours"
            )
        raise


def _full(error: OSError) -> str | None:
    """What could not be written since disk or quota are full, or None where that is not what happened."""
    full = (errno.ENOSPC, errno.EDQUOT)
    if isinstance(error, shutil.Error):  # of a folder's copy: source, target and words of each file
        targets = [target for _, target, words in error.args[0] if any(f"[Errno {code}]" in words for code in full)]
        return str(targets[0]) if targets else None
    if error.errno not in full:
        return None
    return str(error.filename2 or error.filename or CACHE)  # a copy names its source first


def _of_another_user(error: OSError) -> bool:
    """Whether something in the cache, or the folder that it lies in, may not be written."""
    if not isinstance(error, PermissionError) or error.filename is None:
        return False
    file = Path(os.fsdecode(error.filename))
    return file.is_relative_to(CACHE) or CACHE.is_relative_to(file)


def say(text: str) -> None:
    """Tell the user something."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def step(title: str) -> Iterator[None]:
    """Announce a step and tell how long it took."""
    say(f"→ {title} …")
    began = time.monotonic()
    yield
    say(f"  {title}: {time.monotonic() - began:.0f} s")


def run(
    command: Sequence[str | Path],
    *,
    log: Path,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    text: str | None = None,
    timeout_s: float = COMMAND_TIMEOUT_S,
) -> None:
    """Run a command with its output in a log file.

    Args:
        command: Program and arguments.
        log: File that its output is appended to.
        env: Variables beside the process's own.
        cwd: Folder to run in.
        text: Standard input.
        timeout_s: Bound of the whole, in seconds.

    Raises:
        ClusterError: It failed; the message has its last lines.
        TooLongError: It took too long.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        out.write(f"$ {' '.join(map(str, command))}\n")
        out.flush()
        try:
            process = subprocess.Popen(
                [str(part) for part in command],
                stdin=None if text is None else subprocess.PIPE,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                cwd=cwd,
                text=True,
                pass_fds=held,
            )
        except FileNotFoundError as error:
            raise ClusterError(f"{command[0]} is missing") from error
        try:
            code = see_through(process, what=Path(command[0]).name, text=text, timeout_s=timeout_s)
        except subprocess.TimeoutExpired as error:
            raise TooLongError(f"{command[0]} took longer than {timeout_s:.0f} s; see {log}") from error
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-TAIL_LINES:])
        raise ClusterError(f"{' '.join(map(str, command[:4]))} … failed ({code}). Its last lines ({log}):\n{tail}")


def see_through(
    process: subprocess.Popen[str],
    *,
    what: str,
    text: str | None = None,
    timeout_s: float | None = None,
    interrupt_timeout_s: float = INTERRUPT_TIMEOUT_S,
) -> int:
    """Wait for the end of a process; Ctrl-C, which it got too, it may end by in good order.

    Args:
        process: What was begun, with its output anywhere but in a pipe.
        what: Its name.
        text: Standard input.
        timeout_s: Bound of the whole, in seconds.
        interrupt_timeout_s: Bound of what it does after Ctrl-C, in seconds.

    Returns:
        Its exit code.

    Raises:
        TimeoutExpired: It took too long, and was killed.
        KeyboardInterrupt: Ctrl-C was pressed, and it has ended. Pressed once more, it is killed.
    """
    try:
        process.communicate(text, timeout=timeout_s)
    except KeyboardInterrupt:
        if process.poll() is None:
            say(f"  waiting for {what} to end; Ctrl-C kills it")
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(interrupt_timeout_s)
        raise
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
    return process.returncode


def read(command: Sequence[str | Path], *, env: Mapping[str, str] | None = None, timeout_s: float = 60) -> str | None:
    """The output of a command, or None where it failed, is missing or took too long."""
    try:
        done = subprocess.run(
            [str(part) for part in command],
            capture_output=True,
            text=True,
            env={**os.environ, **(env or {})},
            timeout=timeout_s,
            check=False,
        )
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def wait_until(check: Callable[[], bool], *, what: str, timeout_s: float, every_s: float = 0.5) -> None:
    """Poll until a condition holds.

    Raises:
        ClusterError: It did not hold in time.
    """
    deadline = time.monotonic() + timeout_s
    while not check():
        if time.monotonic() > deadline:
            raise ClusterError(f"{what} did not happen within {timeout_s:.0f} s")
        time.sleep(every_s)
