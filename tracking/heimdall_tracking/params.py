"""Parameters of every type become text: nothing that a configuration holds makes tracking fail."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, datetime, time
from typing import Any, Final

import structlog

from heimdall_tracking.redact import MASK, names_secret, redact

KEY_LIMIT: Final = 250
VALUE_LIMIT: Final = 6000
DEPTH_LIMIT: Final = 20
ARRAY_LIMIT: Final = 1000
"""Elements of an array that is written out; of a larger one, shape and type."""
_FORBIDDEN: Final = re.compile(r"[^\w\-. /:]")

log = structlog.get_logger()


def flatten(params: Mapping[Any, Any]) -> dict[str, str]:
    """Turn nested parameters into MLflow's flat ones.

    Args:
        params: Parameters of any type, nested at will.

    Returns:
        Names joined by dots, with the values as text. What looks like a secret is masked; too long a value is cut.
    """
    found = list(_walk("", params, ()))
    flat: dict[str, str] = {}
    for name, (_, text) in zip(Names().of(name for name, _ in found), found, strict=True):
        if flat.get(name, text) != text:
            log.warning("two parameters have one name; the last is logged", name=name)
        flat[name] = text
    return flat


class Names:
    """Names as MLflow takes them, each for one name alone.

    What MLflow takes as it is stays as it is. Of others that would become the same, the first is given it, and the
    rest what tells them apart.
    """

    def __init__(self) -> None:
        """None is given yet."""
        self._owners: dict[str, str] = {}
        self._told: set[str] = set()

    def of(self, names: Iterable[object]) -> list[str]:
        """What things are logged as that are logged together.

        Args:
            names: Their names, of any type.

        Returns:
            A name for each, in their order.
        """
        pairs = [(text, clean_name(text)) for text in map(_text, names)]
        self._owners.update((clean, text) for text, clean in pairs if text == clean)
        return [
            clean if self._owners.setdefault(clean, text) == text else self._apart(text, clean) for text, clean in pairs
        ]

    def _apart(self, text: str, clean: str) -> str:
        name = _with_digest(clean, text)
        if text not in self._told:
            self._told.add(text)
            log.warning("a name would be another's, as MLflow takes it", name=redact(text), logged_as=name)
        return name


def clean_name(name: object) -> str:
    """A name that MLflow takes for a parameter or a metric: what it refuses becomes an underscore."""
    text = _FORBIDDEN.sub("_", _text(name)).strip()
    # MLflow reads names as paths that must be as short as they can be: no empty, `.` or `..` parts, no `..` in front.
    parts = [part for part in text.split("/") if part not in ("", ".", "..")]
    text = "/".join(parts)
    if text.startswith(".."):
        text = f"_{text}"
    if len(text) > KEY_LIMIT:
        # Names that differ only beyond the limit must stay apart.
        text = _with_digest(text, text)
    return text or "_"


def _with_digest(name: str, whole: str) -> str:
    """A name that ends in a digest of what it stands for."""
    digest = hashlib.sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return f"{name[: KEY_LIMIT - 9].rstrip('/')}-{digest}"


def clean_text(text: str, limit: int) -> str:
    """A text that every database of MLflow takes: no NUL, no half of a surrogate pair, no longer than the limit."""
    text = text[: limit + 1].replace("\0", "\ufffd").encode("utf-8", "replace").decode()
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _walk(prefix: str, value: Any, above: tuple[int, ...]) -> Iterator[tuple[str, str]]:
    """Names and texts under a value; `above` holds the mappings that it lies in, so that one in itself ends."""
    opened = _opened(value)
    pairs = _pairs(opened) if len(above) < DEPTH_LIMIT and id(value) not in above else []
    for key, child in pairs:
        name = f"{prefix}.{_text(key)}" if above else _text(key)
        yield from _walk(name, child, (*above, id(value)))
    if above and not pairs:
        text = _value(opened)
        # What lies within something named like a secret is one, whatever it is called itself.
        named = any(names_secret(part) for part in (prefix, *prefix.split(".")))
        secret = named and text not in ("", "None")
        yield prefix, MASK if secret else text


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    try:
        return list(value.items()) if isinstance(value, Mapping) else []
    except Exception:  # noqa: BLE001 - a mapping that can't be read is printed as a whole
        return []


def _opened(value: Any) -> Any:
    """Dataclasses, pydantic models and namespaces as mappings; the rest as it is."""
    try:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {item.name: getattr(value, item.name, None) for item in dataclasses.fields(value)}
        if hasattr(value, "model_dump") and not isinstance(value, type):
            return value.model_dump(mode="python")
        if isinstance(value, argparse.Namespace):
            return vars(value)
    except Exception:  # noqa: BLE001 - a type that can't be opened is printed as a whole
        return value
    return value


def _value(value: Any) -> str:
    return clean_text(redact(_text(value)), VALUE_LIMIT)


def _text(value: Any) -> str:
    try:
        return _plain(value, set())
    except Exception:  # noqa: BLE001 - a type that can't be printed must not end a training
        return f"<{type(value).__name__}>"


def _plain(value: Any, above: set[int]) -> str:
    """A value as text; `above` holds the containers that it lies in, so that one in itself ends."""
    if isinstance(value, enum.Enum):
        return str(value.value)
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    opened = _opened(value)
    if isinstance(opened, list | tuple | set | frozenset | Mapping):
        return _container(opened, above, id(value))
    if hasattr(value, "tolist") and hasattr(value, "dtype"):  # numpy and torch, without importing them
        return _array(value)
    return str(value)


def _container(value: Any, above: set[int], identity: int) -> str:
    if identity in above or len(above) > DEPTH_LIMIT:
        return "…"
    inside = above | {identity}
    if isinstance(value, Mapping):
        pairs = (
            f"{_plain(key, inside)}: {MASK if names_secret(str(key)) else _plain(item, inside)}"
            for key, item in value.items()
        )
        return f"{{{_joined(pairs)}}}"
    items = sorted(value, key=repr) if isinstance(value, set | frozenset) else value
    return f"[{_joined(_plain(item, inside) for item in items)}]"


def _joined(texts: Iterable[str]) -> str:
    """Texts with commas between, no more of them than a value may hold."""
    joined: list[str] = []
    length = 0
    for text in texts:
        joined.append(text)
        length += len(text) + 2
        if length > VALUE_LIMIT:
            break
    return ", ".join(joined)


def _array(value: Any) -> str:
    size = int(value.numel() if hasattr(value, "numel") else value.size)
    if size > ARRAY_LIMIT:
        return f"{type(value).__name__}(shape={tuple(value.shape)}, dtype={value.dtype})"
    detached = value.detach() if hasattr(value, "detach") else value
    return str(detached.tolist())
