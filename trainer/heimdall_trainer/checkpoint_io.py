"""How a checkpoint comes to disk: straight into a file beside its place, then renamed.

Lightning's own way makes it whole in memory first, twice, and writes it to the folder of temporary files before it is
moved: training waits for more than twice the work, and needs room for three copies of the state.

A disk that has much to write back makes whoever writes wait. So the trainer's own checkpoints are only copied by the
training thread (`save`), and written by another one; whoever else saves one finds it on disk when the call returns.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import structlog

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
        """The file whose content is only to be copied."""
        taken: Snapshot | None = None
        """The copy."""

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
        writes by itself (as sharded ones do, all processes together), and where the state can't be copied.

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
        """Copy a checkpoint: tensors to the processor's memory, all else as it would come back from a file.

        Args:
            checkpoint: What torch can save.

        Raises:
            Exception: There is no memory for it, or it can't be pickled, or would not come back.
        """
        self._content: dict[str, Any] | None = _copy(checkpoint)

    def write(self, file: Path) -> None:
        """Write it, whole or not at all, and forget it; once.

        Raises:
            OSError: The disk is full, or the folder can't be written to.
        """
        content, self._content = self._content, None
        assert content is not None, "a snapshot is written once"  # noqa: S101
        save_whole(content, file)


def _take(checkpoint: dict[str, Any]) -> Snapshot | None:
    """A snapshot; None where there can be none, so that the checkpoint is to be written as it is."""
    try:
        return Snapshot(checkpoint)
    except Exception as error:  # noqa: BLE001 - whatever is wrong with it, writing it tells
        reason = f"{type(error).__name__}: {error}"
        log.warning("a checkpoint can't be copied: training waits until it is written", reason=reason)
        return None


def _copy(state: Any) -> Any:
    """A copy that shares nothing with the original.

    By pickling, as saving does: what is saved can be copied. Tensors' bytes go by another way: storage by storage, so
    that tensors that share one in the original share one in the copy too.
    """
    import torch

    copies: list[Any] = []
    made: dict[int, tuple[Any, Any]] = {}
    """Storages and their copies, by number: the original stays, so that no other one gets its number."""

    def copy(storage: Any) -> Any:
        number = storage._cdata  # noqa: SLF001 - torch's own saving knows a storage by it
        if number not in made:
            empty: Any = torch.UntypedStorage(storage.nbytes())  # type: ignore[no-untyped-call]
            made[number] = storage, empty.copy_(storage)
        return made[number][1]

    class Pickler(pickle.Pickler):
        def persistent_id(self, item: Any) -> int | None:
            if isinstance(item, torch.storage.TypedStorage):
                typed: Any = torch.storage.TypedStorage
                inner = copy(item._untyped_storage)  # noqa: SLF001
                copies.append(typed(wrap_storage=inner, dtype=item.dtype, _internal=True))
            elif isinstance(item, torch.UntypedStorage):
                copies.append(copy(item))
            else:
                return None
            return len(copies) - 1

    class Unpickler(pickle.Unpickler):
        def persistent_load(self, number: int) -> Any:
            return copies[number]

    stream = io.BytesIO()
    Pickler(stream, pickle.HIGHEST_PROTOCOL).dump(state)
    stream.seek(0)
    return Unpickler(stream).load()


def save_whole(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint, whole or not at all.

    Args:
        checkpoint: What torch can save.
        file: Where it is to be, in a folder that is there.

    Raises:
        OSError: The disk is full, or the folder can't be written to.
    """
    import torch

    part = file.with_name(f"{file.name}.part")
    try:
        with part.open("wb") as stream:
            torch.save(checkpoint, stream)
        part.replace(file)
    except BaseException as error:
        part.unlink(missing_ok=True)
        # Where writing fails, torch's own error says nothing of the disk, and the disk's nothing of the file.
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.errno is not None and cause.filename is None:
            raise OSError(cause.errno, cause.strerror, str(file)) from None
        raise
