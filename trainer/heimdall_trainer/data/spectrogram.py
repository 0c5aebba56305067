"""Complex IQ to mel-spectrograms of fixed shape whose absolute power is kept.

Relative power between receivers is much of what tells a position, so nothing here is normalised per recording: a value
is a band's power in dBm, moved and scaled by constants.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

CHANNELS: Final = 3
"""In phase, quadrature, magnitude."""
BANDS: Final = 128
FRAMES: Final = 32
SHAPE: Final = (CHANNELS, BANDS, FRAMES)
SAMPLES_TOGETHER: Final = 2**14
"""Samples of which a processor makes spectrograms at once: what is made on the way fits into its caches. A whole batch
at once would take twice the time."""
NOMINAL_NYQUIST_HZ: Final = 8000.0
"""The mel scale is made for hearing: half the sampling rate is taken for 8 kHz, whatever it is."""


@dataclass(frozen=True, kw_only=True)
class SpectrogramParameters:
    """What a spectrogram depends on beside the samples; part of the cache's key."""

    window: int = 512
    """Samples of the Hann window."""
    transform: int = 1024
    """Length of the Fourier transform; zero-padded so that even the narrowest band holds a bin."""
    longest_hop: int = 256
    """Longer recordings have more windows, whose power is averaged."""
    floor_dbm: float = -170.0
    """Least power of a band, far below thermal noise."""
    reference_dbm: float = -120.0
    """Power that becomes 0."""
    scale_db: float = 20.0
    """Decibels that become 1."""
    version: int = 1
    """Raised when the computation changes."""

    @property
    def minimum_samples(self) -> int:
        """Shortest recording that has all frames."""
        return self.window + FRAMES - 1


DEFAULT_PARAMETERS: Final = SpectrogramParameters()


def mel_from_hz(frequency: Tensor) -> Tensor:
    """Mel of a frequency in hertz (O'Shaughnessy 1987: 2595·log10(1 + f/700))."""
    return 2595.0 * torch.log10(1.0 + frequency / 700.0)


def hz_from_mel(mel: Tensor) -> Tensor:
    """The inverse of mel_from_hz."""
    return 700.0 * (10.0 ** (mel / 2595.0) - 1.0)


@lru_cache(maxsize=8)
def mel_filters(transform: int) -> Tensor:
    """Triangular filters of peak 1 that share each bin's power between neighbouring bands (Davis and Mermelstein 1980).

    Args:
        transform: Length of the Fourier transform.

    Returns:
        Weights, shape (transform // 2 + 1, 128), float32.
    """
    bins = torch.linspace(0.0, NOMINAL_NYQUIST_HZ, transform // 2 + 1, dtype=torch.float64)
    top = mel_from_hz(torch.tensor(NOMINAL_NYQUIST_HZ, dtype=torch.float64)).item()
    edges = hz_from_mel(torch.linspace(0.0, top, BANDS + 2, dtype=torch.float64))
    rising = (bins[:, None] - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - bins[:, None]) / (edges[2:] - edges[1:-1])
    return torch.clamp(torch.minimum(rising, falling), min=0.0).float()


def mel_spectrogram(iq: Tensor, parameters: SpectrogramParameters = DEFAULT_PARAMETERS) -> Tensor:
    """Log-mel spectrograms of I, Q and magnitude.

    Args:
        iq: Complex samples, shape (..., samples); mean squared magnitude is power in milliwatts.
        parameters: How they are computed.

    Returns:
        Shape (..., 3, 128, 32), float32: (band's power in dBm - reference_dbm) / scale_db. Frames are evenly spread
        over the recording, however long it is.

    Raises:
        ValueError: There are less samples than `parameters.minimum_samples`.
    """
    if iq.shape[-1] < parameters.minimum_samples:
        raise ValueError(f"{iq.shape[-1]} samples are too few: {parameters.minimum_samples} are the least")
    if iq.device.type != "cpu":
        return _mel_spectrograms(iq, parameters)
    recordings = iq.reshape(-1, iq.shape[-1])
    together = max(1, SAMPLES_TOGETHER // iq.shape[-1])
    made = [_mel_spectrograms(piece, parameters) for piece in torch.split(recordings, together)]
    return torch.cat(made).reshape(*iq.shape[:-1], *SHAPE)


def _mel_spectrograms(iq: Tensor, parameters: SpectrogramParameters) -> Tensor:
    signals = torch.stack([iq.real, iq.imag, iq.abs()], dim=-2)
    power = _band_power(signals, parameters).movedim(-1, -2)
    if power.shape[-1] != FRAMES:  # more windows than frames: neighbouring ones are averaged
        frames = torch.nn.functional.adaptive_avg_pool1d(power.reshape(-1, 1, power.shape[-1]), FRAMES)
        power = frames.reshape(*power.shape[:-1], FRAMES)
    dbm = 10.0 * torch.log10(torch.clamp(power, min=10 ** (parameters.floor_dbm / 10)))
    return ((dbm - parameters.reference_dbm) / parameters.scale_db).float()


def _band_power(signals: Tensor, parameters: SpectrogramParameters) -> Tensor:
    # Milliwatts per band of each window, shape (..., windows, 128). No root is drawn that would be squared again.
    hop = min((signals.shape[-1] - parameters.window) // (FRAMES - 1), parameters.longest_hop)
    window, filters = _weights(parameters.window, parameters.transform, signals.dtype, signals.device)
    spectra = torch.fft.rfft(signals.unfold(-1, parameters.window, hop) * window, n=parameters.transform)
    banded: Tensor = torch.addcmul(spectra.real.square(), spectra.imag, spectra.imag) @ filters
    return banded


@lru_cache(maxsize=8)
def _weights(samples: int, transform: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A window, and filters that hold all that is linear: by Parseval, a window's bins sum to its mean power."""
    window = torch.hann_window(samples, dtype=dtype, device=device)
    shares = torch.full((transform // 2 + 1, 1), 2.0, dtype=dtype, device=device)  # negative frequencies
    shares[[0, -1]] = 1.0
    filters = mel_filters(transform).to(device, dtype) * shares
    return window, filters / (transform * window.square().sum())
