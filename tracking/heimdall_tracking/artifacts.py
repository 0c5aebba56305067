"""Uploads behind training, tried again while the server is away."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from pathlib import Path
from typing import Final

import structlog

from heimdall_tracking.connections import forget_connections
from heimdall_tracking.errors import TrackingError, is_permanent
from heimdall_tracking.redact import redact

RETRY_S: Final = 1.0
RETRY_LIMIT_S: Final = 30.0

log = structlog.get_logger()


class Uploader:
    """Uploads one after the other, in a thread of their own."""

    def __init__(self, *, retry_s: float = RETRY_S) -> None:
        """Prepare; the thread starts with the first upload.

        Args:
            retry_s: First delay after a failure; it doubles up to RETRY_LIMIT_S.
        """
        self._retry_s = retry_s
        self._closed = threading.Event()
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="heimdall-uploads")
        self._pending: list[Future[None]] = []
        self._lock = threading.Lock()

    def file(self, upload: Callable[[str], None], path: Path) -> Future[None]:
        """Upload a file.

        Args:
            upload: Uploads what is at a path, or raises.
            path: The file.

        Returns:
            The upload.

        Raises:
            TrackingError: The file is missing or can't be read.
        """
        if not path.is_file():
            raise TrackingError(f"{path} is {'a folder' if path.is_dir() else 'missing'}: no file was logged")
        return self._submit(upload, path)

    def folder(self, upload: Callable[[str], None], path: Path) -> Future[None]:
        """Upload a folder; see file."""
        if not path.is_dir():
            raise TrackingError(f"{path} is {'no folder' if path.exists() else 'missing'}: no folder was logged")
        return self._submit(upload, path)

    def flush(self, timeout_s: float) -> bool:
        """Wait until all uploads are done.

        Args:
            timeout_s: How long to wait at most.

        Returns:
            Whether every upload since the last flush succeeded.
        """
        with self._lock:
            waited_for = list(self._pending)
        done, pending = wait_for_futures(waited_for, timeout_s)
        failed = [future for future in done if future.cancelled() or future.exception() is not None]
        for future in failed:
            error = "given up" if future.cancelled() else redact(future.exception())
            log.error("an artifact was not uploaded", error=error)
        with self._lock:
            # Others may have been added meanwhile.
            self._pending = [future for future in self._pending if future not in done]
        return not failed and not pending

    def close(self, timeout_s: float) -> bool:
        """Do what can be done in time, then give the rest up; whether everything was uploaded."""
        done = self.flush(timeout_s)
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        return done

    def _submit(self, upload: Callable[[str], None], path: Path) -> Future[None]:
        if not os.access(path, os.R_OK):
            raise TrackingError(f"{path} can't be read by this user: nothing was logged; change its permissions")
        future = self._pool.submit(self._until_done, upload, path)
        with self._lock:
            self._pending.append(future)
        return future

    def _until_done(self, upload: Callable[[str], None], path: Path) -> None:
        delay = self._retry_s
        while True:
            try:
                upload(str(path))
            except Exception as error:
                if not path.exists():
                    raise TrackingError(f"{path} was removed before it was uploaded") from error
                if is_permanent(error):
                    raise TrackingError(f"{path} can't be uploaded: {redact(error)}") from error
                forget_connections()
                log.warning("an upload failed; trying again", file=str(path), error=redact(error), again_in_s=delay)
                if self._closed.wait(delay):
                    raise TrackingError(f"{path} was not uploaded in time: {redact(error)}") from error
                delay = min(2 * delay, RETRY_LIMIT_S)
            else:
                return
