"""Makes what tests are about, without a database."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from heimdall_trainer.data.arrival_source import ArrivalSource
from heimdall_trainer.data.cache import Caches, Features, pack
from heimdall_trainer.data.features import FeatureSource
from heimdall_trainer.data.recordings import Folder, RecordingStore
from heimdall_trainer.data.sessions import Receiver, Recording, Session, Status, Transmission
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.settings import DataSettings, load_data_settings

SESSIONS: Final[dict[str, Any]] = {
    "sessions": 5,
    "transmissions_per_session": 4,
    "receivers": 3,
    "samples": 1024,
    "seed": 7,
}
"""What the shared recordings are generated with."""
ENTRY_BYTES: Final = len(pack(np.zeros(SHAPE, np.float32)))
"""Size of a cache's entry that holds the spectrograms of a recording."""
ORIGIN: Final = (52.0, 10.0)
FREQUENCY_HZ = 433.92e6
STARTED_AT: Final = datetime(2026, 1, 1, tzinfo=UTC)


def data_settings(folder: Path, **more: object) -> DataSettings:
    """Settings of a database and a store in a folder."""
    values = {
        "database_url": f"sqlite:///{folder}/heimdall.db",
        "recordings_url": f"file:{folder}/recordings",
        "cache_dir": folder / "cache",
        "read_threads": 2,
    }
    return load_data_settings(**(values | more))


def features_of(settings: DataSettings) -> FeatureSource:
    """Features of the settings' recordings, kept in their cache."""
    return FeatureSource(RecordingStore.open(settings), Caches.open(settings))


def arrivals_of(settings: DataSettings) -> ArrivalSource:
    """Times of arrival of the settings' recordings, kept in their cache."""
    return ArrivalSource(RecordingStore.open(settings), Caches.open(settings))


def receiver(index: int) -> Receiver:
    """A receiver some hundred metres from the origin."""
    return Receiver(
        receiver_id=f"rx{index}",
        latitude=ORIGIN[0] + 0.003 * index,
        longitude=ORIGIN[1] - 0.002 * index,
        altitude_m=12.0,
        noise_figure_db=5.0,
    )


def recording(session_id: str, transmission_id: str, index: int) -> Recording:
    """What a receiver recorded; there are no samples to it."""
    return Recording(
        session_id=session_id,
        transmission_id=transmission_id,
        receiver=receiver(index),
        object_key=f"sessions/{session_id}/{transmission_id}/rx{index}.sigmf-meta",
        sample_count=1024,
        sha256=hashlib.sha256(f"{transmission_id}/{index}".encode()).hexdigest(),
        full_scale_dbm=-50.0,
        sample_rate_hz=200e3,
    )


def transmission(number: int, *, session_id: str = "s1", receivers: int = 3) -> Transmission:
    """A transmission that some receivers recorded."""
    identity = f"{session_id}-{number:04}"
    return Transmission(
        id=identity,
        session_id=session_id,
        started_at=STARTED_AT,
        latitude=ORIGIN[0] + 0.001 * (number % 7),
        longitude=ORIGIN[1] + 0.002 * (number % 5),
        modulation="fm",
        origin=ORIGIN,
        center_frequency_hz=FREQUENCY_HZ,
        recordings=tuple(recording(session_id, identity, index) for index in range(receivers)),
    )


def session(identity: str, *, status: Status = "approved", transmissions: int = 2) -> Session:
    """A recording session."""
    return Session(
        id=identity,
        name=f"session {identity}",
        status=status,
        center_frequency_hz=FREQUENCY_HZ,
        sample_rate_hz=200e3,
        origin=ORIGIN,
        receivers=tuple(receiver(index) for index in range(3)),
        transmissions=tuple(transmission(number, session_id=identity) for number in range(transmissions)),
    )


class DrawnFeatures(FeatureSource):
    """Features drawn from each recording's checksum instead of computed from samples."""

    def __init__(self) -> None:
        """Nothing is read."""
        self._store = RecordingStore(Folder(Path("nowhere")))

    def get(self, recording: Recording) -> Features:
        """Always the same for a recording."""
        rng = np.random.default_rng(int(recording.sha256[:8], 16))
        return rng.standard_normal((3, 128, 32), dtype=np.float32)
