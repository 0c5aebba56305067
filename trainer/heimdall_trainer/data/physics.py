"""What happens to a transmission on its way to a receiver: each effect a function of its own.

Signals are complex baseband; their mean squared magnitude is their power in milliwatts, so that 10·log10 of it is dBm.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

SPEED_OF_LIGHT_M_S: Final = 299_792_458.0
BOLTZMANN_J_K: Final = 1.380649e-23
REFERENCE_TEMPERATURE_K: Final = 290.0

Signal = NDArray[np.complex128]


def _signal(values: ArrayLike) -> Signal:
    return np.asarray(values, dtype=np.complex128)


def free_space_loss_db(distance_m: float, frequency_hz: float) -> float:
    """Free-space loss between isotropic antennas (Friis 1946; ITU-R P.525-4).

    Args:
        distance_m: Distance in metres, greater than 0.
        frequency_hz: Carrier frequency in hertz.

    Returns:
        Loss in decibels.
    """
    return float(20 * np.log10(4 * np.pi * distance_m * frequency_hz / SPEED_OF_LIGHT_M_S))


def log_distance_loss_db(distance_m: float, frequency_hz: float, exponent: float, reference_m: float = 1.0) -> float:
    """Log-distance loss: free space up to a reference, then 10·n decibels a decade (Rappaport 2002, 4.9).

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


def thermal_noise_dbm(bandwidth_hz: float, noise_figure_db: float) -> float:
    """Noise power of a receiver: k·T·B at 290 K, raised by its noise figure (Johnson 1928, Nyquist 1928).

    Args:
        bandwidth_hz: Bandwidth in hertz.
        noise_figure_db: Noise figure in decibels.

    Returns:
        Power in dBm.
    """
    milliwatts = BOLTZMANN_J_K * REFERENCE_TEMPERATURE_K * bandwidth_hz * 1000
    return float(10 * np.log10(milliwatts)) + noise_figure_db


def delay_s(distance_m: float) -> float:
    """Time of flight in seconds over a distance in metres."""
    return distance_m / SPEED_OF_LIGHT_M_S


def power_dbm(signal: Signal) -> float:
    """Mean power of a signal in dBm."""
    return float(10 * np.log10(np.mean(np.abs(signal) ** 2)))


def scale_to_dbm(signal: Signal, dbm: float) -> Signal:
    """Scale a signal to a mean power in dBm."""
    return _signal(signal * 10 ** ((dbm - power_dbm(signal)) / 20))


def apply_delay(signal: Signal, seconds: float, sample_rate_hz: float, frequency_hz: float = 0.0) -> Signal:
    """Delay a signal by any fraction of a sample, cyclically, with the carrier's phase turn.

    Args:
        signal: Samples, shape (samples,).
        seconds: Delay in seconds.
        sample_rate_hz: Sampling rate in hertz.
        frequency_hz: Carrier frequency in hertz.

    Returns:
        Samples, shape (samples,).
    """
    frequencies = np.fft.fftfreq(signal.size, 1 / sample_rate_hz) + frequency_hz
    return _signal(np.fft.ifft(np.fft.fft(signal) * np.exp(-2j * np.pi * frequencies * seconds)))


def apply_carrier_offset(signal: Signal, offset_hz: float, sample_rate_hz: float) -> Signal:
    """Turn a signal by a receiver's error of its carrier frequency, in hertz."""
    return _signal(signal * np.exp(2j * np.pi * offset_hz * np.arange(signal.size) / sample_rate_hz))


def apply_sampling_offset(signal: Signal, ppm: float) -> Signal:
    """Sample a signal with a clock that is off by some parts per million (linear interpolation)."""
    times = np.arange(signal.size) * (1 + ppm * 1e-6)
    index = np.arange(signal.size)
    return _signal(np.interp(times, index, signal.real) + 1j * np.interp(times, index, signal.imag))


def white_noise(samples: int, dbm: float, rng: np.random.Generator) -> Signal:
    """Complex white Gaussian noise of a power in dBm."""
    scale = np.sqrt(10 ** (dbm / 10) / 2)
    return _signal(scale * (rng.standard_normal(samples) + 1j * rng.standard_normal(samples)))


def fm_voice(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """Narrow-band FM of noise that is shaped like speech (300 to 3,400 Hz), 2.5 kHz deviation, unit power."""
    spectrum = np.fft.rfft(rng.standard_normal(samples))
    frequencies = np.fft.rfftfreq(samples, 1 / sample_rate_hz)
    spectrum[(frequencies < 300) | (frequencies > 3400)] = 0  # noqa: PLR2004 - ITU-T G.712's voice band
    voice = np.fft.irfft(spectrum, samples)
    peak = np.max(np.abs(voice)) or 1.0
    return _signal(np.exp(2j * np.pi * 2500 * np.cumsum(voice / peak) / sample_rate_hz))


def fsk(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """Two-level FSK at 4,800 baud with 2.4 kHz deviation, continuous phase, unit power."""
    symbol = max(1, round(sample_rate_hz / 4800))
    bits = rng.integers(0, 2, samples // symbol + 1) * 2 - 1
    return _signal(np.exp(2j * np.pi * 2400 * np.cumsum(np.repeat(bits, symbol)[:samples]) / sample_rate_hz))


def ofdm(samples: int, sample_rate_hz: float, rng: np.random.Generator) -> Signal:
    """OFDM-like: 64 carriers of which 48 carry QPSK over three quarters of the band, unit power."""
    del sample_rate_hz  # its band is a share of the sampling rate
    count = samples // 64 + 1
    grid = np.zeros((count, 64), dtype=np.complex128)
    used = np.r_[1:25, 40:64]
    grid[:, used] = np.exp(0.5j * np.pi * rng.integers(0, 4, (count, used.size)))
    signal = np.fft.ifft(grid, axis=1).reshape(-1)[:samples]
    return _signal(signal / np.sqrt(np.mean(np.abs(signal) ** 2)))


MODULATIONS: Final = {"fm": fm_voice, "fsk": fsk, "ofdm": ofdm}
