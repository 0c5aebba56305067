"""The base class of everything that crosses the edge of a process as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.alias_generators import to_camel


class Model(BaseModel):
    """A frozen value with camelCase names in JSON and snake_case names in Python; unknown fields are refused."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, serialize_by_alias=True, frozen=True, extra="forbid"
    )


def explain(error: ValidationError, root: str = "") -> str:
    """A validation error as a sentence that names each field.

    Args:
        error: What pydantic found.
        root: Path of the value that was checked, such as `spec`; empty for a whole document.
    """
    problems = []
    for item in error.errors(include_url=False, include_input=False, include_context=False):
        path = ".".join(str(part) for part in ((root,) if root else ()) + item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        problems.append(f"{path}: {message}" if path else message)
    return "; ".join(problems)
