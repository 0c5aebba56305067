"""torchrun, which exits as it was told to: `python -m heimdall_trainer.torchrun`, see `group.become_torchrun`.

Its own exit code after SIGTERM is 1, whatever its processes have saved. And a container's first process ignores a
signal that it does not handle: torchrun handles none until its processes are there. A second Ctrl-C reaches this
process alone, as its processes have sessions of their own, and is to end them all. Without an operator it also sees to
it that the run is ended where the process that should have done it was killed, or never came so far.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import FrameType
from typing import Any, Final

HURRIED: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
"""How long MLflow is waited for in the end, when the processes that have something to deliver have waited already."""


def main() -> None:
    """Start the processes, and end when they have ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _end)
    try:
        _start()
    except BaseException as error:
        told = isinstance(error, SystemExit) and error.code in (128 + signal.SIGTERM, 128 + signal.SIGINT)
        _end_run(told=told)
        raise


def _start() -> None:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.run import main as start

    _watch_for_second()
    try:
        start()
    except SignalException as told:
        sys.exit(128 + told.sigval)


def _watch_for_second() -> None:
    """Have a second Ctrl-C end the processes at once, once they are there: torchrun would go on waiting for them."""
    from torch.distributed.elastic.agent.server import local_elastic_agent

    agent: Any = local_elastic_agent
    begin = agent.start_processes

    def begin_and_watch(*arguments: Any, **more: Any) -> Any:
        processes = begin(*arguments, **more)
        signal.signal(signal.SIGINT, Interrupts(processes.pids).take)
        return processes

    agent.start_processes = begin_and_watch


class Interrupts:
    """Takes Ctrl-C while processes train."""

    def __init__(self, pids: Callable[[], Mapping[int, int]]) -> None:
        """Nobody has asked yet.

        Args:
            pids: Tells the processes by their local rank; each leads a process group.
        """
        self._pids = pids
        self._is_told = False

    def take(self, number: int, frame: FrameType | None) -> None:
        """Have torchrun tell the processes to end; the second time, kill them."""
        from torch.distributed.elastic.multiprocessing import SignalException

        del frame
        if not self._is_told:
            self._is_told = True
            raise SignalException("Ctrl-C", signal.Signals(number))
        for pid in self._pids().values():
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        os.write(2, b"\nAsked twice to end: ended at once, and MLflow was not told.\n")
        os._exit(128 + number)


def _end(number: int, frame: FrameType | None) -> None:
    del frame
    sys.exit(128 + number)


def _end_run(*, told: bool) -> None:
    """End the run of a group without an operator, unless its first process has."""
    from heimdall_trainer.commands.training import LOCAL_RUN_ID

    run_id = os.environ.get(LOCAL_RUN_ID)
    if run_id is None:
        return
    os.environ.update(HURRIED)
    from heimdall_tracking import initialize_mlflow, runs
    from heimdall_tracking.redact import redact

    try:
        client = initialize_mlflow().client
        found = runs.read_facts(client, run_id)
        if found is not None and found.status == "RUNNING":
            runs.end_run(client, run_id, "KILLED" if told else "FAILED")
    except Exception as error:  # noqa: BLE001 - why the processes have ended is what counts
        print(f"MLflow could not be told that run {run_id} has ended: {redact(error)}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
