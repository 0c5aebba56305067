from __future__ import annotations

import contextlib
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from heimdall_api.contract import Checkpoint, Progress, format_checkpoints, parse_checkpoints
from heimdall_api.quantity import parse_quantity
from heimdall_api.types import TrainingRun, TrainingRunSpec


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), (4, 4), ("16Gi", 16 * 2**30), ("1k", 1000), ("1e3", 1000), (".5", 0.5)]
)
def test_quantities(text: int | str, value: float) -> None:
    assert float(parse_quantity(text)) == value


@pytest.mark.parametrize("text", ["", "-1", "0", "four", "16 Gi", "1GiB", "1ee3"])
def test_what_is_no_positive_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="quantity"):
        parse_quantity(text)


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_quantity(text) > 0


def test_an_empty_spec_is_valid_and_complete() -> None:
    assert TrainingRun.model_validate({"metadata": {"name": "run"}}).spec.training.epochs == 100


def test_a_misspelt_field_is_named() -> None:
    with pytest.raises(ValidationError, match="trainings"):
        TrainingRunSpec.model_validate({"trainings": {}})


def test_checkpoints_survive_their_tag() -> None:
    checkpoint = Checkpoint(step=5, path="checkpoints/5.ckpt", sha256="00", size=3, time="2026-11-01T00:00:00Z")

    assert parse_checkpoints(format_checkpoints([checkpoint])) == [checkpoint]


@pytest.mark.parametrize("tag", [None, "", "{", "[{}]", "3"])
def test_an_unreadable_checkpoint_tag_counts_as_none(tag: str | None) -> None:
    assert parse_checkpoints(tag) == []


def test_a_time_that_names_no_zone_is_taken_for_utc() -> None:
    """As Python's own isoformat() writes it, in an image of somebody's own."""
    progress = Progress.model_validate({"epoch": 0, "epochs": 1, "step": 1, "time": "2026-11-01T12:00:00"})

    assert progress.time == datetime(2026, 11, 1, 12, tzinfo=UTC)
