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
