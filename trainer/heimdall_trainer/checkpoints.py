"""Checkpoints as artifacts of the run: made behind training, named only when whole, fenced by the attempt.

What training hands over is written to disk by one thread, one at a time, and uploaded by another, in order: an upload
may take as long as MLflow is away. A checkpoint's name appears in the run's tag only after its bytes are there, with
their checksum; so a kill at any moment leaves the names of whole ones only.
"""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from heimdall_api.contract import CHECKPOINT_DIR, TAG_CHECKPOINTS, Checkpoint
from heimdall_api.contract import parse_checkpoints as parse
from heimdall_tracking.artifacts import log_refusal
from heimdall_tracking.checkpoints import Mode, publish, ranked, remove, sha256_of
from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import REFUSED_RETRY_S, OvertakenError, Refusal, refusal_of
from heimdall_tracking.outstanding import Outstanding, Tries
from heimdall_tracking.pauses import doubling_s
from heimdall_tracking.redact import redact
from heimdall_tracking.runs import check_attempt
from heimdall_tracking.undelivered import LeftCheckpoint
from heimdall_trainer.errors import FencedError, UndeliveredError

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker
    from heimdall_trainer.checkpoint_io import Snapshot

RETRY_S: Final = 2.0
RETRY_LIMIT_S: Final = 30.0
METRICS_TIMEOUT_S: Final = 600.0
"""How long a checkpoint waits for the metrics before it, until it is looked whether a newer attempt has taken over."""
JOIN_S: Final = 1.0

log = structlog.get_logger()


class CheckpointPublisher:
    """Uploads checkpoints of one attempt, keeps the best ones and the last."""

    def __init__(self, tracker: MLflowTracker, *, attempt: int, keep: int, mode: Mode, fenced: bool = True) -> None:
        """Start the worker thread.

        Args:
            tracker: The run.
            attempt: This attempt's number.
            keep: How many of the best are kept beside the last.
            mode: Whether a smaller or a larger metric is better.
            fenced: Whether a newer attempt is looked out for.
        """
        self._tracker = tracker
        self._attempt = attempt
        self._keep = keep
        self._mode = mode
        self._fenced = fenced
        self.listed = parse(tracker.client.get_run(tracker.run_id).data.tags.get(TAG_CHECKPOINTS))
        self.files: dict[str, Path] = {}
        """Local copies of listed checkpoints, by artifact path."""
        self._writing = False
        self._failure: Exception | None = None
        """Why a checkpoint could not be written."""
        self._pending: deque[tuple[Path, Checkpoint]] = deque()
        """Whole on disk, and still to be uploaded."""
        self._too_large: deque[tuple[Path, Checkpoint]] = deque()
        """Those that were refused for their size: tried again when a newer one was let through."""
        self._named: set[str] = set()
        """Paths of those that were published."""
        self.refusal: Refusal | None = None
        """Why the last upload was refused; None once one was taken."""
        self._changed = threading.Condition()
        self._under_way: tuple[Path, Checkpoint] | None = None
        self._settled = 0
        self._tries = Tries()
        self._closed = False
        self._given_up = False
        """Whether what is under way was handed back; what it still does must have no effect."""
        self.fence: FencedError | None = None
        """Set when a newer attempt has taken over."""
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)
        self._thread.start()

    def submit(
        self, file: Path, *, step: int, epoch: int, metric: float | None, snapshot: Snapshot | None = None
    ) -> None:
        """Hand a checkpoint over; returns at once, except while the one before it is still being written.

        Args:
            file: The checkpoint, which is this publisher's from now on.
            step: Optimizer step.
            epoch: Epoch, from 0.
            metric: The monitored metric, if it is known.
            snapshot: What is still to be written to the file; None where that is whole.

        Raises:
            Exception: The one before it could not be written.
        """
        self.wait_for_file()
        checkpoint = Checkpoint(
            step=step,
            epoch=epoch,
            path=f"{CHECKPOINT_DIR}/{file.name}",
            sha256="",
            size=0,
            time=datetime.now(UTC),
            metric=metric if metric is not None and math.isfinite(metric) else None,
            last=True,
        )
        if snapshot is None:
            self._enqueue(file, checkpoint)
            return
        self._writing = True
        threading.Thread(
            target=self._write, args=(file, checkpoint, snapshot), name="checkpoint-file", daemon=True
        ).start()

    def _write(self, file: Path, checkpoint: Checkpoint, snapshot: Snapshot) -> None:
        try:
            snapshot.write(file)
            self._enqueue(file, checkpoint)
        except Exception as error:  # noqa: BLE001 - it is raised by the thread that trains
            self._failure = error
        with self._changed:
            self._writing = False
            self._changed.notify_all()

    def _enqueue(self, file: Path, checkpoint: Checkpoint) -> None:
        whole = checkpoint.model_copy(update={"size": file.stat().st_size})
        with self._changed:
            while len(self._too_large) + len(self._pending) >= self._keep + 1:
                # The newest one is what a next attempt goes on from, the best are kept and what the model is made of.
                given_up = min([*self._too_large, *self._pending], key=lambda item: self._worth(item[1]))
                (self._too_large if given_up in self._too_large else self._pending).remove(given_up)
                given_up[0].unlink(missing_ok=True)
                log.info("a checkpoint is not uploaded: newer and better ones wait", step=given_up[1].step)
            self._pending.append((file, whole))
            self._changed.notify_all()

    def _worth(self, checkpoint: Checkpoint) -> float:
        if checkpoint.metric is None:
            return -math.inf
        return checkpoint.metric if self._mode == "max" else -checkpoint.metric

    def written(self, timeout_s: float | None = None) -> bool:
        """Wait until nothing is being written, without a timeout as long as that takes; whether that is so."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._writing, timeout_s)

    def wait_for_file(self) -> None:
        """Wait until what was submitted is on disk, as long as that takes: no longer than writing it oneself would.

        Raises:
            Exception: It could not be written.
        """
        self.written()
        self.raise_if_not_written()

    def raise_if_not_written(self) -> None:
        """End a training whose checkpoints can't be kept; nothing is waited for.

        Raises:
            Exception: Why one could not be written, such as a full disk.
        """
        if self._failure is not None:
            raise self._failure

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing that was submitted is under way any more; whether that is so.

        It was published then, or is too large, or a newer attempt has taken over: waiting longer changes nothing.
        """
        with self._changed:
            return self._changed.wait_for(
                lambda: not (self._writing or self._pending or self._under_way) or self.fence is not None, timeout_s
            )

    def outstanding(self) -> Outstanding:
        """What is on its way."""
        with self._changed:
            waiting = [*([] if self._under_way is None else [self._under_way]), *self._pending]
            size = sum(checkpoint.size for _, checkpoint in waiting)
            tries = self._tries
            return Outstanding(settled=self._settled, size=size, tries=tries.begun, under_way=tries.under_way)

    def flush(self, timeout_s: float) -> bool:
        """Wait until everything that was submitted, and could be written, is published; whether it was."""
        with self._changed:
            return self.settle(timeout_s) and self.fence is None and not self._too_large

    def close(self, timeout_s: float = 0) -> list[LeftCheckpoint]:
        """End the worker thread.

        Args:
            timeout_s: How long an upload that is under way may take to its end, JOIN_S at most.

        Returns:
            What was not published, oldest first; nothing where a newer attempt has taken over. All of it is whole on
            disk: what is being written is waited for, JOIN_S at most, and otherwise left out.
        """
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(min(timeout_s, JOIN_S))
        if self.fence is not None:
            return []
        self.written(JOIN_S)
        self._given_up = True
        with self._changed:
            first = [] if self._under_way is None else [self._under_way]
            left, self._under_way = [*self._too_large, *first, *self._pending], None
            self._too_large.clear()
            self._pending.clear()
        return [
            LeftCheckpoint(file=file, checkpoint=checkpoint, keep=self._keep, mode=self._mode)
            for file, checkpoint in left
        ]

    def best(self, folder: Path) -> Checkpoint | None:
        """The listed checkpoint with the best metric, without metrics the last one, of those whose bytes are there.

        Args:
            folder: Where it is downloaded to, if it is not here.

        Raises:
            Exception: The server is away.
        """
        from_the_best = ranked(self.listed, self._mode) or self.listed[::-1]
        return next((item for item in from_the_best if self.local_file(item, folder) is not None), None)

    def local_file(self, checkpoint: Checkpoint, folder: Path) -> Path | None:
        """A checkpoint's file, downloaded where it is not here; None where it is gone, or not what was uploaded.

        Raises:
            Exception: The server is away.
        """
        if checkpoint.path in self.files:
            return self.files[checkpoint.path]
        folder.mkdir(parents=True, exist_ok=True)
        target = tempfile.mkdtemp(dir=folder)
        try:
            file = Path(self._tracker.client.download_artifacts(self._tracker.run_id, checkpoint.path, target))
        except Exception:
            # By its error a store that has lost an object can't be told from one that is ill.
            if self._is_stored(checkpoint):
                raise
            log.warning("a checkpoint is not in the store any more and is left out", path=checkpoint.path)
            return None
        if sha256_of(file) != checkpoint.sha256:
            log.warning("a checkpoint is not what was uploaded and is left out", path=checkpoint.path)
            return None
        self.files[checkpoint.path] = file
        return file

    def _is_stored(self, checkpoint: Checkpoint) -> bool:
        stored = self._tracker.client.list_artifacts(self._tracker.run_id, CHECKPOINT_DIR)
        return any(item.path == checkpoint.path for item in stored)

    def newest_file(self, folder: Path) -> Path | None:
        """The newest whole checkpoint, to go on from; None where there is none."""
        # Of equal steps the one that is listed last: not every optimizer counts its steps.
        placed = sorted(enumerate(self.listed), key=lambda each: (each[1].last, each[1].step, each[0]), reverse=True)
        for _, checkpoint in placed:
            file = self.local_file(checkpoint, folder)
            if file is not None:
                log.info(
                    "going on from a checkpoint", step=checkpoint.step, epoch=checkpoint.epoch, path=checkpoint.path
                )
                return file
        return None

    def raise_if_fenced(self) -> None:
        """Stop what is of no use any more; nothing is asked.

        Raises:
            FencedError: It was seen that a newer attempt has taken over.
        """
        if self.fence is None and self._tracker.overtaken is not None:
            self.fence = FencedError(str(self._tracker.overtaken))
        if self.fence is not None:
            raise self.fence

    def check_fence(self) -> None:
        """Look whether a newer attempt has taken over.

        Raises:
            FencedError: One has.
        """
        if not self._fenced:
            return
        try:
            check_attempt(self._tracker.client.get_run(self._tracker.run_id), self._attempt)
        except OvertakenError as error:
            raise FencedError(str(error)) from None

    # --- the worker ----------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._pending or self._closed)
                if self._closed:
                    return
                self._under_way = self._pending.popleft()
                file, checkpoint = self._under_way
            if not self._try_until_done(file, checkpoint):
                return
            with self._changed:
                self._under_way = None
                self._settled += 1
                self._changed.notify_all()

    def _try_until_done(self, file: Path, checkpoint: Checkpoint) -> bool:
        """Publish until that succeeds or must not be; whether it was settled before the end."""
        pauses = doubling_s(RETRY_S, RETRY_LIMIT_S)
        while not self._closed:
            try:
                with self._tries.one(checkpoint.size):
                    self._publish(file, checkpoint)
            except FencedError as error:
                self.fence = error
                return True
            except Exception as error:  # noqa: BLE001 - MLflow may be away; training goes on
                if not file.exists():
                    log.warning("a checkpoint was removed from disk before it was uploaded", file=str(file))
                    return True
                delay = next(pauses)
                before, self.refusal = self.refusal, refusal_of(error)
                refusal = self.refusal
                if refusal is None:
                    again = "a checkpoint could not be uploaded; trying again"
                    log.warning(again, error=redact(error), again_in_s=delay)
                elif before is None or before.status != refusal.status:
                    log_refusal(refusal, file)
                if refusal is not None and refusal.of_size:
                    with self._changed:
                        self._too_large.append((file, checkpoint))
                        self._under_way = None  # it is in one place at a time, whenever what is left is asked for
                    return True
                forget_connections()
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, delay if refusal is None else REFUSED_RETRY_S)
            else:
                self.refusal = None
                with self._changed:
                    self._pending.extendleft(reversed(self._too_large))
                    self._too_large.clear()
                return True
        return False

    def _publish(self, file: Path, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        self.check_fence()
        newer = [item for item in self.listed if item.path in self._named and item.step > checkpoint.step]
        self.listed, dropped = publish(
            self._tracker.client,
            self._tracker.run_id,
            file,
            checkpoint,
            listed=[item for item in self.listed if item not in newer],
            newer=newer,
            keep=self._keep,
            mode=self._mode,
            before_naming=self._before_naming,
        )
        self._named.add(checkpoint.path)
        self.files[checkpoint.path] = file
        for old in dropped:
            local = self.files.pop(old.path, None)
            if local is not None:
                local.unlink(missing_ok=True)
            remove(self._tracker.client, self._tracker.run_id, old)
        log.info("checkpoint published", step=checkpoint.step, seconds=round(time.monotonic() - began, 2))

    def _before_naming(self) -> None:
        # What a checkpoint knows of must be there before it is: the next attempt does not log it again.
        while not self._tracker.flush_metrics(METRICS_TIMEOUT_S):
            if self._closed:
                raise UndeliveredError("the metrics that were logged before it could not be delivered")
            log.info("a checkpoint waits until the metrics that were logged before it are delivered")
            self.check_fence()
        if self._given_up:
            raise UndeliveredError("it was given up, and is kept on disk")
        self.check_fence()
