"""Samples for training: one transmission as heard by several receivers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from heimdall_trainer.data.arrival_source import ArrivalSource
from heimdall_trainer.data.augment import Augmentation, augment
from heimdall_trainer.data.cache import Caches
from heimdall_trainer.data.features import FeatureSource, keep_readable, leave_out
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import RecordingStore, UnreadableError
from heimdall_trainer.data.sessions import SessionStore, Transmission
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.errors import DataError
from heimdall_trainer.settings import DataSettings


class Sample(TypedDict):
    """One transmission, or a batch of them with a leading B."""

    spectrograms: Tensor
    """Shape (R, 3, 128, 32), float32, see mel_spectrogram."""
    receivers: Tensor
    """Metres east and north of the origin, shape (R, 2), float32; with arrivals (R, 4), see LocalizationNet."""
    position: Tensor
    """Where it truly came from: metres east and north of the origin, shape (2,), float32."""
    origin: Tensor
    """Latitude and longitude of the origin in degrees, shape (2,), float64."""
    mask: NotRequired[Tensor]
    """Of a batch: which receivers are there, and no padding; shape (B, R), bool."""
    counted: NotRequired[Tensor]
    """Of a batch for one of several processes: which samples are no repetition; shape (B,), bool."""


class HeimdallDataset(Dataset[Sample]):
    """Transmissions of recording sessions as features of each receiver."""

    def __init__(
        self,
        transmissions: Sequence[Transmission],
        source: FeatureSource,
        *,
        augmentation: Augmentation | None = None,
        arrivals: ArrivalSource | None = None,
        seed: int = 0,
    ) -> None:
        """Make a dataset of transmissions that can be read; `open` finds them in the database.

        Args:
            transmissions: What it holds.
            source: Gives the features of recordings.
            augmentation: How samples are varied; not at all if None.
            arrivals: Gives the times of arrival; samples are without them if None.
            seed: Seed of the variations, which depend on it, the epoch and the index.
        """
        self.transmissions = list(transmissions)
        self._source = source
        self._augmentation = augmentation
        self._arrivals = arrivals
        self._seed = seed
        self._epoch = 0

    @classmethod
    def open(
        cls,
        settings: DataSettings,
        session_ids: Iterable[str] = (),
        *,
        augmentation: Augmentation | None = None,
        arrivals: bool = False,
        seed: int = 0,
        withdrawn: bool = False,
    ) -> HeimdallDataset:
        """The dataset of approved recording sessions.

        Args:
            settings: Database, store and cache.
            session_ids: Sessions; all approved ones if empty.
            augmentation: How samples are varied; not at all if None.
            arrivals: Whether samples hold times of arrival.
            seed: Seed of the variations.
            withdrawn: Whether sessions are taken as they are named, approved or not.

        Raises:
            ConfigurationError: A session is missing or not approved.
            DataError: There is no approved session, or too many recordings can't be read.
            ConnectionError: Database or store do not answer.
        """
        with closing(SessionStore.open(settings)) as database:
            ids = list(session_ids) if withdrawn else database.approved(session_ids)
            transmissions = database.transmissions(ids)
        store, caches = RecordingStore.open(settings), Caches.open(settings)
        source, times = FeatureSource(store, caches), ArrivalSource(store, caches) if arrivals else None
        kept = readable(transmissions, source, times, settings)
        return cls(kept, source, augmentation=augmentation, arrivals=times, seed=seed)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that variations are drawn for."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self.transmissions)

    def __getitem__(self, index: int) -> Sample:
        transmission = self.transmissions[index]
        heard = transmission.recordings
        try:
            spectrograms = np.stack([self._source.get(recording) for recording in heard])
            arrivals = None if self._arrivals is None else self._arrivals.get(transmission)
        except UnreadableError as error:
            raise DataError(
                f"session {transmission.session_id}, transmission {transmission.id}: a recording that could be read "
                f"when training began can't be any more: {error}"
            ) from None
        places = [(recording.receiver.latitude, recording.receiver.longitude) for recording in heard]
        receivers = to_local(places, transmission.origin).astype(np.float32)
        if arrivals is not None:
            receivers = np.concatenate([receivers, arrivals], axis=1)
        truth = to_local((transmission.latitude, transmission.longitude), transmission.origin).astype(np.float32)
        if self._augmentation is not None:
            rng = np.random.default_rng([self._seed, self._epoch, index])
            spectrograms, receivers, truth = augment(spectrograms, receivers, truth, self._augmentation, rng)
        return {
            "spectrograms": torch.from_numpy(spectrograms),
            "receivers": torch.from_numpy(receivers),
            "position": torch.from_numpy(truth),
            "origin": torch.tensor(transmission.origin, dtype=torch.float64),
        }


def readable(
    transmissions: Sequence[Transmission],
    source: FeatureSource,
    arrivals: ArrivalSource | None,
    settings: DataSettings,
    beat: Callable[[], None] = lambda: None,
) -> list[Transmission]:
    """Compute what samples hold of transmissions, and leave out recordings that can't be read; see `keep_readable`.

    Args:
        transmissions: What is to be trained on.
        source: Computes and keeps features.
        arrivals: The same for times of arrival; None where samples are without them.
        settings: How many may be left out, and how many are read side by side.
        beat: Is called after each recording that was looked at.

    Returns:
        The transmissions with the recordings that can be read; those with none are left out.

    Raises:
        DataError: Too many recordings can't be read.
        ConnectionError: The store does not answer.
    """
    limit, threads = settings.skip_limit, settings.read_threads
    kept = keep_readable(transmissions, source, skip_limit=limit, threads=threads, beat=beat)
    if arrivals is None:
        return kept
    return leave_out(kept, arrivals.prepare(kept, threads, beat), skip_limit=limit)


def collate(samples: Sequence[Sample]) -> Sample:
    """Make a batch of samples with different numbers of receivers.

    Args:
        samples: B samples.

    Returns:
        The batch, receivers padded with zeros to the largest R, and the mask that tells padding apart.
    """
    size, most = len(samples), max(len(sample["receivers"]) for sample in samples)
    spectrograms = torch.zeros(size, most, *SHAPE)
    receivers = torch.zeros(size, most, samples[0]["receivers"].shape[-1])
    mask = torch.zeros(size, most, dtype=torch.bool)
    for index, sample in enumerate(samples):
        count = len(sample["receivers"])
        spectrograms[index, :count] = sample["spectrograms"]
        receivers[index, :count] = sample["receivers"]
        mask[index, :count] = True
    return {
        "spectrograms": spectrograms,
        "receivers": receivers,
        "position": torch.stack([sample["position"] for sample in samples]),
        "origin": torch.stack([sample["origin"] for sample in samples]),
        "mask": mask,
    }
