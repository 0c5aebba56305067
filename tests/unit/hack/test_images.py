"""The images of chart and tests: what is listed is what the chart installs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[3]
TIMEOUT_S = 60


def test_every_image_of_the_chart_is_listed() -> None:
    done = subprocess.run(
        [sys.executable, "hack/images", "list"], cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=True
    )
    listed = {line.split()[1] for line in done.stdout.splitlines()}
    values = yaml.safe_load((ROOT / "charts/heimdall/values.yaml").read_text())
    images = [role["image"] for role in values.values() if isinstance(role, dict) and "image" in role]

    assert len(images) == 5
    assert {f"{image['repository']}:{image['tag']}" for image in images} <= listed
