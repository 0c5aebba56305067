"""HeimdallDataset: a sample is one transmission as heard by all its receivers."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
import structlog
import torch
from torch.utils.data import Dataset

from heimdall_trainer.data import spectrogram
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import ObjectStore, UnreadableError, open_store, read_recording
from heimdall_trainer.data.sessions import Recording, SessionStore, Transmission
from heimdall_trainer.errors import DataError
from heimdall_trainer.settings import DataSettings

DROPOUT: Final = 0.1
SHIFT: Final = 4
SCALE_DB: Final = 3.0

Sample = dict[str, torch.Tensor]
log = structlog.get_logger()


class HeimdallDataset(Dataset[Sample]):
    """Transmissions of approved recording sessions.

    A sample holds, for R receivers, `spectrograms` (R, 3, 128, 32), `receivers` (R, 2) in metres around the mean of
    the receivers, `position` (2,) of the transmitter in the same metres, and `center` (2,): the latitude and longitude
    in degrees of that mean.
    """

    def __init__(
        self, settings: DataSettings, session_ids: Sequence[str] = (), *, augment: bool = False, seed: int = 0
    ) -> None:
        """Read what there is, and check that every recording can be read.

        Args:
            settings: Where recordings lie.
            session_ids: Approved sessions to use; all of them if empty.
            augment: Whether samples are changed at random, for training.
            seed: Seed of the changes.

        Raises:
            ConfigurationError: A session is missing or not approved.
            DataError: Nothing can be read, or too many recordings are unreadable.
        """
        self._settings = settings
        self._augment = augment
        self._seed = seed
        self.epoch = 0
        store = SessionStore.open(settings)
        self._transmissions = store.transmissions(store.approved(session_ids))
        store.close()
        self._store: ObjectStore = open_store(settings)
        self._features = FeatureCache(settings.cache_dir.expanduser())
        self.unreadable: list[str] = []
        """What was skipped, and why."""
        self._load()

    def __len__(self) -> int:
        return len(self._transmissions)

    def __getitem__(self, index: int) -> Sample:
        transmission = self._transmissions[index]
        spectrograms = torch.stack([self._feature(item) for item in transmission.recordings])
        geographic = np.array([(item.latitude, item.longitude) for item in transmission.recordings])
        center = geographic.mean(axis=0)
        sample = {
            "spectrograms": spectrograms,
            "receivers": torch.as_tensor(to_local(geographic, center), dtype=torch.float32),
            "position": torch.as_tensor(
                to_local((transmission.latitude, transmission.longitude), center), dtype=torch.float32
            ),
            "center": torch.as_tensor(center),
        }
        return augmented(sample, [self._seed, self.epoch, index]) if self._augment else sample

    def identity(self) -> dict[str, Any]:
        """What the data is: counts, sessions, and a digest of every recording's checksum."""
        digest = hashlib.sha256()
        for transmission in self._transmissions:
            for recording in transmission.recordings:
                digest.update(recording.sha512.encode())
        return {
            "transmissions": len(self),
            "sessions": len({item.session_id for item in self._transmissions}),
            "digest": digest.hexdigest()[:16],
            "skipped": len(self.unreadable),
        }

    def _load(self) -> None:
        """Fill the cache, side by side; drop what can't be read."""
        recordings = [item for transmission in self._transmissions for item in transmission.recordings]
        with ThreadPoolExecutor(self._settings.read_threads) as pool:
            problems = dict(zip(recordings, pool.map(self._problem, recordings), strict=True))
        bad = {recording for recording, problem in problems.items() if problem is not None}
        self.unreadable = [f"{recording}: {problems[recording]}" for recording in bad]
        for line in self.unreadable:
            log.warning("a recording was skipped", recording=line)
        if len(bad) > self._settings.skip_limit * len(recordings):
            raise DataError(
                f"{len(bad)} of {len(recordings)} recordings can't be read, more than HEIMDALL_SKIP_LIMIT "
                f"({self._settings.skip_limit:.0%}) allows. The first: {sorted(self.unreadable)[0]}"
            )
        kept = [_without(transmission, bad) for transmission in self._transmissions]
        self._transmissions = [transmission for transmission in kept if transmission.recordings]

    def _problem(self, recording: Recording) -> str | None:
        try:
            self._feature(recording)
        except UnreadableError as error:
            return str(error)
        return None

    def _feature(self, recording: Recording) -> torch.Tensor:
        cached = self._features.get(recording)
        if cached is not None:
            return cached
        signal = torch.from_numpy(read_recording(self._store, recording).copy())
        if signal.shape[-1] < spectrogram.MIN_SAMPLES:
            raise UnreadableError(f"{signal.shape[-1]} samples are too few")
        feature = spectrogram.mel_spectrogram(signal, recording.sample_rate_hz)
        self._features.put(recording, feature)
        return feature


class FeatureCache:
    """Features in a local folder, by content and parameters; safe with several processes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, recording: Recording) -> torch.Tensor | None:
        """A recording's feature, or None where it is not there or not whole."""
        try:
            return torch.from_numpy(np.load(self._file(recording)))
        except (OSError, ValueError, EOFError):
            return None

    def put(self, recording: Recording, feature: torch.Tensor) -> None:
        """Keep a recording's feature: written aside, then renamed, so that it is whole or not there."""
        file = self._file(recording)
        handle, name = tempfile.mkstemp(dir=self._folder)
        with os.fdopen(handle, "wb") as stream:
            np.save(stream, feature.numpy())
        Path(name).rename(file)

    def _file(self, recording: Recording) -> Path:
        key = f"{recording.sha512}/{recording.sample_rate_hz}/{spectrogram.VERSION}"
        return self._folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.npy"


def augmented(sample: Sample, seed: Sequence[int]) -> Sample:
    """Change a sample at random: a receiver's loss of hearing, a shift in time, a change of power of all receivers.

    Args:
        sample: As HeimdallDataset gives it.
        seed: The same seed makes the same change: a resumed training sees what it would have seen.

    Returns:
        The changed sample, of the same shapes.
    """
    rng = np.random.default_rng(list(seed))
    spectrograms = torch.roll(sample["spectrograms"], int(rng.integers(-SHIFT, SHIFT + 1)), dims=-1)
    # All receivers alike: what one hears relative to another is what locates.
    spectrograms = spectrograms + float(rng.normal(0, SCALE_DB)) / spectrogram.SPREAD_DB
    count = spectrograms.shape[0]
    keep = rng.uniform(size=count) >= DROPOUT
    if keep.sum() < min(3, count):
        keep[:] = True
    chosen = torch.from_numpy(np.flatnonzero(keep))
    return {**sample, "spectrograms": spectrograms[chosen], "receivers": sample["receivers"][chosen]}


def collate(samples: Sequence[Sample]) -> Sample:
    """Make a batch of samples with different numbers of receivers.

    Returns:
        As HeimdallDataset's samples with a batch dimension, padded to the most receivers, and `mask` (B, R): True
        where a receiver is.
    """
    most = max(sample["receivers"].shape[0] for sample in samples)

    def padded(name: str) -> torch.Tensor:
        shape = (len(samples), most, *samples[0][name].shape[1:])
        out = samples[0][name].new_zeros(shape)
        for row, sample in zip(out, samples, strict=True):
            row[: sample[name].shape[0]] = sample[name]
        return out

    mask = torch.zeros(len(samples), most, dtype=torch.bool)
    for row, sample in zip(mask, samples, strict=True):
        row[: sample["receivers"].shape[0]] = True
    return {
        "spectrograms": padded("spectrograms"),
        "receivers": padded("receivers"),
        "mask": mask,
        "position": torch.stack([sample["position"] for sample in samples]),
        "center": torch.stack([sample["center"] for sample in samples]),
    }


def _without(transmission: Transmission, bad: set[Recording]) -> Transmission:
    from dataclasses import replace

    return replace(transmission, recordings=tuple(item for item in transmission.recordings if item not in bad))
