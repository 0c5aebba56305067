"""Samples, batches, features and their cache."""

from __future__ import annotations

import math
import shutil
import signal
import sqlite3
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from heimdall_api.types import DataSpec
from heimdall_trainer import group
from heimdall_trainer.data import recordings
from heimdall_trainer.data.arrival_source import ArrivalSource
from heimdall_trainer.data.augment import Augmentation
from heimdall_trainer.data.cache import Caches, Features
from heimdall_trainer.data.dataset import HeimdallDataset, collate
from heimdall_trainer.data.features import FeatureSource, keep_readable
from heimdall_trainer.data.geo import to_geographic
from heimdall_trainer.data.module import HeimdallDataModule, digest_of
from heimdall_trainer.data.recordings import Bucket, RecordingStore
from heimdall_trainer.data.sessions import Recording, SessionStore, Transmission
from heimdall_trainer.data.spectrogram import SHAPE, SpectrogramParameters, mel_spectrogram
from heimdall_trainer.data.split import Split
from heimdall_trainer.errors import ConfigurationError, DataError
from heimdall_trainer.settings import DataSettings
from heimdall_trainer.termination import TerminatedError
from tests.unit.trainer.builders import (
    ENTRY_BYTES,
    SESSIONS,
    DrawnFeatures,
    data_settings,
    features_of,
    transmission,
)

TRANSMISSIONS = SESSIONS["sessions"] * SESSIONS["transmissions_per_session"]
PATIENCE_S = 30


def drawn(count: int = 3, *, receivers: int = 3, augmentation: Augmentation | None = None) -> HeimdallDataset:
    sent = [transmission(number, receivers=receivers) for number in range(count)]
    return HeimdallDataset(sent, DrawnFeatures(), augmentation=augmentation, seed=5)


@pytest.fixture
def mine(recorded: DataSettings, tmp_path: Path) -> DataSettings:
    """A copy of the shared recordings, to be spoiled."""
    shutil.copytree(Path(recorded.recordings_url.removeprefix("file:")), tmp_path / "recordings")
    shutil.copy(Path(recorded.recordings_url.removeprefix("file:")).parent / "heimdall.db", tmp_path)
    return data_settings(tmp_path)


def sent_of(settings: DataSettings) -> list[Transmission]:
    database = SessionStore.open(settings)
    try:
        return database.transmissions(database.approved())
    finally:
        database.close()


def left_out(lines: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What the log says of recordings that are left out."""
    return [line for line in lines if line["event"] == "recording left out"]


def data_file(settings: DataSettings, sent: Transmission, index: int) -> Path:
    root = Path(settings.recordings_url.removeprefix("file:"))
    return (root / sent.recordings[index].object_key).with_suffix(".sigmf-data")


def test_a_sample_holds_what_each_receiver_heard_and_where_everything_was() -> None:
    dataset = drawn()
    sample, sent = dataset[1], dataset.transmissions[1]
    assert tuple(sample["spectrograms"].shape) == (3, *SHAPE)
    assert np.array_equal(sample["spectrograms"][2].numpy(), DrawnFeatures().get(sent.recordings[2]))
    back = to_geographic(sample["receivers"].numpy(), sent.origin)
    assert back[2] == pytest.approx([sent.recordings[2].receiver.latitude, sent.recordings[2].receiver.longitude])
    assert to_geographic(sample["position"].numpy(), sent.origin) == pytest.approx([sent.latitude, sent.longitude])
    assert sample["origin"].tolist() == list(sent.origin)
    assert sample["receivers"].dtype == sample["position"].dtype == torch.float32
    assert "mask" not in sample


def test_the_dataset_of_a_database_holds_all_approved_sessions(recorded: DataSettings) -> None:
    dataset = HeimdallDataset.open(recorded)
    assert len(dataset) == TRANSMISSIONS
    recording = dataset.transmissions[0].recordings[0]
    samples = torch.from_numpy(RecordingStore.open(recorded).read(recording))
    assert torch.equal(dataset[0]["spectrograms"][0], mel_spectrogram(samples))


def test_the_dataset_of_some_sessions_holds_those_alone(recorded: DataSettings) -> None:
    dataset = HeimdallDataset.open(recorded, ["generated-7-001"])
    assert {sent.session_id for sent in dataset.transmissions} == {"generated-7-001"}


def test_a_session_that_was_withdrawn_can_be_taken_all_the_same(mine: DataSettings) -> None:
    database = SessionStore.open(mine)
    database.set_status("generated-7-001", "rejected")
    database.close()
    with pytest.raises(ConfigurationError, match=r"generated-7-001 \(rejected\)"):
        HeimdallDataset.open(mine, ["generated-7-001"])
    dataset = HeimdallDataset.open(mine, ["generated-7-001"], withdrawn=True)
    assert {sent.session_id for sent in dataset.transmissions} == {"generated-7-001"}


def test_a_rate_that_was_changed_is_told_though_the_features_are_in_the_cache(mine: DataSettings) -> None:
    sent = HeimdallDataset.open(mine).transmissions[0].recordings[0]
    wrong = replace(sent, sample_rate_hz=2 * sent.sample_rate_hz)
    source = FeatureSource(RecordingStore.open(mine), Caches.open(mine))
    assert source.check(sent) is None
    assert source.check(wrong) is not None


def test_without_augmentation_a_sample_is_always_the_same() -> None:
    dataset = drawn()
    first = dataset[0]
    dataset.set_epoch(3)
    assert all(torch.equal(first[name], dataset[0][name]) for name in first)  # type: ignore[literal-required]


def test_augmentation_depends_on_seed_epoch_and_index_alone() -> None:
    dataset, again = (drawn(augmentation=Augmentation()) for _ in range(2))
    first = dataset[1]["position"]
    assert torch.equal(first, again[1]["position"])
    dataset.set_epoch(1)
    assert not torch.equal(first, dataset[1]["position"])
    dataset.set_epoch(0)
    _ = dataset[0]
    assert torch.equal(first, dataset[1]["position"])


def test_a_batch_is_padded_to_its_largest_sample_and_says_so() -> None:
    few, many = drawn(1, receivers=2)[0], drawn(1, receivers=4)[0]
    batch = collate([few, many])
    assert tuple(batch["spectrograms"].shape) == (2, 4, *SHAPE)
    assert batch["mask"].tolist() == [[True, True, False, False], [True, True, True, True]]
    assert torch.equal(batch["spectrograms"][0, :2], few["spectrograms"])
    assert torch.equal(batch["receivers"][1], many["receivers"])
    assert not batch["spectrograms"][0, 2:].any()
    assert not batch["receivers"][0, 2:].any()
    assert torch.equal(batch["position"], torch.stack([few["position"], many["position"]]))
    assert batch["origin"].dtype == torch.float64


def test_features_are_computed_once(mine: DataSettings) -> None:
    source, recording = features_of(mine), sent_of(mine)[0].recordings[0]
    first = source.get(recording)
    shutil.rmtree(Path(mine.recordings_url.removeprefix("file:")))
    assert np.array_equal(features_of(mine).get(recording), first)


def test_features_of_other_content_scale_or_parameters_are_not_taken_for_the_same(mine: DataSettings) -> None:
    source, recording = features_of(mine), sent_of(mine)[0].recordings[0]
    first = source.get(recording)
    for other in (replace(recording, sha256="0" * 64), replace(recording, full_scale_dbm=-1.0)):
        assert source.check(other) is not None
    parameters = SpectrogramParameters(reference_dbm=-100.0)
    fresh = FeatureSource(RecordingStore.open(mine), Caches.open(mine), parameters).get(recording)
    assert fresh == pytest.approx(first - 1.0, abs=1e-5)


@pytest.mark.parametrize("content", [b"", b"cut short", bytes(ENTRY_BYTES), bytes(2 * ENTRY_BYTES)])
def test_a_cache_entry_that_is_broken_is_computed_again(mine: DataSettings, content: bytes) -> None:
    source, recording = features_of(mine), sent_of(mine)[0].recordings[0]
    first = source.get(recording)
    (entry,) = mine.cache_dir.rglob("*.features")
    entry.write_bytes(content)
    assert np.array_equal(source.get(recording), first)
    assert len(entry.read_bytes()) > first.nbytes


def test_recordings_that_can_not_be_read_are_reported_and_left_out(mine: DataSettings) -> None:
    sent = sent_of(mine)
    data_file(mine, sent[0], 1).unlink()
    for index in range(SESSIONS["receivers"]):
        data_file(mine, sent[1], index).write_bytes(b"")
    with capture_logs() as lines:
        kept = keep_readable(sent, features_of(mine), skip_limit=0.1, threads=2)
    assert [each.receiver.receiver_id for each in kept[0].recordings] == ["rx0", "rx2"]
    assert [item.id for item in kept] == [item.id for item in sent if item.id != sent[1].id]
    assert [(line["session"], line["transmission"], line["receiver"]) for line in left_out(lines)] == [
        ("generated-7-000", "generated-7-000-0000", "rx1"),
        ("generated-7-000", "generated-7-000-0001", "rx0"),
        ("generated-7-000", "generated-7-000-0001", "rx1"),
        ("generated-7-000", "generated-7-000-0001", "rx2"),
    ]


def test_a_recording_of_a_receiver_nobody_knows_the_place_of_is_reported_and_left_out(mine: DataSettings) -> None:
    with sqlite3.connect(mine.database_url.get_secret_value().removeprefix("sqlite:///")) as database:
        database.execute("DELETE FROM receivers WHERE session_id = 'generated-7-000' AND receiver_id = 'rx1'")
    database.close()
    with capture_logs() as lines:
        kept = keep_readable(sent_of(mine), features_of(mine), skip_limit=0.1, threads=2)
    assert len(left_out(lines)) == SESSIONS["transmissions_per_session"]
    assert all("no row for this receiver" in line["reason"] for line in left_out(lines))
    assert [each.receiver.receiver_id for each in kept[0].recordings] == ["rx0", "rx2"]


@pytest.mark.parametrize(
    "lost",
    [{"latitude": math.nan}, {"longitude": math.inf}, {"origin": (52.0, math.nan)}],
    ids=lambda each: next(iter(each)),
)
def test_a_transmission_that_came_from_nobody_knows_where_is_reported_and_left_out(lost: dict[str, Any]) -> None:
    sent = [transmission(number) for number in range(4)]
    sent[1] = replace(sent[1], **lost)
    with capture_logs() as lines:
        kept = keep_readable(sent, DrawnFeatures(), skip_limit=0.25, threads=2)
    assert [item.id for item in kept] == [item.id for item in sent if item is not sent[1]]
    assert {(line["session"], line["transmission"]) for line in left_out(lines)} == {("s1", "s1-0001")}
    with pytest.raises(DataError, match="3 of 12 recordings can't be read"):
        keep_readable(sent, DrawnFeatures(), skip_limit=0.2, threads=2)


def test_as_many_recordings_are_read_side_by_side_as_were_asked_for_and_no_more() -> None:
    threads, now, most = 3, 0, 0
    together, changed = threading.Barrier(threads), threading.Lock()

    class Counting(DrawnFeatures):
        def get(self, recording: Recording) -> Features:
            nonlocal now, most
            with changed:
                now += 1
                most = max(most, now)
            together.wait(PATIENCE_S)
            with changed:
                now -= 1
            return super().get(recording)

    sent = [transmission(number) for number in range(4)]
    assert keep_readable(sent, Counting(), skip_limit=0, threads=threads) == sent
    assert most == threads


def read_features(store: RecordingStore, caches: Caches, threads: int) -> None:
    keep_readable(
        [transmission(number) for number in range(4)], FeatureSource(store, caches), skip_limit=0, threads=threads
    )


def read_arrivals(store: RecordingStore, caches: Caches, threads: int) -> None:
    ArrivalSource(store, caches).prepare([transmission(number) for number in range(4)], threads)


@pytest.mark.parametrize("read", [read_features, read_arrivals])
def test_who_is_asked_to_end_waits_for_no_store_that_is_away(
    read: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does the process, which joins the threads that read before it ends."""
    threads, asked, settings = 2, threading.Semaphore(0), data_settings(tmp_path)
    ended = threading.Event()

    def away(*_: object) -> None:
        asked.release()
        raise ConnectionError("does not answer")

    def end(*_: object) -> None:
        ended.set()
        raise TerminatedError

    def end_when_all_wait() -> None:
        for _ in range(threads):
            assert asked.acquire(timeout=PATIENCE_S)
        # Again, where it came in the moment before a wait: Python sees to it only after that.
        while not ended.wait(0.05):
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)

    for name in ("FIRST_WAIT_S", "LONGEST_WAIT_S", "PATIENCE_S"):
        monkeypatch.setattr(recordings, name, PATIENCE_S)
    monkeypatch.setattr(Bucket, "_ask", away)
    store = RecordingStore(Bucket(settings, "bucket", ""))
    before, known = signal.signal(signal.SIGUSR1, end), set(threading.enumerate())
    ending = threading.Thread(target=end_when_all_wait)
    ending.start()
    try:
        with pytest.raises(TerminatedError):
            read(store, Caches.open(settings), threads)
    finally:
        signal.signal(signal.SIGUSR1, before)
    for thread in set(threading.enumerate()) - known:
        thread.join()

    assert not asked.acquire(blocking=False), "nobody has asked a second time"


def test_a_receiver_whose_row_holds_no_numbers_is_reported() -> None:
    heard = transmission(0).recordings[0]
    for lost in ({"longitude": math.inf}, {"noise_figure_db": math.nan}):
        about = replace(heard.receiver, **lost)
        assert "is no number" in str(DrawnFeatures().check(replace(heard, receiver=about)))


def test_more_unreadable_recordings_than_the_limit_are_an_error_that_names_them(mine: DataSettings) -> None:
    sent = sent_of(mine)
    for item in sent[:4]:
        data_file(mine, item, 0).unlink()
    with pytest.raises(DataError, match=r"^4 of 60 .*HEIMDALL_SKIP_LIMIT=0\.05 allows: session generated-7-000, trans"):
        HeimdallDataset.open(mine)


def test_exactly_as_many_as_the_limit_allows_are_no_error(mine: DataSettings) -> None:
    for item in sent_of(mine)[:3]:
        data_file(mine, item, 0).unlink()
    assert len(HeimdallDataset.open(mine)) == TRANSMISSIONS


def test_a_recording_too_short_for_a_spectrogram_is_reported_as_such(recorded: DataSettings, tmp_path: Path) -> None:
    from heimdall_trainer.data.generator import generate

    settings = data_settings(tmp_path)
    generate(settings, sessions=1, transmissions_per_session=1, receivers=1, samples=100)
    (recording,) = sent_of(settings)[0].recordings
    assert features_of(settings).check(recording) == "100 samples are too few: 543 are the least"


def test_the_data_module_divides_by_session(recorded: DataSettings) -> None:
    data = HeimdallDataModule(recorded, DataSpec(), batch_size=4)
    data.setup()
    loaders = {"train": data.train_dataloader(), "validation": data.val_dataloader(), "test": data.test_dataloader()}
    seen = {
        side: {sent.session_id for sent in loader.dataset.transmissions}  # type: ignore[union-attr, attr-defined]
        for side, loader in loaders.items()
    }
    assert seen == {side: set(getattr(data.split, side)) for side in seen}
    assert sum(len(ids) for ids in seen.values()) == SESSIONS["sessions"]
    assert len(set.union(*seen.values())) == SESSIONS["sessions"]


def test_reading_is_heard_of_while_it_goes_on(mine: DataSettings) -> None:
    beats: list[None] = []
    HeimdallDataModule(mine, DataSpec(arrivals=True), beat=lambda: beats.append(None)).prepare_data()
    sent = sent_of(mine)
    assert len(beats) == sum(len(each.recordings) for each in sent) + len(sent)


def test_what_one_process_of_a_node_has_computed_no_other_reads_again(
    mine: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    HeimdallDataModule(mine, DataSpec()).prepare_data()
    read: list[Any] = []
    monkeypatch.setattr(RecordingStore, "read", lambda _, recording: read.append(recording))

    HeimdallDataModule(mine, DataSpec()).setup()

    assert not read


def test_only_training_samples_are_augmented(recorded: DataSettings) -> None:
    data = HeimdallDataModule(recorded, DataSpec(), batch_size=4)
    for loader, changes in ((data.train_dataloader(), True), (data.val_dataloader(), False)):
        positions = []
        for epoch in (0, 1):
            loader.dataset.set_epoch(epoch)  # type: ignore[union-attr, attr-defined]
            positions.append(loader.dataset[0]["position"])  # type: ignore[union-attr]
        assert torch.equal(*positions) is not changes


def test_without_validation_and_test_there_are_no_loaders_for_them(recorded: DataSettings) -> None:
    data = HeimdallDataModule(recorded, DataSpec(validation_fraction=0, test_fraction=0))
    assert data.val_dataloader() == []
    assert data.test_dataloader() == []
    assert len(data.train_dataloader().dataset) == TRANSMISSIONS  # type: ignore[arg-type]


def test_the_identity_of_a_dataset_changes_with_a_single_recording(mine: DataSettings) -> None:
    spec = DataSpec()
    whole = HeimdallDataModule(mine, spec).dataset_identity()
    assert whole == HeimdallDataModule(mine, spec).dataset_identity()
    assert (whole["transmissions"], whole["recordings"]) == (TRANSMISSIONS, TRANSMISSIONS * SESSIONS["receivers"])
    shutil.rmtree(mine.cache_dir)
    data_file(mine, sent_of(mine)[0], 0).unlink()
    assert HeimdallDataModule(mine, spec).dataset_identity()["digest"] != whole["digest"]


@pytest.mark.parametrize(
    "table_and_change",
    [
        ("transmissions", "latitude = latitude + 1e-6"),
        ("receivers", "longitude = longitude + 1e-6"),
        ("receivers", "noise_figure_db = noise_figure_db + 1"),
        ("recording_sessions", "origin_latitude = origin_latitude + 1e-6"),
        ("recording_sessions", "center_frequency_hz = center_frequency_hz + 1"),
    ],
    ids=lambda each: f"{each[0]}: {each[1].split()[0]}",
)
def test_the_identity_of_a_dataset_changes_with_what_is_true_of_a_single_row(
    table_and_change: tuple[str, str], mine: DataSettings
) -> None:
    table, change = table_and_change
    whole = HeimdallDataModule(mine, DataSpec()).dataset_identity()
    with sqlite3.connect(mine.database_url.get_secret_value().removeprefix("sqlite:///")) as database:
        database.execute(f"UPDATE {table} SET {change} WHERE rowid = (SELECT min(rowid) FROM {table})")
    database.close()

    corrected = HeimdallDataModule(mine, DataSpec()).dataset_identity()

    assert corrected.pop("digest") != whole.pop("digest")
    assert corrected == whole, "nothing was left out for it"


@pytest.mark.parametrize(
    "other",
    [{"full_scale_dbm": -51.0}, {"sample_rate_hz": 100e3}, {"sample_count": 512}],
    ids=lambda each: next(iter(each)),
)
def test_the_digest_of_a_dataset_tells_scales_and_rates_apart_and_no_orders(other: dict[str, Any]) -> None:
    sent = [transmission(number) for number in range(2)]
    first, *rest = sent[0].recordings
    changed = replace(sent[0], recordings=(replace(first, **other), *rest))
    turned = replace(sent[0], recordings=(*reversed(rest), first))

    assert digest_of([changed, sent[1]]) != digest_of(sent)
    assert digest_of([sent[1], turned]) == digest_of(sent)


def test_a_side_that_can_not_be_read_is_told_before_training(mine: DataSettings) -> None:
    """However few they are: the test would find out when training is over."""
    tested = HeimdallDataModule(mine, DataSpec(test_fraction=0.2)).split.test
    shutil.rmtree(mine.cache_dir)
    lenient = mine.model_copy(update={"skip_limit": 0.9})
    for sent in sent_of(mine):
        if sent.session_id in tested:
            for number in range(len(sent.recordings)):
                data_file(mine, sent, number).unlink()

    with pytest.raises(DataError, match=f"sessions kept for test can be read .{tested[0]}.: bring them back"):
        HeimdallDataModule(lenient, DataSpec(test_fraction=0.2)).setup()


def test_the_split_of_a_checkpoint_is_kept_whenever_it_comes(mine: DataSettings) -> None:
    data = HeimdallDataModule(mine, DataSpec())
    whole = data.split
    moved = Split(train=(*whole.validation, *whole.test), validation=whole.train[:1], test=())
    state = {"sessions": moved.sides}
    early, late = (HeimdallDataModule(mine, DataSpec()) for _ in range(2))
    late.setup()
    for each in (early, late):
        each.load_state_dict(state)
        each.setup()
        assert each.split == moved
        assert each.state_dict() == state
        assert {sent.session_id for sent in each.train_dataloader().dataset.transmissions} == set(moved.train)  # type: ignore[attr-defined]
    assert len(early.dataset_identity()["train_sessions"]) == 2
    data.load_state_dict({})
    assert data.split == whole, "an older checkpoint tells of no sessions"


def test_all_processes_have_what_the_first_has_found(recorded: DataSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    first, other = (HeimdallDataModule(recorded, DataSpec(), seed=seed) for seed in (1, 2))
    first.setup()
    other.setup()
    assert other.split != first.split, "each by itself finds its own"
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "from_first", lambda _: first._found)
    for _ in range(2):
        other.setup("fit")
        assert other.split == first.split


def test_of_a_node_s_processes_the_first_alone_reads_all_recordings(
    recorded: DataSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (HeimdallDataModule(recorded, DataSpec()) for _ in range(2))
    first.prepare_data()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "from_first", lambda _: first._found)
    monkeypatch.setattr(HeimdallDataModule, "_find", lambda _: pytest.fail("it has read them itself"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    other.setup("fit")
    assert other.split == first.split
    assert len(other.train_dataloader().dataset) == len(first.train_dataloader().dataset)  # type: ignore[arg-type]


@pytest.mark.parametrize("gone", [1, 4])
def test_recordings_that_go_while_their_features_are_cached_are_left_out_where_arrivals_are_wanted(
    mine: DataSettings, gone: int
) -> None:
    HeimdallDataModule(mine, DataSpec()).setup()
    sent = sent_of(mine)
    for item in sent[:gone]:
        data_file(mine, item, 1).unlink()
    data = HeimdallDataModule(mine, DataSpec(arrivals=True))
    if gone > 3:
        with pytest.raises(DataError, match=r"HEIMDALL_SKIP_LIMIT=0\.05 allows: session generated-7-000, trans"):
            data.setup()
        return
    data.setup()
    kept = next(item for item in data._load()[1] if item.id == sent[0].id)
    assert [each.receiver.receiver_id for each in kept.recordings] == ["rx0", "rx2"]


def test_a_recording_that_goes_in_mid_training_is_named(mine: DataSettings) -> None:
    dataset = HeimdallDataset.open(mine)
    shutil.rmtree(mine.cache_dir)
    data_file(mine, dataset.transmissions[0], 1).unlink()
    with pytest.raises(DataError, match="session generated-7-000, transmission generated-7-000-0000: a record"):
        _ = dataset[0]


def test_a_session_that_was_asked_for_and_is_not_there_is_named(recorded: DataSettings) -> None:
    spec = DataSpec.model_validate({"sessions": {"ids": ["generated-7-000", "nowhere"]}})
    with pytest.raises(ConfigurationError, match=r"nowhere \(unknown\)"):
        HeimdallDataModule(recorded, spec).setup()
