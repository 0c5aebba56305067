"""Arrivals of stored recordings: what physics say, estimated once, kept in the one cache, beside receivers' places."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from heimdall_api.types import DataSpec
from heimdall_trainer.data.arrival_source import ArrivalSource
from heimdall_trainer.data.arrivals import ARRIVAL_VALUES
from heimdall_trainer.data.cache import CHECKSUM_BYTES, TYPE, pack
from heimdall_trainer.data.dataset import HeimdallDataset, collate
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.module import HeimdallDataModule
from heimdall_trainer.data.recordings import UnreadableError
from heimdall_trainer.data.sessions import SessionStore, Transmission
from heimdall_trainer.settings import DataSettings
from tests.unit.trainer.builders import ENTRY_BYTES, SESSIONS, arrivals_of

ARRIVAL_BYTES = SESSIONS["receivers"] * ARRIVAL_VALUES * TYPE.itemsize + CHECKSUM_BYTES


@pytest.fixture
def sent(recorded: DataSettings) -> list[Transmission]:
    database = SessionStore.open(recorded)
    try:
        return database.transmissions(database.approved())
    finally:
        database.close()


@pytest.fixture
def source(recorded: DataSettings, tmp_path: Path) -> ArrivalSource:
    """A source with a cache of its own."""
    return arrivals_of(recorded.model_copy(update={"cache_dir": tmp_path}))


def truly_later_m(transmission: Transmission) -> np.ndarray:
    heard = [(each.receiver.latitude, each.receiver.longitude) for each in transmission.recordings]
    places = to_local(heard, transmission.origin)
    return np.linalg.norm(
        places - to_local((transmission.latitude, transmission.longitude), transmission.origin), axis=1
    )


def cached(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.features"))


def test_arrivals_are_off_by_about_as_much_as_they_say(source: ArrivalSource, sent: list[Transmission]) -> None:
    scores = []
    for transmission in sent:
        found = source.get(transmission)
        assert found.shape == (SESSIONS["receivers"], 2)
        reference = int(np.argmin(found[:, 1]))
        assert found[reference, 0] == 0.0
        truth = truly_later_m(transmission)
        errors = found[:, 0] - (truth - truth[reference])
        others = np.arange(len(errors)) != reference
        scores += list((errors / np.hypot(found[:, 1], found[reference, 1]))[others])
    assert 0.7 < np.sqrt(np.mean(np.square(scores))) < 1.6


def test_arrivals_are_estimated_once(
    source: ArrivalSource, sent: list[Transmission], tmp_path: Path, recorded: DataSettings
) -> None:
    first = source.get(sent[0])
    (file,) = cached(tmp_path)
    file.write_bytes(pack(first + 1))
    other = arrivals_of(recorded.model_copy(update={"cache_dir": tmp_path}))
    for each in (source, other):
        assert np.array_equal(each.get(sent[0]), first + 1)


@pytest.mark.parametrize("content", [b"", b"no array", bytes(ARRIVAL_BYTES), bytes(2 * ARRIVAL_BYTES)])
def test_a_cache_entry_that_is_broken_is_estimated_again(
    source: ArrivalSource, sent: list[Transmission], tmp_path: Path, recorded: DataSettings, content: bytes
) -> None:
    first = source.get(sent[0])
    cached(tmp_path)[0].write_bytes(content)
    assert np.array_equal(arrivals_of(recorded.model_copy(update={"cache_dir": tmp_path})).get(sent[0]), first)


def test_other_receivers_or_another_carrier_are_not_taken_for_the_same(
    source: ArrivalSource, sent: list[Transmission], tmp_path: Path
) -> None:
    source.get(sent[0])
    fewer = replace(sent[0], recordings=sent[0].recordings[:2])
    assert source.get(fewer).shape == (2, 2)
    untuned = replace(sent[0], center_frequency_hz=0.0)
    assert not np.array_equal(source.get(untuned)[:, 0], source.get(sent[0])[:, 0])
    assert len(cached(tmp_path)) == 3


def test_a_recording_that_is_missing_is_told(recorded: DataSettings, sent: list[Transmission], tmp_path: Path) -> None:
    shutil.copytree(Path(recorded.recordings_url.removeprefix("file:")), tmp_path / "recordings")
    (tmp_path / "recordings" / sent[0].recordings[1].object_key).unlink()
    settings = recorded.model_copy(
        update={"recordings_url": f"file:{tmp_path}/recordings", "cache_dir": tmp_path / "cache"}
    )
    with pytest.raises(UnreadableError, match="missing"):
        arrivals_of(settings).get(sent[0])


def test_samples_hold_arrivals_beside_places_where_they_are_asked_for(recorded: DataSettings) -> None:
    without = HeimdallDataset.open(recorded)[0]["receivers"]
    dataset = HeimdallDataset.open(recorded, arrivals=True)
    assert torch.equal(dataset[0]["receivers"][:, :2], without)
    expected = arrivals_of(recorded).get(dataset.transmissions[0])
    assert np.array_equal(dataset[0]["receivers"][:, 2:].numpy(), expected)
    batch = collate([dataset[0], dataset[1]])
    assert tuple(batch["receivers"].shape) == (2, SESSIONS["receivers"], 4)


def test_the_spec_asks_for_arrivals_on_all_sides(recorded: DataSettings, tmp_path: Path) -> None:
    settings = recorded.model_copy(update={"cache_dir": tmp_path})
    data = HeimdallDataModule(settings, DataSpec(arrivals=True, test_fraction=0.2), batch_size=4)
    data.setup()
    # Ready before the first batch, which loaders in other processes would each estimate for themselves.
    arrivals = [file for file in cached(tmp_path) if file.stat().st_size == ARRIVAL_BYTES]
    assert len(arrivals) == SESSIONS["sessions"] * SESSIONS["transmissions_per_session"]
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert next(iter(loader))["receivers"].shape[-1] == 4


def test_spectrograms_and_arrivals_have_one_bound(recorded: DataSettings, tmp_path: Path) -> None:
    limit = 5 * ENTRY_BYTES + ENTRY_BYTES // 2
    settings = recorded.model_copy(update={"cache_dir": tmp_path, "cache_limit_gib": limit / 2**30})
    data = HeimdallDataModule(settings, DataSpec(arrivals=True), batch_size=4)
    batch = next(iter(data.train_dataloader()))
    assert batch["receivers"].shape[-1] == 4
    sizes = [file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()]
    assert {ENTRY_BYTES, ARRIVAL_BYTES} <= set(sizes), "both are kept"
    assert sum(sizes) <= limit
