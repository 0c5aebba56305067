"""The resource's reference says what the types say."""

from __future__ import annotations

import re
from collections.abc import Iterator

from heimdall_api import crd, reference
from heimdall_api.rules import VALIDATIONS


def _fields(schema: crd.Schema, path: str) -> Iterator[tuple[str, str]]:
    """Every field, with the object that it is in."""
    for name, field in schema["properties"].items():
        yield path, name
        inner = field.get("items", field)
        if "properties" in inner:
            yield from _fields(inner, f"{path}.{name}" + ("[]" if "items" in field else ""))


def _section(path: str) -> str:
    found = re.search(rf"^###? {re.escape(path)}\n(.*?)(?=^##)", reference.render(), re.MULTILINE | re.DOTALL)
    assert found, f"there is no section {path}"
    return found[1]


def test_the_generated_page_is_up_to_date() -> None:
    assert reference.TARGET.read_text() == reference.render(), "run `make generate` and commit the result"


def test_every_field_is_a_row_of_its_objects_section() -> None:
    fields = [*_fields(crd.schema_of(crd.TrainingRunSpec), "spec")]
    fields += _fields(crd.schema_of(crd.TrainingRunStatus), "status")

    assert [(path, name) for path, name in fields if f"| `{name}` |" not in _section(path)] == []


def test_every_message_of_a_rule_is_told() -> None:
    messages = set(re.findall(r"'message': (?:'([^']+)'|\"([^\"]+)\")", str(crd.schema_of(crd.TrainingRunSpec))))
    changes = {f"{name} can't be changed" for name in crd.schema_of(crd.TrainingRunSpec)["properties"]}
    told = [one or other for one, other in messages]

    assert len(told) > 5
    assert [
        message
        for message in told
        if message not in reference.render() and not any(message.startswith(change) for change in changes)
    ] == []


def test_what_is_fixed_is_what_the_api_server_keeps() -> None:
    spec = crd.schema_of(crd.TrainingRunSpec)["properties"]
    fixed = {name for name, field in spec.items() if any("oldSelf" in r["rule"] for r in field.get(VALIDATIONS, []))}

    rows = re.findall(r"^\| `(\w+)` \| .* \| (fixed|may change) \|", _section("spec"), re.MULTILINE)

    assert {name for name, later in rows if later == "fixed"} == fixed
    assert {name for name, _ in rows} == set(spec)


def test_units_bounds_and_defaults_are_told() -> None:
    assert "| `pendingDeadlineSeconds` | integer of seconds, 1 to 31536000 | `3600` |" in _section("spec")
    assert "| `learningRate` | number, above 0, at most 10 | `0.001` |" in _section("spec.training")
    assert "| `testFraction` | number, 0 to below 1 | `0.1` |" in _section("spec.data")
    assert "| `model` | text, 1 to 250 characters | required |" in _section("spec.registration")
