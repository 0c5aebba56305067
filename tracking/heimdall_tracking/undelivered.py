"""What was not delivered when a process had to end, in a folder of its own: whole, as data, and without credentials.

The folder is made when points first have to wait on disk, with a manifest that names the run, so that even what a
killed process leaves behind can be delivered (heimdall_tracking.deliver). Who writes to it or delivers it holds its
lock.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Final, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from heimdall_api.contract import Checkpoint
from heimdall_api.types import RegistrationSpec
from heimdall_tracking.artifacts import Upload
from heimdall_tracking.calls import Call
from heimdall_tracking.checkpoints import Mode
from heimdall_tracking.errors import TrackingError
from heimdall_tracking.files import whole
from heimdall_tracking.points import Point, to_lines
from heimdall_tracking.redact import redact
from heimdall_tracking.runs import FinalStatus
from heimdall_tracking.spill import Spill

COMMAND: Final = "heimdall-train deliver"
MANIFEST: Final = "manifest.json"
LOCK: Final = ".lock"
VERSION: Final = 1
BEFORE_SPILL: Final = "metrics-00000000.jsonl"
BEHIND_SPILL: Final = "metrics-99999999.jsonl"

log = structlog.get_logger()


class KeptUpload(BaseModel):
    """An artifact, or a model, that was not uploaded."""

    model_config = ConfigDict(frozen=True)

    path: str
    """Where it lies: relative to the folder, or absolute where it could not be copied into it."""
    target: str | None = None
    """Artifact folder that it goes to."""
    whole_folder: bool = False
    model: str | None = None
    """Key of the logged model that it becomes."""


class KeptCheckpoint(BaseModel):
    """A checkpoint that was not published."""

    model_config = ConfigDict(frozen=True)

    path: str
    checkpoint: Checkpoint
    keep: int
    mode: Mode


class Manifest(BaseModel):
    """What lies in the folder, and which run it belongs to."""

    model_config = ConfigDict(frozen=True)

    version: Literal[1] = VERSION
    tracking_uri: str
    """The MLflow server, without user and password."""
    run_id: str
    attempt: int | None = None
    """The attempt that it comes from, where newer ones may take over."""
    made_at: datetime = Field(default_factory=lambda: datetime.now(UTC))
    offsets: dict[str, int] = Field(default_factory=dict)
    """Bytes of a file of points that are delivered."""
    calls: list[Call] = Field(default_factory=list)
    uploads: list[KeptUpload] = Field(default_factory=list)
    checkpoints: list[KeptCheckpoint] = Field(default_factory=list)
    registration: RegistrationSpec | None = None
    """What its model is to be registered as, where nobody else does it."""
    status: FinalStatus | None = None
    """How the run ended, where that could not be told."""

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """The one that lies in a folder.

        Raises:
            OSError: There is none, or it can't be read.
            ValueError: It is none of this version.
        """
        return cls.model_validate_json((folder / MANIFEST).read_text())

    def write(self, folder: Path) -> None:
        """Write it into its folder, whole or not at all.

        Raises:
            OSError: The disk takes nothing more.
        """
        with whole(folder / MANIFEST) as part:
            part.write_text(self.model_dump_json(indent=1, exclude_none=True))


@dataclass(frozen=True, kw_only=True)
class LeftCheckpoint:
    """A checkpoint that its publisher could not publish."""

    file: Path
    checkpoint: Checkpoint
    keep: int
    mode: Mode


@dataclass(frozen=True, kw_only=True)
class Left:
    """What was not delivered, as its senders hand it over. Points: those before the spill's, and those behind."""

    before: Sequence[Point] = ()
    behind: Sequence[Point] = ()
    calls: Sequence[Call] = ()
    uploads: Sequence[Upload] = ()
    checkpoints: Sequence[LeftCheckpoint] = ()

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return any((self.before, self.behind, self.calls, self.uploads, self.checkpoints))


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What lies in a folder, in numbers, and what the disk did not take."""

    folder: Path
    manifest: Manifest
    points: int
    lost_points: int = 0
    problem: str = ""
    """Why not everything could be kept."""

    @property
    def sentence(self) -> str:
        """What was not delivered, and the command that delivers it."""
        entry = self.manifest
        counts = [
            (self.points, "metric point"),
            (len(entry.calls), "call for tags and parameters"),
            (sum(item.model is None for item in entry.uploads), "artifact"),
            (sum(item.model is not None for item in entry.uploads), "model"),
            (len(entry.checkpoints), "checkpoint"),
        ]
        named = [f"{count:,} {_plural(name, count)}" for count, name in counts if count]
        named += [f"the registration as {entry.registration.model}"] if entry.registration is not None else []
        named += [f"the end ({entry.status})"] if entry.status is not None else []
        what = f"{', '.join(named[:-1])} and {named[-1]}" if named[1:] else named[0] if named else "nothing"
        lost = f" ({self.lost_points:,} points are lost: {self.problem})" if self.problem else ""
        return (
            f"{what} of run {entry.run_id} could not be delivered to {entry.tracking_uri} and are kept on disk{lost}; "
            f"deliver them when it answers again with: {command_for(self.folder)}"
        )


class UndeliveredFolder:
    """The folder of one process and run. Nothing is made before it is needed."""

    def __init__(self, wanted: Path, *, run_id: str, tracking_uri: str, attempt: int | None = None) -> None:
        """Nothing is written yet.

        Args:
            wanted: The folder; where another process has left one, its name and a number.
            run_id: The run that everything in it belongs to.
            tracking_uri: Its server; what it says of user and password is left out.
            attempt: Number of the attempt, where newer ones may take over.
        """
        self._wanted = wanted.absolute()
        self._manifest = Manifest(tracking_uri=_portable(tracking_uri), run_id=run_id, attempt=attempt)
        self._folder: Path | None = None
        self._lock: IO[str] | None = None
        self._kept: Kept | None = None

    @property
    def kept(self) -> Kept | None:
        """What was kept; None where everything was delivered."""
        return self._kept

    def open(self) -> Path:
        """Make the folder, if it is not made yet.

        Raises:
            OSError: The disk takes nothing more.
        """
        if self._folder is None:
            folder = _make_new(self._wanted)
            try:
                self._lock = lock(folder)
                self._manifest.write(folder)
            except OSError:
                # The next call makes another: a disk that stays full must not fill with empty ones.
                self._release()
                shutil.rmtree(folder, ignore_errors=True)
                raise
            self._folder = folder
        return self._folder

    def keep(self, left: Left, spill: Spill) -> Kept | None:
        """Put away what was not delivered; the folder is gone where there is nothing.

        Args:
            left: What lies in memory, and files elsewhere.
            spill: Points that lie in this folder already.

        Returns:
            What was kept, or None where there was nothing.
        """
        spilled = spill.settle()
        if not left and not spilled:
            self.discard()
            return None
        try:
            folder = self.open()
        except OSError as error:
            lost = len(left.before) + len(left.behind)
            self._kept = Kept(
                folder=self._wanted, manifest=self._manifest, points=0, lost_points=lost, problem=_reason(error)
            )
            return self._kept
        lost, problem = 0, ""
        for points, name in ((left.before, BEFORE_SPILL), (left.behind, BEHIND_SPILL)):
            failed = _write_points(folder / name, points)
            if failed:
                lost, problem = lost + len(points), failed
        # First as they lie: copying may take longer than the process has left.
        manifest = self._manifest.model_copy(
            update={
                "calls": list(left.calls),
                "uploads": [_kept_upload(item, str(item.path.absolute())) for item in left.uploads],
                "checkpoints": [_kept_checkpoint(item, str(item.file.absolute())) for item in left.checkpoints],
            }
        )
        problem = self._write(manifest) or problem
        if left.uploads or left.checkpoints:
            taken = {
                "uploads": [
                    _kept_upload(item, _take(item.path.absolute(), folder, _place(number, item)))
                    for number, item in enumerate(left.uploads, 1)
                ],
                "checkpoints": [
                    _kept_checkpoint(item, _take(item.file.absolute(), folder, Path("checkpoints") / item.file.name))
                    for item in left.checkpoints
                ],
            }
            problem = self._write(manifest.model_copy(update=taken)) or problem
        points_kept = len(left.before) + len(left.behind) - lost + spilled
        self._kept = Kept(folder=folder, manifest=self._manifest, points=points_kept, lost_points=lost, problem=problem)
        self._release()
        return self._kept

    def keep_status(self, status: FinalStatus | None) -> Kept | None:
        """Put away how the run ended, or forget it (None) when it could be told after all.

        Returns:
            What is kept now, or None where there is nothing.
        """
        return self._keep_to_do({"status": status})

    def keep_registration(self, registration: RegistrationSpec) -> Kept | None:
        """Put away what the run's model is to be registered as when the rest is delivered.

        Returns:
            What is kept now, or None where the disk takes nothing more.
        """
        return self._keep_to_do({"registration": registration})

    def _keep_to_do(self, what: Mapping[str, object]) -> Kept | None:
        if self._folder is None and not any(what.values()):
            return None
        try:
            folder = self.open()
        except OSError as error:
            log.warning("what is left to be done can't be kept", error=_reason(error), **what)
            return None
        known = self._kept
        problem = self._write(self._manifest.model_copy(update=what))
        if known is None and not any(what.values()):
            self.discard()
            return None
        self._kept = Kept(
            folder=folder,
            manifest=self._manifest,
            points=known.points if known else 0,
            lost_points=known.lost_points if known else 0,
            problem=problem or (known.problem if known else ""),
        )
        self._release()
        return self._kept

    def _write(self, manifest: Manifest) -> str:
        """Write the manifest; why that was impossible, or nothing."""
        assert self._folder is not None  # noqa: S101 - it was opened
        self._manifest = manifest
        try:
            manifest.write(self._folder)
        except OSError as error:
            return _reason(error)
        return ""

    def discard(self) -> None:
        """Remove the folder and what lies in it."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
        self._release()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def folder_of_checkpoints(wanted: Path, run_id: str) -> Path | None:
    """A folder that holds checkpoints of a run that were not delivered, or None where there is none.

    Args:
        wanted: The folder that its processes were to use; those that found it taken have one beside it.
        run_id: The run.
    """
    beside = wanted.parent.iterdir() if wanted.parent.is_dir() else ()
    for folder in sorted(each for each in beside if re.fullmatch(rf"{re.escape(wanted.name)}(-\d+)?", each.name)):
        try:
            manifest = Manifest.read(folder)
        except (OSError, ValueError):
            continue
        if manifest.run_id == run_id and manifest.checkpoints:
            return folder
    return None


def command_for(folder: Path) -> str:
    """The command that delivers what lies in a folder."""
    return f"{COMMAND} {shlex.quote(str(folder))}"


def lock(folder: Path) -> IO[str]:
    """Lock a folder for this process; the lock ends with the file that is given back, or with the process.

    Raises:
        TrackingError: Another process holds it.
    """
    file = (folder / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise TrackingError(
            f"{folder} is in use: the training that writes to it still runs, or another process delivers it; "
            "wait for its end"
        ) from None
    return file


def _make_new(wanted: Path) -> Path:
    """A folder that nobody else has: the wanted one, or one beside it."""
    wanted.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        folder = wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _write_points(file: Path, points: Sequence[Point]) -> str:
    """Write points; why that was impossible, or nothing."""
    if not points:
        return ""
    try:
        file.write_bytes(to_lines(points))
    except OSError as error:
        file.unlink(missing_ok=True)
        return _reason(error)
    return ""


def _place(number: int, upload: Upload) -> Path:
    return Path("artifacts") / f"{number:04}" / upload.path.name


def _kept_upload(upload: Upload, path: str) -> KeptUpload:
    return KeptUpload(path=path, target=upload.target, whole_folder=upload.whole_folder, model=upload.model)


def _kept_checkpoint(left: LeftCheckpoint, path: str) -> KeptCheckpoint:
    return KeptCheckpoint(path=path, checkpoint=left.checkpoint, keep=left.keep, mode=left.mode)


def _take(source: Path, folder: Path, place: Path) -> str:
    """Have a file or folder lie in the folder, without a copy where that is possible; where it lies then."""
    target = folder / place
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, copy_function=_link_or_copy)
        else:
            _link_or_copy(str(source), str(target))
    except OSError as error:
        if target.is_dir():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        log.warning("a file that was not delivered stays where it is", file=str(source), error=_reason(error))
        return str(source)
    return str(place)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(os.path.realpath(source), target)  # a link of a link would lead nowhere from here
    except OSError:
        shutil.copy2(source, target)


def _portable(uri: str) -> str:
    """A tracking URI that means the same from any folder, without user and password."""
    scheme = "sqlite:///"
    if uri.startswith(scheme) and not uri.startswith(f"{scheme}/"):
        uri = f"{scheme}{Path(uri.removeprefix(scheme)).absolute()}"
    return redact(uri)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _plural(name: str, count: int) -> str:
    head, space, rest = name.partition(" for ")
    return name if count == 1 else f"{head}s{space}{rest}"
