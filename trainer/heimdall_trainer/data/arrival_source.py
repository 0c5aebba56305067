"""Times of arrival of transmissions, estimated once and kept in a folder by content."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import numpy as np
import structlog
from numpy.typing import NDArray

from heimdall_trainer.data import physics
from heimdall_trainer.data.arrivals import estimate_arrivals
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import RecordingStore, write_whole
from heimdall_trainer.data.sessions import Receiver, Transmission
from heimdall_trainer.settings import DataSettings

VERSION: Final = 1
"""Raised when the computation changes; part of the cache's key."""
REPORT_EVERY: Final = 200
"""Transmissions between two lines of progress."""

Metres = NDArray[np.float32]

log = structlog.get_logger(__name__)


class ArrivalSource:
    """Arrivals of transmissions: from the cache, or estimated from what the store holds.

    Entries are named after everything that they depend on, and are written beside and renamed, so that nothing stale
    is ever found, and any number of processes can share a folder.
    """

    def __init__(self, store: RecordingStore, folder: Path) -> None:
        """Args: store: Where recordings lie. folder: Where arrivals are kept."""
        self._store = store
        self._folder = folder / "arrivals"
        self._known: dict[str, Metres] = {}

    @classmethod
    def open(cls, settings: DataSettings) -> ArrivalSource:
        """The source that the settings name."""
        return cls(RecordingStore.open(settings), settings.cache_dir)

    def prepare(self, transmissions: Sequence[Transmission], threads: int) -> None:
        """Have the arrivals of transmissions ready.

        Raises:
            UnreadableError: A recording can't be read; those that can't are to be left out before.
            ConnectionError: The store does not answer.
        """
        with ThreadPoolExecutor(threads) as pool:
            for start in range(0, len(transmissions), REPORT_EVERY):
                part = transmissions[start : start + REPORT_EVERY]
                for _ in pool.map(self.get, part):
                    pass
                log.info("arrivals ready", transmissions=start + len(part), of=len(transmissions))

    def get(self, transmission: Transmission) -> Metres:
        """How much later a transmission arrived at each receiver than at the loudest one, and how sure that is.

        Returns:
            Metres that light goes in that time, and their standard deviation in metres: shape (R, 2).

        Raises:
            UnreadableError: A recording can't be read.
            ConnectionError: The store does not answer.
        """
        name = _name(transmission)
        if name not in self._known:
            self._known[name] = self._load(name, transmission)
        return self._known[name]

    def _load(self, name: str, transmission: Transmission) -> Metres:
        file = self._folder / name[:2] / f"{name}.npy"
        try:
            kept: Metres = np.load(file)
            if kept.shape == (len(transmission.recordings), 2) and kept.dtype == np.float32:
                return kept
        except (OSError, ValueError, EOFError):
            pass
        estimated = self._estimate(transmission)
        buffer = io.BytesIO()
        np.save(buffer, estimated)
        try:
            write_whole(file, buffer.getvalue())
        except OSError as error:
            log.warning(
                "arrivals can't be kept; they are estimated again", folder=str(self._folder), error=error.strerror
            )
        return estimated

    def _estimate(self, transmission: Transmission) -> Metres:
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
        return metres.astype(np.float32)


def _name(transmission: Transmission) -> str:
    about = [
        VERSION,
        transmission.center_frequency_hz,
        [
            (each.sha256, each.full_scale_dbm, each.sample_rate_hz, _receiver(each.receiver))
            for each in transmission.recordings
        ],
    ]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _receiver(receiver: Receiver) -> tuple[float, ...]:
    return receiver.latitude, receiver.longitude, receiver.noise_figure_db
