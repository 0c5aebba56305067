"""The order of batches, and going on in the middle of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from heimdall_trainer.data.augment import Augmentation
from heimdall_trainer.data.dataset import HeimdallDataset, Sample
from heimdall_trainer.data.loader import ResumableLoader
from tests.unit.trainer.builders import DrawnFeatures, transmission

COUNT = 10
BATCH = 3
BATCHES = 4


def loader(*, num_workers: int = 0, seed: int = 5, shuffle: bool = True, **more: Any) -> ResumableLoader:
    sent = [transmission(number) for number in range(COUNT)]
    dataset = HeimdallDataset(sent, DrawnFeatures(), augmentation=Augmentation(dropout=0.3), seed=seed)
    return ResumableLoader(dataset, batch_size=BATCH, num_workers=num_workers, seed=seed, shuffle=shuffle, **more)


def in_epoch(loader: ResumableLoader, epoch: int) -> ResumableLoader:
    """As Lightning says it, which knows samplers and not datasets."""
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return loader


def order(loader: ResumableLoader) -> list[int]:
    return list(loader.sampler)


def same(batches: list[Sample], others: list[Sample]) -> bool:
    return len(batches) == len(others) and all(
        torch.equal(batch[name], other[name])  # type: ignore[literal-required]
        for batch, other in zip(batches, others, strict=True)
        for name in ("spectrograms", "receivers", "position", "mask")
    )


def test_every_sample_comes_once_an_epoch() -> None:
    assert sorted(order(loader())) == list(range(COUNT))
    assert len(list(loader())) == len(loader()) == BATCHES


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    first = order(in_epoch(loader(), 2))
    assert order(in_epoch(loader(), 2)) == first
    assert order(in_epoch(loader(), 3)) != first
    assert order(in_epoch(loader(seed=6), 2)) != first


def test_without_shuffling_the_order_is_that_of_the_dataset() -> None:
    assert order(in_epoch(loader(shuffle=False), 2)) == list(range(COUNT))


@pytest.mark.parametrize("given", [0, 1, 2, 3])
def test_going_on_in_mid_epoch_gives_the_batches_that_would_have_come(given: int) -> None:
    whole = list(in_epoch(loader(), 2))
    interrupted = in_epoch(loader(), 2)
    batches = iter(interrupted)
    before = [next(batches) for _ in range(given)]
    resumed = in_epoch(loader(), 2)
    resumed.load_state_dict(interrupted.state_dict() if given else {"epoch": 2, "batches": 0})
    after = list(resumed)
    assert same(before + after, whole)
    assert resumed.state_dict() == {"epoch": 2, "batches": BATCHES}


def test_workers_that_read_ahead_do_not_count_as_given() -> None:
    whole = list(in_epoch(loader(), 2))
    interrupted = in_epoch(loader(num_workers=1), 2)
    batches = iter(interrupted)
    next(batches)
    assert interrupted.state_dict() == {"epoch": 2, "batches": 1}
    del batches
    resumed = in_epoch(loader(num_workers=1), 2)
    resumed.load_state_dict(interrupted.state_dict())
    assert same(list(resumed), whole[1:])


def test_the_epoch_after_a_resumed_one_is_whole() -> None:
    resumed = in_epoch(loader(), 2)
    resumed.load_state_dict({"epoch": 2, "batches": 2})
    assert len(list(resumed)) == 2
    assert same(list(in_epoch(resumed, 3)), list(in_epoch(loader(), 3)))


def test_a_second_interruption_of_the_same_epoch_counts_from_its_beginning() -> None:
    resumed = in_epoch(loader(), 2)
    resumed.load_state_dict({"epoch": 2, "batches": 2})
    next(iter(resumed))
    assert resumed.state_dict() == {"epoch": 2, "batches": 3}


def test_a_state_of_another_epoch_leaves_nothing_out() -> None:
    resumed = in_epoch(loader(), 3)
    resumed.load_state_dict({"epoch": 2, "batches": 2})
    assert same(list(resumed), list(in_epoch(loader(), 3)))


def test_a_state_of_a_finished_epoch_starts_it_anew() -> None:
    resumed = in_epoch(loader(), 2)
    resumed.load_state_dict({"epoch": 2, "batches": BATCHES})
    assert len(list(resumed)) == BATCHES


def test_processes_that_train_together_share_the_samples() -> None:
    parts = [order(in_epoch(loader(replicas=2, rank=rank), 1)) for rank in range(2)]
    assert set(parts[0]).isdisjoint(parts[1])
    assert sorted(parts[0] + parts[1]) == list(range(COUNT))


@pytest.mark.parametrize("replicas", [1, 2, 3, 4, COUNT + 3])
def test_a_sample_counts_in_one_process_alone(replicas: int) -> None:
    places = [item["position"].tolist() for item in loader(shuffle=False).dataset]
    counted = []
    for rank in range(replicas):
        part = loader(shuffle=False, replicas=replicas, rank=rank)
        batches = list(part)
        assert len(batches) == len(part)
        for batch in batches:
            real = batch.get("counted", torch.ones(len(batch["position"]), dtype=torch.bool))
            counted += batch["position"][real].tolist()
    assert sorted(counted) == sorted(places)
