"""Mel spectrograms of IQ: 3 channels (I, Q, magnitude), 128 bands, 32 frames, in decibels against a fixed reference.

The reference is fixed because the power at one receiver relative to another is much of what tells where a transmitter
is: normalising each receiver by itself would throw it away.
"""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

CHANNELS: Final = 3
BANDS: Final = 128
FRAMES: Final = 32
WINDOW: Final = 512
"""Samples of a window."""
FLOOR_DBM: Final = -140.0
"""Power below this is taken for it: under the thermal noise of a single band."""
CENTER_DBM: Final = -100.0
SPREAD_DB: Final = 30.0
"""Decibels that become 1 in the normalised feature."""
MIN_SAMPLES: Final = FRAMES
VERSION: Final = "1"
"""Part of the cache key: change it when features change."""


def mel_spectrogram(signal: torch.Tensor, sample_rate_hz: float) -> torch.Tensor:
    """Features of IQ recordings.

    Args:
        signal: Complex samples, shape (..., samples); mean squared magnitude is power in milliwatts.
        sample_rate_hz: Sampling rate in hertz.

    Returns:
        Float32, shape (..., 3, 128, 32): (dBm + 100) / 30 of I, Q and magnitude.

    Raises:
        ValueError: There are fewer than 32 samples.
    """
    samples = signal.shape[-1]
    if samples < MIN_SAMPLES:
        raise ValueError(f"{samples} samples are too few for {FRAMES} frames")
    channels = torch.stack([signal.real, signal.imag, signal.abs()], dim=-2).to(torch.float32)
    frames = _frames(channels)
    window = torch.hann_window(WINDOW, device=signal.device)
    # Parseval: the sum over all bins is the window's mean power.
    power = torch.fft.rfft(frames * window).abs().square() * (2 / (window.square().sum() * WINDOW))
    mel = power @ mel_filters(sample_rate_hz).to(signal.device).T
    decibels = 10 * torch.log10(mel.clamp_min(10 ** (FLOOR_DBM / 10)))
    return ((decibels - CENTER_DBM) / SPREAD_DB).transpose(-1, -2).contiguous()


def _frames(channels: torch.Tensor) -> torch.Tensor:
    """Cut into 32 windows, spread evenly from the first sample to the last; shape (..., 3, 32, 512)."""
    samples = channels.shape[-1]
    if samples < WINDOW:
        channels = torch.nn.functional.pad(channels, (0, WINDOW - samples))
        samples = WINDOW
    starts = torch.linspace(0, samples - WINDOW, FRAMES, device=channels.device).round().long()
    index = starts[:, None] + torch.arange(WINDOW, device=channels.device)
    return channels[..., index]


@cache
def mel_filters(sample_rate_hz: float) -> torch.Tensor:
    """Triangular filters, evenly spaced in mel (O'Shaughnessy 1987: 2595·log10(1 + f/700)).

    A filter that would be narrower than a bin is a bin wide, so that none is empty.

    Args:
        sample_rate_hz: Sampling rate in hertz.

    Returns:
        Weights, shape (128, 257).
    """
    nyquist = sample_rate_hz / 2
    top = 2595 * torch.log10(torch.tensor(1 + nyquist / 700, dtype=torch.float64))
    edges = 700 * (10 ** (torch.linspace(0, float(top), BANDS + 2, dtype=torch.float64) / 2595) - 1)
    width = nyquist / (WINDOW // 2)
    centers = edges[1:-1, None]
    lower = torch.minimum(edges[:-2, None], centers - width)
    upper = torch.maximum(edges[2:, None], centers + width)
    bins = torch.linspace(0, nyquist, WINDOW // 2 + 1, dtype=torch.float64)
    rising, falling = (bins - lower) / (centers - lower), (upper - bins) / (upper - centers)
    return torch.minimum(rising, falling).clamp_min(0).to(torch.float32)
