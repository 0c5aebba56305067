"""Delivering later what a process had to leave: the other half of heimdall_tracking.undelivered.

The manifest is the state: what was delivered is taken out of it at once. Interrupted at any moment and begun again, the
little that is delivered twice arrives once: MLflow takes equal points once, tags and parameters keep one value, an
artifact of one name lies there once, a logged model is found by its key, and a version by its run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from heimdall_api.contract import TAG_CHECKPOINTS, parse_checkpoints
from heimdall_api.types import RegistrationSpec
from heimdall_tracking.artifacts import Upload
from heimdall_tracking.checkpoints import publish, remove
from heimdall_tracking.errors import (
    AwayError,
    OvertakenError,
    TrackingError,
    is_permanent,
    is_refusal,
    refusal_of,
)
from heimdall_tracking.points import Point, from_line, is_step
from heimdall_tracking.queue import BATCH, halves, log_refused
from heimdall_tracking.redact import MASK, redact
from heimdall_tracking.registry import ModelMissingError, register
from heimdall_tracking.runs import check_attempt, read_facts
from heimdall_tracking.settings import TrackingSettings, load_settings
from heimdall_tracking.spill import PATTERN
from heimdall_tracking.tracker import MLflowTracker, send_points
from heimdall_tracking.undelivered import COMMAND, LOCK, MANIFEST, KeptCheckpoint, KeptUpload, Manifest, lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = structlog.get_logger()


def deliver(folder: str | Path, settings: TrackingSettings | None = None) -> str:
    """Deliver what a process left in a folder, then remove the folder.

    Args:
        folder: The folder; begun again after an interruption, it goes on where that one ended.
        settings: How to reach the server; where they name none, the manifest's server is asked.

    Returns:
        What was delivered, as a sentence for people.

    Raises:
        TrackingError: The folder holds nothing that can be delivered, or the run takes nothing more.
        AwayError: The server does not answer.
    """
    place = Path(folder).absolute()
    _check(place)
    with lock(place):
        delivery = _Delivery(place, _read_manifest(place), settings or load_settings())
        try:
            delivery.run()
        except (TrackingError, AwayError):
            raise
        except Exception as error:
            if is_permanent(error):
                raise TrackingError(f"{place} can't be delivered: {redact(error)}") from error
            raise AwayError(
                f"the rest of {place} could not be delivered ({_reason(error)}); nothing is lost: "
                f"run `{COMMAND} {place}` again"
            ) from error
        _remove(place)
    return delivery.sentence


def _check(folder: Path) -> None:
    """Before anything is written to it: whether this is a folder of what was not delivered."""
    if not folder.is_dir():
        raise TrackingError(f"{folder} is no folder: there is nothing to deliver")
    if not (folder / MANIFEST).is_file():
        raise TrackingError(f"{folder} has no {MANIFEST}: it is no folder of what was not delivered")


def _read_manifest(folder: Path) -> Manifest:
    try:
        return Manifest.read(folder)
    except (OSError, ValueError) as error:
        raise TrackingError(f"{folder / MANIFEST} can't be read: {type(error).__name__}") from None


class _Delivery:
    """One delivery of one folder."""

    def __init__(self, folder: Path, manifest: Manifest, settings: TrackingSettings) -> None:
        self._folder = folder
        self._manifest = manifest
        self._client: MlflowClient = MLflowTracker(_reachable(settings, manifest)).client
        self._run_id = manifest.run_id
        self._points = 0
        self._has_model = False
        self._registered = ""
        self._impossible: list[str] = []

    @property
    def sentence(self) -> str:
        """What was delivered, and what somebody else has to do."""
        told = f"everything of run {self._run_id} is delivered: {self._points:,} metric points and what belongs to them"
        if self._registered:
            return f"{told}. {self._registered}"
        if self._has_model:
            told += (
                "; its model is in the run, and not registered by this: the operator registers the model of a "
                "TrainingRun that succeeds, any other is registered by hand"
            )
        return told

    def run(self) -> None:
        """Deliver everything: metrics before the checkpoints that know of them, the end of the run last.

        A model is registered when all else is there.
        """
        run = self._client.get_run(self._run_id)
        self._check_run(run)
        for file in sorted(self._folder.glob(PATTERN)):
            self._deliver_points(file)
        for call in self._manifest.calls:
            call.make(self._client, self._run_id)
            self._note(calls=[other for other in self._manifest.calls if other != call])
        for upload in self._manifest.uploads:
            self._deliver_upload(upload)
        for checkpoint in self._manifest.checkpoints:
            self._deliver_checkpoint(checkpoint)
        if self._manifest.registration is not None and not self._impossible:
            self._register(self._manifest.registration)
        if self._manifest.status is not None and run.info.status == "RUNNING":
            self._client.set_terminated(self._run_id, self._manifest.status)
        if self._impossible:
            raise TrackingError(
                f"all but this of {self._folder} is delivered: {'; '.join(self._impossible)}; "
                "remedy that and deliver again, or remove the folder"
            )

    def _check_run(self, run: Run) -> None:
        if run.info.lifecycle_stage == "deleted":
            raise TrackingError(
                f"run {self._run_id} was deleted: restore it (`mlflow runs restore --run-id {self._run_id}`), "
                f"or remove {self._folder}"
            )
        try:
            check_attempt(run, self._manifest.attempt)
        except OvertakenError as error:
            raise TrackingError(
                f"what was left of run {self._run_id} is not wanted any more: {error}; remove {self._folder}"
            ) from None

    def _deliver_points(self, file: Path) -> None:
        for points, offset in _batches(file, self._manifest.offsets.get(file.name, 0)):
            self._send(points)
            self._note(offsets={**self._manifest.offsets, file.name: offset})
        file.unlink()

    def _send(self, points: Sequence[Point]) -> None:
        try:
            send_points(self._client, self._run_id, points)
        except Exception as error:
            if not is_refusal(error):
                raise
            parts = halves(points, error)
            for part in parts:
                self._send(part)
            if not parts:
                log_refused(points, error)
        else:
            self._points += len(points)

    def _deliver_upload(self, kept: KeptUpload) -> None:
        path = self._folder / kept.path
        upload = Upload(
            path=path,
            target=kept.target,
            whole_folder=kept.whole_folder,
            model=kept.model,
            attempt=self._manifest.attempt,
        )
        try:
            upload.make(self._client, self._run_id)
        except Exception as error:
            if path.exists() and not is_permanent(error) and not _is_too_large(error):
                raise
            self._impossible.append(f"{path} ({_reason(error) if path.exists() else 'it was removed'})")
            return
        self._has_model = self._has_model or kept.model is not None
        self._note(uploads=[other for other in self._manifest.uploads if other != kept])
        self._forget(kept.path)

    def _deliver_checkpoint(self, kept: KeptCheckpoint) -> None:
        path = self._folder / kept.path
        if not path.exists():
            self._impossible.append(f"{path} (it was removed)")
            return
        listed = parse_checkpoints(self._client.get_run(self._run_id).data.tags.get(TAG_CHECKPOINTS))
        try:
            # Training may have gone on meanwhile: what it made since stays the newest.
            _, dropped = publish(
                self._client,
                self._run_id,
                path,
                kept.checkpoint,
                listed=[item for item in listed if item.step <= kept.checkpoint.step],
                newer=[item for item in listed if item.step > kept.checkpoint.step],
                keep=kept.keep,
                mode=kept.mode,
            )
        except Exception as error:
            if not _is_too_large(error):
                raise
            self._impossible.append(f"{path} ({_reason(error)})")
            return
        for old in dropped:
            remove(self._client, self._run_id, old)
        self._note(checkpoints=[other for other in self._manifest.checkpoints if other != kept])
        self._forget(kept.path)

    def _register(self, spec: RegistrationSpec) -> None:
        facts = read_facts(self._client, self._run_id)
        assert facts is not None  # noqa: S101 - the run was there, and is no deleted one
        try:
            self._registered = register(self._client, facts, spec).message
        except ModelMissingError as error:
            self._impossible.append(f"the registration as {spec.model} ({error})")
        else:
            self._note(registration=None)

    def _forget(self, path: str) -> None:
        """Remove what was delivered, if it is a copy of ours."""
        if Path(path).is_absolute():
            return
        found = self._folder / path
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            found.unlink(missing_ok=True)

    def _note(self, **done: object) -> None:
        self._manifest = self._manifest.model_copy(update=done)
        self._manifest.write(self._folder)


def _is_too_large(error: Exception) -> bool:
    refusal = refusal_of(error)
    return refusal is not None and refusal.of_size


def _reason(error: Exception) -> str:
    refusal = refusal_of(error)
    return refusal.sentence if refusal is not None else redact(error)


def _reachable(settings: TrackingSettings, manifest: Manifest) -> TrackingSettings:
    """The settings, with the manifest's server where they name none."""
    if "tracking_uri" in settings.model_fields_set:
        return settings
    if MASK in manifest.tracking_uri:
        raise TrackingError(
            f"the address {manifest.tracking_uri} was kept without user and password: set MLFLOW_TRACKING_URI to it"
        )
    return settings.model_copy(update={"tracking_uri": manifest.tracking_uri})


def _batches(file: Path, start: int) -> Iterator[tuple[list[Point], int]]:
    """The points of a file from an offset on, in batches, each with the offset behind it; half lines are left out."""
    with file.open("rb") as stream:
        stream.seek(start)
        points: list[Point] = []
        for line in stream:
            start += len(line)
            point = from_line(line)
            if point is not None and not is_step(point.step):
                log.warning("a metric whose step is beyond 64 bits is left out", metric=point.name)
            elif point is not None:
                points.append(point)
            if len(points) == BATCH:
                yield points, start
                points = []
        if points:
            yield points, start


def _remove(folder: Path) -> None:
    """Remove a delivered folder; the manifest goes last, so that an interruption leaves what can be delivered again."""
    last = (LOCK, MANIFEST)
    for child in folder.iterdir():
        if child.is_dir() and not child.is_symlink():
            shutil.rmtree(child, ignore_errors=True)
        elif child.name not in last:
            child.unlink(missing_ok=True)
    for name in last:
        (folder / name).unlink(missing_ok=True)
    folder.rmdir()
