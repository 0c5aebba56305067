"""How a trainer ends: exit code and last words, by the contract."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from heimdall_api.contract import ENV_TERMINATION_MESSAGE, MESSAGE_LIMIT, ExitCode, Reason, TerminationMessage
from heimdall_trainer.errors import ConfigurationError, DataError, FencedError, UndeliveredError


class TerminatedError(BaseException):
    """SIGTERM was received, and what could be saved was."""


def run_to_exit_code(call: Callable[[], None]) -> int:
    """Do something, and turn how it ended into exit code and last words.

    Args:
        call: What to do.

    Returns:
        The exit code.
    """
    try:
        call()
    except BaseException as error:
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        code, reason, message = judge(error)
        if reason == Reason.USER_ERROR:
            traceback.print_exc()
        leave_last_words(reason, message)
        return code
    return ExitCode.SUCCESS


def judge(error: BaseException) -> tuple[ExitCode, Reason, str]:
    """What an exception means: exit code, reason, and a message for people."""
    match error:
        case TerminatedError():
            return ExitCode.SIGTERM, Reason.PREEMPTED, str(error)
        case ConfigurationError() | DataError():
            return ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION, str(error)
        case FencedError():
            return ExitCode.FENCED, Reason.FENCED, str(error)
        case UndeliveredError():
            return ExitCode.UNDELIVERED, Reason.TRACKING_UNAVAILABLE, str(error)
    if type(error).__name__ == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        text = "The GPU's memory does not suffice: lower spec.training.batchSize, or use a larger GPU."
        return ExitCode.CUDA_OUT_OF_MEMORY, Reason.CUDA_OUT_OF_MEMORY, f"{text} {str(error)[:300]}"
    return ExitCode.ERROR, Reason.USER_ERROR, f"{type(error).__name__}: {error}{_where(error)}"


def _where(error: BaseException) -> str:
    """File and line of the innermost frame."""
    frames = traceback.extract_tb(error.__traceback__)
    return f" ({frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def leave_last_words(reason: Reason, message: str) -> None:
    """Tell people on stderr, and the operator in the termination message."""
    short = message if len(message) <= MESSAGE_LIMIT else f"{message[: MESSAGE_LIMIT - 1]}…"
    print(f"{reason}: {short}", file=sys.stderr, flush=True)
    file = os.environ.get(ENV_TERMINATION_MESSAGE)
    if file:
        Path(file).write_text(TerminationMessage(reason=reason, message=short).to_json())
