"""LocalizationModule: LocalizationNet as Lightning trains it."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from heimdall_trainer.data.dataset import Sample
from heimdall_trainer.model.losses import LOSSES
from heimdall_trainer.model.metrics import LocalizationMetrics
from heimdall_trainer.model.net import LocalizationNet


class LocalizationModule(pl.LightningModule):
    """The localizer with its loss, metrics, AdamW and cosine schedule."""

    def __init__(
        self,
        backbone: str = "convnext_tiny",
        *,
        pretrained: bool = False,
        freeze_backbone: bool = False,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
        loss: str = "gaussian",
    ) -> None:
        """Build the module.

        Args:
            backbone: Name of a timm model.
            pretrained: Start from timm's pretrained weights.
            freeze_backbone: Train the heads alone.
            learning_rate: Peak learning rate.
            weight_decay: Weight decay.
            loss: gaussian, huber or quantile.
        """
        super().__init__()
        self.save_hyperparameters()
        self._learning_rate, self._weight_decay = learning_rate, weight_decay
        self.net = LocalizationNet(backbone, pretrained=pretrained, freeze_backbone=freeze_backbone)
        self._loss = LOSSES[loss]
        self._metrics = {"val": LocalizationMetrics(), "test": LocalizationMetrics()}

    def forward(self, spectrograms: torch.Tensor, receivers: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        """See LocalizationNet.forward."""
        return self.net(spectrograms, receivers, mask)

    def training_step(self, batch: Sample, batch_idx: int) -> torch.Tensor:
        """Loss of a batch."""
        del batch_idx
        loss, _ = self._step(batch)
        self.log("train/loss", loss, on_step=True, on_epoch=True, batch_size=len(batch["position"]))
        return loss

    def validation_step(self, batch: Sample, batch_idx: int) -> None:
        """Loss and metrics of a batch."""
        del batch_idx
        self._evaluate("val", batch)

    def test_step(self, batch: Sample, batch_idx: int) -> None:
        """Loss and metrics of a batch."""
        del batch_idx
        self._evaluate("test", batch)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Log the metrics of the epoch."""
        self._log_metrics("test")

    def configure_optimizers(self) -> Any:
        """AdamW with a cosine schedule over all steps."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=self._learning_rate, weight_decay=self._weight_decay)
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _step(self, batch: Sample) -> tuple[torch.Tensor, torch.Tensor]:
        prediction = self.net(batch["spectrograms"], batch["receivers"], batch["mask"])
        return self._loss(prediction[:, :2], prediction[:, 2:], batch["position"]), prediction

    def _evaluate(self, side: str, batch: Sample) -> None:
        loss, prediction = self._step(batch)
        self.log(f"{side}/loss", loss, on_epoch=True, on_step=False, batch_size=len(batch["position"]))
        self._metrics[side].update(prediction, batch["position"])

    def _log_metrics(self, side: str) -> None:
        for name, value in self._metrics[side].compute().items():
            self.log(f"{side}/{name}", value)
