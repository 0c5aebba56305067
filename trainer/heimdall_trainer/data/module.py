"""HeimdallDataModule: training, validation and test data of recording sessions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, Sampler

from heimdall_api.types import DataSpec
from heimdall_trainer.data.dataset import HeimdallDataset, Sample, collate
from heimdall_trainer.data.sessions import SessionStore
from heimdall_trainer.data.split import Split, split_sessions
from heimdall_trainer.settings import DataSettings


class EpochSampler(Sampler[int]):
    """An order that depends on seed and epoch alone, so that a resumed training sees what it would have seen."""

    def __init__(self, size: int, seed: int) -> None:
        self._size = size
        self._seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
        return iter(torch.randperm(self._size, generator=generator).tolist())

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        self.epoch = epoch


class HeimdallDataModule(pl.LightningDataModule):
    """Recording sessions, divided so that none is on two sides."""

    def __init__(
        self, settings: DataSettings, data: DataSpec, *, batch_size: int = 32, num_workers: int = 0, seed: int = 42
    ) -> None:
        """Prepare; nothing is read before setup.

        Args:
            settings: Where recordings lie.
            data: Which sessions, and how they are divided.
            batch_size: Transmissions in a batch.
            num_workers: Processes that load data.
            seed: Seed of division, order and augmentation.
        """
        super().__init__()
        self._settings = settings
        self._data = data
        self._batch_size = batch_size
        self._num_workers = num_workers
        self._seed = seed
        self.split: Split | None = None
        self._sets: dict[str, HeimdallDataset] = {}

    def setup(self, stage: str | None = None) -> None:
        """Divide the sessions and open them, once, whatever the stage."""
        del stage
        if self._sets:
            return
        store = SessionStore.open(self._settings)
        sessions = store.approved(self._data.sessions.ids)
        store.close()
        self.split = split_sessions(
            sessions,
            validation_fraction=self._data.validation_fraction,
            test_fraction=self._data.test_fraction,
            seed=self._seed,
        )
        sides = {"train": self.split.train, "validation": self.split.validation, "test": self.split.test}
        self._sets = {
            side: HeimdallDataset(self._settings, ids, augment=side == "train", seed=self._seed)
            for side, ids in sides.items()
            if ids
        }

    def dataset_identity(self) -> dict[str, Any]:
        """What each side is made of."""
        return {side: dataset.identity() for side, dataset in self._sets.items()}

    def train_dataloader(self) -> DataLoader[Sample]:
        """Batches in an order of their own in each epoch."""
        dataset = self._sets["train"]
        sampler = EpochSampler(len(dataset), self._seed)
        return self._loader(dataset, sampler=sampler)

    def val_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Batches for validation; empty where no session is kept for it."""
        return self._loader(self._sets["validation"]) if "validation" in self._sets else []

    def test_dataloader(self) -> DataLoader[Sample] | list[Any]:
        """Batches for the test; empty where no session is kept for it."""
        return self._loader(self._sets["test"]) if "test" in self._sets else []

    def _loader(self, dataset: HeimdallDataset, sampler: EpochSampler | None = None) -> DataLoader[Sample]:
        return DataLoader(
            dataset,
            batch_size=self._batch_size,
            sampler=sampler,
            num_workers=self._num_workers,
            collate_fn=collate,
            persistent_workers=self._num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )
