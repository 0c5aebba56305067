"""Arrivals estimated from recordings: exact without noise, unbiased, and near the bound with little."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.data import physics
from heimdall_trainer.data.arrivals import (
    WORST_SIGMA_S,
    Arrivals,
    PairDelay,
    arrival_sigma_s,
    estimate_arrivals,
    pair_delay,
)
from heimdall_trainer.data.generator import MARGIN, Scene, receive, transmit

SCENE = Scene()
SAMPLES, RATE_HZ = 2048, SCENE.sample_rate_hz
MODULATIONS = sorted(physics.MODULATIONS)
QUIET = -300.0
NOISE_DBM = physics.thermal_noise_dbm(RATE_HZ, 6.0)


def heard(
    delays: list[float], *, modulation: str, loss_db: float = 100.0, noise_figure_db: float = QUIET, **more: Any
) -> list[physics.Signal]:
    """What receivers hear of one transmission, so many samples late, with clocks that are off by so many ppm."""
    rng = np.random.default_rng(more.get("seed", 1))
    sent = transmit(SCENE, modulation, SAMPLES + 2 * MARGIN, rng)
    clocks = more.get("clocks") or [0.0] * len(delays)
    return [
        receive(
            sent,
            loss_db=loss_db,
            delay_s=delay / RATE_HZ,
            clock_ppm=clock,
            noise_figure_db=noise_figure_db,
            scene=SCENE,
            rng=rng,
        )
        for delay, clock in zip(delays, clocks, strict=True)
    ]


def pair(first: float, second: float, **more: Any) -> PairDelay:
    late, reference = heard([first, second], **more)
    return pair_delay(late, reference, largest_delay=4.0, largest_offset=0.05)


@settings(deadline=None, max_examples=30)
@given(delay=st.floats(-3, 3), clock=st.floats(-3, 3), modulation=st.sampled_from(MODULATIONS))
def test_without_noise_delay_and_offset_are_exact(delay: float, clock: float, modulation: str) -> None:
    found = pair(3 + delay, 3.0, modulation=modulation, clocks=[clock, 0.0])
    # The clock samples early by its millionths: at the middle of the recording by half of that.
    at_middle = delay + clock * 1e-6 * (SAMPLES - 1) / 2
    assert found.delay == pytest.approx(at_middle, abs=2e-3)
    assert found.offset * RATE_HZ == pytest.approx(-clock * 1e-6 * SCENE.frequency_hz, abs=0.2)
    assert found.coherence == pytest.approx(1.0, abs=1e-3)  # a clock that is off stretches the copy


def test_a_louder_copy_is_no_later() -> None:
    late, reference = heard([1.3, 0.0], modulation="ofdm")
    found = pair_delay(1000 * late, reference, largest_delay=4.0, largest_offset=0.05)
    assert found.delay == pytest.approx(1.3, abs=1e-3)


def test_bandwidth_is_that_of_the_transmission() -> None:
    flat = pair(1.0, 0.0, modulation="ofdm").bandwidth * RATE_HZ
    # 48 of 64 carriers, evenly: a band of width B has 2π·B/√12.
    assert flat == pytest.approx(2 * np.pi * 0.75 * RATE_HZ / np.sqrt(12), rel=0.05)
    keyed = pair(1.0, 0.0, modulation="fsk").bandwidth * RATE_HZ
    # Constant envelope: the root mean square of the frequency's deviation.
    assert keyed == pytest.approx(2 * np.pi * physics.FSK_DEVIATION_HZ, rel=0.05)


def test_noise_alone_is_hardly_coherent_and_stays_within_bounds() -> None:
    rng = np.random.default_rng(1)
    first, second = (physics.white_noise(SAMPLES, -100.0, rng) for _ in range(2))
    found = pair_delay(first, second, largest_delay=4.0, largest_offset=0.05)
    assert found.coherence < 0.05
    assert abs(found.delay) <= 4.0
    assert abs(found.offset) <= 0.06


@pytest.mark.parametrize("modulation", MODULATIONS)
def test_noise_leaves_arrivals_unbiased_and_near_their_bound(modulation: str) -> None:
    scores = []
    for seed in range(120):
        signals = heard([1.25, 0.0], modulation=modulation, loss_db=110.0, noise_figure_db=6.0, seed=seed)
        found = estimate(signals)
        error = found.times_s[0] - found.times_s[1] - 1.25 / RATE_HZ
        scores.append(error / np.hypot(*found.sigma_s))
    assert abs(np.mean(scores)) < 3 * np.std(scores) / np.sqrt(len(scores))
    # The ends are faded out, which costs a little.
    assert 0.85 < np.std(scores) < 1.3


def estimate(signals: list[physics.Signal], **more: Any) -> Arrivals:
    places = np.array([[2000.0 * index, 0.0] for index in range(len(signals))])
    arguments = {"noise_dbm": [NOISE_DBM] * len(signals), "sample_rate_hz": RATE_HZ, "frequency_hz": SCENE.frequency_hz}
    return estimate_arrivals(signals, places, **{**arguments, **more})


def test_clocks_that_are_off_are_taken_out_where_the_carrier_is_known() -> None:
    signals = heard([1.0, 0.0, 0.5], modulation="ofdm", clocks=[4.0, 0.0, -3.0])
    late = estimate(signals).times_s
    assert (late - late[1]) * RATE_HZ == pytest.approx(np.array([1.0, 0.0, 0.5]), abs=5e-4)
    left_in = estimate(signals, frequency_hz=0.0).times_s
    assert (left_in - left_in[1])[0] * RATE_HZ == pytest.approx(1.0 + 4e-6 * SAMPLES / 2, abs=5e-4)


def test_the_loudest_receiver_is_what_arrivals_count_from() -> None:
    first, second, third = heard([0.5, 1.0, 2.0], modulation="fsk")
    found = estimate([first, 10 * second, third])
    assert found.times_s[1] == 0.0
    assert found.times_s * RATE_HZ == pytest.approx(np.array([-0.5, 0.0, 1.0]), abs=2e-3)
    assert found.sigma_s[1] == found.sigma_s.min()


def test_a_single_receiver_tells_nothing_of_time() -> None:
    found = estimate(heard([1.0], modulation="fm"))
    assert found.times_s == pytest.approx([0.0])
    assert found.sigma_s == pytest.approx([WORST_SIGMA_S])


@pytest.mark.parametrize("muted", [0, 1, 2])
def test_a_receiver_that_was_muted_tells_nothing_and_disturbs_nobody(muted: int) -> None:
    signals = heard([0.5, 1.0, 2.0], modulation="fsk")
    signals[muted] = np.zeros_like(signals[muted])
    found = estimate(signals)
    assert np.isfinite(found.times_s).all()
    assert found.sigma_s[muted] == WORST_SIGMA_S
    assert (np.delete(found.sigma_s, muted) < WORST_SIGMA_S).all()


def test_silence_alone_is_no_error() -> None:
    found = estimate([np.zeros_like(signal) for signal in heard([0.5, 1.0], modulation="fm")])
    assert found.sigma_s == pytest.approx([WORST_SIGMA_S] * 2)


def test_the_bound_of_an_arrival_is_kay_s() -> None:
    # 100 kHz flat, 40 dB, 1,000 samples.
    beta = 2 * np.pi * 100e3 / np.sqrt(12)
    assert arrival_sigma_s(beta, np.array([1e4]), 1000) == pytest.approx([1 / (beta * np.sqrt(2e7))])
    assert arrival_sigma_s(0.0, np.array([1e4]), 1000) == pytest.approx([WORST_SIGMA_S])
