"""Checkpoints in a run: which of them stay, and in which order one is published so that only whole ones have a name."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import structlog

from heimdall_api.contract import CHECKPOINT_DIR, TAG_CHECKPOINTS, Checkpoint, format_checkpoints
from heimdall_tracking.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

Mode = Literal["min", "max"]

log = structlog.get_logger()


def publish(
    client: MlflowClient,
    run_id: str,
    file: Path,
    checkpoint: Checkpoint,
    *,
    listed: Sequence[Checkpoint],
    keep: int,
    mode: Mode,
    newer: Sequence[Checkpoint] = (),
    before_naming: Callable[[], object] = lambda: None,
) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Upload a checkpoint, then name it in the run's tag; made again, it is there once.

    Args:
        client: Client of the tracking server.
        run_id: The run.
        file: Its bytes.
        checkpoint: What is known of it.
        listed: The checkpoints that the run names now, newest last; this one comes behind them.
        keep: How many of the best stay beside the last.
        mode: Whether a smaller or a larger metric is better.
        newer: Checkpoints that the run names now and that this one comes before.
        before_naming: Called when its bytes are there: delivers what it knows of, or raises where it must not be named.

    Returns:
        The checkpoints that the run names now, this one among them, and those that it no longer does.

    Raises:
        Exception: The server is away or refuses, or `before_naming` raised.
    """
    whole = checkpoint.model_copy(update={"sha256": sha256_of(file), "time": datetime.now(UTC)})
    client.log_artifact(run_id, str(file), CHECKPOINT_DIR)
    before_naming()
    every = [item for item in listed if item.path != whole.path] + [whole, *newer]
    stay, dropped = retained(every, keep=keep, mode=mode)
    client.set_tag(run_id, TAG_CHECKPOINTS, format_checkpoints(stay), synchronous=True)
    return stay, dropped


def retained(checkpoints: list[Checkpoint], *, keep: int, mode: Mode) -> tuple[list[Checkpoint], list[Checkpoint]]:
    """Which checkpoints stay: the best ones, and the newest whatever it is worth.

    Args:
        checkpoints: All of them, newest last.
        keep: How many of the best.
        mode: Whether a smaller or a larger metric is better.

    Returns:
        Those that stay, newest last and alone marked as the last; and those that go.
    """
    newest = checkpoints[-1]
    best = {item.path for item in ranked(checkpoints, mode)[:keep]}
    stay = [item for item in checkpoints if item.path in best or item is newest]
    marked = [item.model_copy(update={"last": item is newest}) for item in stay]
    kept = {item.path for item in stay}
    return marked, [item for item in checkpoints if item.path not in kept]


def ranked(checkpoints: Sequence[Checkpoint], mode: Mode) -> list[Checkpoint]:
    """Those with a metric, the best first."""
    known = [(item.metric, item) for item in checkpoints if item.metric is not None]
    return [item for _, item in sorted(known, key=lambda pair: pair[0], reverse=mode == "max")]


def remove(client: MlflowClient, run_id: str, checkpoint: Checkpoint) -> None:
    """Remove the bytes of a checkpoint that is no longer named; one that can't be removed only takes room."""
    try:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        run = client.get_run(run_id)
        store: Any = get_artifact_repository(run.info.artifact_uri, tracking_uri=client.tracking_uri)
        store.delete_artifacts(checkpoint.path)
    except Exception as error:  # noqa: BLE001 - its name is gone already
        log.info("an old checkpoint was not removed", path=checkpoint.path, error=redact(error))


def sha256_of(file: Path) -> str:
    """Checksum of a file's bytes, hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
