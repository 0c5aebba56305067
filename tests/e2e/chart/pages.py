"""Commands of a page of the documents, typed into a shell as they stand there."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cluster import COMMAND_TIMEOUT_S, ROOT, Cluster
from tests.unit.documents.documents import blocks


def section(page: str, heading: str) -> list[str]:
    """Blocks of commands under a heading of a page, without those that no test runs."""
    found = [block for block in blocks("sh") if block.where == page and block.heading == heading]
    assert found, f"{page} has no commands under {heading}"
    return [block.text for block in found if not block.is_marked]


@dataclass(frozen=True)
class Typist:
    """Types commands for the tests' release, in a folder, with the port that leads to the object store."""

    release: Cluster
    folder: Path
    port: int = 0

    def type(self, *texts: str) -> str:
        """What the commands say; each must succeed."""
        said = ""
        for text in texts:
            here = text.replace("-n heimdall ", f"-n {self.release.namespace} ").replace(":9000", f":{self.port}")
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", here.replace(" charts/heimdall ", f" {ROOT}/charts/heimdall ")],
                cwd=self.folder,
                env={**self.release.env, "MC_CONFIG_DIR": str(self.folder / ".mc")},
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
            )
            assert done.returncode == 0, f"{here}{done.stdout}{done.stderr}"
            said += done.stdout
        return said
