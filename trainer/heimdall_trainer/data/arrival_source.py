"""Times of arrival of transmissions, estimated once and kept by content, in the cache of all features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
import structlog

from heimdall_trainer.data import physics
from heimdall_trainer.data.arrivals import ARRIVAL_VALUES, estimate_arrivals
from heimdall_trainer.data.cache import Caches, Features, key_of
from heimdall_trainer.data.features import Problem, without
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import RecordingStore, UnreadableError
from heimdall_trainer.data.sessions import Receiver, Recording, Transmission

KIND: Final = "arrivals"
VERSION: Final = 1
"""Raised when the computation or one of its constants changes; part of the key."""
REPORT_EVERY: Final = 200
"""Transmissions between two lines of progress."""

log = structlog.get_logger(__name__)


class ArrivalSource:
    """Arrivals of transmissions: from a cache, or estimated from what the store holds.

    Entries are named after everything that they depend on, so that nothing stale is ever found.
    """

    def __init__(self, store: RecordingStore, caches: Caches) -> None:
        """Nothing is read yet.

        Args:
            store: Where recordings lie.
            caches: Where arrivals are kept.
        """
        self._store = store
        self._caches = caches

    def prepare(
        self, transmissions: Sequence[Transmission], threads: int, beat: Callable[[], None] = lambda: None
    ) -> list[Problem]:
        """Have the arrivals of transmissions ready.

        Args:
            transmissions: Which ones.
            threads: Transmissions that are worked on side by side.
            beat: Is called after each of them, so that somebody hears that it goes on.

        Returns:
            Recordings that can't be read, and are to be left out: their spectrograms may have been in the cache.

        Raises:
            ConnectionError: The store does not answer.
        """
        problems: list[Problem] = []
        with self._store.side_by_side(threads) as pool:
            for start in range(0, len(transmissions), REPORT_EVERY):
                part = transmissions[start : start + REPORT_EVERY]
                for found in pool.map(self._prepare, part):
                    beat()
                    problems += found
                log.info("arrivals ready", transmissions=start + len(part), of=len(transmissions))
        return problems

    def _prepare(self, transmission: Transmission) -> list[Problem]:
        try:
            self.get(transmission)
        except UnreadableError:
            problems = [Problem(each, reason) for each in transmission.recordings if (reason := self._fault(each))]
            for left in without([transmission], {problem.recording.object_key for problem in problems}):
                self.get(left)
            return problems
        return []

    def _fault(self, recording: Recording) -> str:
        """Why a recording can't be read; empty where it can."""
        try:
            self._store.read(recording)
        except UnreadableError as error:
            return str(error)
        return ""

    def get(self, transmission: Transmission) -> Features:
        """How much later a transmission arrived at each receiver than at the loudest one, and how sure that is.

        Returns:
            Metres that light goes in that time, and their standard deviation in metres: shape (R, 2).

        Raises:
            UnreadableError: A recording can't be read.
            ConnectionError: The store does not answer.
        """
        shape = (len(transmission.recordings), ARRIVAL_VALUES)
        return self._caches.get(_key(transmission), shape, lambda: self._estimate(transmission))

    def _estimate(self, transmission: Transmission) -> Features:
        heard = transmission.recordings
        signals = [self._store.read(recording) for recording in heard]
        shortest = min(signal.size for signal in signals)
        places = [(recording.receiver.latitude, recording.receiver.longitude) for recording in heard]
        rate_hz = heard[0].sample_rate_hz
        found = estimate_arrivals(
            [signal[:shortest] for signal in signals],
            to_local(places, transmission.origin),
            noise_dbm=[physics.thermal_noise_dbm(rate_hz, item.receiver.noise_figure_db) for item in heard],
            sample_rate_hz=rate_hz,
            frequency_hz=transmission.center_frequency_hz,
        )
        metres = physics.SPEED_OF_LIGHT_M_S * np.stack([found.times_s, found.sigma_s], axis=1)
        estimated: Features = metres.astype(np.float32)
        return estimated


def _key(transmission: Transmission) -> str:
    heard = [
        (each.sha256, each.full_scale_dbm, each.sample_rate_hz, _receiver(each.receiver))
        for each in transmission.recordings
    ]
    return key_of([KIND, VERSION, transmission.center_frequency_hz, heard])


def _receiver(receiver: Receiver) -> tuple[float, ...]:
    return receiver.latitude, receiver.longitude, receiver.noise_figure_db
