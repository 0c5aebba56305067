"""How long the end of a training waits for MLflow: while something arrives, and a while longer.

Nobody sees how much of a file has arrived that is being uploaded. It counts as moving for as long as it would take at
the slowest rate that is worth waiting for. So a large file on a slow line arrives, and a server that is away is waited
for no longer than the patience lasts and one try takes to fail.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from typing import Final

from heimdall_tracking.outstanding import Outstanding

LOOK_EVERY_S: Final = 1.0
"""How often it is looked whether something has arrived."""
SLOWEST_BYTES_PER_S: Final = 2**20
"""A file that is uploaded more slowly counts as standing still."""
SLOWEST_CALLS_PER_S: Final = 1
"""So many calls a second, batches of metric points among them, are no endless delivery."""

Settle = Callable[[float], bool]
"""Waits for so many seconds until nothing is under way any more; whether that is so."""


class Patience:
    """Of all waits at a training's end together: what one has used up without anything arriving, the next lacks."""

    def __init__(
        self, look: Callable[[], Outstanding], timeout_s: float, beat: Callable[[], None] = lambda: None
    ) -> None:
        """It is whole.

        Args:
            look: Tells what is on its way.
            timeout_s: How long nothing may arrive.
            beat: Is called at each look, so that somebody hears that it is waited.
        """
        self._beat = beat
        self._look = look
        self.timeout_s = timeout_s
        self._idle_s = 0.0
        """How long was waited since something arrived, over all waits so far."""
        self._settled = 0

    def wait(self, settle: Settle, at_most_s: float = math.inf) -> bool:
        """Wait until nothing is under way any more.

        Args:
            settle: Waits for that.
            at_most_s: Limit of this wait.

        Returns:
            Whether that is so; otherwise it was given up.
        """
        return next(settled for settled in self.looks(settle, at_most_s) if settled is not None)

    def looks(self, settle: Settle, at_most_s: float = math.inf) -> Iterator[bool | None]:
        """The same wait piece by piece, for who has something else to do at each look.

        However slowly things arrive, it ends: with what is left to be done at the slowest rates, and the patience.

        Args:
            settle: Waits for it.
            at_most_s: Limit of all pieces together.

        Yields:
            None while it goes on; at last whether nothing is under way any more.
        """
        now, seen = time.monotonic(), self._look()
        self._note(seen, 0.0)
        slowest_s = seen.calls / SLOWEST_CALLS_PER_S + seen.size / SLOWEST_BYTES_PER_S
        deadline = now + min(at_most_s, self.timeout_s + slowest_s)
        moving_until = now + seen.under_way / SLOWEST_BYTES_PER_S
        while True:
            left_s = min(deadline - now, max(self.timeout_s - self._idle_s, moving_until - now))
            settled = settle(max(0.0, min(left_s, LOOK_EVERY_S)))
            if settled or left_s <= 0:
                yield settled
                return
            yield None
            self._beat()
            before, now = now, time.monotonic()
            last, seen = seen, self._look()
            self._note(seen, now - before)
            if (seen.tries, seen.under_way) != (last.tries, last.under_way):
                # A try that begins when the patience is over already has no more time than the one that failed.
                is_patient = self._idle_s < self.timeout_s
                moving_until = now + seen.under_way / SLOWEST_BYTES_PER_S if is_patient else now

    def _note(self, seen: Outstanding, waited_s: float) -> None:
        self._idle_s = self._idle_s + waited_s if seen.settled == self._settled else 0.0
        self._settled = seen.settled
