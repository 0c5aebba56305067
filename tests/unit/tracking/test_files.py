"""Files are whole or not there, whatever ends their writing."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from heimdall_tracking.files import whole


def test_what_was_there_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    with whole(file) as part:
        part.write_text("new")
        assert file.read_text() == "old"

    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("error", [ValueError("half-way"), KeyboardInterrupt()], ids=["error", "signal"])
def test_nothing_of_what_was_cut_short_is_left(error: BaseException, shared: bool, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")

    def write() -> None:
        with whole(file, shared=shared) as part:
            part.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()

    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_an_error_of_the_disk_names_the_file_where_it_names_none(tmp_path: Path) -> None:
    file = tmp_path / "file"

    with pytest.raises(OSError) as caught, whole(file):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError) as other, whole(file):
        raise OSError(errno.EIO, "Input/output error", "another")

    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(file))
    assert other.value.filename == "another"


def test_the_next_try_writes_over_what_a_kill_has_left(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with whole(file) as part:
        left = part
        part.write_text("new")
    left.write_text("left by a kill")

    with whole(file) as part:
        assert part == left
        part.write_text("newer")

    assert list(tmp_path.iterdir()) == [file]


def test_those_who_write_one_file_at_once_do_not_meet(tmp_path: Path) -> None:
    file = tmp_path / "file"

    with whole(file, shared=True) as first:
        first.write_text("first")
        with whole(file, shared=True) as second:
            second.write_text("second")
        assert file.read_text() == "second"

    assert file.read_text() == "first"
    assert list(tmp_path.iterdir()) == [file]
