"""`python3 hack/diagrams.py` draws the diagrams of the documents into docs/diagrams, for the site.

A forge draws them itself, with Mermaid; on the site they are pictures, so that a reader's browser asks no other server
for a program. Each is named after its text, so that one whose text has changed is seen to be missing. Needed: npm,
which fetches Mermaid, and Chromium, which runs it.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

DOCS: Final = Path(__file__).resolve().parents[1] / "docs"
DRAWN: Final = DOCS / "diagrams"
MERMAID: Final = "mermaid@11.12.0"
BROWSERS: Final = ("chromium", "chromium-browser", "google-chrome")
BLOCK: Final = re.compile(r"^(?P<indent> *)```mermaid\n(?P<text>.*?)^(?P=indent)```", re.MULTILINE | re.DOTALL)
NOTES: Final = re.compile(r' data-[a-z-]+="[^"]*"')
"""What Mermaid notes for itself, of which nothing is seen."""
LONG: Final = re.compile(r"\d+\.\d{3,}")
"""Numbers, finer than a screen shows."""
TIMEOUT_S: Final = 120
CONFIG: Final = {
    "startOnLoad": False,
    "theme": "neutral",
    "fontFamily": "sans-serif",
    # Labels as text of the picture: some programs show no HTML in one.
    "htmlLabels": False,
    "flowchart": {"htmlLabels": False, "wrappingWidth": 280},
    "themeCSS": ".edgeLabel rect, .edgeLabel .label rect { fill: #fff !important; opacity: 1 !important; }",
}
PAGE: Final = """<!doctype html><meta charset="utf-8"><body><script src="mermaid.min.js"></script><script>
mermaid.initialize(%(config)s);
mermaid.render("diagram", %(text)s).then(({svg}) => {
  const parsed = new DOMParser().parseFromString(svg, "text/html").querySelector("svg");
  document.body.textContent = "BEGIN" + new XMLSerializer().serializeToString(parsed) + "END";
}, (error) => { document.body.textContent = "ERROR" + error; });
</script>"""


def picture_of(text: str) -> Path:
    """Where the picture of a diagram lies."""
    return DRAWN / f"{hashlib.sha256(text.encode()).hexdigest()[:12]}.svg"


def diagrams() -> Iterator[str]:
    """The texts of all diagrams."""
    for page in sorted(DOCS.rglob("*.md")):
        for block in BLOCK.finditer(page.read_text()):
            yield block["text"]


def main() -> None:
    """Draw those that are missing, and remove those that no page has any more."""
    wanted = {picture_of(text): text for text in diagrams()}
    DRAWN.mkdir(exist_ok=True)
    for file in set(DRAWN.glob("*.svg")) - wanted.keys():
        file.unlink()
    missing = {file: text for file, text in wanted.items() if not file.exists()}
    if not missing:
        return
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None or shutil.which("npm") is None:
        sys.exit("hack/diagrams.py: npm and Chromium are needed (Debian: apt-get install npm chromium)")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        _fetch_mermaid(folder)
        for file, text in missing.items():
            file.write_text(_draw(browser, folder, text))
            print(file)


def _fetch_mermaid(folder: Path) -> None:
    subprocess.run(["npm", "pack", "--silent", MERMAID], cwd=folder, check=True, timeout=TIMEOUT_S, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as tar:
        tar.extract("package/dist/mermaid.min.js", folder, filter="data")
    (folder / "package/dist/mermaid.min.js").rename(folder / "mermaid.min.js")


def _draw(browser: str, folder: Path, text: str) -> str:
    page = folder / "page.html"
    page.write_text(PAGE % {"config": json.dumps(CONFIG), "text": json.dumps(text)})
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    found = re.search(r"BEGIN(.*)END", html.unescape(done.stdout), re.DOTALL)
    if found is None:
        sys.exit(f"hack/diagrams.py: a diagram could not be drawn:\n{text}\n{html.unescape(done.stdout)[-2000:]}")
    picture = LONG.sub(lambda number: f"{float(number[0]):.2f}", NOTES.sub("", found[1])).strip()
    width = re.search(r'viewBox="\S+ \S+ (\S+) ', picture)
    assert width is not None  # Mermaid always says so
    return picture.replace('width="100%"', f'width="{width[1]}"', 1) + "\n"


if __name__ == "__main__":
    main()
