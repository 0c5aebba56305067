"""How a checkpoint comes to disk: straight into a file beside its place, then renamed.

Lightning's own way makes it whole in memory first, twice, and writes it to the folder of temporary files before it is
moved: training waits for more than twice the work, and needs room for three copies of the state.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def make_checkpoint_io(pl: Any) -> Any:
    """What writes and reads checkpoints, for a Lightning package.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.

    Returns:
        A plugin that the package's Trainer takes.
    """

    class StraightCheckpointIO(pl.plugins.io.TorchCheckpointIO):  # type: ignore[misc]
        """Reads as Lightning does."""

        def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
            if "://" in str(path):
                super().save_checkpoint(checkpoint, path, storage_options)
                return
            file = Path(path)
            file.parent.mkdir(parents=True, exist_ok=True)  # a callback of the user's own leaves that to whoever writes
            save_whole(checkpoint, file)

    return StraightCheckpointIO()


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
