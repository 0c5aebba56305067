"""Training in a group: what is one process's own, what all agree on. One process is a group of one.

torchrun starts the processes and tells each its place (RANK, WORLD_SIZE, LOCAL_WORLD_SIZE); the operator gives torchrun
its options by its own PET_… variables, and this module starts it where they are there.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, Final, TypeVar

from heimdall_api.contract import ENV_GRACE_PERIOD
from heimdall_trainer.errors import ConfigurationError

DEFAULT_GRACE_PERIOD_S: Final = 60
COLLECTIVE_TIMEOUT: Final = timedelta(minutes=5)
"""How long a process waits for the others: a lost one makes them wait, not fail."""
ALONE_TIMEOUT: Final = timedelta(hours=2)
"""How long the others wait for what one does alone and in good order: an export, a download."""
SHUTDOWN_MARGIN_S: Final = 5
"""How much sooner than the pod's grace period torchrun's patience with its processes ends."""
BROKEN: Final = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe"),
    *("timed out waiting", "socket timeout", "nccl error: remote", "ncclremoteerror"),
)
"""Words of an error that another process's end has caused."""

Made = TypeVar("Made")


def is_group() -> bool:
    """Whether torchrun is to start the processes, and has not yet."""
    if under_torchrun():
        return False
    return spans_nodes() or _count("PET_NPROC_PER_NODE") > 1


def spans_nodes() -> bool:
    """Whether this program is called once on each of several nodes."""
    return _count("PET_NNODES") > 1


def _count(name: str) -> int:
    """How many of something torchrun is told to start.

    Raises:
        ConfigurationError: It is told more than one number, or a word.
    """
    told = os.environ.get(name, "1")
    if not told.isdecimal():
        raise ConfigurationError(
            f"{name} is {told!r}: give one number. A group whose size changes would not go on as it began"
        )
    return int(told)


def under_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def become_torchrun(arguments: Sequence[str]) -> None:
    """Replace this process by torchrun, which calls this program again in each process; does not return.

    Args:
        arguments: Of this program, without its name.
    """
    grace_s = int(os.environ.get(ENV_GRACE_PERIOD) or DEFAULT_GRACE_PERIOD_S)
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", str(max(1, grace_s - SHUTDOWN_MARGIN_S)))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if not os.environ.keys() & {"PET_REDIRECTS", "PET_TEE"}:
        # What processes print goes where this one's does: a folder for it would stay in /tmp, empty.
        os.environ.setdefault("PET_LOG_DIR", os.devnull)
    sys.stdout.flush()
    command = [sys.executable, "-m", "heimdall_trainer.torchrun", "-m", "heimdall_trainer.cli", *arguments]
    os.execv(sys.executable, command)  # noqa: S606 - no shell wanted


def world_size() -> int:
    """Processes that train together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process speaks for the group: it alone tells MLflow."""
    return int(os.environ.get("RANK", "0")) == 0


def trainer_options(pl: Any) -> dict[str, Any]:
    """What Lightning's Trainer must be told of the group.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.
    """
    import torch

    # Not Lightning's own choice: a Mac's GPU knows no numbers of 64 bits, which recordings' places have.
    accelerator = "gpu" if torch.cuda.is_available() else "cpu"
    if world_size() == 1:
        return {"accelerator": accelerator, "devices": 1}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return {
        "accelerator": accelerator,
        "strategy": pl.strategies.DDPStrategy(timeout=COLLECTIVE_TIMEOUT),
        "num_nodes": world_size() // local,
        "devices": local,
    }


def any_of(flags: Sequence[bool], trainer: Any) -> list[bool]:
    """Which flags are set in any process: all must take the same turn at the same step."""
    if world_size() == 1:
        return list(flags)
    import torch

    mine = torch.tensor([float(flag) for flag in flags], device=trainer.strategy.root_device)
    return [bool(value > 0) for value in trainer.strategy.reduce(mine, reduce_op="sum")]


def is_first_of_node() -> bool:
    """Whether this process does what is done once on each node."""
    return local_rank() == 0


def local_rank() -> int:
    """Which process of its node this is: the number of its GPU, too."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def from_first(value: Any) -> Any:
    """What the first process has, in every process. It must be picklable."""
    if world_size() == 1:
        return value
    import torch.distributed

    holder = [value]
    torch.distributed.broadcast_object_list(holder, src=0)
    return holder[0]


def begin(trainer: Any) -> None:
    """Have the processes find each other, sooner than Lightning would; it finds that done."""
    if world_size() > 1:
        trainer.strategy.setup_environment()


def by_first(make: Callable[[], Made]) -> Made | None:
    """What the first process makes alone, which may take longer than a collective; None in the others."""
    if world_size() == 1:
        return make()
    import torch.distributed

    # On the CPU, and made while nobody has to wait: its own timeout is what the others wait by.
    patient: Any = torch.distributed.new_group(timeout=ALONE_TIMEOUT, backend="gloo")
    made = make() if is_first() else None
    torch.distributed.barrier(group=patient)
    torch.distributed.destroy_process_group(patient)
    return made


def is_broken_connection(error: BaseException) -> bool:
    """Whether an error says that another process of the group has ended."""
    if world_size() == 1:
        return False
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & {"DistBackendError", "DistNetworkError", "DistStoreError"}:
        return True
    text = str(error).lower()
    return "RuntimeError" in kinds and any(words in text for words in BROKEN)
