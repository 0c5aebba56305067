"""Where a process trains."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch

from heimdall_trainer import group
from heimdall_trainer.errors import ConfigurationError


@pytest.mark.parametrize(("cuda", "accelerator"), [(True, "gpu"), (False, "cpu")])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_gpu_is_used_where_there_is_one_and_the_processor_otherwise(
    cuda: bool, accelerator: str, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert group.trainer_options(pl)["accelerator"] == accelerator


@pytest.mark.parametrize("told", ["1:4", "gpu", "-1", ""])
@pytest.mark.parametrize("name", ["PET_NNODES", "PET_NPROC_PER_NODE"])
def test_a_group_of_no_fixed_size_is_refused(name: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, told)
    with pytest.raises(ConfigurationError, match=f"{name} is '{told}': give one number"):
        group.is_group()
