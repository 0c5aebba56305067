"""How much of a delay is left in the spectrograms that the localizer is given.

The estimator here knows more than any network can: the transmission itself, and the expected spectrogram around the
true delay, carrier phase, carrier offset and power. It is off by at least as little as a network could be.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from heimdall_trainer.data import physics
from heimdall_trainer.data.arrivals import arrival_sigma_s
from heimdall_trainer.data.generator import MARGIN, Scene, transmit
from heimdall_trainer.data.spectrogram import mel_spectrogram

SAMPLES: Final = 4096
NOISE_FIGURE_DB: Final = 6.0
DISTANCE_M: Final = 1500.0
POWER_DBM: Final = 27.0
STEPS: Final = np.array([0.5, 0.05, 5.0, 0.1])
"""Differences for derivatives by delay (samples), phase (radians), offset (hertz), power (decibels)."""
DRAWS: Final = 48

Reals = NDArray[np.float64]


def delay_errors_m(modulation: str, seed: int = 1, scene: Scene | None = None) -> tuple[float, float]:
    """How far off the delay of one receiver is, told from its spectrograms, and at best from its samples.

    Linear least squares around the truth, of all 3 · 128 · 32 values weighted by their variance; carrier phase, offset
    and power are unknown beside the delay.

    Args:
        modulation: One of physics.MODULATIONS.
        seed: Of transmission and noise.
        scene: The world; the loss is that of DISTANCE_M.

    Returns:
        Root mean square error from spectrograms, and the bound from samples, both in metres.
    """
    scene = scene or Scene()
    rng = np.random.default_rng(seed)
    sent = physics.scale_to_dbm(transmit(scene, modulation, SAMPLES + 2 * MARGIN, rng), POWER_DBM)
    heard = _receiver(scene, sent)
    noise_dbm = physics.thermal_noise_dbm(scene.sample_rate_hz, NOISE_FIGURE_DB)
    known, fresh = (np.stack([physics.white_noise(SAMPLES, noise_dbm, rng) for _ in range(DRAWS)]) for _ in range(2))
    values = _features(heard(np.zeros(4)) + known)
    slopes = np.stack(
        [
            (_features(heard(step) + known) - _features(heard(-step) + known)).mean(axis=0) / (2 * step.sum())
            for step in np.diag(STEPS)
        ],
        axis=1,
    )
    weighted = slopes / values.var(axis=0)[:, None]
    estimator = np.linalg.solve(weighted.T @ slopes, weighted.T)
    estimates = (_features(heard(np.zeros(4)) + fresh) - values.mean(axis=0)) @ estimator.T
    moved = (_features(heard(np.diag(STEPS)[0]) + fresh) - values.mean(axis=0)) @ estimator.T
    # Derivatives are noisy themselves, which shortens estimates: by how much shows when the delay is moved.
    gain = float(np.mean(moved[:, 0] - estimates[:, 0]) / STEPS[0])
    metres = physics.SPEED_OF_LIGHT_M_S / scene.sample_rate_hz
    snr = 10 ** ((physics.power_dbm(heard(np.zeros(4))) - noise_dbm) / 10)
    bound_s = arrival_sigma_s(_bandwidth_rad_s(sent, scene.sample_rate_hz), np.array([snr]), SAMPLES)[0]
    return float(np.std(estimates[:, 0])) / abs(gain) * metres, float(bound_s) * physics.SPEED_OF_LIGHT_M_S


def _receiver(scene: Scene, sent: physics.Signal) -> Callable[[Reals], physics.Signal]:
    loss_db = physics.log_distance_loss_db(DISTANCE_M, scene.frequency_hz, scene.exponent)

    def heard(offsets: Reals) -> physics.Signal:
        delay, phase, hertz, decibels = offsets
        signal = sent * 10 ** ((decibels - loss_db) / 20) * np.exp(1j * phase)
        signal = physics.apply_delay(signal, delay / scene.sample_rate_hz, scene.sample_rate_hz)
        return physics.apply_carrier_offset(signal, hertz, scene.sample_rate_hz)[MARGIN:-MARGIN]

    return heard


def _features(signals: physics.Signal) -> Reals:
    features: Reals = mel_spectrogram(torch.from_numpy(signals)).double().numpy().reshape(len(signals), -1)
    return features


def _bandwidth_rad_s(signal: physics.Signal, sample_rate_hz: float) -> float:
    power = np.abs(np.fft.fft(signal)) ** 2
    omega = 2 * np.pi * np.fft.fftfreq(signal.size, 1 / sample_rate_hz)
    mean = np.average(omega, weights=power)
    return float(np.sqrt(np.average((omega - mean) ** 2, weights=power)))
