"""Generated recordings: what the physics say, the same for the same seed, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from heimdall_trainer.data import physics
from heimdall_trainer.data.generator import (
    MARGIN,
    Scene,
    generate,
    receive,
    receiver_places,
    session_id,
    transmit,
    transmitter_place,
)
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import RecordingStore
from heimdall_trainer.data.sessions import SessionStore, Transmission
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings
from tests.unit.trainer.builders import SESSIONS, data_settings
from tests.unit.trainer.test_physics import frequency_of, tone

SAMPLES = 4096
SMALL: dict[str, Any] = {"sessions": 2, "transmissions_per_session": 2, "receivers": 2, "samples": 256}
QUIET = -300.0
"""A noise figure, in decibels, that leaves no noise."""


def quiet_receive(sent: physics.Signal, **more: Any) -> physics.Signal:
    arguments = {"loss_db": 0.0, "delay_s": 0.0, "clock_ppm": 0.0, "noise_figure_db": QUIET, "scene": Scene()}
    return receive(sent, **{**arguments, **more}, rng=np.random.default_rng(1))


def sent_signal(scene: Scene | None = None, modulation: str = "ofdm") -> physics.Signal:
    return transmit(scene or Scene(), modulation, SAMPLES + 2 * MARGIN, np.random.default_rng(1))


def content(settings: DataSettings) -> dict[str, bytes]:
    root = Path(settings.recordings_url.removeprefix("file:"))
    return {str(file.relative_to(root)): file.read_bytes() for file in sorted(root.rglob("*.sigmf-data"))}


def stored(settings: DataSettings) -> list[Transmission]:
    database = SessionStore.open(settings)
    try:
        return database.transmissions(database.approved())
    finally:
        database.close()


def run(settings: DataSettings, **more: Any) -> int:
    return generate(settings, **{**SMALL, **more})


def test_a_transmission_leaves_with_the_power_that_its_scene_allows() -> None:
    scene = Scene(power_dbm=(27.0, 27.0))
    assert physics.power_dbm(sent_signal(scene)) == pytest.approx(27.0)


def test_what_arrives_is_what_left_less_the_loss() -> None:
    sent = sent_signal()
    heard = quiet_receive(sent, loss_db=100.0)
    assert heard.shape == (SAMPLES,)
    assert np.allclose(heard, sent[MARGIN:-MARGIN] * 10**-5, atol=1e-12)


def test_silence_is_heard_as_thermal_noise() -> None:
    noise = receive(
        np.zeros(100_000 + 2 * MARGIN, dtype=complex),
        loss_db=0.0,
        delay_s=0.0,
        clock_ppm=0.0,
        noise_figure_db=6.0,
        scene=Scene(),
        rng=np.random.default_rng(1),
    )
    assert physics.power_dbm(noise) == pytest.approx(physics.thermal_noise_dbm(200e3, 6.0), abs=0.1)


def test_a_farther_receiver_hears_it_later_by_the_time_of_flight() -> None:
    sent, distance_m = sent_signal(), 4 * physics.SPEED_OF_LIGHT_M_S / 200e3
    heard = quiet_receive(sent, delay_s=physics.arrival_delay_s(distance_m))
    reference = quiet_receive(sent)
    correlation = np.abs(np.fft.ifft(np.fft.fft(heard) * np.conj(np.fft.fft(reference))))
    assert np.argmax(correlation) == 4


def test_a_clock_that_is_fast_sees_the_carrier_low() -> None:
    scene = Scene()
    heard = quiet_receive(tone(0.0, SAMPLES + 2 * MARGIN), clock_ppm=2.0, scene=scene)
    assert frequency_of(heard[:-MARGIN]) == pytest.approx(-2e-6 * scene.frequency_hz, rel=1e-3)


def test_a_clock_that_is_fast_takes_more_samples_of_each_period() -> None:
    """Of a tone, as far as it is from the carrier, which the same clock moves."""
    carrier, sent = (
        frequency_of(quiet_receive(tone(hertz, SAMPLES + 2 * MARGIN), clock_ppm=100.0)[MARGIN:-MARGIN])
        for hertz in (0.0, 40e3)
    )
    assert sent - carrier == pytest.approx(40e3 * (1 - 100e-6), abs=0.1)


def test_each_receiver_of_a_session_has_a_clock_of_its_own_for_carrier_and_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(noise_figure_db=(QUIET, QUIET), clock_error_ppm=50.0)
    heard = []
    for hertz in (0.0, 40e3):
        for name in physics.MODULATIONS:
            monkeypatch.setitem(physics.MODULATIONS, name, lambda samples, *_, hertz=hertz: tone(hertz, samples))
        folder = tmp_path / str(hertz)
        folder.mkdir()
        settings = data_settings(folder)
        run(settings, sessions=1, receivers=3, samples=SAMPLES, scene=scene)
        read = RecordingStore.open(settings).read
        heard.append(
            [[frequency_of(read(each)[MARGIN:-MARGIN]) for each in sent.recordings] for sent in stored(settings)]
        )
    carriers, tones = np.array(heard)  # transmissions, receivers
    assert np.diff(np.sort(carriers[0])).min() > 1000
    assert carriers[1] == pytest.approx(carriers[0], abs=0.1), "the clock is the receiver's, not the transmission's"
    assert tones - carriers == pytest.approx(40e3 * (1 + carriers / scene.frequency_hz), abs=0.1)


def test_receivers_lie_around_and_transmitters_within() -> None:
    rng = np.random.default_rng(1)
    places = receiver_places(8, 1000.0, rng)
    distances = np.linalg.norm(places, axis=1)
    assert ((distances >= 600) & (distances <= 1200)).all()
    # No half plane is empty: every gap between directions is less than half a turn.
    angles = np.sort(np.arctan2(places[:, 1], places[:, 0]))
    assert np.diff(np.append(angles, angles[0] + 2 * np.pi)).max() < np.pi
    sent_from = np.array([transmitter_place(1000.0, rng) for _ in range(500)])
    within = np.linalg.norm(sent_from, axis=1)
    assert within.max() <= 1000
    assert np.mean(within < 1000 / np.sqrt(2)) == pytest.approx(0.5, abs=0.07)  # evenly over the disc


def test_recorded_power_follows_the_distances(tmp_path: Path) -> None:
    scene = Scene(shadowing_db=0.0, power_dbm=(27.0, 27.0), noise_figure_db=(QUIET, QUIET), clock_error_ppm=0.0)
    settings = data_settings(tmp_path)
    run(settings, sessions=1, samples=1024, scene=scene)
    store = RecordingStore.open(settings)
    for sent in stored(settings):
        truth = to_local((sent.latitude, sent.longitude), sent.origin)
        for recording in sent.recordings:
            place = to_local((recording.receiver.latitude, recording.receiver.longitude), sent.origin)
            loss = physics.log_distance_loss_db(float(np.linalg.norm(truth - place)), scene.frequency_hz, 2.7)
            # The part that was cut out of a transmission has not quite the whole one's power.
            assert physics.power_dbm(store.read(recording)) == pytest.approx(27.0 - loss, abs=0.5)


def test_sessions_are_approved_and_whole(recorded: DataSettings) -> None:
    sent = stored(recorded)
    assert {item.session_id for item in sent} == {session_id(7, number) for number in range(SESSIONS["sessions"])}
    assert len(sent) == SESSIONS["sessions"] * SESSIONS["transmissions_per_session"]
    assert all(len(item.recordings) == SESSIONS["receivers"] for item in sent)
    assert all(each.sample_count == SESSIONS["samples"] for item in sent for each in item.recordings)


def test_the_same_seed_makes_the_same_recordings_and_another_one_others(tmp_path: Path) -> None:
    first, again, other = (data_settings(tmp_path / name) for name in ("first", "again", "other"))
    for settings, seed in ((first, 1), (again, 1), (other, 2)):
        Path(tmp_path / settings.cache_dir.parent.name).mkdir()
        assert run(settings, seed=seed) == SMALL["sessions"]
    assert content(first) == content(again)
    assert stored(first) == stored(again)
    assert set(content(first).values()).isdisjoint(content(other).values())


def test_sessions_that_are_there_are_left_alone_and_missing_ones_added(tmp_path: Path) -> None:
    settings = data_settings(tmp_path)
    assert run(settings) == 2
    before, sent = content(settings), stored(settings)
    assert run(settings) == 0
    assert run(settings, sessions=3) == 1
    assert content(settings).items() >= before.items()
    assert stored(settings)[: len(sent)] == sent


def test_recordings_that_were_lost_are_made_again(tmp_path: Path) -> None:
    settings = data_settings(tmp_path)
    run(settings)
    before = content(settings)
    for file in (tmp_path / "recordings").rglob("*.sigmf-*"):
        file.unlink()
    assert run(settings) == 0
    assert content(settings) == before


def test_a_session_that_was_made_with_other_parameters_is_not_taken_for_the_same(tmp_path: Path) -> None:
    settings = data_settings(tmp_path)
    run(settings, seed=7)
    with pytest.raises(ConfigurationError, match="generated-7-000 was made with other parameters: choose another seed"):
        run(settings, seed=7, samples=512)
    with pytest.raises(ConfigurationError, match="other parameters"):
        run(settings, seed=7, scene=Scene(exponent=3.5))


@pytest.mark.parametrize("name", ["sessions", "transmissions_per_session", "receivers", "samples"])
def test_numbers_below_one_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        run(data_settings(tmp_path), **{name: 0})


def test_progress_is_told_session_by_session(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = data_settings(tmp_path)
    run(settings, sessions=1)
    run(settings)
    assert capsys.readouterr().err.splitlines() == [
        "session 1 of 1: generated-7-000 made",
        "session 1 of 2: generated-7-000 is there",
        "session 2 of 2: generated-7-001 made",
    ]
