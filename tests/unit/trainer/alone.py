"""As one process of a group, waits for what the first one makes alone for longer than a collective is waited for.

Called as `python -m tests.unit.trainer.alone`, with torchrun's variables.
"""

from __future__ import annotations

import time
from datetime import timedelta

import torch.distributed as dist

from heimdall_trainer import group

COLLECTIVE_TIMEOUT = timedelta(seconds=1)


def make() -> str:
    """Longer than the others wait for each other."""
    time.sleep(3 * COLLECTIVE_TIMEOUT.total_seconds())
    return "made"


if __name__ == "__main__":
    dist.init_process_group("gloo")
    # Only now: finding each other may take longer on a machine that has much to do.
    dist.distributed_c10d._set_pg_timeout(COLLECTIVE_TIMEOUT, dist.group.WORLD)
    made = group.by_first(make)
    print("made" if made == "made" else "waited", flush=True)
    dist.destroy_process_group()
