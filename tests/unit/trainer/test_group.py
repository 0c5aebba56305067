"""Where a process trains."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from heimdall_trainer import group


@pytest.mark.parametrize(("cuda", "accelerator"), [(True, "gpu"), (False, "cpu")])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_is_used_where_there_is_one_and_the_processor_otherwise(
    cuda: bool, accelerator: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert group.trainer_options(pl)["accelerator"] == accelerator
