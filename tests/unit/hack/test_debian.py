"""Programs are taken out of a Debian package once, and nothing of the machine is changed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from heimdall_cluster import debian
from heimdall_cluster.steps import ClusterError


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("BIN", "PARTS", "LOGS"):
        monkeypatch.setattr(debian, name, tmp_path / name.lower())
    return tmp_path


def package(folder: Path, paths: tuple[str, ...]) -> None:
    """A package as apt-get would bring it."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN/control").write_text("Package: p\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n")
    for path in (*paths, "usr/share/much"):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(path)
    done = subprocess.run(["dpkg-deb", "--build", root, folder / "p.deb"], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def bring(monkeypatch: pytest.MonkeyPatch, *paths: str) -> list[list[str]]:
    """Stand in for apt-get; what is run."""
    ran: list[list[str]] = []
    really = debian.run

    def run(command: list[str], **more: object) -> None:
        ran.append([str(part) for part in command])
        if command[0] == "apt-get":
            folder = Path(str(more["cwd"]))
            package(folder / "made", paths)
            (folder / "made/p.deb").rename(folder / "p.deb")
            return
        really(command, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(debian, "run", run)
    return ran


def test_only_the_programs_are_kept_and_taken_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    ran = bring(monkeypatch, "usr/bin/prometheus", "usr/bin/promtool")

    debian.ensure("prometheus")
    debian.ensure("prometheus")

    assert [command[0] for command in ran] == ["apt-get", "dpkg-deb"]
    assert (cache / "bin/promtool").read_text() == "usr/bin/promtool"
    files = {path.name for path in (cache / "parts").rglob("*") if path.is_file()}
    assert files == {"prometheus", "promtool"}


def test_a_package_without_a_program_is_told(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    bring(monkeypatch, "usr/bin/prometheus")

    with pytest.raises(ClusterError, match="has no usr/bin/promtool"):
        debian.ensure("prometheus")
