"""Baselines and the bound: exact without noise, unbiased, as good as the bound allows where that can be reached."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.data.arrivals import Arrivals
from heimdall_trainer.data.generator import receiver_places, transmitter_place
from heimdall_trainer.data.physics import SPEED_OF_LIGHT_M_S
from tests.bench.baselines import (
    Physics,
    bound_errors_m,
    gcc_phat,
    information,
    most_likely,
    posterior_mean,
    time_difference,
    weighted_centroid,
)

RADIUS_M, RECEIVERS = 1500.0, 5
SEEDS = st.integers(0, 10_000)


def physics(shadowing_db: float = 2.0) -> Physics:
    return Physics(
        frequency_hz=433.92e6, exponent=2.7, shadowing_db=shadowing_db, power_dbm=(24.0, 30.0), radius_m=RADIUS_M
    )


def scene(seed: int) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Receivers around, a transmitter within, and what noise is drawn from."""
    rng = np.random.default_rng(seed)
    return receiver_places(RECEIVERS, RADIUS_M, rng), 0.9 * transmitter_place(RADIUS_M, rng), rng


def heard_power(place: np.ndarray, places: np.ndarray, known: Physics, shadowing: np.ndarray | float = 0) -> np.ndarray:
    return 27.0 + known.heard_dbm(np.linalg.norm(place - places, axis=1)) + shadowing


def heard_arrivals(place: np.ndarray, places: np.ndarray, sigma_m: float, noise: np.ndarray | float = 0) -> Arrivals:
    late_m = np.linalg.norm(place - places, axis=1) + sigma_m * noise
    count = len(places)
    return Arrivals(
        times_s=(late_m - late_m[0]) / SPEED_OF_LIGHT_M_S,
        sigma_s=np.full(count, sigma_m / SPEED_OF_LIGHT_M_S),
        snr=np.full(count, 1000.0),
        bandwidth_rad_s=1e5,
    )


def test_centroid_of_equal_powers_is_the_middle_and_of_one_loud_receiver_its_place() -> None:
    places = np.array([[0.0, 0.0], [1000.0, 0.0], [500.0, 900.0]])
    assert weighted_centroid(places, np.full(3, -80.0)) == pytest.approx(np.array([500.0, 300.0]))
    assert weighted_centroid(places, np.array([-80.0, -200.0, -200.0])) == pytest.approx(places[0], abs=1e-6)
    # 10 dB more are ten times the weight.
    assert weighted_centroid(places[:2], np.array([-80.0, -90.0])) == pytest.approx(np.array([1000 / 11, 0.0]))


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_time_differences_without_noise_give_the_place(seed: int) -> None:
    places, place, _ = scene(seed)
    found = time_difference(places, heard_arrivals(place, places, sigma_m=1.0), RADIUS_M)
    assert found == pytest.approx(place, abs=0.01)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_the_most_likely_place_without_noise_is_the_place(seed: int) -> None:
    places, place, _ = scene(seed)
    known = physics()
    arrivals = heard_arrivals(place, places, sigma_m=1.0)
    assert most_likely(places, heard_power(place, places, known), known, arrivals) == pytest.approx(place, abs=0.01)


@settings(deadline=None, max_examples=40)
@given(seed=SEEDS)
def test_power_alone_without_shadowing_gives_the_place(seed: int) -> None:
    places, place, _ = scene(seed)
    known = physics(shadowing_db=0.1)
    assert most_likely(places, heard_power(place, places, known), known) == pytest.approx(place, abs=0.1)


def errors_of_arrivals(sigma_m: float, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    places, place, rng = scene(3)
    sigma_s = np.full(RECEIVERS, sigma_m / SPEED_OF_LIGHT_M_S)
    bound = np.linalg.inv(information(place, places, sigma_s=sigma_s))
    noise = rng.standard_normal((count, RECEIVERS))
    found = [time_difference(places, heard_arrivals(place, places, sigma_m, each), RADIUS_M) for each in noise]
    return np.array(found) - place, bound


def errors_of_power(shadowing_db: float, count: int = 400) -> tuple[np.ndarray, np.ndarray]:
    places, place, rng = scene(3)
    known = physics(shadowing_db)
    bound = np.linalg.inv(information(place, places, physics=known))
    noise = shadowing_db * rng.standard_normal((count, RECEIVERS))
    found = [most_likely(places, heard_power(place, places, known, each), known) for each in noise]
    return np.array(found) - place, bound


@pytest.mark.slow
@pytest.mark.parametrize(("errors_of", "noise"), [(errors_of_arrivals, 3.0), (errors_of_power, 0.1)])
def test_little_noise_leaves_them_unbiased_and_as_good_as_the_bound(errors_of: object, noise: float) -> None:
    errors, bound = errors_of(noise)  # type: ignore[operator]
    deviation = np.sqrt(np.diag(bound))
    assert np.abs(errors.mean(axis=0) / deviation).max() < 3 / np.sqrt(len(errors))
    assert np.cov(errors.T) / np.sqrt(np.outer(*2 * [np.diag(bound)])) == pytest.approx(
        bound / np.sqrt(np.outer(*2 * [np.diag(bound)])), abs=0.2
    )


@pytest.mark.slow
def test_power_and_arrivals_together_are_better_than_either() -> None:
    places, place, rng = scene(5)
    known, sigma_m = physics(), 150.0
    alone, late, both = [], [], []
    for _ in range(150):
        power = heard_power(place, places, known, known.shadowing_db * rng.standard_normal(RECEIVERS))
        arrivals = heard_arrivals(place, places, sigma_m, rng.standard_normal(RECEIVERS))
        alone.append(most_likely(places, power, known))
        late.append(time_difference(places, arrivals, RADIUS_M))
        both.append(most_likely(places, power, known, arrivals))
    rms = [np.sqrt(np.mean(np.sum((np.array(each) - place) ** 2, axis=1))) for each in (alone, late, both)]
    assert rms[2] < min(rms[:2])


def test_the_most_likely_place_lies_within_the_area() -> None:
    known = physics(shadowing_db=6.0)
    for seed in range(20):
        places, place, rng = scene(seed)
        power = heard_power(place, places, known, known.shadowing_db * rng.standard_normal(RECEIVERS))
        assert np.linalg.norm(most_likely(places, power, known)) <= RADIUS_M


@pytest.mark.slow
def test_the_posterior_mean_has_the_smaller_mean_squared_error() -> None:
    known = physics()
    squares = {"mean": 0.0, "mode": 0.0, "centroid": 0.0}
    for seed in range(150):
        rng = np.random.default_rng(seed)
        places, place = receiver_places(RECEIVERS, RADIUS_M, rng), transmitter_place(RADIUS_M, rng)
        power = rng.uniform(-3, 3) + heard_power(place, places, known, 2.0 * rng.standard_normal(RECEIVERS))
        for name, found in (
            ("mean", posterior_mean(places, power, known)),
            ("mode", most_likely(places, power, known)),
            ("centroid", weighted_centroid(places, power)),
        ):
            squares[name] += float(np.sum((found - place) ** 2))
    assert squares["mean"] < 0.9 * min(squares["mode"], squares["centroid"])


def test_the_posterior_mean_of_power_beyond_all_that_is_possible_is_still_a_place() -> None:
    places, place, _ = scene(1)
    found = posterior_mean(places, heard_power(place, places, physics()) + 500.0, physics())
    assert np.isfinite(found).all()
    assert np.linalg.norm(found - place) < 500


def test_information_of_a_cross_is_what_one_finds_by_hand() -> None:
    # Four receivers at 1 km in the four directions, the transmitter in the middle: directions are orthonormal twice.
    places = 1000.0 * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    late = information(np.zeros(2), places, sigma_s=np.full(4, 10.0 / SPEED_OF_LIGHT_M_S))
    assert late == pytest.approx(np.eye(2) * 2 / 10.0**2)
    slope = 10 * 2.7 / np.log(10) / 1000.0  # decibels a metre
    assert information(np.zeros(2), places, physics=physics()) == pytest.approx(np.eye(2) * 2 * (slope / 2.0) ** 2)


def test_information_of_both_is_their_sum() -> None:
    places, place, _ = scene(2)
    sigma_s = np.full(RECEIVERS, 1e-8)
    both = information(place, places, physics=physics(), sigma_s=sigma_s)
    parts = information(place, places, physics=physics()) + information(place, places, sigma_s=sigma_s)
    assert both == pytest.approx(parts)


@settings(deadline=None, max_examples=30)
@given(seed=SEEDS)
def test_one_receiver_more_is_never_less_information(seed: int) -> None:
    places, place, rng = scene(seed)
    sigma_s = rng.uniform(1e-9, 1e-7, RECEIVERS)
    every = information(place, places, physics=physics(), sigma_s=sigma_s)
    fewer = information(place, places[:-1], physics=physics(), sigma_s=sigma_s[:-1])
    assert np.linalg.eigvalsh(every - fewer).min() > -1e-9 * np.trace(every)


def test_errors_at_the_bound_have_its_size() -> None:
    errors = bound_errors_m([np.eye(2) / 30.0**2] * 50, np.random.default_rng(1))
    assert np.median(errors) == pytest.approx(30.0 * np.sqrt(2 * np.log(2)), rel=0.03)  # Rayleigh


@pytest.mark.parametrize("delay", [-2.0, 0.3, 1.75])
def test_the_phase_transform_finds_a_delay_of_any_fraction(delay: float) -> None:
    rng = np.random.default_rng(1)
    signal = rng.standard_normal(2048) + 1j * rng.standard_normal(2048)
    late = np.fft.ifft(np.fft.fft(signal) * np.exp(-2j * np.pi * np.fft.fftfreq(2048) * delay))
    assert gcc_phat(late, signal, largest_delay=3.0) == pytest.approx(delay, abs=2e-3)
