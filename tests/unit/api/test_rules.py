"""Rules are checked by the API server (CEL) and by pydantic: neither may know one that the other does not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from heimdall_api import crd
from heimdall_api.base import explain
from heimdall_api.rules import VALIDATIONS
from heimdall_api.types import TrainingRun

BROKEN: list[tuple[str, dict[str, Any], str]] = [
    ("", {"metadata": {"name": "9lives"}}, "metadata.name becomes the name of Jobs and Pods: use at most 52"),
    ("", {"metadata": {"name": "a" * 53}}, "metadata.name becomes the name of Jobs and Pods: use at most 52"),
    ("spec.model", {"model": {"backbone": "a", "module": "b:C"}}, "set either backbone (the localizer on that"),
    ("spec.model", {"model": {"args": {}}}, "args are the arguments of module: set module too, or remove args"),
    ("spec.data", {"data": {"args": {"a": 1}}}, "args are the arguments of module: set module too, or remove args"),
    ("spec.data", {"data": {"validationFraction": 0.5, "testFraction": 0.5}}, "validationFraction and testFraction"),
    ("spec.model.module", {"model": {"module": "nonsense"}}, "must be an import path of the form package.module"),
    ("spec.data.module", {"data": {"module": "a:B\n"}}, "must be an import path of the form package.module"),
    ("spec.tracking.tags", {"tracking": {"tags": {"team@x": "rf"}}}, "names must be letters, digits, underscores"),
    ("spec.registration.model", {"registration": {"model": "a/b"}}, "must not contain '/' or ':'"),
    ("spec.registration.aliases.1", {"registration": {"model": "m", "aliases": ["a", "v7"]}}, "must be letters, digi"),
    (
        "spec.registration.promotion.alias",
        {"registration": {"model": "m", "promotion": {"alias": "latest", "metric": "loss"}}},
        "must be letters, digits, hyphens and underscores, and neither latest nor like v7",
    ),
    *((f"spec.resources.{name}", {"resources": {name: "-2"}}, "must be a positive") for name in ("cpu", "memory")),
    ("spec.resources.sharedMemory", {"resources": {"sharedMemory": 0}}, "must be a positive quantity such as 500m"),
    ("spec.retries.memoryGrowth.max", {"retries": {"memoryGrowth": {"max": "lots"}}}, "must be a positive quantity"),
]
"""Path of the value that a rule speaks of, a spec (or a whole document) that breaks it, the message's beginning."""


def rules_of(schema: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Path and message of every rule that a new resource is checked with; an item of a list is `[]`."""
    for rule in schema.get(VALIDATIONS, ()):
        if "oldSelf" not in rule["rule"]:
            yield path, rule["message"]
    for name, child in schema.get("properties", {}).items():
        yield from rules_of(child, f"{path}.{name}" if path else name)
    for key in ("items", "additionalProperties"):
        if isinstance(schema.get(key), dict):
            yield from rules_of(schema[key], f"{path}.[]")


def crd_rules() -> set[tuple[str, str]]:
    version = crd.custom_resource_definition()["spec"]["versions"][0]
    return set(rules_of(version["schema"]["openAPIV3Schema"]))


def refusal(document: dict[str, Any]) -> tuple[str, str]:
    whole = document if "metadata" in document else {"metadata": {"name": "run"}, "spec": document}
    with pytest.raises(ValidationError) as caught:
        TrainingRun.model_validate(whole)
    (item,) = caught.value.errors()
    path = ".".join("[]" if isinstance(part, int) else part for part in item["loc"])
    return path, item["msg"].removeprefix("Value error, ")


@pytest.mark.parametrize(("path", "document", "message"), BROKEN, ids=[f"{path}" for path, _, _ in BROKEN])
def test_pydantic_refuses_what_the_api_server_would(path: str, document: dict[str, Any], message: str) -> None:
    whole = document if "metadata" in document else {"metadata": {"name": "run"}, "spec": document}
    with pytest.raises(ValidationError) as caught:
        TrainingRun.model_validate(whole)
    said = explain(caught.value)
    assert said.startswith(f"{path}: {message}" if path else message)
    assert "Value error" not in said


def test_every_rule_of_the_crd_has_a_check_with_the_same_message() -> None:
    assert {refusal(document) for _, document, _ in BROKEN} == crd_rules()


@pytest.mark.parametrize(
    "spec",
    [
        {"model": {"module": "a.b:C", "args": {"x": 1}}, "data": {"module": "a:D", "args": {}}},
        {"data": {"validationFraction": 0.5, "testFraction": 0.49}},
        {"registration": {"model": "m", "aliases": ["v7a", "Latest"]}, "tracking": {"tags": {"a.b/c: d-e": "@"}}},
        {"resources": {"cpu": 1, "memory": "1.5Gi"}},
    ],
)
def test_what_keeps_to_the_rules_is_valid(spec: dict[str, Any]) -> None:
    TrainingRun.model_validate({"metadata": {"name": "a" * 52}, "spec": spec})


def test_a_definition_s_rules_about_changes_are_the_api_server_s_alone() -> None:
    parts = crd.schema_of(crd.TrainingRunSpec)["properties"]
    rules = {name: [rule["rule"] for rule in part.get(VALIDATIONS, ())] for name, part in parts.items()}
    immutable = {name for name, items in rules.items() if any("oldSelf" in item for item in items)}
    assert immutable >= {"image", "model", "data", "training", "export", "registration", "podTemplate"}
