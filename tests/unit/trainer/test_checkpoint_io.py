"""Checkpoints come to disk whole or not at all, as they were when they were made."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch

from heimdall_trainer import checkpoint_io
from heimdall_trainer.checkpoint_io import Snapshot, make_checkpoint_io, save, save_whole

STATE: dict[str, Any] = {"state_dict": {"weight": torch.arange(100_000.0)}, "epoch": 3}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    save_whole(STATE, file)
    found = torch.load(file, weights_only=False)
    assert torch.equal(found["state_dict"]["weight"], STATE["state_dict"]["weight"])
    assert found["epoch"] == 3
    assert list(tmp_path.iterdir()) == [file]


@contextmanager
def little_room() -> Iterator[None]:
    """No file may become larger than a part of the state."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_takes_no_more_is_named_and_nothing_half_is_left(tmp_path: Path) -> None:
    file = tmp_path / "x.ckpt"
    with little_room(), pytest.raises(OSError) as caught:
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


class Place:
    """A data loader's state, of a class of its own."""

    def __init__(self) -> None:
        self.order = [3, 1, 2]


def test_what_training_does_after_a_snapshot_is_not_in_its_file(tmp_path: Path) -> None:
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step() -> None:
        model(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()

    step()
    place, seen = Place(), {"batches": [1]}
    state: dict[str, Any] = {
        "state_dict": model.state_dict(),
        "optimizer_states": [optimizer.state_dict()],
        "place": place,
        "seen": seen,
    }
    save_whole(state, tmp_path / "at-once.ckpt")
    snapshot = Snapshot(state)
    step()
    place.order.append(4)
    seen["batches"].append(2)
    del state["seen"]

    snapshot.write(tmp_path / "later.ckpt")

    at_once, later = (torch.load(tmp_path / name, weights_only=False) for name in ("at-once.ckpt", "later.ckpt"))
    assert later["place"].order == [3, 1, 2]
    assert later["seen"] == {"batches": [1]}
    assert not torch.equal(later["state_dict"]["weight"], model.weight)
    torch.testing.assert_close(later["state_dict"], at_once["state_dict"], rtol=0, atol=0)
    moments = [each["optimizer_states"][0]["state"] for each in (later, at_once)]
    torch.testing.assert_close(*moments, rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="elsewhere processes begin empty, and hold nothing")
def test_a_process_that_began_while_a_snapshot_waited_holds_nothing_of_it(tmp_path: Path) -> None:
    """A data loader's process lives for an epoch: what it holds is charged to the pod."""
    snapshot = Snapshot(STATE)
    child = os.fork()
    if child == 0:
        while True:
            signal.pause()
    held = Path(f"/proc/{child}/fd/{snapshot._file.fileno()}")  # type: ignore[union-attr]
    try:
        assert held.stat().st_size > 400_000
        snapshot.write(tmp_path / "x.ckpt")
        assert held.stat().st_blocks == 0
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert torch.load(tmp_path / "x.ckpt", weights_only=False)["epoch"] == 3


def test_a_snapshot_s_file_is_no_larger_than_what_it_is_of(tmp_path: Path) -> None:
    """Tied weights, and parts of one tensor, are there once."""
    whole = torch.arange(100_000.0)
    parameter = torch.nn.Parameter(whole.view(100, 1000))
    state = {"whole": whole, "tied": parameter, "part": whole[10:20:2], "empty": torch.empty(0), "half": whole.half()}
    save_whole(state, tmp_path / "at-once.ckpt")

    Snapshot(state).write(tmp_path / "later.ckpt")

    sizes = [(tmp_path / name).stat().st_size for name in ("at-once.ckpt", "later.ckpt")]
    assert sizes[0] == pytest.approx(sizes[1], abs=1000)
    found = torch.load(tmp_path / "later.ckpt", weights_only=False)
    assert isinstance(found["tied"], torch.nn.Parameter)
    assert found["tied"].data_ptr() == found["whole"].data_ptr()
    assert found["part"].tolist() == [10, 12, 14, 16, 18]
    torch.testing.assert_close(dict(found), state)


class Recorded:
    """As a trainer that saves what it is given through its strategy."""

    def __init__(self, strategy: Any, state: dict[str, Any]) -> None:
        self.strategy, self.state = strategy, state

    def save_checkpoint(self, file: Path) -> None:
        self.strategy.save_checkpoint(self.state, file)


def through_plugin(state: dict[str, Any]) -> Recorded:
    plugin = make_checkpoint_io(import_module("pytorch_lightning"))
    return Recorded(SimpleNamespace(checkpoint_io=plugin, save_checkpoint=plugin.save_checkpoint), state)


def test_only_what_is_asked_for_is_written_later(tmp_path: Path) -> None:
    trainer, file = through_plugin(STATE), tmp_path / "folder/x.ckpt"
    snapshot = save(trainer, file)
    assert snapshot is not None
    assert not list(file.parent.iterdir())

    trainer.save_checkpoint(file)
    assert torch.load(file, weights_only=False)["epoch"] == 3
    file.unlink()
    snapshot.write(file)
    assert torch.load(file, weights_only=False)["epoch"] == 3


def test_a_checkpoint_of_the_user_s_own_that_is_made_meanwhile_is_written_at_once(tmp_path: Path) -> None:
    """As by a hook that saves something beside it."""
    trainer = through_plugin(STATE)
    whole = trainer.strategy.save_checkpoint

    def save_both(state: dict[str, Any], file: Path) -> None:
        whole(state, tmp_path / "mine.ckpt")
        whole(state, file)

    trainer.strategy.save_checkpoint = save_both
    later = save(trainer, tmp_path / "later.ckpt")
    assert later is not None
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.ckpt"]
    later.write(tmp_path / "later.ckpt")


def test_a_strategy_that_writes_by_itself_writes_at_once(tmp_path: Path) -> None:
    """As sharded ones do, whose processes write together."""
    trainer = through_plugin(STATE)
    trainer.strategy.save_checkpoint = save_whole
    assert save(trainer, tmp_path / "x.ckpt") is None
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]


class Full(io.BytesIO):
    """Memory that has no more room."""

    def write(self, _: Any) -> int:
        raise MemoryError


def test_a_state_that_memory_has_no_room_for_is_written_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_io, "_memory", Full)
    assert save(through_plugin(STATE), tmp_path / "x.ckpt") is None
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [tmp_path / "x.ckpt"]
    assert torch.load(tmp_path / "x.ckpt", weights_only=False)["epoch"] == 3


def test_a_disk_that_takes_no_more_is_named_by_whoever_writes_later_too(tmp_path: Path) -> None:
    file, snapshot = tmp_path / "x.ckpt", Snapshot(STATE)
    with little_room(), pytest.raises(OSError) as caught:
        snapshot.write(file)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(file))
    assert not list(tmp_path.iterdir())


def test_a_state_that_can_not_be_saved_is_told_where_it_is_made(tmp_path: Path) -> None:
    with pytest.raises(Exception, match=r"local object .*<lambda>"):
        save(through_plugin({**STATE, "more": lambda: None}), tmp_path / "x.ckpt")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers")
@pytest.mark.filterwarnings("ignore:You.re resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
def test_a_trainer_of_either_package_goes_on_from_what_it_saved(package: str, tmp_path: Path) -> None:
    pl = import_module(package)
    model = import_module(f"{package}.demos.boring_classes").BoringModel

    def trainer(steps: int, scale: float = 2.0**16) -> Any:
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        return pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            plugins=[make_checkpoint_io(pl), pl.plugins.MixedPrecision("16-mixed", "cpu", scaler)],
            default_root_dir=tmp_path,
            limit_val_batches=0,
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=False,
        )

    first, second, file = trainer(1, scale=512.0), trainer(3), tmp_path / "x.ckpt"
    first.fit(model())
    snapshot = save(first, file)
    assert snapshot is not None
    assert not list(tmp_path.iterdir())
    snapshot.write(file)
    assert list(tmp_path.iterdir()) == [file]
    # As a ModelCheckpoint of the user's own does, whose folder nobody has made.
    first.save_checkpoint(tmp_path / "mlflow/run/x.ckpt")
    first.save_checkpoint(f"memory://{package}/x.ckpt")
    assert fsspec.filesystem("memory").exists(f"/{package}/x.ckpt")
    second.fit(model(), ckpt_path=file, weights_only=False)
    assert (first.global_step, second.global_step) == (1, 3)
    assert second.precision_plugin.scaler.get_scale() == 512, "what the scaler had found"
