"""Judges a localizer that was not trained, and prints what is said of it: one process of a group, or a group of one.

Called as `python -m tests.unit.trainer.judged`, with torchrun's variables where there are several.
"""

from __future__ import annotations

import json
import os
from typing import Final

import pytorch_lightning as L  # noqa: N812
import torch

from heimdall_trainer.data.dataset import HeimdallDataset
from heimdall_trainer.data.loader import ResumableLoader
from heimdall_trainer.model.module import LocalizationModule
from tests.unit.trainer.builders import DrawnFeatures, transmission

TRANSMISSIONS: Final = 5
"""Two processes have three each, in batches of two: the last batch of the second is a repetition alone."""


def judged(processes: int, rank: int) -> dict[str, float]:
    """Metrics of the model on some transmissions."""
    torch.manual_seed(1)
    dataset = HeimdallDataset([transmission(number) for number in range(TRANSMISSIONS)], DrawnFeatures())
    loader = ResumableLoader(dataset, batch_size=2, num_workers=0, seed=1, shuffle=False, replicas=processes, rank=rank)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module, found = LocalizationModule("test_resnet"), dict[str, float]()
    for each in (trainer.validate, trainer.test):
        found |= each(module, loader, verbose=False)[0]
    return found


if __name__ == "__main__":
    print(json.dumps(judged(int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]))))
