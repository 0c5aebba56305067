"""Checkpoints come to disk whole or not at all."""

from __future__ import annotations

import errno
import resource
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from heimdall_trainer.checkpoint_io import make_checkpoint_io, save_whole

STATE: dict[str, Any] = {"state_dict": {"weight": torch.arange(100_000.0)}, "epoch": 3}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    save_whole(STATE, file)
    found = torch.load(file, weights_only=False)
    assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert found["epoch"] == 3
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture
def little_room() -> Iterator[None]:
    """No file may become larger than a part of the state."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_named_and_nothing_half_is_left(tmp_path: Path, little_room: None) -> None:
    file = tmp_path / "x.ckpt"
    with pytest.raises(OSError) as caught:
        save_whole(STATE, file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        save_whole(STATE, tmp_path / "gone/x.ckpt")


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    class Unsaveable:
        def __reduce__(self) -> Any:
            assert torch.load(file, weights_only=False)["epoch"] == 3
            raise ValueError("half-way")

    file = tmp_path / "x.ckpt"
    save_whole(STATE, file)
    with pytest.raises(ValueError, match="half-way"):
        save_whole({**STATE, "epoch": 4, "more": Unsaveable()}, file)
    assert torch.load(file, weights_only=False)["epoch"] == 3
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_trainer_of_either_package_goes_on_from_what_it_saved(package: str, tmp_path: Path) -> None:
    pl = import_module(package)
    model = import_module(f"{package}.demos.boring_classes").BoringModel

    def trainer(steps: int) -> Any:
        return pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            plugins=[make_checkpoint_io(pl)],
            default_root_dir=tmp_path,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    first, second, file = trainer(1), trainer(3), tmp_path / "x.ckpt"
    first.fit(model())
    first.save_checkpoint(file)
    assert list(tmp_path.iterdir()) == [file]
    # As a ModelCheckpoint of the user's own does, whose folder nobody has made.
    first.save_checkpoint(tmp_path / "mlflow/run/x.ckpt")
    first.save_checkpoint(f"memory://{package}/x.ckpt")
    assert fsspec.filesystem("memory").exists(f"/{package}/x.ckpt")
    second.fit(model(), ckpt_path=file, weights_only=False)
    assert (first.global_step, second.global_step) == (1, 3)
