"""How a trainer ends: exit code, reason, last words."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from heimdall_api.contract import ENV_TERMINATION_MESSAGE, MESSAGE_LIMIT, ExitCode, Reason, TerminationMessage
from heimdall_tracking import SettingsError
from heimdall_trainer.errors import ConfigurationError, DataError, DivergedError, FencedError, UndeliveredError
from heimdall_trainer.termination import EXIT_BY_HAND, StoppedByHandError, TerminatedError, run_to_exit_code


class OutOfMemoryError(RuntimeError):
    """As torch names it."""

    __module__ = "torch"


class MlflowException(Exception):  # noqa: N818 - its name there
    """As mlflow names it."""

    __module__ = "mlflow.exceptions"

    def __init__(self, message: str, error_code: str) -> None:
        super().__init__(message)
        self.error_code = error_code


ENDS = {
    "Ctrl-C": (StoppedByHandError("at step 3"), EXIT_BY_HAND, Reason.PREEMPTED),
    "SIGTERM": (TerminatedError("at step 3"), ExitCode.SIGTERM, Reason.PREEMPTED),
    "a spec that can't work": (ConfigurationError("wrong"), ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION),
    "settings that can't be used": (SettingsError("wrong"), ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION),
    "recordings that can't be used": (DataError("corrupt"), ExitCode.CONFIGURATION, Reason.INVALID_CONFIGURATION),
    "weights that are no numbers": (DivergedError("nan"), ExitCode.ERROR, Reason.USER_ERROR),
    "a newer attempt": (FencedError("attempt 2"), ExitCode.FENCED, Reason.FENCED),
    "results not delivered": (UndeliveredError("late"), ExitCode.UNDELIVERED, Reason.TRACKING_UNAVAILABLE),
    "MLflow away": (
        MlflowException("no answer", "INTERNAL_ERROR"),
        ExitCode.UNDELIVERED,
        Reason.TRACKING_UNAVAILABLE,
    ),
    "a wrong call of MLflow": (
        MlflowException("no such run", "RESOURCE_DOES_NOT_EXIST"),
        ExitCode.ERROR,
        Reason.USER_ERROR,
    ),
    "a GPU that is full": (
        OutOfMemoryError("tried to allocate"),
        ExitCode.CUDA_OUT_OF_MEMORY,
        Reason.CUDA_OUT_OF_MEMORY,
    ),
    "a full disk": (OSError(errno.ENOSPC, "No space left", "/out"), ExitCode.ERROR, Reason.STORAGE_EXCEEDED),
    "a folder that may not be written to": (
        PermissionError(errno.EACCES, "no", "/out"),
        ExitCode.ERROR,
        Reason.USER_ERROR,
    ),
    "an exit that claims success": (SystemExit(), ExitCode.ERROR, Reason.USER_ERROR),
    "an exception in training": (KeyError("x"), ExitCode.ERROR, Reason.USER_ERROR),
}


def ending_with(error: BaseException) -> Callable[[], None]:
    def end() -> None:
        raise error

    return end


@pytest.mark.parametrize(("error", "code", "reason"), ENDS.values(), ids=ENDS.keys())
def test_each_end_has_its_exit_code_and_reason(
    error: BaseException, code: int, reason: Reason, last_words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_to_exit_code(ending_with(error)) == code
    told = TerminationMessage.model_validate_json(last_words.read_text())
    assert told.reason is reason
    assert f"{reason}: {told.message}" in capsys.readouterr().err


def test_success_leaves_no_last_words(last_words: Path) -> None:
    assert run_to_exit_code(lambda: None) == ExitCode.SUCCESS
    assert not last_words.exists()


def test_a_user_s_error_tells_type_message_and_place(last_words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_to_exit_code(ending_with(ValueError("boom")))
    message = TerminationMessage.model_validate_json(last_words.read_text()).message
    assert message.startswith("ValueError: boom (")
    assert f"{Path(__file__).name}:" in message
    assert "Traceback" in capsys.readouterr().err


def test_a_wrong_spec_is_told_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    run_to_exit_code(ending_with(ConfigurationError("spec.training.epochs: wrong")))
    assert capsys.readouterr().err == "InvalidConfiguration: spec.training.epochs: wrong\n"


def test_long_last_words_are_cut_to_what_a_status_carries(last_words: Path) -> None:
    run_to_exit_code(ending_with(DataError("x" * 5000)))
    message = TerminationMessage.model_validate_json(last_words.read_text()).message
    assert len(message) == MESSAGE_LIMIT
    assert message.endswith("x…")


def test_a_full_gpu_is_told_with_a_remedy(last_words: Path) -> None:
    run_to_exit_code(ending_with(OutOfMemoryError("tried to allocate 2 GiB")))
    message = TerminationMessage.model_validate_json(last_words.read_text()).message
    assert "spec.training.batchSize" in message
    assert "tried to allocate 2 GiB" in message


def test_last_words_that_can_not_be_written_change_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_TERMINATION_MESSAGE, "/dev/full")
    assert run_to_exit_code(ending_with(TerminatedError("at step 3"))) == ExitCode.SIGTERM


def test_last_words_and_log_hold_no_password(last_words: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_to_exit_code(ending_with(RuntimeError("can't reach http://user:hunter2@mlflow:5000/api")))
    assert "hunter2" not in last_words.read_text()
    assert "hunter2" not in capsys.readouterr().err


@pytest.mark.parametrize("error", [SystemExit(2), KeyboardInterrupt()])
def test_who_ends_the_process_on_purpose_ends_it(error: BaseException, last_words: Path) -> None:
    with pytest.raises(type(error)):
        run_to_exit_code(ending_with(error))
    assert not last_words.exists()
