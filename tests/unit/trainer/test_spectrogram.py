"""Spectrograms against an implementation of their formulas in numpy, and against librosa."""

from __future__ import annotations

import librosa
import numpy as np
import pytest
import scipy.signal
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.data.spectrogram import (
    BANDS,
    DEFAULT_PARAMETERS,
    FRAMES,
    SAMPLES_TOGETHER,
    SHAPE,
    SpectrogramParameters,
    hz_from_mel,
    mel_filters,
    mel_from_hz,
    mel_spectrogram,
)

WINDOW, TRANSFORM, LONGEST_HOP = 512, 1024, 256
FLOOR_DBM, REFERENCE_DBM, SCALE_DB = -170.0, -120.0, 20.0


def noise(samples: int, dbm: float = -100.0, seed: int = 1) -> np.ndarray:
    rng = np.random.default_rng(seed)
    unit = (rng.standard_normal(samples) + 1j * rng.standard_normal(samples)) / np.sqrt(2)
    return unit * 10 ** (dbm / 20)


def tone(samples: int, cycles: float, dbm: float) -> np.ndarray:
    """A complex oscillation of so many cycles per sample."""
    return 10 ** (dbm / 20) * np.exp(2j * np.pi * cycles * np.arange(samples))


def band_dbm(spectrogram: torch.Tensor) -> np.ndarray:
    return spectrogram.numpy() * SCALE_DB + REFERENCE_DBM


def independent(iq: np.ndarray) -> np.ndarray:
    """The same from the formulas: windowed periodograms, triangles on the mel scale, means over frames, decibels."""
    hop = min((len(iq) - WINDOW) // (FRAMES - 1), LONGEST_HOP)
    starts = range(0, len(iq) - WINDOW + 1, hop)
    triangles = independent_filters()
    channels = []
    for channel in (iq.real, iq.imag, np.abs(iq)):
        windows = []
        for start in starts:
            _, density = scipy.signal.periodogram(
                channel[start : start + WINDOW], fs=1.0, window="hann", nfft=TRANSFORM, detrend=False
            )
            windows.append(triangles @ (density / TRANSFORM))
        powers, frames = np.array(windows), []
        for frame in range(FRAMES):
            first, last = frame * len(powers) // FRAMES, -(-(frame + 1) * len(powers) // FRAMES)
            frames.append(powers[first:last].mean(axis=0))
        dbm = 10 * np.log10(np.maximum(np.array(frames).T, 10 ** (FLOOR_DBM / 10)))
        channels.append((dbm - REFERENCE_DBM) / SCALE_DB)
    return np.array(channels)


def independent_filters() -> np.ndarray:
    top = 2595 * np.log10(1 + 8000 / 700)
    edges = [700 * (10 ** (top * index / (BANDS + 1) / 2595) - 1) for index in range(BANDS + 2)]
    bins = np.arange(TRANSFORM // 2 + 1) * 8000 / (TRANSFORM // 2)
    return np.array([np.interp(bins, edges[band : band + 3], [0.0, 1.0, 0.0]) for band in range(BANDS)])


@pytest.mark.parametrize("samples", [543, 600, 1024, 4096, 8448, 8449, 20_000])
def test_it_is_what_the_formulas_give(samples: int) -> None:
    iq = noise(samples) + tone(samples, 0.05, -95.0)
    found = mel_spectrogram(torch.from_numpy(iq)).numpy()
    assert found == pytest.approx(independent(iq), abs=2e-5)


def of_librosa(iq: np.ndarray) -> np.ndarray:
    """The same from a library's transform, filters and decibels; only framing and its averages are ours."""
    hop = min((len(iq) - WINDOW) // (FRAMES - 1), LONGEST_HOP)
    filters = librosa.filters.mel(
        sr=16_000, n_fft=TRANSFORM, n_mels=BANDS, fmax=8000, htk=True, norm=None, dtype=np.float64
    )
    energy = TRANSFORM * np.sum(scipy.signal.get_window("hann", WINDOW) ** 2)
    one_sided = np.full(TRANSFORM // 2 + 1, 2.0)
    one_sided[[0, -1]] = 1.0
    # It centres a window in the transform's length: half of the difference is put before and after.
    margin = (TRANSFORM - WINDOW) // 2
    channels = []
    for channel in (iq.real, iq.imag, np.abs(iq)):
        spectra = librosa.stft(
            np.pad(channel, margin), n_fft=TRANSFORM, hop_length=hop, win_length=WINDOW, window="hann", center=False
        )
        bands = filters @ (np.abs(spectra) ** 2 * one_sided[:, None] / energy)
        count = bands.shape[1]
        frames = [
            bands[:, frame * count // FRAMES : -(-(frame + 1) * count // FRAMES)].mean(axis=1)
            for frame in range(FRAMES)
        ]
        decibels = librosa.power_to_db(np.stack(frames, axis=1), amin=10 ** (FLOOR_DBM / 10), top_db=None)
        channels.append((decibels - REFERENCE_DBM) / SCALE_DB)
    return np.array(channels)


@pytest.mark.parametrize("samples", [543, 1024, 4096, 20_000])
def test_it_is_what_librosa_gives(samples: int) -> None:
    iq = noise(samples) + tone(samples, 0.05, -95.0)
    found = mel_spectrogram(torch.from_numpy(iq)).numpy()
    # What is left is the rounding of filters and output to single precision.
    assert found == pytest.approx(of_librosa(iq), rel=1e-5, abs=2e-6)


SUMS_OF_VERSION = {1: [-0.8894541, 0.0003665, -0.0002012, -0.0010933]}
"""Of the features of a known recording, by SpectrogramParameters.version: weighted sums in which each value counts."""


def test_who_changes_the_computation_is_told_to_raise_the_version() -> None:
    """Caches hold features by version: those of another computation would be taken for the same."""
    times = np.arange(6000)
    iq = tone(6000, 0.07, -90.0) + 10 ** (-100 / 20) * np.exp(1e-4j * times**2 * (1 + 1e-5 * times)) + noise(6000, -115)
    parameters = SpectrogramParameters(
        window=WINDOW,
        transform=TRANSFORM,
        longest_hop=LONGEST_HOP,
        floor_dbm=FLOOR_DBM,
        reference_dbm=REFERENCE_DBM,
        scale_db=SCALE_DB,
    )
    features = mel_spectrogram(torch.from_numpy(iq), parameters).numpy().astype(np.float64)
    index = np.arange(features.size)
    sums = [float(np.mean(features.ravel() * np.cos(index * step))) for step in (0.0, 0.7, 1.9, 3.1)]

    assert sums == pytest.approx(SUMS_OF_VERSION[parameters.version], abs=1e-6), (
        "the computation of features has changed: raise SpectrogramParameters.version, and note the new sums here"
    )


def test_single_precision_is_near_enough() -> None:
    iq = noise(4096) + tone(4096, 0.05, -95.0)
    found = mel_spectrogram(torch.from_numpy(iq.astype(np.complex64))).numpy()
    assert found == pytest.approx(independent(iq), abs=1e-3)


@pytest.mark.parametrize("samples", [543, 1000, 4096, 30_000])
def test_the_shape_is_the_same_however_long_the_recording_is(samples: int) -> None:
    found = mel_spectrogram(torch.from_numpy(noise(samples)))
    assert tuple(found.shape) == SHAPE == (3, 128, 32)
    assert found.dtype == torch.float32


def test_a_batch_is_each_recording_by_itself() -> None:
    batch = torch.from_numpy(np.stack([noise(1024, seed=seed) for seed in range(6)])).reshape(2, 3, 1024)
    found = mel_spectrogram(batch)
    assert tuple(found.shape) == (2, 3, *SHAPE)
    assert torch.allclose(found[1, 2], mel_spectrogram(batch[1, 2]), atol=1e-6)


def test_one_sample_less_than_enough_is_refused() -> None:
    assert DEFAULT_PARAMETERS.minimum_samples == 543
    with pytest.raises(ValueError, match="542 samples are too few: 543"):
        mel_spectrogram(torch.from_numpy(noise(542)))


@settings(deadline=None, max_examples=25)
@given(decibels=st.floats(-20, 60), seed=st.integers(0, 100))
def test_more_decibels_move_every_value_by_the_same_amount(decibels: float, seed: int) -> None:
    # So loud that no band of any window comes near the floor.
    iq = noise(600, dbm=-50.0, seed=seed)
    before, after = (mel_spectrogram(torch.from_numpy(iq * 10 ** (gain / 20))) for gain in (0.0, decibels))
    assert (after - before).numpy() == pytest.approx(np.full(SHAPE, decibels / SCALE_DB), abs=1e-4)


def test_the_bands_of_a_real_oscillation_sum_to_its_power() -> None:
    # In phase and in quadrature each hold half of the power of a complex oscillation, in every frame.
    dbm = band_dbm(mel_spectrogram(torch.from_numpy(tone(4096, 0.1, -90.0))))
    total = 10 * np.log10((10 ** (dbm[:2] / 10)).sum(axis=1))
    assert total == pytest.approx(np.full((2, FRAMES), -90.0 - 10 * np.log10(2)), abs=0.05)


def test_an_oscillation_is_in_the_band_of_its_frequency() -> None:
    cycles = 0.1
    dbm = band_dbm(mel_spectrogram(torch.from_numpy(tone(4096, cycles, -90.0))))
    mel = 2595 * np.log10(1 + cycles * 16_000 / 700)
    step = 2595 * np.log10(1 + 8000 / 700) / (BANDS + 1)
    assert np.abs(dbm[0].mean(axis=1).argmax() - (mel / step - 1)) <= 1


def test_the_magnitude_of_an_oscillation_is_constant_and_so_in_the_lowest_bands() -> None:
    dbm = band_dbm(mel_spectrogram(torch.from_numpy(tone(4096, 0.1, -90.0))))
    assert dbm[2, :4].max() > -100
    assert dbm[2, 16:].max() < -140


def test_silence_is_the_floor() -> None:
    dbm = band_dbm(mel_spectrogram(torch.zeros(1024, dtype=torch.complex64)))
    assert dbm == pytest.approx(np.full(SHAPE, FLOOR_DBM))


def test_what_comes_late_is_in_the_late_frames() -> None:
    iq = noise(4096, dbm=-160.0)
    iq[3072:] += noise(1024, dbm=-80.0, seed=2)
    dbm = band_dbm(mel_spectrogram(torch.from_numpy(iq)))[0].mean(axis=0)
    assert dbm[:20].max() < -140
    assert dbm[28:].min() > -120


def test_filters_share_each_bin_between_neighbours_and_leave_no_band_empty() -> None:
    weights = mel_filters(TRANSFORM).numpy()
    assert pytest.approx(independent_filters(), abs=1e-6) == weights.T
    assert (weights.sum(axis=0) > 0).all()
    bins = np.linspace(0.0, 8000.0, TRANSFORM // 2 + 1)
    step = 2595 * np.log10(1 + 8000 / 700) / (BANDS + 1)
    # From the lowest band's centre to the highest one's; beyond, a triangle has no neighbour.
    lowest, highest = (700 * (10 ** (index * step / 2595) - 1) for index in (1, BANDS))
    shared = weights.sum(axis=1)[(bins >= lowest) & (bins <= highest)]
    assert shared == pytest.approx(np.ones(shared.size), abs=1e-5)


def test_mel_and_back_is_the_same_frequency() -> None:
    hertz = torch.tensor([0.0, 440.0, 1000.0, 8000.0], dtype=torch.float64)
    assert torch.allclose(hz_from_mel(mel_from_hz(hertz)), hertz)
    assert mel_from_hz(hertz)[2].item() == pytest.approx(999.99, abs=0.01)


def test_other_parameters_move_reference_and_scale() -> None:
    iq = torch.from_numpy(noise(1024))
    usual, other = mel_spectrogram(iq), mel_spectrogram(iq, SpectrogramParameters(reference_dbm=-100.0, scale_db=10.0))
    assert torch.allclose(other * 10.0 - 100.0, usual * 20.0 - 120.0, atol=1e-3)


def test_a_batch_of_any_shape_is_its_recordings_one_by_one() -> None:
    """More of them than are made at once."""
    samples = SAMPLES_TOGETHER // 2
    iq = torch.stack([torch.from_numpy(noise(samples, seed=seed)) for seed in range(6)])

    batch = mel_spectrogram(iq.reshape(2, 3, samples))

    assert batch.shape == (2, 3, *SHAPE)
    torch.testing.assert_close(batch.reshape(6, *SHAPE), torch.stack([mel_spectrogram(each) for each in iq]))
