"""SIGTERM, and the time after it: one deadline, of which every wait takes what those before it have left."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Final

from heimdall_api.contract import ENV_GRACE_PERIOD
from heimdall_trainer import group
from heimdall_trainer.termination import TerminatedError

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
    waits no longer than what is left.
    """

    def __init__(self) -> None:
        """Nothing was received yet, and nothing is watched."""
        self._began: float | None = None
        self._in_loop = False
        self._settling = False

    def watch(self) -> None:
        """Handle SIGTERM from here on; whoever took it over meanwhile loses it again."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._on_sigterm)

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
        del number, frame
        self.begin()
        if not (self._in_loop or self._settling):
            raise TerminatedError("Asked to end (SIGTERM) outside of the training loop.")

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
