"""Augmentation keeps what tells the position."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from heimdall_trainer.data.augment import Augmentation, augment
from heimdall_trainer.data.spectrogram import DEFAULT_PARAMETERS

NOTHING = Augmentation(dropout=0.0, shift_frames=0, scale_db=0.0, turn=False)


def sample(receivers: int, seed: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    spectrograms = rng.standard_normal((receivers, 3, 128, 32)).astype(np.float32)
    places = rng.uniform(-2000, 2000, (receivers, 2)).astype(np.float32)
    return spectrograms, places, rng.uniform(-1000, 1000, 2).astype(np.float32)


def distances(receivers: np.ndarray, position: np.ndarray) -> np.ndarray:
    return np.linalg.norm(receivers - position, axis=1)


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_turning_and_mirroring_keep_all_distances(seed: int) -> None:
    spectrograms, receivers, position = sample(5)
    only_turn = Augmentation(dropout=0.0, shift_frames=0, scale_db=0.0)
    seen, turned, moved = augment(spectrograms, receivers, position, only_turn, np.random.default_rng(seed))
    assert np.array_equal(seen, spectrograms)
    assert distances(turned, moved) == pytest.approx(distances(receivers, position), rel=1e-5)
    assert np.linalg.norm(turned, axis=1) == pytest.approx(np.linalg.norm(receivers, axis=1), rel=1e-5)
    between = np.linalg.norm(receivers[:, None] - receivers, axis=-1)
    assert np.linalg.norm(turned[:, None] - turned, axis=-1) == pytest.approx(between, rel=1e-4, abs=1e-2)


def test_turning_goes_in_all_directions_and_mirrors_every_other_time() -> None:
    spectrograms, receivers, position = np.zeros((2, 3, 128, 32), "f4"), np.eye(2, dtype="f4"), np.ones(2, "f4")
    angles, mirrored = [], []
    for seed in range(400):
        _, turned, _ = augment(spectrograms, receivers, position, Augmentation(dropout=0), np.random.default_rng(seed))
        angles.append(np.arctan2(turned[0, 1], turned[0, 0]))
        mirrored.append(np.linalg.det(turned) < 0)
    assert np.abs(np.mean(np.exp(1j * np.array(angles)))) < 0.15
    assert np.mean(mirrored) == pytest.approx(0.5, abs=0.1)


def test_turning_leaves_alone_what_else_is_known_of_receivers() -> None:
    spectrograms, places, position = sample(5)
    known = np.arange(10, dtype=np.float32).reshape(5, 2)
    only_turn = Augmentation(dropout=0.0, shift_frames=0, scale_db=0.0)
    turned, turned_and_more = (
        augment(spectrograms, each, position, only_turn, np.random.default_rng(3))[1]
        for each in (places, np.concatenate([places, known], axis=1))
    )
    assert np.array_equal(turned_and_more, np.concatenate([turned, known], axis=1))


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), receivers=st.integers(1, 6))
def test_power_between_receivers_stays_what_it_was(seed: int, receivers: int) -> None:
    spectrograms, places, position = sample(receivers)
    only_power = Augmentation(dropout=0.0, shift_frames=4, scale_db=3.0, turn=False)
    seen, _, _ = augment(spectrograms, places, position, only_power, np.random.default_rng(seed))
    means = spectrograms.mean(axis=(1, 2, 3)), seen.mean(axis=(1, 2, 3))
    assert means[1] - means[1][0] == pytest.approx(means[0] - means[0][0], abs=1e-4)
    assert np.abs(means[1] - means[0]).max() <= 3.0 / DEFAULT_PARAMETERS.scale_db + 1e-4


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000))
def test_all_receivers_are_moved_in_time_together_and_lose_nothing(seed: int) -> None:
    spectrograms, places, position = sample(3)
    only_shift = Augmentation(dropout=0.0, shift_frames=4, scale_db=0.0, turn=False)
    seen, _, _ = augment(spectrograms, places, position, only_shift, np.random.default_rng(seed))
    shifts = [shift for shift in range(-4, 5) if np.array_equal(seen, np.roll(spectrograms, shift, axis=-1))]
    assert len(shifts) == 1


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), receivers=st.integers(1, 8), dropout=st.floats(0, 1))
def test_dropout_leaves_enough_receivers_and_each_with_its_own_place(seed: int, receivers: int, dropout: float) -> None:
    spectrograms, places, position = sample(receivers)
    only_dropout = Augmentation(dropout=dropout, shift_frames=0, scale_db=0.0, turn=False)
    seen, kept, _ = augment(spectrograms, places, position, only_dropout, np.random.default_rng(seed))
    assert min(3, receivers) <= len(kept) <= receivers
    indices = [int(np.flatnonzero((places == place).all(axis=1))[0]) for place in kept]
    assert indices == sorted(set(indices))
    assert np.array_equal(seen, spectrograms[indices])


def test_dropout_leaves_receivers_out_as_often_as_it_says() -> None:
    spectrograms, places, position = sample(10)
    settings_ = Augmentation(dropout=0.2, turn=False)
    kept = [
        len(augment(spectrograms, places, position, settings_, np.random.default_rng(seed))[1]) for seed in range(300)
    ]
    assert np.mean(kept) == pytest.approx(8.0, abs=0.25)


def test_nothing_asked_for_changes_nothing() -> None:
    before = sample(4)
    after = augment(*before, NOTHING, np.random.default_rng(1))
    assert all(np.array_equal(one, other) for one, other in zip(before, after, strict=True))


def test_what_was_given_is_left_alone_and_types_stay() -> None:
    before, given_ = sample(5), sample(5)
    after = augment(*given_, Augmentation(dropout=0.5), np.random.default_rng(1))
    assert all(np.array_equal(one, other) for one, other in zip(before, given_, strict=True))
    assert [item.dtype for item in after] == [np.float32] * 3
