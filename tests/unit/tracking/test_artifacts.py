"""Uploads: what is impossible is said at once, what may still come is tried again."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import wait as wait_for_futures
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from heimdall_tracking import artifacts
from heimdall_tracking.artifacts import Upload
from heimdall_tracking.errors import REFUSED_RETRY_S, TooLargeError, TrackingError
from heimdall_tracking.outstanding import Outstanding
from tests.unit.tracking.fakes import PATIENCE_S, AnsweredError, AwayError, RefusedError

ENDLESS_S = 3600
SOON_S = 0.02


Send = Callable[[str], object]


class Uploader(artifacts.Uploader):
    """Uploads each in the way that its test wants."""

    def __init__(self, *, retry_s: float = 0.001) -> None:
        self.sends: dict[int, Send] = {}
        super().__init__(lambda upload: self.sends[id(upload)](str(upload.path)) and None, retry_s=retry_s)

    def file(self, send: Send, path: Path, *, whole_folder: bool = False) -> Future[None]:
        upload = Upload(path=path, whole_folder=whole_folder)
        self.sends[id(upload)] = send
        return self.put(upload)

    def folder(self, send: Send, path: Path) -> Future[None]:
        return self.file(send, path, whole_folder=True)


@pytest.fixture
def uploader() -> Iterator[Uploader]:
    uploader = Uploader(retry_s=0.001)
    yield uploader
    uploader.close(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / "weights.bin"
    file.write_bytes(b"weights")
    return file


def test_files_and_folders_are_uploaded_one_after_the_other(uploader: Uploader, file: Path) -> None:
    uploaded: list[str] = []

    first = uploader.file(uploaded.append, file)
    uploader.folder(uploaded.append, file.parent)

    assert uploader.flush(PATIENCE_S)
    assert uploaded == [str(file), str(file.parent)]
    assert first.result(0) is None


def test_a_missing_file_is_named_at_once(uploader: Uploader, tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match=r"gone\.bin is missing"):
        uploader.file(lambda path: None, tmp_path / "gone.bin")
    with pytest.raises(TrackingError, match="gone is missing"):
        uploader.folder(lambda path: None, tmp_path / "gone")


def test_a_folder_is_no_file_and_a_file_is_no_folder(uploader: Uploader, file: Path) -> None:
    with pytest.raises(TrackingError, match="is a folder"):
        uploader.file(lambda path: None, file.parent)
    with pytest.raises(TrackingError, match="is no folder"):
        uploader.folder(lambda path: None, file)


def test_a_file_that_may_not_be_read_is_named_at_once(
    uploader: Uploader, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.getuid() == 0:  # root may read everything
        monkeypatch.setattr(os, "access", lambda path, mode: False)
    file.chmod(0)

    with pytest.raises(TrackingError, match=r"weights\.bin can't be read by this user.*permissions"):
        uploader.file(lambda path: None, file)


def test_a_file_within_a_folder_that_may_not_be_read_is_named(uploader: Uploader, file: Path) -> None:
    def upload(path: str) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    upload_of_folder = uploader.folder(upload, file.parent)

    with pytest.raises(TrackingError, match=r"can't be uploaded.*weights\.bin"):
        upload_of_folder.result(PATIENCE_S)
    assert not uploader.flush(PATIENCE_S)


def test_a_file_removed_before_its_turn_is_named(uploader: Uploader, file: Path) -> None:
    def upload(path: str) -> None:
        file.unlink()
        Path(path).read_bytes()

    with pytest.raises(TrackingError, match="was removed before it was uploaded"):
        uploader.file(upload, file).result(PATIENCE_S)


def test_an_upload_is_tried_again_until_the_server_is_back(uploader: Uploader, file: Path) -> None:
    errors = [AwayError(), ConnectionError(), RefusedError("INTERNAL_ERROR")]
    uploaded = []

    def upload(path: str) -> None:
        if errors:
            raise errors.pop()
        uploaded.append(path)

    uploader.file(upload, file)

    assert uploader.flush(PATIENCE_S)
    assert uploaded == [str(file)]


def test_an_upload_that_is_refused_is_tried_once_and_holds_nothing_up(uploader: Uploader, file: Path) -> None:
    calls, uploaded = [], []

    def refused(path: str) -> None:
        calls.append(path)
        raise RefusedError("RESOURCE_DOES_NOT_EXIST")

    first = uploader.file(refused, file)
    uploader.file(uploaded.append, file)

    assert not uploader.flush(PATIENCE_S)
    assert isinstance(first.exception(0), TrackingError)
    assert len(calls) == 1
    assert uploaded == [str(file)]


def test_a_file_that_no_proxy_lets_through_is_tried_once_told_once_and_left(uploader: Uploader, file: Path) -> None:
    calls, uploaded = [], []

    def too_large(path: str) -> None:
        calls.append(path)
        raise AnsweredError(413)

    with capture_logs() as lines:
        first = uploader.file(too_large, file)
        uploader.file(too_large, file)
        uploader.file(uploaded.append, file)
        assert uploader.settle(PATIENCE_S), "waiting longer changes nothing"
        assert not uploader.flush(0)
        assert not uploader.flush(PATIENCE_S), "it is kept for good"
    assert isinstance(first.exception(0), TooLargeError)
    assert (len(calls), uploaded) == (2, [str(file)])
    (told,) = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert told["fate"] == "is kept, to be delivered later"
    assert "413 Client Error; raise the largest body" in told["error"]
    assert uploader.refusal is not None

    uploader.close(0)
    assert [upload.path for upload in uploader.left()] == [file, file]


@pytest.mark.parametrize("status", [401, 403])
def test_who_may_not_upload_is_told_once_and_tries_slowly_until_that_is_mended(
    status: int, uploader: Uploader, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    errors, waits = 3 * [AnsweredError(status)], list[float]()
    monkeypatch.setattr(uploader._closed, "wait", waits.append)

    def upload(path: str) -> None:
        if errors:
            raise errors.pop()

    with capture_logs() as lines:
        uploader.file(upload, file)
        assert uploader.flush(PATIENCE_S)
    assert waits == 3 * [REFUSED_RETRY_S]
    (told,) = [line for line in lines if line["log_level"] in ("warning", "error")]
    assert told["fate"] == "is tried again every 60 s"
    assert uploader.refusal is None


def test_a_failure_is_told_by_the_flush_after_it_and_not_by_later_ones(uploader: Uploader, file: Path) -> None:
    def refused(path: str) -> None:
        raise RefusedError

    uploader.file(refused, file)

    assert not uploader.flush(PATIENCE_S)
    assert uploader.flush(PATIENCE_S)


def test_an_upload_added_while_another_is_waited_for_is_not_forgotten(
    uploader: Uploader, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: str) -> None:
        raise RefusedError

    def wait_and_add(futures: list[object], timeout: float) -> object:
        uploader.file(refused, file)
        return wait_for_futures(futures, timeout)  # type: ignore[type-var]

    monkeypatch.setattr(artifacts, "wait_for_futures", wait_and_add)
    assert uploader.flush(PATIENCE_S)
    monkeypatch.undo()

    assert not uploader.flush(PATIENCE_S)


def test_flush_says_false_while_an_upload_is_under_way(uploader: Uploader, file: Path) -> None:
    go_on = threading.Event()
    uploader.file(lambda path: go_on.wait(PATIENCE_S), file)

    assert not uploader.flush(SOON_S)
    assert not uploader.settle(0)

    go_on.set()
    assert uploader.settle(PATIENCE_S)
    assert uploader.flush(0)


def test_what_is_on_its_way_is_told_with_its_size_and_every_try(uploader: Uploader, file: Path) -> None:
    go_on, tried, again = threading.Event(), threading.Semaphore(0), [AwayError()]
    (file.parent / "more").mkdir()
    (file.parent / "more" / "half.bin").write_bytes(b"half")

    def upload(path: str) -> None:
        tried.release()
        if again:
            raise again.pop()
        assert go_on.wait(PATIENCE_S)

    uploader.file(upload, file)
    uploader.folder(lambda path: None, file.parent)
    for _ in range(2):
        assert tried.acquire(timeout=PATIENCE_S)

    whole = len(b"weights") + len(b"half")
    assert uploader.outstanding() == Outstanding(size=len(b"weights") + whole, tries=2, under_way=len(b"weights"))
    go_on.set()
    assert uploader.flush(PATIENCE_S)
    assert uploader.outstanding() == Outstanding(settled=2, tries=3)


def test_what_is_too_large_is_on_its_way_no_more(uploader: Uploader, file: Path) -> None:
    def too_large(path: str) -> None:
        raise AnsweredError(413)

    uploader.file(too_large, file)
    assert uploader.settle(PATIENCE_S)
    assert uploader.outstanding() == Outstanding(settled=1, tries=1)


def test_close_gives_up_what_can_not_be_uploaded_and_says_so(file: Path) -> None:
    uploader, tried = Uploader(retry_s=ENDLESS_S), threading.Event()

    def away(path: str) -> None:
        tried.set()
        raise AwayError("http://alice:canary@host")

    first = uploader.file(away, file)
    second = uploader.file(away, file)
    assert tried.wait(PATIENCE_S)

    assert not uploader.close(SOON_S)
    with pytest.raises(TrackingError, match="was not uploaded in time") as caught:
        first.result(PATIENCE_S)
    assert "canary" not in str(caught.value)
    assert second.cancelled()
    assert [upload.path for upload in uploader.left()] == [file, file]
    assert not uploader.close(0), "closing again does not make it uploaded"


def test_an_upload_that_its_caller_gave_up_is_left_out_and_holds_nothing_up(uploader: Uploader, file: Path) -> None:
    go_on = threading.Event()
    uploaded: list[str] = []
    uploader.file(lambda path: go_on.wait(PATIENCE_S), file)
    given_up = uploader.file(uploaded.append, file)
    uploader.folder(uploaded.append, file.parent)
    assert given_up.cancel()
    go_on.set()

    uploader.flush(PATIENCE_S)
    assert uploaded == [str(file.parent)]
    assert not uploader.left()


def test_an_upload_whose_answer_is_still_out_at_the_end_is_left_too(file: Path) -> None:
    uploader, tried, go_on = Uploader(), threading.Event(), threading.Event()

    def hang(path: str) -> None:
        tried.set()
        assert go_on.wait(PATIENCE_S)

    upload = uploader.file(hang, file)
    assert tried.wait(PATIENCE_S)

    assert not uploader.close(0)
    assert [item.path for item in uploader.left()] == [file]

    go_on.set()
    assert upload.result(PATIENCE_S) is None


def test_what_is_impossible_is_not_left(file: Path) -> None:
    uploader = Uploader()

    def refused(path: str) -> None:
        raise RefusedError

    uploader.file(refused, file)

    assert not uploader.close(PATIENCE_S)
    assert uploader.left() == []
