"""Spectrograms by other libraries, as the trainer defines them, to be compared in time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Final
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray

from heimdall_trainer.data.spectrogram import BANDS, DEFAULT_PARAMETERS, FRAMES, NOMINAL_NYQUIST_HZ

MARGIN: Final = (DEFAULT_PARAMETERS.transform - DEFAULT_PARAMETERS.window) // 2
"""Both libraries centre a window in the transform's length: so much is put before and after."""

Signals = NDArray[np.complex64]
Reals = NDArray[np.float32]


def hop_of(samples: int) -> int:
    """Samples between windows, for recordings that have as many windows as frames."""
    rest = samples - DEFAULT_PARAMETERS.window
    hop = rest // (FRAMES - 1)
    assert hop <= DEFAULT_PARAMETERS.longest_hop, "windows of other lengths are averaged"
    assert rest // hop == FRAMES - 1, "windows of other lengths are averaged"
    return hop


def by_librosa(iq: Signals) -> Reals:
    """The same by librosa, whose functions take a batch.

    Args:
        iq: Shape (..., samples).

    Returns:
        Shape (..., 3, 128, 32).
    """
    import librosa

    pad = [(0, 0)] * iq.ndim + [(MARGIN, MARGIN)]
    power = librosa.feature.melspectrogram(
        y=np.pad(np.stack([iq.real, iq.imag, np.abs(iq)], axis=-2), pad),
        sr=2 * NOMINAL_NYQUIST_HZ,
        n_fft=DEFAULT_PARAMETERS.transform,
        win_length=DEFAULT_PARAMETERS.window,
        hop_length=hop_of(iq.shape[-1]),
        center=False,
        n_mels=BANDS,
        htk=True,
        norm=None,
    )
    dbm = librosa.power_to_db(_scale() * power, amin=10 ** (DEFAULT_PARAMETERS.floor_dbm / 10), top_db=None)
    scaled: Reals = (dbm - DEFAULT_PARAMETERS.reference_dbm) / DEFAULT_PARAMETERS.scale_db
    return scaled


def torchaudio_mel() -> Callable[[torch.Tensor], torch.Tensor]:
    """The same by torchaudio, in torch."""
    # It compares the CUDA that it and torch were built with, and torch goes on alone: of what is used here nothing is
    # built, and so nothing is of CUDA.
    with patch.object(torch.version, "cuda", None):
        from torchaudio.transforms import MelSpectrogram

    @cache
    def made(samples: int, device: torch.device) -> torch.nn.Module:
        return MelSpectrogram(
            sample_rate=int(2 * NOMINAL_NYQUIST_HZ),
            n_fft=DEFAULT_PARAMETERS.transform,
            win_length=DEFAULT_PARAMETERS.window,
            hop_length=hop_of(samples),
            center=False,
            n_mels=BANDS,
            mel_scale="htk",
            norm=None,
        ).to(device)

    def by_torchaudio(iq: torch.Tensor) -> torch.Tensor:
        signals = torch.stack([iq.real, iq.imag, iq.abs()], dim=-2)
        mel = made(iq.shape[-1], iq.device)
        power = _scale() * mel(torch.nn.functional.pad(signals, (MARGIN, MARGIN)))
        dbm = 10 * torch.log10(power.clamp(min=10 ** (DEFAULT_PARAMETERS.floor_dbm / 10)))
        scaled: torch.Tensor = (dbm - DEFAULT_PARAMETERS.reference_dbm) / DEFAULT_PARAMETERS.scale_db
        return scaled

    return by_torchaudio


def _scale() -> float:
    # One-sided power per window; the first and the last bin, which are there once, lie in no band.
    window = np.hanning(DEFAULT_PARAMETERS.window + 1)[:-1]
    return float(2 / (DEFAULT_PARAMETERS.transform * np.square(window).sum()))
