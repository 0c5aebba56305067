"""Features of recordings, computed once and kept by content."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Final

import structlog
import torch

from heimdall_trainer.data.cache import Caches, Features, key_of
from heimdall_trainer.data.recordings import RecordingStore, UnreadableError
from heimdall_trainer.data.sessions import Recording, Transmission
from heimdall_trainer.data.spectrogram import DEFAULT_PARAMETERS, SHAPE, SpectrogramParameters, mel_spectrogram
from heimdall_trainer.errors import DataError

NAMED_PROBLEMS: Final = 10
"""How many unreadable recordings an error names; the log names all."""
REPORT_EVERY: Final = 1000
"""Recordings between two lines of progress."""

log = structlog.get_logger(__name__)


class FeatureSource:
    """Spectrograms of recordings: from a cache, or computed from what the store holds.

    Entries are named after the data's checksum, its scale and rate, and the parameters: nothing stale is ever found.
    """

    def __init__(
        self,
        store: RecordingStore,
        caches: Caches,
        parameters: SpectrogramParameters = DEFAULT_PARAMETERS,
    ) -> None:
        """Nothing is read yet.

        Args:
            store: Where recordings lie.
            caches: Where features are kept.
            parameters: How they are computed.
        """
        self._store = store
        self._caches = caches
        self._parameters = parameters

    def get(self, recording: Recording) -> Features:
        """Spectrograms of a recording, shape (3, 128, 32), see mel_spectrogram.

        Raises:
            UnreadableError: The recording is missing, short, corrupt, of another rate or type.
            ConnectionError: The store does not answer.
        """
        return self._caches.get(self._key(recording), SHAPE, lambda: self._compute(recording))

    def _compute(self, recording: Recording) -> Features:
        samples = self._store.read(recording)
        try:
            features: Features = mel_spectrogram(torch.from_numpy(samples), self._parameters).numpy()
        except ValueError as error:
            raise UnreadableError(str(error)) from None
        return features

    def side_by_side(self, threads: int) -> AbstractContextManager[Executor]:
        """Threads to read in, see `RecordingStore.side_by_side`."""
        return self._store.side_by_side(threads)

    def check(self, recording: Recording) -> str | None:
        """Make sure that a recording's features are in the cache; what is wrong with it if they can't be."""
        about = recording.receiver
        if not _are_numbers(about.latitude, about.longitude, about.noise_figure_db):
            return "its session has no row for this receiver, or one whose place or noise figure is no number"
        try:
            self.get(recording)
        except UnreadableError as error:
            return str(error)
        return None

    def _key(self, recording: Recording) -> str:
        about = [recording.sha256, recording.full_scale_dbm, recording.sample_count, recording.sample_rate_hz]
        return key_of([*about, asdict(self._parameters)])


@dataclass(frozen=True)
class Problem:
    """A recording that can't be used, and why."""

    recording: Recording
    reason: str

    def __str__(self) -> str:
        """As errors name it."""
        return f"{self.recording}: {self.reason}"


def keep_readable(
    transmissions: Sequence[Transmission],
    source: FeatureSource,
    *,
    skip_limit: float,
    threads: int,
    beat: Callable[[], None] = lambda: None,
) -> list[Transmission]:
    """Compute the features of all recordings, and leave out those that can't be read, each of which the log names.

    Args:
        transmissions: What is to be trained on.
        source: Computes and keeps features.
        skip_limit: Share of recordings that may be left out.
        threads: Recordings that are read side by side.
        beat: Is called after each recording, so that somebody hears that it goes on.

    Returns:
        The transmissions with the recordings that can be read; those with none are left out.

    Raises:
        DataError: More recordings than the limit can't be read; the message names some of them.
        ConnectionError: The store does not answer.
    """
    problems = _find_unplaced(transmissions)
    unplaced = {problem.recording.object_key for problem in problems}
    others = [each for sent in transmissions for each in sent.recordings if each.object_key not in unplaced]
    problems += _find_problems(others, source, threads, beat)
    return leave_out(transmissions, problems, skip_limit=skip_limit)


def leave_out(
    transmissions: Sequence[Transmission], problems: Sequence[Problem], *, skip_limit: float
) -> list[Transmission]:
    """Leave out recordings that can't be used; see `keep_readable`, whose errors are raised."""
    every = [recording for transmission in transmissions for recording in transmission.recordings]
    for problem in problems:
        _warn(problem)
    if len(problems) > skip_limit * len(every):
        named = "; ".join(str(problem) for problem in problems[:NAMED_PROBLEMS])
        raise DataError(
            f"{len(problems)} of {len(every)} recordings can't be read, more than HEIMDALL_SKIP_LIMIT={skip_limit:g} "
            f"allows: {named}{' …' if len(problems) > NAMED_PROBLEMS else ''}"
        )
    return without(transmissions, {problem.recording.object_key for problem in problems})


def _find_unplaced(transmissions: Sequence[Transmission]) -> list[Problem]:
    """Recordings of transmissions that nobody knows the place of: learned from, one would make every weight NaN."""
    return [
        Problem(recording, "where its transmission came from, or its session's origin, is no number")
        for sent in transmissions
        if not _are_numbers(sent.latitude, sent.longitude, *sent.origin)
        for recording in sent.recordings
    ]


def _are_numbers(*values: float) -> bool:
    return all(math.isfinite(value) for value in values)


def _find_problems(
    every: Sequence[Recording], source: FeatureSource, threads: int, beat: Callable[[], None]
) -> list[Problem]:
    problems = []
    with source.side_by_side(threads) as pool:
        for start in range(0, len(every), REPORT_EVERY):
            part = every[start : start + REPORT_EVERY]
            for recording, reason in zip(part, pool.map(source.check, part), strict=True):
                beat()
                if reason is not None:
                    problems.append(Problem(recording, reason))
            log.info("features ready", recordings=start + len(part), of=len(every), unreadable=len(problems))
    return problems


def without(transmissions: Iterable[Transmission], bad_keys: set[str]) -> list[Transmission]:
    """Transmissions without some recordings, and without those that nobody else has recorded."""
    kept = (
        replace(item, recordings=tuple(each for each in item.recordings if each.object_key not in bad_keys))
        for item in transmissions
    )
    return [item for item in kept if item.recordings]


def _warn(problem: Problem) -> None:
    recording = problem.recording
    log.warning(
        "recording left out",
        session=recording.session_id,
        transmission=recording.transmission_id,
        receiver=recording.receiver.receiver_id,
        reason=problem.reason,
    )
