"""The localizer as Lightning trains it."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any, Final

import pytorch_lightning as L  # noqa: N812 - the name its users know
import torch
from torch import Tensor
from torchmetrics import MeanMetric

from heimdall_trainer import group
from heimdall_trainer.data.dataset import Sample
from heimdall_trainer.data.spectrogram import SHAPE
from heimdall_trainer.model.losses import loss_by_name
from heimdall_trainer.model.metrics import MeanLoss, PositionMetrics
from heimdall_trainer.model.net import LocalizationNet

WARMUP_SHARE: Final = 0.05
"""Share of the steps in which the learning rate rises to its peak."""
LARGEST_GRADIENT: Final = 1.0
"""Norm of all weights' gradient where arrivals are given: one that contradicts the others has no bound by itself."""
FINAL_SHARE: Final = 0.01
"""The learning rate at the end, as a share of the peak."""
LOSS_OF_STEP: Final = "train/loss_step"
SHOWN_EVERY_S: Final = 1.0
"""How often a step's loss is shown to people."""
TRAINING_LOSS: Final = "training_loss"
"""What a checkpoint holds of the epoch that it was made in: the sum of the losses, and of how many samples."""


class LocalizationModule(L.LightningModule):
    """Trains a LocalizationNet with AdamW, a cosine schedule, and metrics in metres."""

    def __init__(
        self,
        backbone: str = "convnext_tiny",
        pretrained: bool = False,
        freeze_backbone: bool = False,
        *,
        learning_rate: float = 1.0e-3,
        weight_decay: float = 1.0e-5,
        loss: str = "gaussian",
        weights: str | Path | None = None,
        arrivals: bool = False,
        resumed: bool = False,
    ) -> None:
        """Make the module.

        Args:
            backbone: Name of a model of timm.
            pretrained: Start from trained weights.
            freeze_backbone: Train the heads alone.
            learning_rate: Peak of the schedule.
            weight_decay: Of matrices; biases and normalisations have none.
            loss: gaussian, huber or quantile.
            weights: File with weights of the backbone, instead of the library's.
            arrivals: Locate by times of arrival too.
            resumed: A checkpoint's weights come next: pretrained ones would be fetched for nothing.

        Raises:
            ConfigurationError: Backbone or loss are unknown.
        """
        super().__init__()
        # Not where weights come from: all attempts of a run must have the same hyperparameters.
        self.save_hyperparameters(ignore=["weights", "resumed"])
        fetched = pretrained and not resumed
        self.net = LocalizationNet(backbone, fetched, freeze_backbone, weights=weights, arrivals=arrivals)
        self.example_input_array = (torch.zeros(1, 2, *SHAPE), torch.zeros(1, 2, self.net.receiver_values))
        self._loss = loss_by_name(loss)
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay
        self.validation_metrics = PositionMetrics()
        self.test_metrics = PositionMetrics()
        # Not `self.log` with a batch size: it rounds the sizes' mean over processes down.
        # A batch whose loss is no number must be seen: left out, the worst checkpoint could be the best.
        self.validation_loss = MeanMetric(nan_strategy=math.inf)
        self.test_loss = MeanMetric(nan_strategy=math.inf)
        self.training_loss = MeanLoss()
        self._shown = -math.inf
        """When a step's loss was last shown."""

    def forward(self, spectrograms: Tensor, receivers: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Locate transmissions, see LocalizationNet.forward."""
        return self.net(spectrograms, receivers, mask)  # type: ignore[no-any-return]

    def training_step(self, batch: Sample, batch_idx: int) -> Tensor:
        """Loss of a batch."""
        del batch_idx
        loss, samples = self._loss(self._predict(batch), batch["position"]), len(batch["position"])
        self.training_loss.update(loss.detach() * samples, samples)
        self._log_step(loss.detach())
        return loss

    def on_train_epoch_end(self) -> None:
        """Log the loss of all batches, as early stopping may watch it, too."""
        # Lightning's own mean is that of one process's share, and of the batches since training was gone on with.
        mean = self.training_loss.compute()
        self.log("train/loss_epoch", mean, sync_dist=True)
        self.log("train/loss", mean, sync_dist=True, logger=False)
        self.training_loss.reset()

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Take a batch into the metrics."""
        del batch_idx
        prediction = self._predict(batch)
        # The scale is found here: it must not be judged by what it was found with.
        unscaled = torch.cat([prediction[:, :2], prediction[:, 2:] / self.net.sigma_scale], dim=-1)
        self._judge(unscaled, batch, self.validation_metrics, self.validation_loss)

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Take a batch into the metrics."""
        del batch_idx
        self._judge(self._predict(batch), batch, self.test_metrics, self.test_loss)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all batches, and let what is said from now on be as sure as it was right."""
        self.net.set_sigma_scale(self._log("val", self.validation_metrics, self.validation_loss)["sigma_scale"])

    def on_test_epoch_end(self) -> None:
        """Log the metrics of all batches."""
        self._log("test", self.test_metrics, self.test_loss)

    def configure_optimizers(self) -> Any:
        """AdamW (Loshchilov and Hutter 2019) with a short warm-up and a cosine over all steps (2017)."""
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        groups = [
            {"params": [each for each in trained if each.dim() > 1], "weight_decay": self._weight_decay},
            {"params": [each for each in trained if each.dim() <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self._learning_rate)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_share(step, steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        """Bound what a batch can do where arrivals are given."""
        if self.net.arrivals:
            gradient_clip_val, gradient_clip_algorithm = LARGEST_GRADIENT, "norm"
        self.clip_gradients(
            optimizer, gradient_clip_val=gradient_clip_val, gradient_clip_algorithm=gradient_clip_algorithm
        )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A checkpoint holds all weights: loading it must fetch none. All processes of a group call this."""
        kept = {**checkpoint.get("hyper_parameters", {}), "pretrained": False, "weights": None}
        checkpoint["hyper_parameters"] = kept
        with self.training_loss.sync_context():
            checkpoint[TRAINING_LOSS] = float(self.training_loss.total), float(self.training_loss.samples)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the epoch's loss: the first process, on behalf of those that train with it."""
        self.training_loss.reset()
        if group.is_first():
            self.training_loss.update(*checkpoint.get(TRAINING_LOSS, (0.0, 0.0)))

    def _log_step(self, loss: Tensor) -> None:
        """Log a step's loss: for the run each step's, for people to see what is new every second.

        `self.log` takes a quarter of a millisecond, as much as all else that Lightning does in a step.
        """
        trainer: Any = self.trainer
        if (self.global_step + 1) % trainer.log_every_n_steps == 0:
            for logger in self.loggers:
                logger.log_metrics({LOSS_OF_STEP: loss.item()}, self.global_step)
        now = time.monotonic()
        if trainer.is_last_batch or now - self._shown >= SHOWN_EVERY_S:
            self.log(LOSS_OF_STEP, loss, prog_bar=True, logger=False)
            self._shown = now

    def _predict(self, batch: Sample) -> Tensor:
        return self(batch["spectrograms"], batch["receivers"], batch.get("mask"))  # type: ignore[no-any-return]

    def _judge(self, prediction: Tensor, batch: Sample, metrics: PositionMetrics, loss: MeanMetric) -> None:
        truth = batch["position"]
        if "counted" in batch:
            prediction, truth = prediction[batch["counted"]], truth[batch["counted"]]
        # Also where nothing counts: processes that have seen nothing must still take part in gathering.
        metrics.update(prediction, truth)
        loss.update(self._loss(prediction, truth) if len(truth) else 0.0, weight=len(truth))

    def _log(self, prefix: str, metrics: PositionMetrics, loss: MeanMetric) -> dict[str, Tensor]:
        values = metrics.compute()
        # All processes have the same values already; Lightning warns of values that it was not asked to gather.
        self.log(f"{prefix}/loss", loss.compute(), prog_bar=True, sync_dist=True)
        self.log_dict({f"{prefix}/{name}": value for name, value in values.items()}, sync_dist=True)
        metrics.reset()
        loss.reset()
        return values


def schedule_share(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: a linear rise, then half a cosine.

    Args:
        step: Steps done.
        steps: Steps in all.
    """
    warmup = max(1, round(WARMUP_SHARE * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - warmup))
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))
