"""The localizer: network, losses, metrics. Names are imported when they are first used."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

_HOMES: Final = {
    "LocalizationModule": "module",
    "LocalizationNet": "net",
    "PositionMetrics": "metrics",
    "gaussian_nll": "losses",
    "huber": "losses",
    "quantile": "losses",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
