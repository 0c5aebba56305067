"""Where a process trains."""

from __future__ import annotations

import os

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


@pytest.mark.parametrize(
    ("told", "folder"),
    [({}, os.devnull), ({"PET_LOG_DIR": "logs"}, "logs"), ({"PET_TEE": "3"}, None), ({"PET_REDIRECTS": "3"}, None)],
    ids=["nothing", "a folder", "to write it to files too", "to write it to files"],
)
def test_torchrun_makes_a_folder_for_what_processes_print_where_it_is_told_to(
    told: dict[str, str], folder: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = {"PATH": os.environ["PATH"], **told}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(os, "execv", lambda *_: None)
    group.become_torchrun(["run"])
    assert environment.get("PET_LOG_DIR") == folder


@pytest.mark.parametrize("rank", ["0", "1"])
def test_what_the_first_makes_alone_is_waited_for_longer_than_for_each_other(
    rank: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before it begins: making something to wait by takes all of them."""
    did: list[object] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", rank)
    dist = torch.distributed
    monkeypatch.setattr(dist, "new_group", lambda timeout, backend: did.append((timeout, backend)) or "patient")
    monkeypatch.setattr(dist, "barrier", lambda group: did.append(f"waited, {group}"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda group: None)
    made = group.by_first(lambda: did.append("made") or "this")
    is_first = rank == "0"
    assert made == ("this" if is_first else None)
    assert did == [(group.ALONE_TIMEOUT, "gloo"), *(["made"] if is_first else []), "waited, patient"]
    assert group.ALONE_TIMEOUT > 10 * group.COLLECTIVE_TIMEOUT
