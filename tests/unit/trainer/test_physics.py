"""Each effect on a signal, against its formula."""

from __future__ import annotations

import numpy as np
import pytest

from heimdall_trainer.data import physics

RATE_HZ = 200e3
SAMPLES = 4096


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def tone(frequency_hz: float, samples: int = SAMPLES, times: np.ndarray | None = None) -> physics.Signal:
    steps = np.arange(samples) if times is None else times
    return np.exp(2j * np.pi * frequency_hz * steps / RATE_HZ)


def band_limited(rng: np.random.Generator, samples: int = SAMPLES, share: float = 0.5) -> physics.Signal:
    """Noise that fills a share of the band."""
    spectrum = np.fft.fft(rng.standard_normal(samples) + 1j * rng.standard_normal(samples))
    spectrum[np.abs(np.fft.fftfreq(samples)) > share / 2] = 0
    return np.fft.ifft(spectrum)


def frequency_of(signal: physics.Signal) -> float:
    """Mean frequency in hertz, from the turn between neighbouring samples."""
    return float(np.angle(np.vdot(signal[:-1], signal[1:])) * RATE_HZ / (2 * np.pi))


@pytest.mark.parametrize(
    ("distance_m", "frequency_hz", "loss_db"),
    # ITU-R P.525: 32.45 + 20·log10(f/MHz) + 20·log10(d/km)
    [(1000.0, 1e6, 32.45), (1000.0, 433.92e6, 85.20), (10_000.0, 100e6, 92.45)],
)
def test_free_space_loss_is_what_the_itu_gives(distance_m: float, frequency_hz: float, loss_db: float) -> None:
    assert physics.free_space_loss_db(distance_m, frequency_hz) == pytest.approx(loss_db, abs=0.01)


def test_twice_the_distance_in_free_space_is_6_db() -> None:
    near, far = (physics.free_space_loss_db(distance, 433.92e6) for distance in (500.0, 1000.0))
    assert far - near == pytest.approx(6.0206, abs=1e-4)


@pytest.mark.parametrize("exponent", [2.0, 2.7, 4.0])
def test_a_decade_of_distance_is_ten_times_the_exponent(exponent: float) -> None:
    near, far = (physics.log_distance_loss_db(distance, 433.92e6, exponent) for distance in (100.0, 1000.0))
    assert far - near == pytest.approx(10 * exponent)


def test_log_distance_with_exponent_2_is_free_space() -> None:
    assert physics.log_distance_loss_db(730.0, 433.92e6, 2.0) == pytest.approx(
        physics.free_space_loss_db(730.0, 433.92e6)
    )


def test_closer_than_the_reference_counts_as_the_reference() -> None:
    assert physics.log_distance_loss_db(0.1, 433.92e6, 3.0) == physics.free_space_loss_db(1.0, 433.92e6)


def test_shadowing_is_normal_with_its_deviation(rng: np.random.Generator) -> None:
    drawn = [physics.shadowing_db(2.0, rng) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(0, abs=0.15)
    assert np.std(drawn) == pytest.approx(2.0, rel=0.05)


def test_thermal_noise_is_minus_174_dbm_a_hertz_raised_by_bandwidth_and_noise_figure() -> None:
    assert physics.thermal_noise_dbm(1.0, 0.0) == pytest.approx(-173.975, abs=1e-3)
    assert physics.thermal_noise_dbm(200e3, 6.0) == pytest.approx(-173.975 + 53.010 + 6.0, abs=1e-3)


def test_white_noise_has_its_power_in_both_parts_alike(rng: np.random.Generator) -> None:
    noise = physics.white_noise(100_000, -110.0, rng)
    assert physics.power_dbm(noise) == pytest.approx(-110.0, abs=0.05)
    assert np.var(noise.real) == pytest.approx(np.var(noise.imag), rel=0.03)
    spectrum = np.abs(np.fft.fft(noise)).reshape(10, -1) ** 2
    assert spectrum.mean(axis=1) == pytest.approx(np.full(10, spectrum.mean()), rel=0.05)


def test_scaling_gives_the_power_asked_for() -> None:
    assert physics.power_dbm(physics.scale_to_dbm(3.0 * tone(1e3), 27.0)) == pytest.approx(27.0)


def test_light_needs_a_microsecond_for_300_m() -> None:
    assert physics.arrival_delay_s(299.792458) == pytest.approx(1e-6)


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_a_delay_of_whole_samples_moves_the_samples(rng: np.random.Generator, delay: int) -> None:
    signal = band_limited(rng)
    delayed = physics.apply_delay(signal, delay / RATE_HZ, RATE_HZ)
    assert np.allclose(delayed, np.roll(signal, delay))


@pytest.mark.parametrize("delay", [0.25, 2.5, 6.125])
def test_a_delay_is_found_again_by_cross_correlation(rng: np.random.Generator, delay: float) -> None:
    signal = band_limited(rng)
    delayed = physics.apply_delay(signal, delay / RATE_HZ, RATE_HZ)
    finer = 8
    spectrum = np.zeros(finer * SAMPLES, dtype=complex)
    product = np.fft.fftshift(np.fft.fft(delayed) * np.conj(np.fft.fft(signal)))
    spectrum[: SAMPLES // 2], spectrum[-SAMPLES // 2 :] = product[SAMPLES // 2 :], product[: SAMPLES // 2]
    assert np.argmax(np.abs(np.fft.ifft(spectrum))) / finer == delay


def test_a_delay_turns_the_carrier_s_phase() -> None:
    delay_s, carrier_hz = 1e-6, 433.92e6
    delayed = physics.apply_delay(np.ones(64, dtype=complex), delay_s, RATE_HZ, carrier_hz)
    assert delayed == pytest.approx(np.full(64, np.exp(-2j * np.pi * carrier_hz * delay_s)))


@pytest.mark.parametrize("offset_hz", [-433.92, 0.0, 1250.0])
def test_a_carrier_offset_moves_the_frequency_by_its_hertz(offset_hz: float) -> None:
    moved = physics.apply_carrier_offset(tone(5e3), offset_hz, RATE_HZ)
    assert frequency_of(moved) == pytest.approx(5e3 + offset_hz, abs=1e-6)
    assert physics.power_dbm(moved) == pytest.approx(0.0)


@pytest.mark.parametrize("ppm", [-500.0, 100.0, 20_000.0])
def test_a_sampling_offset_takes_sample_n_at_n_times_one_plus_its_millionths(ppm: float) -> None:
    times = np.arange(SAMPLES) * (1 + ppm * 1e-6)
    taken = physics.apply_sampling_offset(tone(5e3, samples=SAMPLES + 200), ppm)[:SAMPLES]
    inner = slice(32, -32)
    assert np.abs(taken[inner] - tone(5e3, times=times)[inner]).max() < 1e-3


def test_a_clock_that_is_right_changes_nothing(rng: np.random.Generator) -> None:
    signal = band_limited(rng)
    assert np.allclose(physics.apply_sampling_offset(signal, 0.0), signal)


def test_full_scale_leaves_headroom_and_is_a_step_of_the_gain() -> None:
    full_scale = physics.full_scale_dbm(physics.scale_to_dbm(tone(1e3), -73.0))
    assert full_scale == -60.0  # -73 + 6 of headroom, up to the next step of 10


@pytest.mark.parametrize("name", sorted(physics.MODULATIONS))
def test_a_modulation_has_unit_power_and_depends_on_its_seed_alone(name: str) -> None:
    first, again, other = (
        physics.MODULATIONS[name](SAMPLES, RATE_HZ, np.random.default_rng(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (SAMPLES,)
    assert physics.power_dbm(first) == pytest.approx(0.0, abs=1e-9)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def occupied_hz(signal: physics.Signal, share: float) -> float:
    """Width of the band around the carrier that holds a share of the power."""
    power = np.abs(np.fft.fft(signal)) ** 2
    frequencies = np.abs(np.fft.fftfreq(signal.size, 1 / RATE_HZ))
    order = np.argsort(frequencies)
    held = np.cumsum(power[order]) / power.sum()
    return float(2 * frequencies[order][np.searchsorted(held, share)])


def test_fm_keeps_its_deviation_and_carson_s_bandwidth(rng: np.random.Generator) -> None:
    signal = physics.fm_voice(1 << 15, RATE_HZ, rng)
    frequency = np.angle(signal[1:] * np.conj(signal[:-1])) * RATE_HZ / (2 * np.pi)
    assert np.abs(frequency).max() == pytest.approx(physics.FM_DEVIATION_HZ, rel=1e-6)
    assert occupied_hz(signal, 0.98) < 2 * (physics.FM_DEVIATION_HZ + physics.VOICE_BAND_HZ[1])


def test_fsk_has_two_frequencies_and_9600_symbols_a_second(rng: np.random.Generator) -> None:
    signal = physics.fsk(1 << 14, RATE_HZ, rng)
    frequency = np.angle(signal[1:] * np.conj(signal[:-1])) * RATE_HZ / (2 * np.pi)
    assert np.abs(frequency) == pytest.approx(np.full(frequency.size, physics.FSK_DEVIATION_HZ))
    changes = np.flatnonzero(np.diff(np.sign(frequency)))
    # Each change lies on a symbol's edge: a whole number of symbols after the first one, within a sample.
    symbols = np.diff(changes) * physics.FSK_BAUD / RATE_HZ
    assert np.abs(symbols - np.round(symbols)).max() < 2 * physics.FSK_BAUD / RATE_HZ
    assert changes.size / signal.size * RATE_HZ == pytest.approx(physics.FSK_BAUD / 2, rel=0.2)


def test_ofdm_fills_three_quarters_of_the_band_and_repeats_its_prefix(rng: np.random.Generator) -> None:
    signal = physics.ofdm(1 << 14, RATE_HZ, rng)
    assert occupied_hz(signal, 0.99) == pytest.approx(0.75 * RATE_HZ, rel=0.1)
    length = physics.OFDM_CARRIERS + physics.OFDM_PREFIX
    symbols = signal[: signal.size // length * length].reshape(-1, length)
    assert np.allclose(symbols[:, : physics.OFDM_PREFIX], symbols[:, physics.OFDM_CARRIERS :])
