"""Physically sensible recordings, generated as sessions into the same database and store as real ones."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from heimdall_trainer.data import physics
from heimdall_trainer.data.geo import to_geographic
from heimdall_trainer.data.recordings import ObjectStore, key_of, open_store, write_recording
from heimdall_trainer.data.sessions import SessionStore
from heimdall_trainer.settings import DataSettings

AUTHOR: Final = "heimdall-train data generate"


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What recordings are made of."""

    sessions: int = 12
    transmissions: int = 20
    receivers: int = 5
    samples: int = 4096
    seed: int = 7
    sample_rate_hz: float = 200e3
    frequency_hz: float = 433.92e6
    power_dbm: float = 27.0
    """Radiated power; 27 dBm is half a watt."""
    exponent: float = 2.7
    """Path-loss exponent: suburban, between free space (2) and a city (3.5)."""
    shadowing_db: float = 2.0
    """Standard deviation of the loss."""
    noise_figure_db: float = 6.0
    carrier_error_ppm: float = 1.0
    sampling_error_ppm: float = 5.0
    radius_m: float = 1500.0
    """Transmitters lie within this distance of the origin, receivers around them."""
    origin: tuple[float, float] = (52.0, 10.0)
    """Latitude and longitude in degrees."""


def generate(settings: DataSettings, scene: Scene) -> int:
    """Make sessions; those that are there already are left as they are.

    Args:
        settings: Where to write to.
        scene: What to make.

    Returns:
        How many sessions were added.
    """
    database, store = SessionStore.open(settings), open_store(settings)
    database.create_schema()
    added = 0
    for number in range(scene.sessions):
        session_id = f"generated-{scene.seed}-{number:03}"
        if not database.has_session(session_id):
            _add_session(database, store, scene, session_id, number=number, threads=settings.read_threads)
            added += 1
        print(f"session {number + 1} of {scene.sessions}: {session_id}", file=sys.stderr, flush=True)
    database.close()
    return added


def _add_session(
    database: SessionStore, store: ObjectStore, scene: Scene, session_id: str, *, number: int, threads: int
) -> None:
    rng = np.random.default_rng([scene.seed, number])
    places = receiver_places(scene, rng)
    geographic = to_geographic(places, scene.origin)
    receivers = [
        {
            "session_id": session_id,
            "receiver_id": f"rx{index}",
            "latitude": float(place[0]),
            "longitude": float(place[1]),
            "noise_figure_db": scene.noise_figure_db,
        }
        for index, place in enumerate(geographic)
    ]
    transmissions: list[dict[str, Any]] = []
    recordings: list[dict[str, Any]] = []
    with ThreadPoolExecutor(threads) as pool:
        for item in range(scene.transmissions):
            transmission_id = f"{session_id}-{item:04}"
            place = _place_in_disc(scene.radius_m, rng)
            modulation = str(rng.choice(sorted(physics.MODULATIONS)))
            latitude, longitude = (float(value) for value in to_geographic(place, scene.origin))
            transmissions.append(
                {
                    "id": transmission_id,
                    "session_id": session_id,
                    "latitude": latitude,
                    "longitude": longitude,
                    "modulation": modulation,
                }
            )
            keys = [key_of(session_id, transmission_id, str(row["receiver_id"])) for row in receivers]
            # Drawn here, in order: what the threads do must not change what is made.
            signals = receive(scene, place, places, modulation, rng)
            jobs = zip(keys, signals, geographic, strict=True)
            digests = pool.map(lambda job: _write(store, scene, *job), jobs)
            recordings += [
                {
                    "transmission_id": transmission_id,
                    "receiver_id": row["receiver_id"],
                    "object_key": key,
                    "samples": scene.samples,
                    "sha512": digest,
                }
                for row, key, digest in zip(receivers, keys, digests, strict=True)
            ]
    session = {
        "id": session_id,
        "center_frequency_hz": scene.frequency_hz,
        "sample_rate_hz": scene.sample_rate_hz,
        "origin_latitude": scene.origin[0],
        "origin_longitude": scene.origin[1],
    }
    # The database last: a session that it names is whole in the store.
    database.add_session(session, receivers=receivers, transmissions=transmissions, recordings=recordings)


def _write(store: ObjectStore, scene: Scene, key: str, signal: NDArray[np.complex128], place: Any) -> str:
    return write_recording(
        store,
        key,
        signal,
        sample_rate_hz=scene.sample_rate_hz,
        frequency_hz=scene.frequency_hz,
        geolocation=(float(place[0]), float(place[1])),
        author=AUTHOR,
    )


def receiver_places(scene: Scene, rng: np.random.Generator) -> NDArray[np.float64]:
    """Places around the origin, spread over all directions: metres, shape (receivers, 2)."""
    angles = 2 * np.pi * (np.arange(scene.receivers) + rng.uniform(-0.3, 0.3, scene.receivers)) / scene.receivers
    distances = scene.radius_m * rng.uniform(0.6, 1.2, scene.receivers)
    return np.stack([distances * np.cos(angles), distances * np.sin(angles)], axis=-1)


def _place_in_disc(radius_m: float, rng: np.random.Generator) -> NDArray[np.float64]:
    angle, distance = rng.uniform(0, 2 * np.pi), radius_m * np.sqrt(rng.uniform())
    return np.array([distance * np.cos(angle), distance * np.sin(angle)])


def receive(
    scene: Scene, place: NDArray[np.float64], receivers: NDArray[np.float64], modulation: str, rng: np.random.Generator
) -> list[NDArray[np.complex128]]:
    """What each receiver records of one transmission.

    Args:
        scene: What recordings are made of.
        place: The transmitter's place in metres, shape (2,).
        receivers: The receivers' places in metres, shape (receivers, 2).
        modulation: Name of the modulation.
        rng: Source of randomness.

    Returns:
        Samples of each receiver, shape (samples,); mean squared magnitude is power in milliwatts.
    """
    sent = physics.MODULATIONS[modulation](scene.samples, scene.sample_rate_hz, rng)
    noise_dbm = physics.thermal_noise_dbm(scene.sample_rate_hz, scene.noise_figure_db)
    signals = []
    for receiver in receivers:
        distance = float(np.linalg.norm(place - receiver))
        loss = physics.log_distance_loss_db(distance, scene.frequency_hz, scene.exponent)
        loss += rng.normal(0, scene.shadowing_db)
        signal = physics.scale_to_dbm(sent, scene.power_dbm - loss)
        signal = physics.apply_delay(signal, physics.delay_s(distance), scene.sample_rate_hz, scene.frequency_hz)
        offset = rng.normal(0, scene.carrier_error_ppm) * 1e-6 * scene.frequency_hz
        signal = physics.apply_carrier_offset(signal, offset, scene.sample_rate_hz)
        signal = physics.apply_sampling_offset(signal, rng.normal(0, scene.sampling_error_ppm))
        signals.append(signal + physics.white_noise(scene.samples, noise_dbm, rng))
    return signals
