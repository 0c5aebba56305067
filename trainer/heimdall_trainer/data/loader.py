"""A data loader that goes on, after an interruption, with the batch that would have come next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler

from heimdall_trainer.data.dataset import HeimdallDataset, Sample, collate


class ResumableSampler(DistributedSampler[Sample]):
    """Indices in an order that depends on seed and epoch alone; the first of them can be left out.

    Lightning sets its epoch, and leaves a distributed sampler as it is, on one device too. All processes are given
    equally many, or they would wait for each other: the first few indices come a second time for that.
    """

    skip: int = 0
    """Indices that the next pass leaves out."""

    def __iter__(self) -> Iterator[Any]:
        indices = list(super().__iter__())
        start, self.skip = self.skip, 0
        return iter(indices[start:])


class ResumableLoader(DataLoader[Sample]):
    """Loads batches of a dataset; Lightning keeps its state in checkpoints (`state_dict`, `load_state_dict`)."""

    def __init__(
        self,
        dataset: HeimdallDataset,
        *,
        batch_size: int,
        num_workers: int,
        seed: int,
        shuffle: bool,
        replicas: int = 1,
        rank: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """Make a loader.

        Args:
            dataset: What is loaded.
            batch_size: Samples in a batch.
            num_workers: Processes that load; 0: this one.
            seed: Seed of the order.
            shuffle: Whether the order is drawn anew for every epoch.
            replicas: Processes that train together.
            rank: Which of them this is.
            pin_memory: Whether batches are put where a GPU reads faster.
        """
        order = ResumableSampler(dataset, num_replicas=replicas, rank=rank, shuffle=shuffle, seed=seed)
        super().__init__(
            dataset,
            batch_size=batch_size,
            sampler=order,
            num_workers=num_workers,
            collate_fn=collate,
            pin_memory=pin_memory,
        )
        self._order = order
        self._heimdall = dataset
        self._batch_samples = batch_size
        self._given = 0
        self._resume: dict[str, int] | None = None

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        # A generator: the epoch is read when the first batch is asked for, and Lightning sets it late.
        epoch = self._order.epoch
        resume, self._resume = self._resume, None
        self._given = 0
        if resume is not None and resume["epoch"] == epoch and resume["batches"] < len(self):
            self._given = resume["batches"]
        self._order.skip = self._given * self._batch_samples
        self._heimdall.set_epoch(epoch)
        for batch in super().__iter__():
            if self._order.num_replicas > 1:
                batch["counted"] = self._counted(len(batch["position"]))
            self._given += 1
            yield batch

    def _counted(self, size: int) -> torch.Tensor:
        """Which samples of the next batch are no repetition: shape (size,), bool."""
        first = self._given * self._batch_samples
        places = self._order.rank + self._order.num_replicas * torch.arange(first, first + size)
        return places < len(self._heimdall)

    def state_dict(self) -> dict[str, Any]:
        """Epoch, and how many of its batches were given out."""
        return {"epoch": self._order.epoch, "batches": self._given}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass go on where a state was taken, if it is of the same epoch."""
        self._resume = {"epoch": int(state["epoch"]), "batches": int(state["batches"])}
