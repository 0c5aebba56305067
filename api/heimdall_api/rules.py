"""Rules of the resource, each checked twice: by the API server as CEL, by pydantic as Python, with one message.

A rule has one home for both, so that `heimdall-train validate` refuses what the API server would refuse.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Self

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema, core_schema

from heimdall_api.base import Model

VALIDATIONS: Final = "x-kubernetes-validations"


def cel(rule: str, message: str) -> dict[str, str]:
    """One CEL rule of the CRD."""
    return {"rule": rule, "message": message}


def transitions(*items: dict[str, str]) -> dict[str, Any]:
    """Rules about a change, as extra JSON schema of a field or a type: only the API server knows what was before."""
    return {VALIDATIONS: list(items)}


def immutable(field: str) -> dict[str, str]:
    """The rule that keeps a part of the spec from being changed."""
    return cel("self == oldSelf", f"{field} can't be changed once the run exists: create a new TrainingRun instead")


@dataclass(frozen=True)
class Rule:
    """What a value must keep to. In `Annotated[str, Rule(…)]` it is a rule of that field."""

    cel: str
    """For the API server; the value is `self`."""
    message: str
    """For people: what is expected, or the remedy."""
    holds: Callable[[Any], bool]
    """For pydantic: the same in Python, of the parsed value."""

    def check(self, value: Any) -> Any:
        """Give the value back.

        Raises:
            ValueError: The rule does not hold; with its message.
        """
        if not self.holds(value):
            raise ValueError(self.message)
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self.check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return add_rules(handler(schema), self)


def add_rules(schema: dict[str, Any], *rules: Rule) -> dict[str, Any]:
    """A JSON schema with rules in front of those that it has."""
    if not rules:
        return schema
    return {**schema, VALIDATIONS: [*(cel(rule.cel, rule.message) for rule in rules), *schema.get(VALIDATIONS, [])]}


class RuledModel(Model):
    """A value with rules of its own, about several of its fields."""

    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _check_rules(self) -> Self:
        for rule in self.rules:
            rule.check(self)
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return add_rules(handler.resolve_ref_schema(handler(schema)), *cls.rules)
