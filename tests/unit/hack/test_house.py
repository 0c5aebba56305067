"""The house: lock files that name no index and hold hashes, and an environment that is its own clone's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LOCKS = sorted((ROOT / "requirements").glob("*.txt"))


@pytest.mark.parametrize("lock", [lock for lock in LOCKS if lock.name != "constraints.txt"], ids=lambda lock: lock.name)
def test_a_lock_file_names_no_index_and_pins_by_hash(lock: Path) -> None:
    text = lock.read_text()

    assert "index-url" not in text
    assert "://" not in text
    assert text.count("--hash=sha256:") >= text.count("==") > 0


def test_images_run_as_somebody_without_rights() -> None:
    for name in ("Dockerfile.operator", "Dockerfile.trainer", "images/contract/Dockerfile"):
        users = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("USER ")]
        assert users, name
        assert "root" not in users[-1], name
        assert not users[-1].startswith("USER 0"), name


def test_the_operator_s_image_holds_no_torch() -> None:
    names = {line.partition("==")[0] for line in (ROOT / "requirements/operator.txt").read_text().splitlines()}

    assert "kopf" in names
    assert names.isdisjoint({"torch", "lightning", "pytorch-lightning", "timm", "mlflow"})


@pytest.mark.parametrize(
    "name",
    [
        *(f"Dockerfile.{name}" for name in ("operator", "trainer")),
        *(f"images/{name}/Dockerfile" for name in ("contract", "mlflow")),
    ],
)
def test_the_index_that_packages_come_from_is_in_no_image(name: str) -> None:
    """A stage that is left behind is told of it, before it installs anything."""
    first, last = re.split(r"^FROM .*$", (ROOT / name).read_text(), flags=re.MULTILINE)[1:]

    before = first.partition("RUN ")[0].splitlines()
    assert {"ARG PIP_INDEX_URL", "ARG UV_DEFAULT_INDEX=$PIP_INDEX_URL"} <= set(before)
    assert "INDEX" not in last


@pytest.mark.parametrize(
    "said", [{}, {"XDG_CACHE_HOME": "/xdg"}, {"HEIMDALL_CACHE": "/mine", "XDG_CACHE_HOME": "/xdg"}], ids=str
)
def test_the_types_are_cached_where_everything_is(monkeypatch: pytest.MonkeyPatch, said: dict[str, str]) -> None:
    """Or another call would find a cache that holds what it did not make."""
    from heimdall_cluster.paths import cache_dir

    (folder,) = re.findall(r"MYPY_CACHE_DIR=(\S+)", (ROOT / "hack/e2e").read_text())
    for name in ("HEIMDALL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in said.items():
        monkeypatch.setenv(name, value)

    told = subprocess.run(
        ["bash", "-c", f"echo {folder}"], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert told.strip() == str(cache_dir() / "mypy")


# --- the development environment ----------------------------------------------------------------------------------

PYTHON = """#!/bin/bash
# Stands in for Python and what lies beside it in an environment, which names its place as a real one does.
place=
case "$*" in
  "-m venv --clear .venv")
    echo made >> did
    rm -rf .venv
    mkdir -p .venv/bin
    for name in python pip uv; do
      sed "s|^place=.*|place='$PWD'|" "$0" > ".venv/bin/$name"
      chmod +x ".venv/bin/$name"
    done ;;
  "-c import pip") [ ! -e .venv/broken ] ;;
  --version) [ ! -e .venv/broken ] && echo "pip 26.0 from $place/.venv/lib/python3.11/site-packages/pip" ;;
  "-m pip config get global.index-url") [ -e pip.conf ] && cat pip.conf ;;
  "pip "*) echo "$2 index=${UV_DEFAULT_INDEX:-} certs=$UV_SYSTEM_CERTS" >> did ;;
esac
"""


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone in which nothing was made yet, at a path with a space."""
    made = tmp_path / "a clone"
    (made / "requirements").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", made)
    for file in ("bootstrap", "dev"):
        (made / f"requirements/{file}.txt").touch()
    for room in ("api", "tracking", "operator", "trainer"):
        (made / room).mkdir()
        (made / room / "pyproject.toml").touch()
    (tmp_path / "python3").write_text(PYTHON)
    (tmp_path / "python3").chmod(0o755)
    for name in ("PIP_INDEX_URL", "UV_DEFAULT_INDEX", "UV_SYSTEM_CERTS", "MAKEFLAGS", "MAKELEVEL"):
        monkeypatch.delenv(name, raising=False)
    return made


def make_venv(clone: Path, **said: str) -> list[str]:
    """What `make venv` did."""
    python = f"PYTHON={clone.parent / 'python3'}"
    (clone / "did").unlink(missing_ok=True)
    subprocess.run(["make", "venv", python], cwd=clone, env={**os.environ, **said}, check=True, timeout=60)
    return (clone / "did").read_text().splitlines() if (clone / "did").exists() else []


def test_an_environment_is_made_once_and_brought_up_to_date(clone: Path) -> None:
    installed = ["sync", "install"]

    assert [line.split()[0] for line in make_venv(clone)] == ["made", *installed]
    assert make_venv(clone) == []
    os.utime(clone / ".venv/.heimdall-stamp", (0, 0))
    assert [line.split()[0] for line in make_venv(clone)] == installed


def copied(clone: Path) -> Path:
    return shutil.copytree(clone, clone.with_name("another clone"))


def moved(clone: Path) -> Path:
    return clone.rename(clone.with_name("another place"))


def broken(clone: Path) -> Path:
    """Its Python has become another version."""
    (clone / ".venv/broken").touch()
    return clone


@pytest.mark.parametrize("change", [copied, moved, broken])
def test_an_environment_of_another_place_is_made_anew(clone: Path, change: Callable[[Path], Path]) -> None:
    """It names its place in its programs and in what is installed to be edited: it would run another clone's code."""
    make_venv(clone)

    changed = change(clone)

    assert make_venv(changed)[0] == "made"
    assert make_venv(changed) == []


@pytest.mark.parametrize(
    ("said", "configured", "index"),
    [
        ({}, "", ""),
        ({"PIP_INDEX_URL": "https://pip"}, "https://conf", "https://pip"),
        ({}, "https://conf", "https://conf"),
        ({"PIP_INDEX_URL": "https://pip", "UV_DEFAULT_INDEX": "https://uv"}, "https://conf", "https://uv"),
    ],
    ids=str,
)
def test_a_mirror_that_serves_pip_serves_uv(clone: Path, said: dict[str, str], configured: str, index: str) -> None:
    if configured:
        (clone / "pip.conf").write_text(configured)

    (synced,) = [line for line in make_venv(clone, **said) if line.startswith("sync")]

    assert synced.split()[1] == f"index={index}"
    assert synced.split()[2] in {"certs=0", "certs=1"}, "where the machine names no authorities, uv's own are asked"


def test_whom_uv_trusts_can_be_told(clone: Path) -> None:
    assert "sync index= certs=0" in make_venv(clone, UV_SYSTEM_CERTS="0")
