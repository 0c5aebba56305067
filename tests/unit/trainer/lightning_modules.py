"""A module and its data as a user of `lightning.pytorch`, the other of Lightning's two packages, writes them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, TensorDataset


class Digits(pl.LightningModule):
    """Tells apart the classes of small generated images, as Lightning's first example does with MNIST."""

    def __init__(self, hidden: int = 16, *, lr: float = 1e-2) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.layers = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 4)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.cross_entropy(self(batch[0]), batch[1]))

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)


class Images(pl.LightningDataModule):
    """Generated images, each with a bright quarter that tells its class."""

    def __init__(self, count: int = 64, batch_size: int = 16) -> None:
        super().__init__()
        self.count, self.batch_size = count, batch_size

    def train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        classes = torch.arange(self.count) % 4
        images = torch.rand(self.count, 1, 8, 8, generator=generator)
        for image, number in zip(images, classes, strict=True):
            row, column = 4 * (int(number) // 2), 4 * (int(number) % 2)
            image[:, row : row + 4, column : column + 4] += 1
        return DataLoader(TensorDataset(images, classes), batch_size=self.batch_size)

    val_dataloader = test_dataloader = train_dataloader
