"""Files that are whole or not there: written beside their place, then renamed."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def whole(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """A path to write to, which takes a file's place once it is whole; what was there stays until then.

    Args:
        file: The file, in a folder that is there.
        shared: Whether others may write it at the same time: then the path is nobody else's. Without that, what a kill
            has cut short is written over by the next try.

    Raises:
        OSError: The disk takes nothing more; it names the file, where it named none.
    """
    part = file.with_name(f".{file.name}.{secrets.token_hex(8)}.part" if shared else f"{file.name}.part")
    try:
        yield part
        part.replace(file)
    except BaseException as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            raise OSError(error.errno, error.strerror, str(file)) from None
        raise
