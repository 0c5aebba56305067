"""Modules as a user would bring them: plain Lightning, nothing of this project."""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)


class Line(pl.LightningModule):
    """Learns y = 2x from eight points, one batch an epoch."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = torch.nn.Linear(1, 1)
        self.lr = lr

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self(x), y)
        self.log("train/loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), self.lr)

    def train_dataloader(self) -> Any:
        return points()


class Shuffled(Line):
    """Four batches an epoch, each time in another order, which it draws as users do."""

    def __init__(self, how: str = "shuffle") -> None:
        super().__init__(lr=0.01)
        self.how = how

    def train_dataloader(self) -> Any:
        x = torch.linspace(-1, 1, 8).unsqueeze(1)
        data = TensorDataset(x, 2 * x)
        options: dict[str, Any] = {"shuffle": True}
        if self.how == "generator":
            options["generator"] = torch.Generator().manual_seed(7)
        elif self.how == "weighted":
            options = {"sampler": WeightedRandomSampler([1.0] * 8, 8, generator=torch.Generator())}
        elif self.how == "distributed":
            options = {"sampler": DistributedSampler(data, num_replicas=1, rank=0)}
        elif self.how == "workers":
            options |= {"num_workers": 1, "persistent_workers": True}
        elif self.how == "its own way":
            return Listed(data, batch_size=2, **options)
        return DataLoader(data, batch_size=2, **options)


class Noisy(TensorDataset):
    """Adds noise to each point as it is read, of each library's generator."""

    def __getitem__(self, index: Any) -> Any:
        x, y = super().__getitem__(index)
        return x + 0.1 * (torch.randn(1) + float(np.random.randn()) + random.gauss(0, 1)), y


class Away(TensorDataset):
    """Where it is read for the sixth time, its store is away for good, and the training is told to end."""

    reads = 0

    def __getitem__(self, index: Any) -> Any:
        Away.reads += 1
        if Away.reads == 6:
            os.kill(os.getppid() if get_worker_info() else os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return super().__getitem__(index)


class Told(TensorDataset):
    """Has the training told to end while it is read."""

    def __getitem__(self, index: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().__getitem__(index)


class AwayFrom(Line):
    """Reads from there, two points a batch."""

    def __init__(self, num_workers: int = 0) -> None:
        super().__init__()
        self.num_workers = num_workers

    def train_dataloader(self) -> Any:
        x = torch.linspace(-1, 1, 8).unsqueeze(1)
        return DataLoader(Away(x, 2 * x), batch_size=2, num_workers=self.num_workers)


class Dropping(Shuffled):
    """Draws random numbers wherever one can."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.5)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.dropout(x.expand(-1, 8)).mean(1, keepdim=True))

    def on_train_epoch_start(self) -> None:
        self.scale.fill_(random.uniform(0.5, 1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.scale * super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *_: Any) -> None:
        torch.rand(1)

    def train_dataloader(self) -> Any:
        loader = super().train_dataloader()
        return DataLoader(Noisy(*loader.dataset.tensors), batch_size=2, shuffle=True)


class Listed(DataLoader):  # type: ignore[type-arg]
    """Iterates in a way of its own, which nobody else can begin in the middle."""

    def __iter__(self) -> Any:
        return iter(list(super().__iter__()))


class SeveralShuffled(Shuffled):
    """Draws from two such loaders, of which the second begins again in mid-epoch."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return super().training_step([torch.cat(each) for each in zip(*batch.values(), strict=True)], batch_idx)

    def train_dataloader(self) -> Any:
        x = torch.linspace(-1, 1, 6).unsqueeze(1)
        return {"long": super().train_dataloader(), "short": DataLoader(TensorDataset(x, x), 2, shuffle=True)}


class LineWithExample(Line):
    """The same, which can be exported."""

    def __init__(self) -> None:
        super().__init__()
        self.example_input_array = torch.zeros(1, 1)


class LineWithoutData(Line):
    """The same, for a LightningDataModule; it validates and tests."""

    train_dataloader = pl.LightningModule.train_dataloader

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", torch.nn.functional.mse_loss(self(batch[0]), batch[1]))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test/loss", torch.nn.functional.mse_loss(self(batch[0]), batch[1]))


class ReadsMore(LineWithoutData):
    """Reads such data in a step, or to validate on."""

    train_dataloader = Line.train_dataloader

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.where == "step":
            batch = next(iter(self.told()))
        return super().training_step(batch, batch_idx)

    def val_dataloader(self) -> Any:
        return self.told() if self.where == "validation" else points()

    def told(self) -> Any:
        return DataLoader(Told(*points().dataset.tensors), batch_size=8)


class WorseAndWorse(LineWithoutData):
    """Its validation says so in the module's own hook, at the epoch's very end."""

    train_dataloader = Line.train_dataloader

    def val_dataloader(self) -> Any:
        return points()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass

    def on_train_epoch_end(self) -> None:
        self.log("val/loss", float(1 + self.current_epoch))


class Diverging(WorseAndWorse):
    """What it logs is no number from an epoch on."""

    def __init__(self, since: int = 0) -> None:
        super().__init__()
        self.since = since

    def on_train_epoch_end(self) -> None:
        self.log("val/loss", float("nan") if self.current_epoch >= self.since else 1.0)


class BetterAndBetter(WorseAndWorse):
    """By a metric of which more is better: up to its third epoch."""

    def on_train_epoch_end(self) -> None:
        self.log("val/accuracy", 2.0 - abs(2 - self.current_epoch))


class Plateau(WorseAndWorse):
    """Learns half as fast after each epoch, since none is better than the first."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), self.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/loss"}}


class ByHandOnPoints(Line):
    """Two steps of its optimizer for each batch, of data whose length is known."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            self.optimizers().step()


class ByHandUncounted(ByHandOnPoints):
    """Four batches an epoch; its optimizer is torch's own, whose steps Lightning does not count."""

    def optimizers(self, *, use_pl_optimizer: bool = False) -> Any:
        return super().optimizers(use_pl_optimizer=False)

    def train_dataloader(self) -> Any:
        return points(batch_size=2)


class Keeping(Line):
    """Makes its loader when it is made, and keeps it."""

    def __init__(self) -> None:
        super().__init__()
        self.loader = points(batch_size=2)

    def train_dataloader(self) -> Any:
        return self.loader


class Calling(Line):
    """Brings a callback of Lightning's own."""

    def configure_callbacks(self) -> Any:
        return [pl.callbacks.LambdaCallback(on_train_start=lambda *_: None)]


class Drawing(Line):
    """Logs a figure after each epoch, as with Lightning's MLFlowLogger."""

    def on_train_epoch_end(self) -> None:
        from matplotlib.figure import Figure

        figure = Figure()
        figure.subplots().plot([0, 1], [0, self.layer.weight.item()])
        self.logger.experiment.log_figure(self.logger.run_id, figure, f"lines/{self.current_epoch}.png")


class TwoInputs(Line):
    """Batches of three, of which two go in."""

    def forward(self, x: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return self.layer(x) + offset

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        x, offset, y = batch
        return torch.nn.functional.mse_loss(self(x, offset), y)

    def train_dataloader(self) -> Any:
        x = torch.linspace(-1, 1, 8).unsqueeze(1)
        return DataLoader(TensorDataset(x, 0 * x, 2 * x), batch_size=8)


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The eight points, of which nobody knows beforehand that they are eight."""

    def __iter__(self) -> Any:
        x = torch.linspace(-1, 1, 8).unsqueeze(1)
        return iter(zip(x, 2 * x, strict=True))


class ByHand(Line):
    """Two optimizers that are stepped by hand, on a stream; it validates nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = torch.nn.functional.mse_loss(self(batch[0]), batch[1])
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
        self.log("train/loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([each], self.lr) for each in self.parameters()]

    def train_dataloader(self) -> Any:
        return DataLoader(Stream(), batch_size=4)


class Trimmed(WorseAndWorse):
    """Keeps of its weights only those that it has learned, and finds the others again by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.strict_loading = False
        self.fixed = torch.nn.Linear(1, 1).requires_grad_(requires_grad=False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        learned = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith("fixed")}
        checkpoint["state_dict"] = {f"mine.{name}": value for name, value in learned.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name.removeprefix("mine."): value for name, value in state.items()}


class StoppedLine(Line):
    """Its first attempt is told to end in the middle of training."""

    def __init__(self, lr: float = 0.1, stop_at: int = 3) -> None:
        super().__init__(lr)
        self.stop_at = stop_at

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.global_step == self.stop_at and os.environ.get("HEIMDALL_ATTEMPT") == "1":
            os.kill(os.getpid(), signal.SIGTERM)


class StoppedLate(Line):
    """It is told to end, twice, when its last epoch is over."""

    def on_train_epoch_end(self) -> None:
        if self.current_epoch + 1 == self.trainer.max_epochs:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)


class Broken(Line):
    """Fails at its third step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        if self.global_step == 2:
            raise RuntimeError("boom")
        return super().training_step(batch, batch_idx)


class Points(pl.LightningDataModule):
    """The eight points, for training, validation and test."""

    def __init__(self, batch_size: int = 8) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> Any:
        return points(self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


class Demanding(Points):
    """Data that can't be made without an argument."""

    def __init__(self, size: int) -> None:
        super().__init__(size)


class NoModule:
    """Is no LightningModule."""


def points(batch_size: int = 8) -> Any:
    x = torch.linspace(-1, 1, 8).unsqueeze(1)
    return DataLoader(TensorDataset(x, 2 * x), batch_size=batch_size)
