from __future__ import annotations

import pytest

from heimdall_api import crd


@pytest.mark.parametrize("target", crd.TARGETS, ids=lambda path: str(path.relative_to(crd.ROOT)))
def test_the_generated_file_is_up_to_date(target: object) -> None:
    assert target.read_text() == crd.render(), "run `make generate` and commit the result"  # type: ignore[attr-defined]


def test_every_field_of_the_spec_is_described() -> None:
    def undescribed(schema: crd.Schema, path: str) -> list[str]:
        missing = [] if schema.get("description") else [path]
        for name, child in schema.get("properties", {}).items():
            missing += undescribed(child, f"{path}.{name}")
        return missing

    assert undescribed(crd.schema_of(crd.TrainingRunSpec), "spec") == []
