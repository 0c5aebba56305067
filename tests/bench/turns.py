"""Variants are measured in turns, and compared within a round: what else a machine does meets all of them alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from statistics import median, quantiles
from typing import TypeVar

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Comparison:
    """What the rounds say of a ratio or a difference."""

    median: float
    spread: float
    """Half of the distance between the quartiles: half of the rounds lie about so near to the median."""


def in_turns(variants: Mapping[str, Callable[[], ResultT]], rounds: int) -> dict[str, list[ResultT]]:
    """Measure each variant once a round, each round beginning with the next of them.

    Args:
        variants: What measures them, by name.
        rounds: How often.

    Returns:
        What was measured, by name, in order of the rounds.
    """
    names = list(variants)
    results: dict[str, list[ResultT]] = {name: [] for name in names}
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            results[name].append(variants[name]())
    return results


def compare(
    values: Sequence[float], others: Sequence[float], how: Callable[[float, float], float] = truediv
) -> Comparison:
    """Compare two variants round by round.

    Args:
        values: Of the one, in order of the rounds.
        others: Of the other.
        how: What is said of two values of a round; their ratio by default.
    """
    compared = [how(one, other) for one, other in zip(values, others, strict=True)]
    if len(compared) == 1:
        return Comparison(compared[0], 0.0)
    low, _, high = quantiles(compared, n=4, method="inclusive")
    return Comparison(median(compared), (high - low) / 2)
