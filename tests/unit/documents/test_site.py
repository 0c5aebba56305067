"""The documents build into a site, strictly, and what the builder does not look at is looked at here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import unquote

import pytest

from tests.programs import hack

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 300
pytestmark = pytest.mark.slow


def build(folder: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """`make docs` of a folder's documents. (With --quiet, --strict counts no warnings.)"""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(to)],
        cwd=folder,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


ALONE = ("mkdocs.yml", "docs", "hack/site.py", "hack/diagrams.py", "charts/heimdall/README.md", "CONTRIBUTING.md")
"""What the pages are made of, without what they link to."""


def copy(to: Path, *names: str) -> None:
    for name in names:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        source = ROOT / name
        shutil.copytree(source, to / name) if source.is_dir() else shutil.copy(source, to / name)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    return folder


class _Page(HTMLParser):
    """What a page links to, and which anchors it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            if name == "id" and value:
                self.anchors.add(value)


def dead(site: Path) -> Iterator[str]:
    """Links of the site that lead nowhere in it."""
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html") if path.name != "404.html"}
    for path, page in pages.items():
        for link in page.links:
            if re.match(r"[a-z]+:|//", link):
                continue
            target, _, anchor = unquote(link).partition("#")
            file = (path.parent / target.partition("?")[0]).resolve() if target else path
            file = file / "index.html" if file.is_dir() else file
            if not file.is_file() or (anchor and file in pages and anchor not in pages[file].anchors):
                yield f"{path.relative_to(site)}: {link}"


def test_every_link_of_every_page_leads_somewhere(site: Path) -> None:
    assert list(dead(site)) == []


def test_nothing_is_asked_of_other_servers_when_a_page_is_opened(site: Path) -> None:
    pages = [_Page(path.read_text()) for path in site.rglob("*.html")]
    styles = [
        match
        for path in site.rglob("*.html")
        for match in re.findall(r"<link[^>]*href=\"(https?:[^\"]+)", path.read_text())
    ]

    assert len(pages) > 30
    assert [
        link for page in pages for link in page.links if link.startswith(("http:", "https:")) and link.endswith(".js")
    ] == []
    assert styles == []


def test_every_diagram_is_a_picture(site: Path) -> None:
    """Of a diagram's text the theme would have the browser fetch what draws it."""
    shown = set()
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert "mermaid" not in re.findall(r'class="([^"]*)"', text), page.name
        pictures = re.findall(r'<img alt="[^"]+, as a diagram" class="diagram" src="([^"]+)"', text)
        source = ROOT / "docs" / page.relative_to(site).with_suffix(".md")
        wanted = source.read_text().count("```mermaid") if source.exists() else 0
        assert len(pictures) == wanted, page.name
        shown |= {(page.parent / picture).resolve().name for picture in pictures}

    assert len(shown) > 3
    assert shown == {file.name for file in (ROOT / "docs/diagrams").iterdir()}, "make diagrams"


def test_a_diagram_that_was_not_drawn_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    hook = hack("site.py", monkeypatch)
    page = SimpleNamespace(file=SimpleNamespace(abs_src_path=str(ROOT / "docs/page.md"), src_uri="page.md"))

    with pytest.raises(hook.PluginError, match="the diagram under 'Flows' was not drawn: make diagrams"):
        hook.on_page_markdown("## Flows\n\n```mermaid\nflowchart XX\n```\n", page)


def test_no_page_shows_markdown_that_was_not_understood(site: Path) -> None:
    for path in site.rglob("*.html"):
        text = re.sub(r"<(pre|code|script)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        body = re.sub(r"<[^>]+>", "", text)
        assert "```" not in body, path
        assert re.findall(r"<code>(?:sh|yaml|python) ", path.read_text()) == [], f"{path}: a block begins beside text"
        assert "](" not in body, path
        assert re.findall(r"^\s*\|.*\|\s*$", body, re.MULTILINE) == [], path


def test_what_belongs_to_an_item_of_a_list_stays_in_it(site: Path) -> None:
    """GitHub asks for two or three blanks, the builder's parser for four."""
    pages = {name: (site / f"{name}.html").read_text() for name in ("howto/own-model", "runbooks/HeimdallOperatorDown")}
    articles = {name: text.partition("<article")[2].partition("</article>")[0] for name, text in pages.items()}

    assert articles["howto/own-model"].count("<ol>") == 1
    assert re.search(r"<ol>.*<ul>.*</ul>.*</ol>", articles["runbooks/HeimdallOperatorDown"], re.DOTALL)


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    """Also one that leaves docs/."""
    copy(tmp_path, *ALONE)

    done = build(tmp_path, tmp_path / "site")

    assert done.returncode != 0
    assert "manifests/examples/localizer.yaml" in done.stderr
