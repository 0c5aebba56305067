"""The parts of `make bench-science` on a session of their own: what takes minutes is the training alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from heimdall_trainer.data.generator import Scene, generate
from heimdall_trainer.data.sessions import SessionStore
from tests.bench.science import compare, coverages_of, errors_of
from tests.unit.trainer.builders import data_settings


def test_every_estimator_locates_the_same_recordings_of_a_session(tmp_path: Path) -> None:
    settings, scene = data_settings(tmp_path), Scene()
    generate(settings, sessions=1, transmissions_per_session=6, scene=scene)
    database = SessionStore.open(settings)
    try:
        sent = database.transmissions(database.approved())
    finally:
        database.close()
    errors, informations = compare(settings, scene, sent)
    assert {len(each) for each in errors.values()} == {6}
    assert all(np.isfinite(each).all() for each in errors.values())
    assert np.median(errors["time difference, cross-ambiguity"]) < 50
    assert np.median(errors["most likely: power and arrivals"]) < 0.5 * np.median(errors["weighted centroid"])
    more = [both - power for power, both in zip(informations["power"], informations["power and arrivals"], strict=True)]
    assert all(np.linalg.eigvalsh(each).min() > 0 for each in more)


def test_the_goal_of_the_networks_is_a_third_of_the_centroid() -> None:
    errors = {
        "weighted centroid": np.array([300.0]),
        "network: near": np.array([99.0]),
        "network: far": np.array([101.0]),
    }
    figures = {figure.name: figure for figure in errors_of(errors, {"power": [np.eye(2)]})}
    assert figures["network: near (median)"].met is True
    assert figures["network: far (median)"].met is False
    assert figures["weighted centroid (median)"].met is None
    assert figures["network: near (median)"].goal == "≤ 100"


@pytest.mark.parametrize(("held", "met"), [(0.66, True), (0.60, False)])
def test_coverage_is_met_within_three_points(held: float, met: bool) -> None:
    class Said:
        class predictions:  # noqa: N801 - stands for an attribute
            squares = np.where(np.arange(1000) < 1000 * held, 0.0, 4.0)

    first, second = coverages_of({"x": Said()})  # type: ignore[dict-item]
    assert first.met is met
    assert second.value == 100.0
    assert second.met is False
