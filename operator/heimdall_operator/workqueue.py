"""A queue of names to look at: each at most once at a time, later again where asked, backing off on errors.

Events say only *which* run to look at again, so adding a waiting name again changes nothing, and adding one that is
being looked at makes it be looked at once more afterwards: nothing is missed and nothing piles up.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Hashable
from typing import Final, Generic, TypeVar

from heimdall_tracking.pauses import doubled_s

BACKOFF_S: Final = 1.0
BACKOFF_LIMIT_S: Final = 60.0

K = TypeVar("K", bound=Hashable)


class WorkQueue(Generic[K]):
    """Names waiting to be looked at."""

    def __init__(self) -> None:
        self._ready: deque[K] = deque()
        self._waiting: dict[K, float] = {}
        """Names in `_ready`, with the time they were added."""
        self._active: set[K] = set()
        self._again: set[K] = set()
        self._timers: dict[K, asyncio.TimerHandle] = {}
        self._failures: dict[K, int] = {}
        self._event = asyncio.Event()

    def __len__(self) -> int:
        """How many names wait."""
        return len(self._ready)

    @property
    def oldest_wait_s(self) -> float:
        """How long the first name has waited, in seconds."""
        return time.monotonic() - self._waiting[self._ready[0]] if self._ready else 0.0

    def add(self, key: K) -> None:
        """Look at a name as soon as possible."""
        timer = self._timers.pop(key, None)
        if timer is not None:
            timer.cancel()
        if key in self._active:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting[key] = time.monotonic()
            self._ready.append(key)
            self._event.set()

    def add_later(self, key: K, delay_s: float) -> None:
        """Look at a name after a delay, unless it is to be looked at sooner."""
        due = asyncio.get_running_loop().time() + delay_s
        timer = self._timers.get(key)
        if timer is not None:
            if timer.when() <= due:
                return
            timer.cancel()
        self._timers[key] = asyncio.get_running_loop().call_later(delay_s, self.add, key)

    def add_after_failure(self, key: K) -> float:
        """Look at a name again after a delay that grows with each failure in a row; the delay, in seconds."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        delay = doubled_s(BACKOFF_S, failures - 1, BACKOFF_LIMIT_S)
        self.add_later(key, delay)
        return delay

    def forget_failures(self, key: K) -> None:
        """Begin with the shortest delay at the next failure."""
        self._failures.pop(key, None)

    async def get(self) -> K:
        """Wait for a name and take it: nobody else gets it until `done`."""
        while not self._ready:
            self._event.clear()
            await self._event.wait()
        key = self._ready.popleft()
        del self._waiting[key]
        self._active.add(key)
        return key

    def done(self, key: K) -> None:
        """Give a name back."""
        self._active.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def close(self) -> None:
        """Cancel what would come later."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
