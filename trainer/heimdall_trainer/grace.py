"""The time after SIGTERM: one deadline, of which every wait takes what those before it have left."""

from __future__ import annotations

import os
import time
from typing import Final

from heimdall_api.contract import ENV_GRACE_PERIOD
from heimdall_trainer import group

RESERVE_SHARE: Final = 1 / 6
RESERVE_S: Final = 2.0
"""What no wait may take of the grace period, the larger of both: for putting away on disk what was not delivered."""


def grace_period_s() -> float:
    """Seconds between SIGTERM and SIGKILL: as the operator gives them, less what torchrun takes for itself."""
    period = float(os.environ.get(ENV_GRACE_PERIOD) or group.DEFAULT_GRACE_PERIOD_S)
    return max(1.0, period - group.SHUTDOWN_MARGIN_S) if group.under_torchrun() else period


class Grace:
    """Counts down from SIGTERM on."""

    def __init__(self) -> None:
        """Nothing was received yet."""
        self._began: float | None = None

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
