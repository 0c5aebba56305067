"""Parameters of every type become text: nothing that a configuration holds makes tracking fail."""

from __future__ import annotations

import dataclasses
import enum
import re
from collections.abc import Iterator, Mapping
from datetime import date, datetime, time
from pathlib import PurePath
from typing import Any, Final

KEY_LIMIT: Final = 250
VALUE_LIMIT: Final = 6000
DEPTH_LIMIT: Final = 20
MASK: Final = "***"
_FORBIDDEN: Final = re.compile(r"[^\w\-. /:]")
_SECRET: Final = re.compile(r"(?i)(password|passwd|secret|token|credential|api_?key|access_?key|private_?key)")
_USERINFO: Final = re.compile(r"(?<=://)[^/@\s]+@")


def flatten(params: Mapping[Any, Any]) -> dict[str, str]:
    """Turn nested parameters into MLflow's flat ones.

    Args:
        params: Parameters of any type, nested at will.

    Returns:
        Names joined by dots, with the values as text. What looks like a secret is masked; too long a value is cut.
    """
    return dict(_walk("", params, 0))


def _walk(prefix: str, value: Any, depth: int) -> Iterator[tuple[str, str]]:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {item.name: getattr(value, item.name, None) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping) and value and depth < DEPTH_LIMIT:
        for key, child in value.items():
            name = f"{prefix}.{_text(key)}" if prefix else _text(key)
            yield from _walk(name, child, depth + 1)
    else:
        name = _key(prefix)
        yield name, MASK if _SECRET.search(prefix) and value not in (None, "") else _value(value)


def _key(name: str) -> str:
    cleaned = _FORBIDDEN.sub("_", name)[:KEY_LIMIT].strip("/. ")
    return cleaned or "_"


def _value(value: Any) -> str:
    text = _USERINFO.sub(f"{MASK}@", _text(value))
    return text if len(text) <= VALUE_LIMIT else f"{text[: VALUE_LIMIT - 1]}…"


def _text(value: Any) -> str:
    try:
        return _plain(value)
    except Exception:  # noqa: BLE001 - a type that can't be printed must not end a training
        return f"<{type(value).__name__}>"


def _plain(value: Any) -> str:
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple | set | frozenset):
        items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
        return f"[{', '.join(_text(item) for item in items)}]"
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy and torch, without importing them
        detached = value.detach() if hasattr(value, "detach") else value
        return str(detached.tolist())
    return str(value)
