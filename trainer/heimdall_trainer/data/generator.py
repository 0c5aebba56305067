"""Generated recordings that are physically sensible, written as sessions to the database and store of real ones."""

from __future__ import annotations

import hashlib
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
from numpy.typing import NDArray

from heimdall_trainer.data import physics
from heimdall_trainer.data.geo import to_geographic
from heimdall_trainer.data.recordings import Capture, RecordingStore, key_of
from heimdall_trainer.data.sessions import Receiver, Recording, Session, SessionStore, Transmission
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings

AUTHOR: Final = "heimdall-train data generate"
MARGIN: Final = 128
"""Samples that are generated before and after a recording, so that delays bring no edge into it."""
FIRST_TRANSMISSION: Final = datetime(2026, 1, 1, tzinfo=UTC)
TRANSMISSION_INTERVAL: Final = timedelta(seconds=10)

Points = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The world that recordings are made in."""

    sample_rate_hz: float = 200e3
    frequency_hz: float = 433.92e6
    power_dbm: tuple[float, float] = (24.0, 30.0)
    """Bounds of the radiated power: 27 dBm is half a watt. It differs, so that only relative power locates."""
    exponent: float = 2.7
    """Path-loss exponent: suburban, between free space (2) and a dense city (3.5; Rappaport 2002, table 4.2)."""
    shadowing_db: float = 2.0
    """Standard deviation of the loss."""
    noise_figure_db: tuple[float, float] = (4.0, 8.0)
    """Bounds of the receivers' noise figures."""
    clock_error_ppm: float = 1.0
    """Standard deviation of a receiver's clock, which sets both its carrier and its sampling."""
    radius_m: float = 1500.0
    """Transmitters lie within this distance of the origin, receivers around them."""
    origin: tuple[float, float] = (52.0, 10.0)
    """Latitude and longitude in degrees."""


@dataclass(frozen=True, kw_only=True)
class _Station:
    receiver: Receiver
    place_m: Points
    clock_ppm: float


@dataclass(frozen=True, kw_only=True)
class _Plan:
    scene: Scene
    seed: int
    transmissions: int
    receivers: int
    samples: int

    @property
    def name(self) -> str:
        """Says what a session was made of: the same name, the same content."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        return f"generated, seed {self.seed}, parameters {digest[:12]}"


def generate(
    settings: DataSettings,
    *,
    sessions: int = 12,
    transmissions_per_session: int = 20,
    receivers: int = 5,
    samples: int = 4096,
    seed: int = 7,
    scene: Scene | None = None,
) -> int:
    """Make approved sessions, and tell of each on standard error; those that are there already are left as they are.

    Args:
        settings: Database and store to write to.
        sessions: Sessions to make, named `generated-SEED-NUMBER`.
        transmissions_per_session: Transmissions in each.
        receivers: Receivers of each, at other places every time.
        samples: Samples of a recording.
        seed: The same seed makes the same sessions.
        scene: The world they are made in.

    Returns:
        How many sessions were added.

    Raises:
        ConfigurationError: A session of this seed is there with other parameters, or a number is too small.
    """
    if min(sessions, transmissions_per_session, receivers) < 1 or samples < 1:
        raise ConfigurationError("sessions, transmissions, receivers and samples must be at least 1")
    plan = _Plan(
        scene=scene or Scene(),
        seed=seed,
        transmissions=transmissions_per_session,
        receivers=receivers,
        samples=samples,
    )
    store, added = RecordingStore.open(settings), 0
    with closing(SessionStore.open(settings)) as database, ThreadPoolExecutor(settings.read_threads) as pool:
        database.create_schema()
        for number in range(sessions):
            new = _add_session(database, store, plan, number, pool)
            added += new
            found = f"{session_id(seed, number)} {'made' if new else 'is there'}"
            print(f"session {number + 1} of {sessions}: {found}", file=sys.stderr, flush=True)
    return added


def session_id(seed: int, number: int) -> str:
    """ID of a generated session."""
    return f"generated-{seed}-{number:03}"


def _add_session(
    database: SessionStore, store: RecordingStore, plan: _Plan, number: int, pool: ThreadPoolExecutor
) -> bool:
    identity = session_id(plan.seed, number)
    name = database.session_name(identity)
    if name is not None and name != plan.name:
        raise ConfigurationError(
            f"session {identity} was made with other parameters: choose another seed, or remove it first"
        )
    if name is not None and _is_stored(store, identity, plan):
        return False
    # The database last: a session that it names is whole in the store.
    return database.add_session(_make_session(store, plan, number, pool))


def _is_stored(store: RecordingStore, identity: str, plan: _Plan) -> bool:
    last = f"{identity}-{plan.transmissions - 1:04}"
    return all(store.has(key_of(identity, last, f"rx{index}")) for index in range(plan.receivers))


def _make_session(store: RecordingStore, plan: _Plan, number: int, pool: ThreadPoolExecutor) -> Session:
    scene = plan.scene
    rng = np.random.default_rng([plan.seed, number])
    stations = _stations(plan, rng)
    return Session(
        id=session_id(plan.seed, number),
        name=plan.name,
        status="approved",
        center_frequency_hz=scene.frequency_hz,
        sample_rate_hz=scene.sample_rate_hz,
        origin=scene.origin,
        receivers=tuple(station.receiver for station in stations),
        transmissions=tuple(
            _make_transmission(store, plan, (number, item), stations=stations, rng=rng, pool=pool)
            for item in range(plan.transmissions)
        ),
    )


def _stations(plan: _Plan, rng: np.random.Generator) -> list[_Station]:
    scene = plan.scene
    places = receiver_places(plan.receivers, scene.radius_m, rng)
    return [
        _Station(
            receiver=Receiver(
                receiver_id=f"rx{index}",
                latitude=float(position[0]),
                longitude=float(position[1]),
                noise_figure_db=float(rng.uniform(*scene.noise_figure_db)),
            ),
            place_m=place,
            clock_ppm=float(rng.normal(0, scene.clock_error_ppm)),
        )
        for index, (place, position) in enumerate(zip(places, to_geographic(places, scene.origin), strict=True))
    ]


def _make_transmission(
    store: RecordingStore,
    plan: _Plan,
    numbers: tuple[int, int],
    *,
    stations: list[_Station],
    rng: np.random.Generator,
    pool: ThreadPoolExecutor,
) -> Transmission:
    scene, identity = plan.scene, session_id(plan.seed, numbers[0])
    transmission_id = f"{identity}-{numbers[1]:04}"
    started_at = FIRST_TRANSMISSION + timedelta(days=numbers[0]) + TRANSMISSION_INTERVAL * numbers[1]
    place = transmitter_place(scene.radius_m, rng)
    latitude, longitude = (float(value) for value in to_geographic(place, scene.origin))
    modulation = str(rng.choice(sorted(physics.MODULATIONS)))
    sent = transmit(scene, modulation, plan.samples + 2 * MARGIN, rng)
    # Drawn here, in order: what the threads do must not change what is made.
    signals = [_receive(scene, sent, place, station, rng) for station in stations]

    def write(station: _Station, signal: physics.Signal) -> Recording:
        capture = Capture(
            session_id=identity,
            transmission_id=transmission_id,
            receiver=station.receiver,
            sample_rate_hz=scene.sample_rate_hz,
            frequency_hz=scene.frequency_hz,
            started_at=started_at,
            full_scale_dbm=physics.full_scale_dbm(signal),
            author=AUTHOR,
        )
        return store.write(signal, capture)

    return Transmission(
        id=transmission_id,
        session_id=identity,
        started_at=started_at,
        latitude=latitude,
        longitude=longitude,
        modulation=modulation,
        origin=scene.origin,
        recordings=tuple(pool.map(write, stations, signals)),
        center_frequency_hz=scene.frequency_hz,
    )


def receiver_places(count: int, radius_m: float, rng: np.random.Generator) -> Points:
    """Places around the origin, spread over all directions: metres east and north, shape (count, 2).

    Transmitters lie between them: outside of their receivers places are far less certain (Torrieri 1984).
    """
    angles = 2 * np.pi * (rng.uniform() + (np.arange(count) + rng.uniform(-0.3, 0.3, count)) / count)
    distances = radius_m * rng.uniform(0.6, 1.2, count)
    return np.stack([distances * np.cos(angles), distances * np.sin(angles)], axis=-1)


def transmitter_place(radius_m: float, rng: np.random.Generator) -> Points:
    """A place drawn evenly from a disc around the origin: metres east and north, shape (2,).

    The distance by inversion: its distribution is (distance / radius)² (Devroye 1986, II.2).
    """
    angle, distance = rng.uniform(0, 2 * np.pi), radius_m * np.sqrt(rng.uniform())
    return np.array([distance * np.cos(angle), distance * np.sin(angle)])


def transmit(scene: Scene, modulation: str, samples: int, rng: np.random.Generator) -> physics.Signal:
    """A transmission as it leaves the antenna: shape (samples,), its power in milliwatts."""
    signal = physics.MODULATIONS[modulation](samples, scene.sample_rate_hz, rng)
    return physics.scale_to_dbm(signal, float(rng.uniform(*scene.power_dbm)))


def _receive(
    scene: Scene, sent: physics.Signal, place: Points, station: _Station, rng: np.random.Generator
) -> physics.Signal:
    distance = max(float(np.linalg.norm(place - station.place_m)), 1.0)
    loss_db = physics.log_distance_loss_db(distance, scene.frequency_hz, scene.exponent)
    return receive(
        sent,
        loss_db=loss_db + physics.shadowing_db(scene.shadowing_db, rng),
        delay_s=physics.arrival_delay_s(distance),
        clock_ppm=station.clock_ppm,
        noise_figure_db=station.receiver.noise_figure_db,
        scene=scene,
        rng=rng,
    )


def receive(
    sent: physics.Signal,
    *,
    loss_db: float,
    delay_s: float,
    clock_ppm: float,
    noise_figure_db: float,
    scene: Scene,
    rng: np.random.Generator,
) -> physics.Signal:
    """What a receiver records of a transmission.

    Args:
        sent: The transmission with a margin on both sides, shape (samples + 2·MARGIN,), in milliwatts.
        loss_db: Loss on the way in decibels.
        delay_s: Time of flight in seconds.
        clock_ppm: Error of the receiver's clock: it samples at another rate, and tunes to another frequency.
        noise_figure_db: Noise figure in decibels.
        scene: Frequency and sampling rate.
        rng: Source of the noise.

    Returns:
        Samples, shape (samples,); mean squared magnitude is power in milliwatts.
    """
    signal = sent * 10 ** (-loss_db / 20)
    signal = physics.apply_delay(signal, delay_s, scene.sample_rate_hz, scene.frequency_hz)[MARGIN:]
    # A receiver that tunes too high sees the carrier too low.
    signal = physics.apply_carrier_offset(signal, -clock_ppm * 1e-6 * scene.frequency_hz, scene.sample_rate_hz)
    signal = physics.apply_sampling_offset(signal, -clock_ppm)[: sent.size - 2 * MARGIN]
    noise_dbm = physics.thermal_noise_dbm(scene.sample_rate_hz, noise_figure_db)
    return signal + physics.white_noise(signal.size, noise_dbm, rng)
