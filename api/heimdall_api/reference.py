"""Writes the resource's reference for people from the types: `python -m heimdall_api.reference`.

It is made of the schema that the API server gets, so that page, CRD and types can't say different things.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Final

from heimdall_api.contract import API_VERSION, KIND
from heimdall_api.crd import COLUMNS, ROOT, Schema, schema_of
from heimdall_api.rules import VALIDATIONS, immutable
from heimdall_api.types import NAME_RULE, TrainingRunSpec, TrainingRunStatus

TARGET: Final = ROOT / "docs/reference/trainingrun.md"
UNITS: Final = {"Seconds": "seconds", "Minutes": "minutes"}
"""Units, by what is in a field's name. What a quantity counts (cores, bytes) is in its description."""

INTRODUCTION: Final = f"""\
<!-- Made of api/heimdall_api/types.py: make generate -->

# The TrainingRun resource

`{API_VERSION}`, kind `{KIND}`, short name `tr`, namespaced.
On a cluster, `kubectl explain trainingrun.spec` tells the same.

- `kubectl` and `heimdall-train` refuse a field that is not here. An empty `spec` is a valid one.
- `heimdall-train validate -f FILE` checks a file by the same rules, with the same messages.
- Quantities are Kubernetes' own: `500m`, `4`, `16Gi`.
- What is fixed is refused with: {immutable("FIELD")["message"]}.
- {NAME_RULE.message}.
"""

STATUS: Final = """\
Written by the operator alone; what is not known yet is absent. Phases, reasons and what follows from them:
[operating](../operating.md).
"""


def render() -> str:
    """The page, as the generated file holds it."""
    spec, status = schema_of(TrainingRunSpec), schema_of(TrainingRunStatus)
    status.pop("required", None)
    parts = [INTRODUCTION, *_sections("spec", spec)]
    first, *others = _sections("status", status)
    heading, _, rest = first.partition("\n\n")
    return "\n".join([*parts, f"{heading}\n\n{STATUS}\n{rest}", *others, _columns()])


def _sections(path: str, schema: Schema, fixed: bool = False) -> Iterator[str]:
    """A section of an object, then those of the objects in it."""
    fields: Schema = schema["properties"]
    level = "##" if "." not in path else "###"
    parts = [f"{level} {path}\n"]
    if fixed:
        parts.append("Can't be changed once the run exists.\n")
    parts.append(_table(path, schema))
    if rules := list(_rules(path, schema)):
        parts += ["Refused with this message:\n", *(f"- {where}: {message}" for where, message in rules), ""]
    yield "\n".join(parts)
    for name, field in fields.items():
        inner = field.get("items", field)
        if "properties" in inner:
            below = f"{path}.{name}" + ("[]" if "items" in field else "")
            yield from _sections(below, inner, fixed or _is_fixed(field))


def _table(path: str, schema: Schema) -> str:
    """One row a field. Of the spec itself it also says what may be changed later."""
    is_spec = path == "spec"
    has_defaults = path.startswith("spec")
    columns = ["field", "type", *(["default"] if has_defaults else []), *(["later"] if is_spec else []), "what"]
    rows = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for name, field in schema["properties"].items():
        cells = [f"`{name}`", _type(name, field)]
        if has_defaults:
            cells.append(_default(name, field, schema))
        if is_spec:
            cells.append("fixed" if _is_fixed(field) else "may change")
        rows.append(f"| {' | '.join([*cells, field.get('description', '')])} |")
    return "\n".join(rows) + "\n"


def _is_fixed(field: Schema) -> bool:
    return any(rule["rule"] == "self == oldSelf" for rule in field.get(VALIDATIONS, []))


def _default(name: str, field: Schema, parent: Schema) -> str:
    if name in parent.get("required", []):
        return "required"
    if "properties" in field or "default" not in field:
        return ""
    return f"`{json.dumps(field['default'], ensure_ascii=False)}`"


def _type(name: str, field: Schema) -> str:
    if "properties" in field:
        return "object, see below"
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    if field.get("x-kubernetes-int-or-string"):
        return "quantity"
    if field.get("type") == "array":
        item = field["items"]
        inner = "objects, see below" if "properties" in item else _plural(_type(name, item))
        return f"list of {inner}{_at_most(field.get('maxItems'))}"
    if isinstance(value := field.get("additionalProperties"), dict):
        return f"map of text to {_type(name, value)}{_at_most(field.get('maxProperties'))}"
    if field.get("type") == "string":
        return "time" if field.get("format") == "date-time" else f"text{_length(field)}"
    if field.get("type") in ("integer", "number"):
        unit = next((unit for part, unit in UNITS.items() if part in name), "")
        return f"{field['type']}{f' of {unit}' if unit else ''}{_range(field)}"
    return str(field["type"])


def _plural(kind: str) -> str:
    return kind.replace("text", "texts", 1)


def _at_most(limit: int | None) -> str:
    return f", at most {limit}" if limit is not None else ""


def _length(field: Schema) -> str:
    least, most = field.get("minLength", 0), field.get("maxLength")
    if most is None:
        return ""
    return f", {least} to {most} characters" if least else f", at most {most} characters"


def _range(field: Schema) -> str:
    """Bounds in words: `1 to 100`, `0 to below 1`, `above 0, at most 10`."""
    least, most = field.get("minimum"), field.get("maximum")
    is_above, is_below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    if least is not None and most is not None and not is_above:
        return f", {_number(least)} to {'below ' if is_below else ''}{_number(most)}"
    low = "" if least is None else f", above {_number(least)}" if is_above else f", {_number(least)} or more"
    high = "" if most is None else f", {'below' if is_below else 'at most'} {_number(most)}"
    return low + high


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _rules(path: str, schema: Schema) -> Iterator[tuple[str, str]]:
    """Rules of an object and of its plain fields, where they hold and what they say; changes are told by the table."""
    for rule in schema.get(VALIDATIONS, []):
        if rule["rule"] != "self == oldSelf":
            yield f"`{path}`", rule["message"]
    for name, field in schema["properties"].items():
        if "properties" in field:
            continue
        for inner, suffix in ((field, ""), (field.get("items", {}), "[]")):
            for rule in inner.get(VALIDATIONS, []):
                if rule["rule"] != "self == oldSelf" and "properties" not in inner:
                    yield f"`{path}.{name}{suffix}`", rule["message"]


def _columns() -> str:
    """What `kubectl get` shows."""
    rows = ["## Columns of kubectl get\n", "| column | from | shown |", "|---|---|---|"]
    for column in COLUMNS:
        shown = "with `-o wide`" if column.get("priority") else "always"
        rows.append(f"| {column['name']} | `{column['jsonPath']}` | {shown} |")
    return "\n".join(rows) + "\n"


def main() -> None:
    """Write the page."""
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    TARGET.write_text(render())


if __name__ == "__main__":
    main()
