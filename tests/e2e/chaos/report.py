"""What was done to the operator and to what it stands on, and what was wrong afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

from tests.e2e.cluster import ROOT

SEED = int(os.environ.get("HEIMDALL_CHAOS_SEED", "7"))
REPORT = ROOT / "build/chaos/report.json"


@dataclass
class Report:
    """Kills, faults and violations of all tests of this folder."""

    seed: int = SEED
    kills: int = 0
    """At random moments."""
    deaths: dict[str, list[str]] = field(default_factory=dict)
    """After which actions and writes the operator died, one after the other, by the life that it walked through."""
    faults: list[str] = field(default_factory=list)
    runs: int = 0
    mistakes: list[str] = field(default_factory=list)
    """What operators said of mistakes of their own."""
    violations: list[str] = field(default_factory=list)

    @contextmanager
    def expecting(self, what: str) -> Iterator[None]:
        """What is expected is a violation until it is there."""
        self.violations.append(f"not so: {what}")
        yield
        self.violations.remove(f"not so: {what}")

    def write(self) -> None:
        """Write it to its file, and print what it comes to."""
        walked = sum(map(len, self.deaths.values()))
        REPORT.parent.mkdir(parents=True, exist_ok=True)
        REPORT.write_text(json.dumps({**asdict(self), "deaths_in_all": walked}, indent=1))
        print(
            f"\n{self.runs} runs, {self.kills} kills at random, {walked} after every action and write of "
            f"{len(self.deaths)} lives, faults: {self.faults}, {len(self.violations)} violations"
        )
