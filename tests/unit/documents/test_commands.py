"""What the documents tell people to type is there: targets, flags, files, links."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from heimdall_trainer.cli import _parser

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?://|#)([^)#\s]+)")
TARGET = re.compile(r"^([a-z][a-z-]*):", re.MULTILINE)
PLACE = re.compile(r"^(?:\./)?(?:manifests|charts|hack|images|tests|docs)/[\w./-]+$")


def commands() -> list[tuple[str, list[str]]]:
    """Every command of every shell block, split as a shell splits it."""
    found = []
    for document in DOCUMENTS:
        for block in BLOCK.findall(document.read_text()):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"&&|\|", line):
                    words = shlex.split(part, comments=True)
                    if words:
                        found.append((f"{document.relative_to(ROOT)}: {line.strip()}", words))
    return found


def typed(program: str) -> list[object]:
    return [pytest.param(words[1:], id=where) for where, words in commands() if words[0] == program]


def test_there_are_commands_to_check() -> None:
    assert typed("make")
    assert typed("heimdall-train")


@pytest.mark.parametrize("words", typed("make"))
def test_a_target_is_there(words: list[str]) -> None:
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))

    assert {word for word in words if "=" not in word} <= targets


@pytest.mark.parametrize("words", typed("heimdall-train"))
def test_the_trainer_takes_the_flags(words: list[str]) -> None:
    assert _parser().parse_args(words).call


@pytest.mark.parametrize(("where", "words"), [pytest.param(*item, id=item[0]) for item in commands()])
def test_a_file_of_the_repository_is_there(where: str, words: list[str]) -> None:
    places = [word.removeprefix("@") for word in words if PLACE.match(word)]

    assert [place for place in places if not (ROOT / place).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = LINK.findall(document.read_text())

    assert [link for link in links if not (document.parent / link).exists()] == []
