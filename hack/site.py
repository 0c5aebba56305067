"""What the site needs beyond mkdocs: links that leave docs/, lists as GitHub reads them, and diagrams as pictures.

Pages link to files of the repository, so that they work where Markdown alone is shown. Each file that is linked to
becomes a part of the site, under `repository/`; a link to what is not there the strict build refuses.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any, Final

from markdown import Extension
from markdown.blockprocessors import build_block_parser
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files, InclusionLevel

sys.path.insert(0, str(Path(__file__).parent))

from diagrams import BLOCK, picture_of

ROOT: Final = Path(__file__).resolve().parents[1]
DOCS: Final = ROOT / "docs"
SHELF: Final = "repository"
"""Folder of the site that holds what lies outside docs/."""
LINK: Final = re.compile(r"(?P<before>\]\()(?P<target>(?![a-z]+:|#|/)[^)#\s]+)")
FENCE: Final = re.compile(r"^(?P<indent> *)(?P<ticks>```+).*?^(?P=indent)(?P=ticks) *$", re.MULTILINE | re.DOTALL)
HEADING: Final = re.compile(r"^#+ (.*)$", re.MULTILINE)
INDENT: Final = 2


class _NarrowLists(Extension):
    """What belongs to an item of a list is indented by two or three blanks here, as GitHub allows."""

    def extendMarkdown(self, md: Any) -> None:  # noqa: N802 - the library's name
        md.tab_length = INDENT
        md.parser = build_block_parser(md)  # the one that is there was made with the library's four


def on_config(config: Any) -> Any:
    """Have lists read as GitHub reads them; before other extensions add to the parser."""
    config.markdown_extensions.insert(0, _NarrowLists())
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the files of the repository that pages link to, and those that these link to."""
    waiting = [file for file in files if file.is_documentation_page()]
    waiting += [_add(files, config, Path(item)) for item in _from_repository(config.nav)]
    while waiting:
        file = waiting.pop()
        source = Path(str(file.abs_src_path))
        for target in LINK.findall(FENCE.sub("", source.read_text())):
            path = (source.parent / target[1]).resolve()
            outside = path.is_relative_to(ROOT) and not path.is_relative_to(DOCS)
            if outside and path.is_file() and files.get_file_from_path(_uri(path)) is None:
                added = _add(files, config, path)
                added.inclusion = InclusionLevel.NOT_IN_NAV
                waiting += [added] if added.is_documentation_page() else []
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Point links at where their targets are on the site, and put pictures in the place of diagrams."""
    source = Path(str(page.file.abs_src_path))
    here = Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        target = _uri((source.parent / match["target"]).resolve())
        return match["before"] + os.path.relpath(target, here)

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):
        before = LINK.sub(moved, markdown[end : fence.start()])
        parts += [before, _drawn(fence.group(), markdown[: fence.start()], here)]
        end = fence.end()
    return "".join([*parts, LINK.sub(moved, markdown[end:])])


def _drawn(fence: str, before: str, here: Path) -> str:
    """A fence; if it is a diagram, its picture, which leads to itself where it can be made larger."""
    diagram = BLOCK.fullmatch(fence.rstrip())
    if diagram is None:
        return fence
    (*_, heading) = HEADING.findall(before)
    picture = picture_of(diagram["text"])
    if not picture.exists():
        raise PluginError(f"the diagram under {heading!r} was not drawn: make diagrams")
    place = os.path.relpath(picture.relative_to(DOCS), here)
    return f"{diagram['indent']}[![{heading}, as a diagram]({place}){{ .diagram }}]({place})"


def _uri(path: Path) -> str:
    """Where a file is on the site."""
    if path.is_relative_to(DOCS):
        return path.relative_to(DOCS).as_posix()
    return f"{SHELF}/{path.relative_to(ROOT).as_posix()}" if path.is_relative_to(ROOT) else path.as_posix()


def _add(files: Files, config: Any, path: Path) -> File:
    file = File.generated(config, _uri(path), abs_src_path=str(path))
    files.append(file)
    return file


def _from_repository(nav: Any) -> list[Path]:
    """Pages of the navigation that lie outside docs/."""
    if isinstance(nav, str):
        return [ROOT / nav.removeprefix(f"{SHELF}/")] if nav.startswith(f"{SHELF}/") else []
    items = nav.values() if isinstance(nav, dict) else nav
    return [path for item in items for path in _from_repository(item)]
