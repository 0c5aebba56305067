"""How `heimdall-train` ends, whatever it was called with and whatever became of its streams."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from heimdall_api.contract import ExitCode, Reason, TerminationMessage
from heimdall_trainer import cli
from heimdall_trainer.commands import data
from heimdall_trainer.termination import EXIT_BY_HAND


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The program on a command line: its exit code."""

    def call(*words: str) -> int:
        codes = list[int]()
        monkeypatch.setattr(sys, "argv", ["heimdall-train", *words])
        monkeypatch.setattr(cli, "_configure_logging", lambda: None)
        monkeypatch.setattr(os, "_exit", codes.append)
        try:
            cli.main()
        except SystemExit as error:
            codes.append(int(error.code or 0))
        assert len(codes) == 1
        return codes[0]

    return call


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("run --nope", "unrecognized arguments: --nope; see heimdall-train --help"),
        ("train --epochs many", "argument --epochs: invalid int value: 'many'; see heimdall-train train --help"),
        ("evaluate", "the following arguments are required: --model; see heimdall-train evaluate --help"),
        ("", "the following arguments are required: COMMAND; see heimdall-train --help"),
    ],
)
def test_an_option_that_can_not_be_used_is_told_as_what_no_other_attempt_helps_against(
    words: str, said: str, main: Callable[..., int], last_words: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(*words.split()) == ExitCode.CONFIGURATION
    told = TerminationMessage.model_validate_json(last_words.read_text())
    assert (told.reason, told.message) == (Reason.INVALID_CONFIGURATION, said)
    assert capsys.readouterr().err.startswith("usage: heimdall-train ")


def test_help_is_no_error(main: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert main("run", "--help") == ExitCode.SUCCESS
    assert capsys.readouterr().out.startswith("usage: heimdall-train run ")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def detached() -> io.TextIOWrapper:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.detach()
    return stream


@pytest.mark.parametrize("stream", [closed, detached, lambda: None], ids=["closed", "detached", "gone"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_a_module_has_closed_changes_no_exit_code(
    stream: Callable[[], Any], name: str, main: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "_inspect", lambda _: monkeypatch.setattr(sys, name, stream()))
    assert main("data", "inspect") == ExitCode.SUCCESS


def test_ctrl_c_in_a_command_that_has_nothing_to_save_is_one_line(
    main: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "_inspect", interrupted)
    assert main("data", "inspect") == EXIT_BY_HAND
    assert capsys.readouterr().err == "Ended by Ctrl-C.\n"
