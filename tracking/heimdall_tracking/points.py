"""Points of metrics, and how they are written to disk: one a line, in the order in which they were logged."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

INFINITY: Final = 1.79769e308
"""What MLflow's databases keep an infinity as, nearly: they keep the largest number, this is a little less."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of one metric."""

    name: str
    value: float
    step: int
    timestamp_ms: int


def storable(value: float) -> float:
    """A value as every database of MLflow takes it."""
    return math.copysign(INFINITY, value) if math.isinf(value) else value


def is_number(value: float) -> bool:
    """Whether a value that MLflow has kept was neither NaN nor an infinity."""
    return abs(value) < INFINITY


def is_step(value: int) -> bool:
    """Whether MLflow takes a number for a step: it keeps 64 bits of it."""
    return -(2**63) <= value < 2**63


def to_lines(points: Iterable[Point]) -> bytes:
    """Points as lines of JSON, each whole by itself; a value comes back as exactly the number it was."""
    return "".join(
        f"{json.dumps([point.name, point.value, point.step, point.timestamp_ms])}\n" for point in points
    ).encode()


def from_line(line: bytes) -> Point | None:
    """The point of a line; None where a full disk or a kill left half a line."""
    try:
        name, value, step, timestamp_ms = json.loads(line)
        return Point(str(name), float(value), int(step), int(timestamp_ms))
    except (ValueError, TypeError):
        return None
