"""How a checkpoint comes to disk: straight into a file beside its place, then renamed.

Lightning's own way makes it whole in memory first, twice, and writes it to the folder of temporary files before it is
moved: training waits for more than twice the work, and needs room for three copies of the state.

A disk that has much to write back makes whoever writes wait. So of the trainer's own checkpoints the training thread
makes the bytes alone (`save`), and another one writes them; whoever else saves one finds it on disk when the call
returns.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Final

import structlog

from heimdall_tracking.files import whole
from heimdall_tracking.redact import described

PIECE: Final = 16 * 2**20
"""So many bytes are written at a time."""

log = structlog.get_logger()


def make_checkpoint_io(pl: Any) -> Any:
    """What writes and reads checkpoints, for a Lightning package.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.

    Returns:
        A plugin that the package's Trainer takes.
    """

    class StraightCheckpointIO(pl.plugins.io.TorchCheckpointIO):  # type: ignore[misc]
        """Reads as Lightning does."""

        wanted: Path | None = None
        """The file whose content is only to be held in memory."""
        taken: Snapshot | None = None
        """That content."""

        def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
            if "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            file = Path(path)
            file.parent.mkdir(parents=True, exist_ok=True)  # a callback of the user's own leaves that to whoever writes
            if file == self.wanted:
                self.taken = _take(checkpoint)
                if self.taken is not None:
                    return
            save_whole(checkpoint, file)

    return StraightCheckpointIO()


def save(trainer: Any, file: Path) -> Snapshot | None:
    """Have Lightning make a checkpoint, which may still have to be written; all processes of a group call this.

    Args:
        trainer: Lightning's, with a plugin of make_checkpoint_io.
        file: Where it is to be, in a folder that is there.

    Returns:
        What is to be written to the file; None where nothing is: by the processes behind the first, where the strategy
        writes by itself (as sharded ones do, all processes together), and where there is no room for it in memory.

    Raises:
        OSError: It was written, and the disk is full, or the folder can't be written to.
    """
    plugin = trainer.strategy.checkpoint_io
    plugin.wanted = file
    try:
        trainer.save_checkpoint(file)
        taken: Snapshot | None = plugin.taken
        return taken
    finally:
        plugin.wanted = plugin.taken = None


class Snapshot:
    """A checkpoint as it was when it was taken, in memory; what training does afterwards does not change it."""

    def __init__(self, checkpoint: dict[str, Any]) -> None:
        """Make the bytes of a checkpoint's file: whoever writes them later takes no turn of Python's from training.

        Args:
            checkpoint: What torch can save.

        Raises:
            Exception: There is no memory for it, or it can't be pickled.
        """
        import torch

        self._file: BinaryIO | None = _memory()
        torch.save(checkpoint, self._file)

    def __del__(self) -> None:
        """One that was not written is forgotten all the same."""
        if self._file is not None:
            _forget(self._file)

    def write(self, file: Path) -> None:
        """Write it, whole or not at all, and forget it; once.

        Raises:
            OSError: The disk is full, or the folder can't be written to.
        """
        made, self._file = self._file, None
        assert made is not None, "a snapshot is written once"  # noqa: S101
        try:
            made.seek(0)
            with _whole(file) as stream:
                shutil.copyfileobj(made, stream, PIECE)
        finally:
            _forget(made)


def _memory() -> BinaryIO:
    """A file in memory.

    Data loaders' processes begin while a snapshot waits, and would hold what was in this one's own memory for an epoch.
    """
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("checkpoint"), "w+b")
    return BytesIO()  # where processes begin empty


def _forget(file: BinaryIO) -> None:
    file.truncate(0)  # for whoever has it open, too
    file.close()


def _take(checkpoint: dict[str, Any]) -> Snapshot | None:
    """A snapshot; None where there can be none, so that the checkpoint is to be written as it is."""
    try:
        return Snapshot(checkpoint)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, writing it tells
        log.warning("a checkpoint can't be held in memory: training waits until it is written", reason=described(error))
        return None


def save_whole(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        checkpoint: What torch can save.
        file: Where it is to be, in a folder that is there.

    Raises:
        OSError: The disk is full, or the folder can't be written to.
    """
    import torch

    with _whole(file) as stream:
        torch.save(checkpoint, stream)


@contextmanager
def _whole(file: Path) -> Iterator[BinaryIO]:
    """A file to write to, which takes another one's place once it is whole."""
    with whole(file) as part:
        try:
            with part.open("wb") as stream:
                yield stream
        except RuntimeError as error:
            # Where writing fails, torch's own error says nothing of the disk.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
