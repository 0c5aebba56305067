"""Pulling an image: each by itself, bounded in time, and what can't be pulled is said in a line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from heimdall_cluster import engine, pulling

MIRRORED, LACKING = "python:3.11", "docker.io/library/redis:7.4"
NEVER = "exec sleep 300"


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], None]:
    """Stands in for Docker's client by a script, which has the image's name as its second argument."""

    def be(script: str) -> None:
        program = tmp_path / "docker"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(engine, "docker", lambda: str(program))

    monkeypatch.setattr(engine, "environment", dict)
    monkeypatch.setattr(pulling, "LOGS", tmp_path)
    monkeypatch.setattr(pulling, "silent", set())
    return be


def test_an_image_that_a_registry_has_is_pulled(
    client: Callable[[str], None], capsys: pytest.CaptureFixture[str]
) -> None:
    client('echo "3.11: Pulling from library/$2"')

    assert pulling.pull(MIRRORED)
    assert "can't be pulled" not in capsys.readouterr().err


def test_why_an_image_can_not_be_pulled_is_said_in_a_line(
    client: Callable[[str], None], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    client('echo more >&2; echo "Error response from daemon: manifest for $2 not found: manifest unknown" >&2; exit 1')

    assert not pulling.pull(LACKING)
    said = capsys.readouterr().err.splitlines()
    assert said[1:] == [f"  {LACKING} can't be pulled: manifest for {LACKING} not found: manifest unknown"]
    assert "more" in (tmp_path / "images.log").read_text()


def test_a_registry_that_keeps_silent_is_given_up_sooner_the_next_time(
    client: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked all the same: a mirror of it may have the other image."""
    client(f"case $2 in {MIRRORED}) echo here;; *) {NEVER};; esac")
    monkeypatch.setattr(pulling, "ANSWER_TIMEOUT_S", 0.2)
    monkeypatch.setattr(pulling, "NEXT_ANSWER_TIMEOUT_S", 0.1)

    assert [pulling.pull(image) for image in (LACKING, LACKING, "ghcr.io/x")] == [False] * 3
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  ")]
    assert [line.partition("answered within ")[2] for line in said] == ["0.2 s", "0.1 s", "0.2 s"]

    monkeypatch.setattr(pulling, "NEXT_ANSWER_TIMEOUT_S", 60)
    assert pulling.pull(MIRRORED)


def test_what_a_registry_has_begun_to_give_is_waited_for_longer(
    client: Callable[[str], None], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client(f"echo here; {NEVER}")
    monkeypatch.setattr(pulling, "PULL_TIMEOUT_S", 0.2)

    assert not pulling.pull(MIRRORED)
    assert f"{MIRRORED} can't be pulled: it took longer than 0.2 s" in capsys.readouterr().err
