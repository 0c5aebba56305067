"""When a transmission arrived at each receiver, relative to the loudest one, from what they recorded.

The receivers start at one instant (a pulse per second of satellite navigation, say), but each clock runs at its own
rate, which moves both carrier and sampling. So delay and frequency are estimated together: the peak of the
cross-ambiguity function (Stein 1981, "Algorithms for ambiguity function processing"), of signals from which the
noise outside the transmission's band was filtered, as maximum likelihood asks for (Knapp and Carter 1976).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from heimdall_trainer.data import physics

ARRIVAL_VALUES: Final = 2
"""Of each receiver: how much later, and how sure that is."""
EDGE: Final = 64
"""Samples at both ends that are faded out, so that nothing enters or leaves while signals are moved."""
LARGEST_OFFSET_HZ: Final = 10e3
"""Bound of the difference between two receivers' carriers."""
STEPS: Final = 6
"""Newton steps; each doubles the digits that are right."""
SMOOTHING: Final = 33
"""Bins that a spectrum is averaged over before the transmission's band is looked for in it."""
LEAST_SNR: Final = 1e-3
"""Below this a receiver heard nothing: its arrival is as uncertain as this signal-to-noise ratio makes it."""
WORST_SIGMA_S: Final = 1e-3
"""Largest standard deviation of an arrival: what is unknown, in a number (300 km)."""

Signal = NDArray[np.complexfloating]
Reals = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class PairDelay:
    """How one recording lies to another."""

    delay: float
    """Samples by which it is later, at the middle of the recording."""
    offset: float
    """Cycles per sample by which its carrier is higher."""
    coherence: float
    """Squared normalised correlation at the peak: 1 for copies, near 0 for noise."""
    bandwidth: float
    """Root-mean-square bandwidth of what both hold, in radians per sample, less what it costs to tell
    delay from offset."""


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When a transmission arrived at R receivers."""

    times_s: Reals
    """Seconds after the arrival at the loudest receiver, shape (R,)."""
    sigma_s: Reals
    """Standard deviations in seconds, each receiver's by itself, shape (R,)."""
    snr: Reals
    """Ratios of signal to noise, shape (R,)."""
    bandwidth_rad_s: float
    """Root-mean-square bandwidth of the transmission."""


def estimate_arrivals(
    signals: Sequence[Signal],
    places_m: Reals,
    *,
    noise_dbm: Sequence[float] | Reals,
    sample_rate_hz: float,
    frequency_hz: float = 0.0,
) -> Arrivals:
    """Estimate arrivals from recordings that were started at one instant.

    Args:
        signals: What R receivers recorded, each of shape (samples,), power in milliwatts.
        places_m: Where they stand, metres, shape (R, 2): no wave needs longer between two of them than light does.
        noise_dbm: Noise power of each receiver in dBm.
        sample_rate_hz: Sampling rate in hertz.
        frequency_hz: Carrier frequency; a clock that is off by a share of it samples off by the same share, which is
            taken out. 0: not known, nothing is taken out.

    Returns:
        The arrivals; a single receiver's is 0.
    """
    noise = 10 ** (np.asarray(noise_dbm, dtype=np.float64) / 10)
    power = np.array([np.mean(np.abs(signal) ** 2) for signal in signals])
    snr = np.maximum(power / noise - 1, LEAST_SNR)
    reference = int(np.argmax(snr))
    middle = (len(signals[reference]) - 1) / 2
    times, bandwidths, weights = np.zeros(len(signals)), np.zeros(len(signals)), np.zeros(len(signals))
    for index, signal in enumerate(signals):
        if index == reference or not (power[index] and power[reference]):
            continue  # silence, of a receiver that was muted, is like nothing
        farthest_m = float(np.linalg.norm(places_m[index] - places_m[reference]))
        pair = pair_delay(
            signal,
            signals[reference],
            largest_delay=physics.arrival_delay_s(farthest_m) * sample_rate_hz + 0.5,
            largest_offset=LARGEST_OFFSET_HZ / sample_rate_hz,
            noise=float(noise[reference]),
        )
        slower = -pair.offset * sample_rate_hz / frequency_hz if frequency_hz else 0.0
        times[index] = (pair.delay - slower * middle) / sample_rate_hz
        bandwidths[index], weights[index] = pair.bandwidth, pair.coherence
    total = weights.sum()
    bandwidth = float((bandwidths * weights).sum() / total * sample_rate_hz) if total > 0 else 0.0
    samples = len(signals[reference])
    sigma = np.where(power > 0, arrival_sigma_s(bandwidth, snr, samples), WORST_SIGMA_S)
    return Arrivals(times_s=times, sigma_s=sigma, snr=snr, bandwidth_rad_s=bandwidth)


def arrival_sigma_s(bandwidth_rad_s: float, snr: Reals, samples: int) -> Reals:
    """Cramér-Rao bound of an arrival: 1 / (β·√(2·N·SNR)) (Kay 1993, vol. 1, example 3.13; Quazi 1981).

    Args:
        bandwidth_rad_s: Root-mean-square bandwidth β in radians per second.
        snr: Ratios of signal to noise per complex sample, shape (R,).
        samples: Complex samples N, of independent noise.

    Returns:
        Standard deviations in seconds, shape (R,); no larger than WORST_SIGMA_S.
    """
    information = bandwidth_rad_s * np.sqrt(2 * samples * np.asarray(snr, dtype=np.float64))
    sigma: Reals = 1 / np.maximum(information, 1 / WORST_SIGMA_S)
    return sigma


def pair_delay(
    signal: Signal, reference: Signal, *, largest_delay: float, largest_offset: float, noise: float = 0.0
) -> PairDelay:
    """The peak of the cross-ambiguity function of two recordings: how much later, and how much higher in frequency.

    A coarse search over whole samples and Fourier bins, then Newton's method on the logarithm of the normalised
    correlation, whose peak is exact without noise whatever the signal's envelope.

    Args:
        signal: Samples, shape (samples,).
        reference: What it is compared with, shape (samples,).
        largest_delay: Bound of the delay, in samples.
        largest_offset: Bound of the offset, in cycles per sample.
        noise: Noise power of the reference, in its units: what does not stand out is left out of the comparison. In
            wide noise a narrow transmission's delay would be lost otherwise, as it is the noise that has the bandwidth.
    """
    moving, still = np.asarray(signal, np.complex128), np.asarray(reference, np.complex128)
    raw = _Correlation(moving, still)
    delay, offset = raw.coarse(int(np.ceil(largest_delay)), largest_offset)
    band = _band(still, noise)
    # At one carrier first, so that the same filter leaves copies of each other.
    fine = _Correlation(_filtered(moving * np.exp(raw.turn * offset), band), _filtered(still, band))
    delay, more = _climb(fine, delay, largest_delay)
    coherence, _, hessian = fine.expand(delay, more)
    curvature = hessian[0, 0] - hessian[0, 1] ** 2 / min(hessian[1, 1], -np.finfo(float).tiny)
    bandwidth = float(np.sqrt(max(-curvature / 2, 0.0)))
    return PairDelay(delay=delay, offset=offset + more, coherence=coherence, bandwidth=bandwidth)


def _climb(correlation: _Correlation, delay: float, largest_delay: float) -> tuple[float, float]:
    offset, resolution = 0.0, 1 / correlation.samples
    for _ in range(STEPS):
        _, gradient, hessian = correlation.expand(delay, offset)
        if not (hessian[0, 0] < 0 and np.linalg.det(hessian) > 0):
            break  # no peak here: noise alone
        step = -np.linalg.solve(hessian, gradient)
        delay = float(np.clip(delay + np.clip(step[0], -1, 1), -largest_delay, largest_delay))
        offset += float(np.clip(step[1], -resolution, resolution))
    return delay, offset


def _band(reference: Signal, noise: float) -> Reals:
    # Wiener's filter of the reference, 0 where its spectrum does not clearly stand out of the noise.
    power = np.abs(np.fft.fft(reference)) ** 2 / reference.size
    around = np.concatenate([power[-(SMOOTHING // 2) :], power, power[: SMOOTHING // 2]])
    smooth = np.convolve(around, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
    band: Reals = np.maximum(smooth - 2 * noise, 0) / np.maximum(smooth, np.finfo(float).tiny)
    return band if band.any() else np.ones_like(band)


def _filtered(signal: Signal, band: Reals) -> Signal:
    return np.fft.ifft(np.fft.fft(signal) * band)


class _Correlation:
    """Normalised correlation of a signal, moved in time and frequency, with a reference that stays."""

    def __init__(self, signal: Signal, reference: Signal) -> None:
        self.samples = signal.size
        inner = _window(signal.size, 2 * EDGE, EDGE)
        # Faded before it is moved: moving is cyclic, and a jump at the ends would ring into everything.
        self._spectrum = np.fft.fft(signal * _window(signal.size, 0, EDGE))
        self._energy = np.fft.fft(np.abs(signal) ** 2 * _window(signal.size, 0, EDGE)) * np.conj(np.fft.fft(inner))
        self._weighted = np.conj(reference) * inner
        self._signal = signal
        self._reference_energy = float(np.sum(inner * np.abs(reference) ** 2))
        self._omega = 2j * np.pi * np.fft.fftfreq(signal.size)
        # Counted from the middle, where delay and offset hardly depend on each other.
        self.turn = -2j * np.pi * (np.arange(signal.size) - (signal.size - 1) / 2)

    def coarse(self, largest_delay: int, largest_offset: float) -> tuple[float, float]:
        """Whole samples and a Fourier bin (of twice the length) near the peak."""
        length = 2 * self.samples
        frequencies = np.fft.fftfreq(length)
        allowed = np.abs(frequencies) <= largest_offset
        best = (-1.0, 0.0, 0.0)
        for delay in range(-largest_delay, largest_delay + 1):
            values = np.abs(np.fft.fft(np.roll(self._signal, -delay) * self._weighted, length)) * allowed
            peak = int(np.argmax(values))
            best = max(best, (float(values[peak]), float(delay), float(frequencies[peak])))
        return best[1], best[2]

    def expand(self, delay: float, offset: float) -> tuple[float, Reals, Reals]:
        """Squared normalised correlation, and gradient and Hessian of its logarithm, by delay and offset."""
        moved = self._spectrum * np.exp(self._omega * delay)
        turned = self._weighted * np.exp(self.turn * offset)
        late, later = np.fft.ifft(moved * self._omega), np.fft.ifft(moved * self._omega**2)
        signal = np.fft.ifft(moved)
        c, c_t, c_tt = (np.sum(turned * each) for each in (signal, late, later))
        c_f, c_ff, c_tf = (
            np.sum(turned * each) for each in (self.turn * signal, self.turn**2 * signal, self.turn * late)
        )
        r_t, r_f = c_t / c, c_f / c
        energies = self._energy * np.exp(self._omega * delay)
        e, e_t, e_tt = (float(np.sum(energies * self._omega**k).real) / self.samples for k in range(3))
        gradient = np.array([2 * r_t.real - e_t / e, 2 * r_f.real])
        cross = 2 * (c_tf / c - r_t * r_f).real
        hessian = np.array(
            [
                [2 * (c_tt / c - r_t**2).real - (e_tt / e - (e_t / e) ** 2), cross],
                [cross, 2 * (c_ff / c - r_f**2).real],
            ]
        )
        return float(np.abs(c) ** 2 / (e * self._reference_energy)), gradient, hessian


def _window(samples: int, margin: int, fade: int) -> Reals:
    """1 inside, 0 within a margin of both ends, and half a cosine between."""
    position = np.minimum(np.arange(samples), np.arange(samples)[::-1]) + 0.5
    inside = np.clip((position - margin) / fade, 0, 1)
    window: Reals = 0.5 - 0.5 * np.cos(np.pi * inside)
    return window
