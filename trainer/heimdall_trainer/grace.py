"""SIGTERM or Ctrl-C, and the time after it: one deadline, of which every wait takes what those before it have left.

torchrun sends it to the process groups of its processes: those that load data get it too, and would end before the
step that is to be saved. So each process that is forked here has a group of its own. One that began otherwise (spawned)
ends, and must not take training along.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from functools import cache
from types import FrameType
from typing import Final

from heimdall_api.contract import ENV_GRACE_PERIOD
from heimdall_trainer import group
from heimdall_trainer.termination import EXIT_BY_HAND, StoppedByHandError, TerminatedError

LOADER: Final = "torch.utils.data.dataloader"
WAITS_FOR_BATCH: Final = "_next_data"
FETCHER: Final = ".loops.fetchers"
IN_USE: Final = (".loops.evaluation_loop", ".loops.optimization")
"""Lightning's own modules: where a batch is waited for, and where something is being done with one."""
TERMINATED_LOADER: Final = ("DataLoader worker", "is killed by signal: Terminated")
"""Words of torch's error where it was told that such a process has ended, whatever was being done."""
RESERVE_SHARE: Final = 1 / 6
RESERVE_S: Final = 2.0
"""What no wait may take of the grace period, the larger of both: for putting away on disk what was not delivered."""


def grace_period_s() -> float:
    """Seconds between SIGTERM and SIGKILL: as the operator gives them, less what torchrun takes for itself."""
    period = float(os.environ.get(ENV_GRACE_PERIOD) or group.DEFAULT_GRACE_PERIOD_S)
    return max(1.0, period - group.SHUTDOWN_MARGIN_S) if group.under_torchrun() else period


class Grace:
    """Watches for SIGTERM, and counts down from the first one on.

    SIGTERM interrupts what the process does, except where that must not be cut in two. There it is noted: the training
    loop looks at each step whether it `began`, and the end of a training, which must put away what was not delivered,
    waits no longer than what is left. The wait for a batch, which a store that is away makes long, is interrupted.
    """

    def __init__(self, *, by_hand: bool = False) -> None:
        """Nothing was received yet, and nothing is watched.

        Args:
            by_hand: Whether Ctrl-C means the same as SIGTERM, and a second one the end at once: for a program of one's
                own, not for a training that somebody else's program calls.
        """
        self.hint = ""
        """What who ends it at once is told."""
        self._by_hand = by_hand
        self._error: type[TerminatedError] = TerminatedError
        self._began: float | None = None
        self._in_loop = False
        self._settling = False

    def watch(self) -> None:
        """Handle SIGTERM from here on; whoever took it over meanwhile loses it again."""
        if threading.current_thread() is threading.main_thread():
            # Who starts it in the background may have it ignore Ctrl-C.
            if self._by_hand and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
                signal.signal(signal.SIGINT, self._on_sigint)
            signal.signal(signal.SIGTERM, self._on_sigterm)
            _keep_forks_apart()

    def enter_loop(self) -> None:
        """From here on SIGTERM is noted: somebody looks at each step."""
        self._in_loop = True

    def leave_loop(self) -> None:
        """From here on SIGTERM interrupts again; one that was noted before is still to be acted on."""
        self._in_loop = False

    def settle(self) -> None:
        """The end is under way, in bounded time: from here on SIGTERM interrupts nothing more."""
        self._settling = True

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        del number
        self.begin()
        # What is due to the same signal is no failure: torch would raise in the middle of a step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if not (self._in_loop or self._settling):
            raise self.error(" outside of the training loop.")
        if self._in_loop and not self._settling and group.world_size() == 1 and _waits_to_train(frame):
            raise self.error(" while it waited for a batch.")

    def _on_sigint(self, number: int, frame: FrameType | None) -> None:
        if self._error is StoppedByHandError:
            # No buffer, and nothing that this may have interrupted.
            os.write(2, f"\nAsked twice to end: ended at once, and MLflow was not told. {self.hint}\n".encode())
            os._exit(EXIT_BY_HAND)
        self._error = StoppedByHandError
        os.write(2, b"\nAsked to end (Ctrl-C): what can be saved is saved first; once more ends it at once.\n")
        self._on_sigterm(number, frame)

    def error(self, rest: str) -> TerminatedError:
        """What the end is raised as.

        Args:
            rest: Where it was, and what became of the checkpoint.
        """
        return self._error(f"Asked to end ({self._error.asked_by}){rest}")

    @property
    def began(self) -> bool:
        """Whether SIGTERM was received."""
        return self._began is not None

    def begin(self) -> None:
        """SIGTERM was received; what the first has begun, another doesn't begin anew."""
        if self._began is None:
            self._began = time.monotonic()

    def passed_s(self) -> float:
        """Seconds since SIGTERM; none before it."""
        return 0.0 if self._began is None else time.monotonic() - self._began

    def left_s(self) -> float:
        """Seconds that may still be waited, all waits together."""
        period = grace_period_s()
        return max(0.0, period - max(RESERVE_S, RESERVE_SHARE * period) - self.passed_s())


@cache
def _keep_forks_apart() -> None:
    """Have the processes that are forked from now on live apart, once for all of them."""
    os.register_at_fork(after_in_child=_live_apart)


def _live_apart() -> None:
    """What is sent to the parent's process group does not arrive here; what is sent to the child ends it as ever."""
    os.setpgid(0, 0)
    for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if isinstance(getattr(signal.getsignal(number), "__self__", None), Grace):
            signal.signal(number, usual)


def is_lost_batch(error: BaseException) -> bool:
    """Whether a batch was waited for, which nothing was done with yet."""
    return any(_waits(frame) for frame, _ in traceback.walk_tb(error.__traceback__))


def _waits_to_train(frame: FrameType | None) -> bool:
    """Whether what is interrupted is the wait for the next batch to train on: no step and no validation."""
    if frame is None:
        return False
    frames = [each for each, _ in traceback.walk_stack(frame)]
    modules = {str(each.f_globals.get("__name__")) for each in frames}
    between = not any(part in module for module in modules for part in IN_USE)
    return between and any(FETCHER in module for module in modules) and any(_waits(each) for each in frames)


def _waits(frame: FrameType) -> bool:
    return frame.f_code.co_name == WAITS_FOR_BATCH and frame.f_globals.get("__name__") == LOADER


def is_terminated_loader(error: BaseException) -> bool:
    """Whether SIGTERM has ended a process that loads data, which the main process gets as well."""
    return isinstance(error, RuntimeError) and all(words in str(error) for words in TERMINATED_LOADER)
