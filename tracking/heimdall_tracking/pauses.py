"""Pauses between tries that double."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Final

_DOUBLINGS: Final = 60
"""More than any limit needs; of a server that is away for a day, the power would be too large for a number."""


def doubled_s(first_s: float, times: int, limit_s: float) -> float:
    """A pause that was doubled so many times, in seconds, up to a limit."""
    return min(first_s * 2.0 ** min(times, _DOUBLINGS), limit_s)


def doubling_s(first_s: float, limit_s: float) -> Iterator[float]:
    """Pauses without end, in seconds, each twice the one before, up to a limit."""
    return (doubled_s(first_s, times, limit_s) for times in itertools.count())
