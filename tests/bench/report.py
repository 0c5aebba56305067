"""What a benchmark found: a table for people, a file for programs."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """A figure, and what it should be."""

    name: str
    value: float
    unit: str
    goal: str = ""
    met: bool | None = None


def at_most(name: str, value: float, unit: str, bound: float) -> Figure:
    """A figure that should be no more than a bound."""
    return Figure(name, value, unit, f"≤ {bound:g}", value <= bound)


def at_least(name: str, value: float, unit: str, bound: float) -> Figure:
    """A figure that should be no less than a bound."""
    return Figure(name, value, unit, f"≥ {bound:g}", value >= bound)


def publish(name: str, figures: list[Figure]) -> Path:
    """Print the table and write `build/bench/NAME.json`."""
    marks = {True: "met", False: "MISSED", None: ""}
    print(f"\n{name} on {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}")
    for figure in figures:
        print(f"  {figure.name:56}{figure.value:12.3f} {figure.unit:10}{figure.goal:12}{marks[figure.met]}")
    file = ROOT / "build/bench" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([asdict(figure) for figure in figures], indent=1))
    print(f"written to {file.relative_to(ROOT)}")
    return file


def percentile(values: list[float], share: float) -> float:
    """The value that a share of all values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]
