"""`python hack/chart` writes the chart's README.md and values.schema.json from values.yaml and its comments.

A comment `# -- …` above a value describes it; `# @type NAME` says what it may be, where the default does not tell.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

sys.path.insert(0, str(Path(__file__).parent))

from value_types import TYPES

CHART: Final = Path(__file__).resolve().parents[2] / "charts/heimdall"
INFERRED: Final = {bool: "boolean", int: "integer", float: "number", str: "string"}


INTRODUCTION: Final = """\
```sh
# not run by a test in these words: tests label the namespace before
helm -n heimdall upgrade --install heimdall charts/heimdall --create-namespace --wait --timeout 15m
helm -n heimdall test heimdall
```

The images of operator and trainer are not published:
[build and push them](../../docs/quickstart.md#on-a-cluster-that-you-have) first.
How it is operated: [docs/chart.md](../../docs/chart.md). Who reaches whom: [docs/network.md](../../docs/network.md).
From Git: [docs/gitops.md](../../docs/gitops.md).

A name that is not here is refused, and so is a value of another type."""


class ValuesError(Exception):
    """values.yaml can't be described: a comment or a type is missing."""


@dataclass
class Value:
    """A value of values.yaml."""

    name: str
    """Dotted."""
    default: Any
    description: str
    type: str
    """A name of TYPES, or one that JSON Schema has."""
    inner: list[Value] = field(default_factory=list)
    """Values below it, where it is a group of named ones."""

    def leaves(self) -> Iterator[Value]:
        """The values that one sets."""
        if not self.inner:
            yield self
        for value in self.inner:
            yield from value.leaves()


def read_values(text: str) -> list[Value]:
    """Values with their comments.

    Args:
        text: Content of values.yaml.

    Raises:
        ValuesError: A value has no comment, or its type is not known.
    """
    return _mapping(yaml.compose(text), text.splitlines(), "")


def schema(values: list[Value]) -> dict[str, Any]:
    """The JSON schema: closed wherever names are known."""
    used = {value.type for group in values for value in group.leaves() if value.type in TYPES}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "Values of the heimdall chart",
        **_object(values),
        "definitions": {name: TYPES[name].schema for name in sorted(_closure(used))},
    }


def readme(values: list[Value]) -> str:
    """README.md: every value in a table, one table a role."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    parts = [
        "<!-- Made of values.yaml: make generate -->",
        f"# {chart['name']}",
        f"{chart['description']} Version {chart['version']}, Kubernetes {chart['kubeVersion'].removesuffix('-0')}.",
        INTRODUCTION,
        "## Values",
    ]
    single = [value for value in values if not value.inner]
    parts.append(_table(single))
    for group in values:
        if group.inner:
            parts.append(f"### {group.name}")
            if group.description:
                parts.append(group.description)
            parts.append(_table(list(group.leaves())))
    return "\n\n".join(parts) + "\n"


def outputs() -> dict[Path, str]:
    """What the two files should hold."""
    values = read_values((CHART / "values.yaml").read_text())
    return {
        CHART / "values.schema.json": json.dumps(schema(values), indent=2, ensure_ascii=False) + "\n",
        CHART / "README.md": readme(values),
    }


def _mapping(node: Any, lines: list[str], prefix: str) -> list[Value]:
    found = []
    for key, below in node.value:
        name = f"{prefix}{key.value}"
        description, kind = _comment(lines, key.start_mark.line)
        default = yaml.safe_load(yaml.serialize(below))
        is_group = isinstance(below, yaml.MappingNode) and kind is None and bool(below.value)
        if is_group:
            found.append(Value(name, default, description, "object", _mapping(below, lines, f"{name}.")))
            continue
        if not description:
            raise ValuesError(f"{name} has no comment: begin the one above it with `# -- `")
        chosen = kind or INFERRED.get(type(default))
        if chosen is None or (kind is not None and kind not in TYPES):
            raise ValuesError(f"{name} needs a `# @type NAME`, one of {', '.join(sorted(TYPES))}")
        found.append(Value(name, default, description, chosen))
    return found


def _comment(lines: list[str], line: int) -> tuple[str, str | None]:
    """Description and type of the comment that ends right above a line."""
    above: list[str] = []
    while line > 0 and lines[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, lines[line].strip().removeprefix("#").strip())
    kind = None
    if above and above[-1].startswith("@type "):
        kind = above.pop().removeprefix("@type ").strip()
    begin = next((at for at, text in enumerate(above) if text.startswith("-- ")), None)
    return (" ".join(above[begin:]).removeprefix("-- ") if begin is not None else ""), kind


def _object(values: list[Value]) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for value in values:
        short = value.name.rpartition(".")[2]
        if value.inner:
            properties[short] = {"description": value.description, **_object(value.inner)}
            if not value.description:
                del properties[short]["description"]
        elif value.type in TYPES:
            # A reference stands alone in this draft: what is beside it would be ignored.
            properties[short] = {
                "description": value.description,
                "default": value.default,
                "allOf": [{"$ref": f"#/definitions/{value.type}"}],
            }
        else:
            properties[short] = {"description": value.description, "default": value.default, "type": value.type}
    required = sorted(properties)
    if not any("." in value.name for value in values):
        properties["global"] = {"description": "Helm's own; not used.", "type": "object"}
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _closure(names: set[str]) -> set[str]:
    """The types of these names, and those that they are made of."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += TYPES[name].refers_to()
    return found


def _table(values: list[Value]) -> str:
    rows = ["| value | what | type | default |", "|---|---|---|---|"]
    for value in values:
        kind = TYPES[value.type].title if value.type in TYPES else value.type
        default = json.dumps(value.default, ensure_ascii=False).replace("|", "\\|")
        description = value.description.replace("|", "\\|")
        rows.append(f"| `{value.name}` | {description} | {kind} | `{default}` |")
    return "\n".join(rows)


def main() -> None:
    """Write both files."""
    for path, text in outputs().items():
        path.write_text(text)


if __name__ == "__main__":
    main()
