"""The house: lock files that name no index and hold hashes, and a licence."""

from __future__ import annotations

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


