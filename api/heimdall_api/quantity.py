"""Kubernetes quantities: `500m`, `4`, `16Gi`."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Final

_SUFFIXES: Final = {
    "": Decimal(1),
    "m": Decimal("0.001"),
    "u": Decimal("0.000001"),
    "n": Decimal("0.000000001"),
    **{suffix: Decimal(1000) ** power for power, suffix in enumerate("kMGTPE", start=1)},
    **{f"{suffix}i": Decimal(1024) ** power for power, suffix in enumerate("KMGTPE", start=1)},
}
_PATTERN: Final = re.compile(r"^\+?(\d+(?:\.\d*)?|\.\d+)(?:([eE][+-]?\d{1,3})|([numkMGTPE]|[KMGTPE]i))?$")


def parse_quantity(value: int | str) -> Decimal:
    """Read a quantity.

    Args:
        value: A number or a string such as `500m`, `4` or `16Gi`.

    Returns:
        Its value in the base unit (cores, bytes).

    Raises:
        ValueError: It is no quantity, or not positive.
    """
    match = _PATTERN.match(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity such as 500m, 4 or 16Gi")
    number, exponent, suffix = match.groups()
    result = Decimal(number + (exponent or "")) * _SUFFIXES[suffix or ""]
    if result <= 0:
        raise ValueError(f"{value!r} must be a positive quantity such as 500m, 4 or 16Gi")
    return result
