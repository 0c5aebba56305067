"""How a trainer ends: exit code and last words, by the contract."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from heimdall_api.contract import ENV_TERMINATION_MESSAGE, MESSAGE_LIMIT, ExitCode, Reason, TerminationMessage
from heimdall_trainer.errors import (
    ConfigurationError,
    DataError,
    DeviceError,
    DivergedError,
    FencedError,
    UndeliveredError,
)
from heimdall_trainer.group import is_broken_connection

NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})


EXIT_BY_HAND: Final = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as of any program."""


class TerminatedError(BaseException):
    """SIGTERM was received, and what could be saved was."""

    asked_by = "SIGTERM"


class StoppedByHandError(TerminatedError):
    """Ctrl-C was pressed, and what could be saved was."""

    asked_by = "Ctrl-C"


def run_to_exit_code(call: Callable[[], None]) -> int:
    """Do something, and turn how it ended into exit code and last words.

    Args:
        call: What to do.

    Returns:
        The exit code.
    """
    # Late: this is imported for `--help` too.
    from heimdall_tracking.redact import redact

    try:
        call()
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) or (isinstance(error, SystemExit) and error.code):
            raise
        code, reason, message = judge(error)
        if reason == Reason.USER_ERROR and not isinstance(error, DivergedError):
            print(redact(traceback.format_exc()), file=sys.stderr, end="")
        leave_last_words(reason, redact(message))
        for note in getattr(error, "__notes__", ()):
            print(redact(note), file=sys.stderr, flush=True)
        return code
    return ExitCode.SUCCESS


def judge(error: BaseException) -> tuple[int, Reason, str]:
    """What an exception means: exit code, reason, and a message for people."""
    from heimdall_tracking import SettingsError
    from heimdall_tracking.errors import AwayError

    match error:
        case StoppedByHandError():
            return EXIT_BY_HAND, Reason.PREEMPTED, str(error)
        case TerminatedError():
            return ExitCode.SIGTERM, Reason.PREEMPTED, str(error)
        case ConfigurationError() | DataError() | SettingsError():
            return ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION, str(error)
        case DivergedError():
            return ExitCode.ERROR, Reason.USER_ERROR, str(error)
        case ConnectionError() | DeviceError():
            # A database or a store that does not answer may answer the next attempt, which may be on another node.
            return ExitCode.ERROR, Reason.UNKNOWN, str(error)
        case FencedError():
            return ExitCode.FENCED, Reason.FENCED, str(error)
        case UndeliveredError() | AwayError():
            return ExitCode.UNDELIVERED, Reason.TRACKING_UNAVAILABLE, str(error)
    return _judge_other(error)


def _judge_other(error: BaseException) -> tuple[ExitCode, Reason, str]:
    """What an exception means that the trainer has no class of its own for."""
    from heimdall_tracking.errors import is_permanent

    if isinstance(error, OSError) and error.errno in NO_ROOM:
        where = f": {error.filename}" if error.filename else _where(error)
        remedy = "make room there, or use a larger disk (--output-dir; on a cluster, a volume of spec.podTemplate)"
        return ExitCode.ERROR, Reason.STORAGE_EXCEEDED, f"{error.strerror}{where}; {remedy}."
    if isinstance(error, SystemExit):
        # Exit code 0 is for a training that is done: nothing would tell that this one is not.
        message = f"sys.exit() was called before training was done{_where(error)}; let training end, or raise an error."
        return ExitCode.ERROR, Reason.USER_ERROR, message
    if _is_named(error, "torch", "OutOfMemoryError"):
        text = "The GPU's memory does not suffice: lower spec.training.batchSize, or use a larger GPU."
        return ExitCode.CUDA_OUT_OF_MEMORY, Reason.CUDA_OUT_OF_MEMORY, f"{text} {str(error)[:300]}"
    if _is_named(error, "mlflow", "MlflowException") and not is_permanent(error):
        return ExitCode.UNDELIVERED, Reason.TRACKING_UNAVAILABLE, f"MLflow can't be used: {error}"
    if is_broken_connection(error):
        return ExitCode.ERROR, Reason.WORKER_LOST, f"The connection to another worker broke: {error}"
    return ExitCode.ERROR, Reason.USER_ERROR, f"{type(error).__name__}: {error}{_where(error)}"


def _is_named(error: BaseException, package: str, name: str) -> bool:
    """Whether it is an error of a package that is heavy to import."""
    kind = type(error)
    return kind.__name__ == name and kind.__module__.split(".")[0] == package


def _where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def leave_last_words(reason: Reason, message: str) -> None:
    """Tell people on stderr, and the operator in the termination message."""
    short = message if len(message) <= MESSAGE_LIMIT else f"{message[: MESSAGE_LIMIT - 1]}…"
    print(f"{reason}: {short}", file=sys.stderr, flush=True)
    file = os.environ.get(ENV_TERMINATION_MESSAGE)
    if file and not _is_consequence(reason, Path(file)):
        # Where it can't be written, the exit code must still say what it means.
        with suppress(OSError):
            Path(file).write_text(TerminationMessage(reason=reason, message=short).to_json())


def _is_consequence(reason: Reason, file: Path) -> bool:
    """Whether another process of this pod has said what this one only suffers from."""
    return reason in (Reason.WORKER_LOST, Reason.PREEMPTED) and file.exists() and file.stat().st_size > 0
