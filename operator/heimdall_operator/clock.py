"""The time by which the operator decides: the API server's, which stamps what is created and deleted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Final

import structlog

TOLERANCE: Final = timedelta(seconds=5)
"""By how much the clocks may differ: an answer tells the time in whole seconds, and is on its way for a moment."""

log = structlog.get_logger()


def local() -> datetime:
    """The time by the clock of the operator's own node."""
    return datetime.now(UTC)


class ServerClock:
    """The node's clock, put right where it differs from what the API server tells with each answer.

    A node's clock that is minutes ahead would have a pod that is just being deleted count as lost, a deadline as over.
    """

    def __init__(self, clock: Callable[[], datetime] = local) -> None:
        """No answer was heard yet: the node's clock is taken for right.

        Args:
            clock: The node's.
        """
        self._clock = clock
        self._ahead = timedelta()
        """By how much the API server's clock is ahead of the node's."""

    def __call__(self) -> datetime:
        """The time by the API server's clock."""
        return self._clock() + self._ahead

    def hear(self, date: str | None, asked: datetime) -> None:
        """Take in what an answer says.

        Args:
            date: Its header `Date` (RFC 9110, 6.6.1).
            asked: When it was asked for, by this clock.
        """
        now = self()
        if date is None or not timedelta() <= now - asked <= TOLERANCE:
            return  # nobody knows how long the answer was on its way, or the clock was put right meanwhile
        try:
            told = parsedate_to_datetime(date)
        except ValueError:
            return
        if told.tzinfo is None or asked - TOLERANCE <= told <= now + TOLERANCE:
            return
        self._ahead += told - now
        log.warning(
            "this node's clock differs from the API server's, whose time is used: put it right",
            ahead_s=round(-self._ahead.total_seconds()),
        )
