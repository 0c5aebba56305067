"""The documents, taken apart: blocks, commands, names in code."""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from heimdall_api import crd

ROOT: Final = Path(__file__).resolve().parents[3]
CHART: Final = ROOT / "charts/heimdall"
DOCUMENTS: Final = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), CHART / "README.md"])
NOT_RUN: Final = "# not run by a test"
"""How a block of commands begins that no test runs; the reason follows."""

_BLOCK = re.compile(r"^(?P<indent> *)```(?P<kind>\w+)\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
_HERE_DOCUMENT = re.compile(r"<<'(\w+)'\n.*?^\1$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
_FENCE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
_SHOWN = re.compile(r"^```\n\$ ([^\n]+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"`([^`\n]+)`")


@dataclass(frozen=True)
class Block:
    """A block of code of a document."""

    document: Path
    kind: str
    text: str
    heading: str
    """Of the section that it is in."""

    @property
    def is_marked(self) -> bool:
        """Whether it says that no test runs it."""
        return self.text.startswith(NOT_RUN)

    @property
    def where(self) -> str:
        return str(self.document.relative_to(ROOT))


@dataclass(frozen=True)
class Command:
    """One command of a block, or one in the text."""

    where: str
    line: str
    words: list[str]
    is_marked: bool
    """Whether its block says that no test runs it."""


def blocks(*kinds: str) -> list[Block]:
    found = []
    for document in DOCUMENTS:
        page = document.read_text()
        for match in _BLOCK.finditer(page):
            if match["kind"] in kinds:
                text = re.sub(rf"^{match['indent']}", "", match["text"], flags=re.MULTILINE)
                headings = _HEADING.findall(_FENCE.sub("", page[: match.start()]))
                found.append(Block(document, match["kind"], text, headings[-1] if headings else ""))
    return found


def commands() -> list[Command]:
    """Every command of every shell block, split as a shell splits it."""
    found = []
    for block in blocks("sh"):
        for line in _HERE_DOCUMENT.sub("", block.text).replace("\\\n", " ").splitlines():
            where = f"{block.where}: {line.strip()}"
            found.extend(Command(where, line, words, block.is_marked) for words in split(line))
    return found


def typed_under(page: str, heading: str, program: str) -> list[list[str]]:
    """Commands of a program in the blocks under a heading of a page."""
    found = [block for block in blocks("sh") if (block.where, block.heading) == (page, heading)]
    lines = [line for block in found for line in block.text.splitlines()]
    return [words for line in lines for words in split(line.partition(" #")[0]) if words[0] == program]


def shown(page: str) -> dict[str, str]:
    """Commands that a page shows with what they print."""
    return dict(_SHOWN.findall((ROOT / page).read_text()))


def looks_like(text: str) -> re.Pattern[str]:
    """What differs from a text in numbers alone."""
    return re.compile(re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(text)))


def commands_in_text(*programs: str) -> list[Command]:
    """Commands within sentences and tables; two words are only the command's name."""
    return [
        Command(f"{document.relative_to(ROOT)}: {code}", code, words, is_marked=True)
        for document, code in code_in_text()
        if code.partition(" ")[0] in programs and code.count(" ") > 1
        for words in split(code)
    ]


def split(line: str) -> list[list[str]]:
    """The commands of a line; those within `$(…)` too."""
    lexer = shlex.shlex(line.replace("$(", " ; ").replace(')"', '"'), posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            found.append([])
        else:
            found[-1].append(word.rstrip(")") if "(" not in word else word)
    return [words for words in found if words]


def code_in_text() -> Iterator[tuple[Path, str]]:
    """What stands between backticks outside blocks."""
    for document in DOCUMENTS:
        for code in _CODE.findall(_FENCE.sub("", document.read_text())):
            yield document, code


@functools.cache
def values() -> dict[str, Any]:
    """The chart's values."""
    return dict(yaml.safe_load((CHART / "values.yaml").read_text()))


def is_value(path: str) -> bool:
    """Whether the chart has a value of this name; below one that is open, anything goes."""
    at: Any = values()
    for part in path.split("."):
        if isinstance(at, dict) and not at:
            return True
        if not isinstance(at, dict) or part not in at:
            return isinstance(at, dict) and any("/" in key for key in at)
        at = at[part]
    return True


@functools.cache
def _schema(part: str) -> crd.Schema:
    return crd.schema_of(crd.TrainingRunSpec if part == "spec" else crd.TrainingRunStatus)


def is_field(path: str) -> bool:
    """Whether the resource has a field of this path, such as `status.attempts[].reason`."""
    first, *rest = re.sub(r"\[\w*]", "", path).split(".")
    at = _schema(first)
    for part in rest:
        at = at.get("items", at)
        if at.get("x-kubernetes-preserve-unknown-fields"):
            return True
        if part not in at.get("properties", {}):
            return False
        at = at["properties"][part]
    return True
