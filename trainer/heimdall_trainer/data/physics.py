"""What happens to a transmission on its way to a receiver: each effect a function of its own.

Signals are complex baseband; their mean squared magnitude is their power in milliwatts, so that 10·log10 of it is dBm.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

SPEED_OF_LIGHT_M_S: Final = 299_792_458.0
BOLTZMANN_J_K: Final = 1.380649e-23
REFERENCE_TEMPERATURE_K: Final = 290.0
"""Standard noise temperature (IEEE Std 145; ITU-R V.573)."""
VOICE_BAND_HZ: Final = (300.0, 3400.0)
"""Band of telephone speech (ITU-T G.712)."""
FM_DEVIATION_HZ: Final = 2500.0
"""Peak deviation of narrow-band voice FM in 12.5 kHz channels (ETSI EN 300 086)."""
FSK_BAUD: Final = 9600.0
FSK_DEVIATION_HZ: Final = 4800.0
"""Half the symbol rate: modulation index 1."""
OFDM_CARRIERS: Final = 64
OFDM_USED: Final = 48
OFDM_PREFIX: Final = 16
INTERPOLATION_TAPS: Final = 32
INTERPOLATION_PHASES: Final = 1024
"""Fractions of a sample that the kernel is tabulated for; between them it is interpolated, at an error of 10⁻⁶."""

Signal = NDArray[np.complex128]


def free_space_loss_db(distance_m: float, frequency_hz: float) -> float:
    """Free-space loss between isotropic antennas (Friis 1946; ITU-R P.525-4, eq. 3).

    Args:
        distance_m: Distance in metres, greater than 0.
        frequency_hz: Carrier frequency in hertz.

    Returns:
        Loss in decibels.
    """
    return float(20 * np.log10(4 * np.pi * distance_m * frequency_hz / SPEED_OF_LIGHT_M_S))


def log_distance_loss_db(distance_m: float, frequency_hz: float, exponent: float, reference_m: float = 1.0) -> float:
    """Mean log-distance loss: free space up to a reference, then 10·n dB a decade (Rappaport 2002, eq. 4.68).

    Args:
        distance_m: Distance in metres; at least the reference distance counts.
        frequency_hz: Carrier frequency in hertz.
        exponent: Path-loss exponent n; 2 is free space.
        reference_m: Reference distance in metres.

    Returns:
        Loss in decibels.
    """
    ratio = max(distance_m, reference_m) / reference_m
    return free_space_loss_db(reference_m, frequency_hz) + float(10 * exponent * np.log10(ratio))


def shadowing_db(deviation_db: float, rng: np.random.Generator) -> float:
    """Log-normal shadowing: a normal deviation of the loss in decibels (Rappaport 2002, eq. 4.69)."""
    return float(rng.normal(0.0, deviation_db))


def thermal_noise_dbm(bandwidth_hz: float, noise_figure_db: float) -> float:
    """Noise power of a receiver: k·T·B at 290 K, raised by its noise figure (Nyquist 1928; Friis 1944).

    Args:
        bandwidth_hz: Bandwidth in hertz.
        noise_figure_db: Noise figure in decibels.

    Returns:
        Power in dBm.
    """
    milliwatts = BOLTZMANN_J_K * REFERENCE_TEMPERATURE_K * bandwidth_hz * 1000
    return float(10 * np.log10(milliwatts)) + noise_figure_db


def arrival_delay_s(distance_m: float) -> float:
    """Time of flight in seconds over a distance in metres, in vacuum."""
    return distance_m / SPEED_OF_LIGHT_M_S


def power_dbm(signal: NDArray[np.complexfloating]) -> float:
    """Mean power of a signal in dBm."""
    return float(10 * np.log10(np.mean(np.abs(signal) ** 2)))


def scale_to_dbm(signal: Signal, dbm: float) -> Signal:
    """Scale a signal to a mean power in dBm."""
    return signal * 10 ** ((dbm - power_dbm(signal)) / 20)


def apply_delay(signal: Signal, seconds: float, sample_rate_hz: float, frequency_hz: float = 0.0) -> Signal:
    """Delay a signal by any fraction of a sample, cyclically, with the carrier's phase turn (Fourier shift theorem).

    Args:
        signal: Samples, shape (samples,).
        seconds: Delay in seconds.
        sample_rate_hz: Sampling rate in hertz.
        frequency_hz: Carrier frequency in hertz.

    Returns:
        Samples, shape (samples,).
    """
    frequencies = np.fft.fftfreq(signal.size, 1 / sample_rate_hz) + frequency_hz
    delayed: Signal = np.fft.ifft(np.fft.fft(signal) * np.exp(-2j * np.pi * frequencies * seconds))
    return delayed


def apply_carrier_offset(signal: Signal, offset_hz: float, sample_rate_hz: float) -> Signal:
    """Turn a signal by an error of the carrier frequency, in hertz."""
    turned: Signal = signal * np.exp(2j * np.pi * offset_hz * np.arange(signal.size) / sample_rate_hz)
    return turned


def apply_sampling_offset(signal: Signal, ppm: float) -> Signal:
    """Sample a signal with a clock that is off: sample n is taken at n·(1 + ppm·10⁻⁶).

    Band-limited interpolation by a Kaiser-windowed sinc (Oppenheim and Schafer, 3rd ed., 4.4 and 7.5).

    Args:
        signal: Samples, shape (samples,); silence before and after.
        ppm: Error in parts per million; positive: the clock is slow, and less samples are taken of the same time.

    Returns:
        Samples, shape (samples,).
    """
    half = INTERPOLATION_TAPS // 2
    times = np.arange(signal.size) * (1 + ppm * 1e-6)
    first = np.floor(times).astype(np.int64)
    silence = np.zeros(half + 2 + max(0, int(np.ceil(times[-1])) - signal.size))
    padded = np.concatenate([np.zeros(half), signal, silence])
    row = (times - first) * INTERPOLATION_PHASES
    above = row.astype(np.int64)
    share = (row - above)[:, None]
    kernels = _interpolation_kernels()
    weights = (1 - share) * kernels[above] + share * kernels[above + 1]
    around = np.lib.stride_tricks.sliding_window_view(padded, INTERPOLATION_TAPS)[first + 1]
    taken: Signal = np.einsum("st,st->s", around, weights)
    return taken


@lru_cache(maxsize=1)
def _interpolation_kernels() -> NDArray[np.float64]:
    # One row for each fraction of a sample. Computed once: Bessel functions are what takes the time.
    half = INTERPOLATION_TAPS // 2
    taps = np.arange(-half + 1, half + 1)
    distance = np.linspace(0, 1, INTERPOLATION_PHASES + 1)[:, None] - taps
    window = np.i0(8.0 * np.sqrt(np.clip(1 - (distance / half) ** 2, 0, 1))) / np.i0(8.0)
    kernels: NDArray[np.float64] = np.sinc(distance) * window
    return kernels


def white_noise(samples: int, dbm: float, rng: np.random.Generator) -> Signal:
    """Complex white Gaussian noise of a power in dBm, shape (samples,)."""
    scale = np.sqrt(10 ** (dbm / 10) / 2)
    noise: Signal = scale * (rng.standard_normal(samples) + 1j * rng.standard_normal(samples))
    return noise


def full_scale_dbm(signal: Signal, headroom_db: float = 6.0, step_db: float = 10.0) -> float:
    """Full scale of a converter behind a gain that is set in steps so that a signal fits with some headroom.

    Args:
        signal: Samples, shape (samples,), power in milliwatts.
        headroom_db: Least distance of the highest peak from full scale, in decibels.
        step_db: Steps of the gain in decibels.

    Returns:
        Power in dBm of a sample of magnitude 1.
    """
    peak_dbm = float(20 * np.log10(np.max(np.abs(signal))))
    return float(np.ceil((peak_dbm + headroom_db) / step_db) * step_db)


def fm_voice(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """Narrow-band FM of noise in the band of speech, 2.5 kHz deviation, unit power.

    Its bandwidth is about 2·(2.5 + 3.4) kHz (Carson 1922).

    Args:
        samples: How many samples.
        sample_rate_hz: Sampling rate in hertz, at least 12 kHz.
        rng: Source of randomness.

    Returns:
        Samples, shape (samples,).
    """
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / sample_rate_hz)
    spectrum[(frequencies < VOICE_BAND_HZ[0]) | (frequencies > VOICE_BAND_HZ[1])] = 0
    voice = np.fft.irfft(spectrum, samples)
    peak = np.max(np.abs(voice)) or 1.0
    return np.exp(2j * np.pi * FM_DEVIATION_HZ * np.cumsum(voice / peak) / sample_rate_hz)


def fsk(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """Two-level FSK at 9,600 baud with 4.8 kHz deviation, continuous phase, unit power.

    Modulation index 1 (Proakis and Salehi 2008, 5th ed., 3.3-1); by Carson's rule 19 kHz wide, as a data radio is in
    channels of 25 kHz (cf. ETSI EN 300 113).

    Args:
        samples: How many samples.
        sample_rate_hz: Sampling rate in hertz, at least 20 kHz.
        rng: Source of randomness.

    Returns:
        Samples, shape (samples,).
    """
    symbol = (np.arange(samples) * FSK_BAUD / sample_rate_hz).astype(np.int64)
    bits = rng.integers(0, 2, symbol[-1] + 1) * 2 - 1
    return np.exp(2j * np.pi * FSK_DEVIATION_HZ * np.cumsum(bits[symbol]) / sample_rate_hz)


def ofdm(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """OFDM-like: 48 of 64 carriers with QPSK, a prefix of 16, over 3/4 of the band, unit power (cf. IEEE 802.11, 17).

    Args:
        samples: How many samples.
        sample_rate_hz: Sampling rate in hertz; it sets nothing here, as the band is a share of it.
        rng: Source of randomness.

    Returns:
        Samples, shape (samples,).
    """
    del sample_rate_hz
    length = OFDM_CARRIERS + OFDM_PREFIX
    count = samples // length + 1
    used = np.r_[1 : OFDM_USED // 2 + 1, OFDM_CARRIERS - OFDM_USED // 2 : OFDM_CARRIERS]
    grid = np.zeros((count, OFDM_CARRIERS), dtype=np.complex128)
    grid[:, used] = np.exp(0.5j * np.pi * rng.integers(0, 4, (count, used.size)))
    symbols = np.fft.ifft(grid, axis=1)
    signal = np.concatenate([symbols[:, -OFDM_PREFIX:], symbols], axis=1).reshape(-1)[:samples]
    unit: Signal = signal / np.sqrt(np.mean(np.abs(signal) ** 2))
    return unit


MODULATIONS: Final = {"fm": fm_voice, "fsk": fsk, "ofdm": ofdm}
