"""Local metres and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.data.geo import EQUATORIAL_RADIUS_M, FLATTENING, to_geographic, to_local

ORIGIN = (52.0, 10.0)
ECCENTRICITY_2 = FLATTENING * (2 - FLATTENING)


def test_the_origin_is_zero() -> None:
    assert to_local(ORIGIN, ORIGIN) == pytest.approx([0, 0], abs=1e-9)


def test_a_small_step_north_is_the_meridian_s_radius_times_the_angle() -> None:
    sine = np.sin(np.radians(ORIGIN[0]))
    meridian = EQUATORIAL_RADIUS_M * (1 - ECCENTRICITY_2) / (1 - ECCENTRICITY_2 * sine**2) ** 1.5
    east, north = to_local((ORIGIN[0] + 0.001, ORIGIN[1]), ORIGIN)
    assert north == pytest.approx(meridian * np.radians(0.001), rel=1e-5)
    assert east == pytest.approx(0, abs=1e-6)


def test_a_small_step_east_is_the_parallel_s_radius_times_the_angle() -> None:
    sine = np.sin(np.radians(ORIGIN[0]))
    parallel = EQUATORIAL_RADIUS_M / np.sqrt(1 - ECCENTRICITY_2 * sine**2) * np.cos(np.radians(ORIGIN[0]))
    east, north = to_local((ORIGIN[0], ORIGIN[1] + 0.001), ORIGIN)
    assert east == pytest.approx(parallel * np.radians(0.001), rel=1e-6)
    assert north == pytest.approx(0, abs=1e-3)


def test_a_degree_of_longitude_on_the_equator_is_111_km() -> None:
    # The plane falls short of the arc of 111,319 m by d³/6R².
    east, _ = to_local((0.0, 1.0), (0.0, 0.0))
    assert east == pytest.approx(111_319.49 - 5.65, abs=0.05)


@settings(deadline=None, max_examples=50)
@given(
    latitude=st.floats(-80, 80),
    longitude=st.floats(-180, 180),
    metres=st.tuples(st.floats(-100e3, 100e3), st.floats(-100e3, 100e3)),
)
def test_there_and_back_again_is_the_same_place(latitude: float, longitude: float, metres: tuple[float, float]) -> None:
    origin = (latitude, longitude)
    assert to_local(to_geographic(metres, origin), origin) == pytest.approx(metres, abs=1e-3)


def test_many_places_are_projected_at_once() -> None:
    places = to_geographic(np.arange(12.0).reshape(2, 3, 2), ORIGIN)
    assert places.shape == (2, 3, 2)
    assert to_local(places, ORIGIN) == pytest.approx(np.arange(12.0).reshape(2, 3, 2), abs=1e-6)
