"""torchrun, which exits as it was told to: `python -m heimdall_trainer.torchrun`, see `group.become_torchrun`.

Its own exit code after SIGTERM is 1, whatever its processes have saved. And a container's first process ignores a
signal that it does not handle: torchrun handles none until its processes are there.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType


def main() -> None:
    """Start the processes, and end when they have ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as start

    try:
        start()
    except SignalException as told:
        sys.exit(128 + told.sigval)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


if __name__ == "__main__":
    main()
