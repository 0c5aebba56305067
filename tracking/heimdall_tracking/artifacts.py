"""Uploads behind training, tried again while the server is away."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from heimdall_tracking import models
from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import (
    REFUSED_RETRY_S,
    Refusal,
    TooLargeError,
    TrackingError,
    is_permanent,
    refusal_of,
)
from heimdall_tracking.outstanding import Outstanding, Tries, size_of
from heimdall_tracking.pauses import doubling_s
from heimdall_tracking.redact import redact
from heimdall_tracking.runs import check_attempt

if TYPE_CHECKING:
    from mlflow import MlflowClient

RETRY_S: Final = 1.0
RETRY_LIMIT_S: Final = 30.0

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Upload:
    """A file or a folder, and where it goes."""

    path: Path
    target: str | None = None
    """Artifact folder; the run's root if None."""
    whole_folder: bool = False
    model: str | None = None
    """Key of the logged model that the folder becomes, see models.publish; None for an artifact."""
    attempt: int | None = None
    """The attempt that it comes from, where newer ones may take over."""

    def make(self, client: MlflowClient, run_id: str) -> None:
        """Upload it; made again, it lies there once.

        Raises:
            OvertakenError: A newer attempt has taken over.
            Exception: The server is away or refuses, or the file can't be read.
        """
        if self.model is not None:
            models.publish(client, run_id, self.path, self.model, attempt=self.attempt)
            return
        if self.attempt is not None:
            check_attempt(client.get_run(run_id), self.attempt)
        log_it = client.log_artifacts if self.whole_folder else client.log_artifact
        log_it(run_id, str(self.path), self.target)


class Uploader:
    """Uploads one after the other, in a thread of their own."""

    def __init__(self, make: Callable[[Upload], None], *, retry_s: float = RETRY_S) -> None:
        """Prepare; the thread starts with the first upload.

        Args:
            make: Makes an upload or raises; called from the background thread alone.
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
        """
        self._make = make
        self._retry_s = retry_s
        self._closed = threading.Event()
        self._changed = threading.Condition()
        self._waiting: deque[tuple[Upload, Future[None]]] = deque()
        self._under_way: Upload | None = None
        self._settled = 0
        self._tries = Tries()
        self._too_large: list[Upload] = []
        self._pending: list[Future[None]] = []
        self._thread: threading.Thread | None = None
        self.refusal: Refusal | None = None
        """Why the last upload was refused, if it was, or one whose file is still kept."""

    def put(self, upload: Upload) -> Future[None]:
        """Have something uploaded; returns at once.

        Args:
            upload: What, and where it goes. It must stay as it is until it was uploaded.

        Returns:
            The upload, to wait for.

        Raises:
            TrackingError: The file or folder is missing or can't be read.
        """
        _check(upload)
        future: Future[None] = Future()
        with self._changed:
            self._pending.append(future)
            self._waiting.append((upload, future))
            self._changed.notify_all()
            if self._thread is None:
                # A daemon: a call to a server that is away must not hold the end of the process up.
                self._thread = threading.Thread(target=self._work, name="heimdall-uploads", daemon=True)
                self._thread.start()
        return future

    def settle(self, timeout_s: float) -> bool:
        """Wait until nothing is to be uploaded any more: it was, or that is impossible, or it is kept for later.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether that is so, which waiting longer does not change then.
        """
        with self._changed:
            waited_for = list(self._pending)
        return not wait_for_futures(waited_for, timeout_s).not_done

    def flush(self, timeout_s: float) -> bool:
        """Wait until all uploads are done.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether every upload since the last flush succeeded, and none is kept to be delivered later.
        """
        with self._changed:
            waited_for = list(self._pending)
        done, pending = wait_for_futures(waited_for, timeout_s)
        failed = [future for future in done if future.cancelled() or future.exception() is not None]
        for future in failed:
            problem = None if future.cancelled() else future.exception()
            if not isinstance(problem, TooLargeError):  # that was told at once
                log.error("an artifact was not uploaded", error="given up" if problem is None else redact(problem))
        with self._changed:
            # Others may have been added meanwhile.
            self._pending = [future for future in self._pending if future not in done]
            return not (failed or pending or self._too_large)

    def close(self, timeout_s: float) -> bool:
        """Do what can be done in time, then end the thread; whether everything was uploaded. See `left`."""
        deadline = time.monotonic() + timeout_s
        done = self.flush(timeout_s)
        self.stop()
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        return done

    def stop(self) -> None:
        """Begin no more uploads; returns at once, though one may be under way."""
        with self._changed:
            self._closed.set()
            for _, future in self._waiting:
                if not future.done() and future.cancel():
                    future.set_running_or_notify_cancel()
            self._changed.notify_all()

    def left(self) -> list[Upload]:
        """What a closed uploader did not upload; one whose answer is still out counts as not uploaded."""
        with self._changed:
            first = [] if self._under_way is None else [self._under_way]
            return [*self._too_large, *first, *(upload for upload, _ in self._waiting)]

    def outstanding(self) -> Outstanding:
        """What is on its way."""
        with self._changed:
            settled, begun, under_way = self._settled, self._tries.begun, self._tries.under_way
            waiting = [] if self._under_way is None else [self._under_way]
            waiting += [upload for upload, _ in self._waiting]
        size = sum(size_of(upload.path) for upload in waiting)
        return Outstanding(settled=settled, size=size, tries=begun, under_way=under_way)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed.is_set())
                if self._closed.is_set():
                    return
                upload, future = self._waiting.popleft()
                self._under_way = upload
            if not future.set_running_or_notify_cancel():
                with self._changed:
                    self._under_way = None
                    self._settled += 1
                continue
            problem: TrackingError | None = None
            settled = True
            try:
                settled = self._until_done(upload)
            except TrackingError as error:
                problem = error
            if settled:
                with self._changed:
                    if isinstance(problem, TooLargeError):
                        self._too_large.append(upload)
                    self._under_way = None
                    self._settled += 1
            else:
                problem = TrackingError(f"{upload.path} was not uploaded in time")
            # Last: who waits for it must find it done.
            if problem is None:
                future.set_result(None)
            else:
                future.set_exception(problem)

    def _until_done(self, upload: Upload) -> bool:
        """Upload until it succeeds; whether it did before the end."""
        path, pauses = upload.path, doubling_s(self._retry_s, RETRY_LIMIT_S)
        while True:
            try:
                with self._tries.one(size_of(path)):
                    self._make(upload)
            except Exception as error:  # noqa: BLE001 - what no other try helps against is raised again
                if self._closed.wait(self._judge(path, error, next(pauses))):
                    return False
            else:
                if not self._too_large:
                    self.refusal = None
                return True

    def _judge(self, path: Path, error: Exception, delay: float) -> float:
        """How long to wait after a failure until the next try.

        Raises:
            TrackingError: There is no use in another one.
        """
        if not path.exists():
            raise TrackingError(f"{path} was removed before it was uploaded") from error
        if is_permanent(error):
            raise TrackingError(f"{path} can't be uploaded: {redact(error)}") from error
        before, refusal = self.refusal, refusal_of(error)
        self.refusal = refusal
        if refusal is not None and (before is None or before.status != refusal.status):
            log_refusal(refusal, path)
        if refusal is not None and refusal.of_size:
            raise TooLargeError(f"{path} can't be uploaded: {refusal.sentence}") from error
        forget_connections()
        if refusal is not None:
            return REFUSED_RETRY_S
        log.warning("an upload failed; trying again", file=str(path), error=redact(error), again_in_s=delay)
        return delay


def log_refusal(refusal: Refusal, file: Path) -> None:
    """Tell of an upload that is refused, and what becomes of it."""
    fate = "is kept, to be delivered later" if refusal.of_size else f"is tried again every {REFUSED_RETRY_S:g} s"
    log.error("an upload is refused, and training goes on", file=str(file), fate=fate, error=refusal.sentence)


def _check(upload: Upload) -> None:
    path = upload.path
    if upload.whole_folder and not path.is_dir():
        raise TrackingError(f"{path} is {'no folder' if path.exists() else 'missing'}: no folder was logged")
    if not upload.whole_folder and not path.is_file():
        raise TrackingError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: no file was logged")
    if not os.access(path, os.R_OK):
        raise TrackingError(f"{path} can't be read by this user: nothing was logged; change its permissions")
