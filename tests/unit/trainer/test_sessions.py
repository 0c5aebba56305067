"""Recording sessions in SQLite."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa

from heimdall_trainer.data import sessions
from heimdall_trainer.data.sessions import SessionStore, receivers
from heimdall_trainer.errors import ConfigurationError, DataError
from tests.unit.trainer.builders import data_settings, session


@pytest.fixture
def empty(tmp_path: Path) -> Iterator[SessionStore]:
    store = SessionStore.open(data_settings(tmp_path))
    yield store
    store.close()


@pytest.fixture
def store(empty: SessionStore) -> SessionStore:
    empty.create_schema()
    for identity, status in (("b", "approved"), ("a", "approved"), ("c", "pending"), ("d", "rejected")):
        assert empty.add_session(session(identity, status=status))  # type: ignore[arg-type]
    return empty


def test_only_approved_sessions_are_found(store: SessionStore) -> None:
    assert store.approved() == ["a", "b"]


def test_sessions_that_were_asked_for_are_found_sorted_and_once(store: SessionStore) -> None:
    assert store.approved(["b", "a", "b"]) == ["a", "b"]
    assert store.approved(["b"]) == ["b"]


def test_sessions_that_can_not_be_used_are_named_with_the_reason(store: SessionStore) -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.data\.sessions\.ids .*c \(pending\), d \(rejected\), x \(unk"):
        store.approved(["a", "c", "d", "x"])


def test_many_sessions_that_can_not_be_used_are_not_all_named(store: SessionStore) -> None:
    with pytest.raises(ConfigurationError, match=r"x09 \(unknown\) and 2 more;"):
        store.approved([f"x{number:02}" for number in range(12)])


def test_approving_and_rejecting_changes_what_is_found(store: SessionStore) -> None:
    store.set_status("c", "approved")
    store.set_status("a", "rejected")
    assert store.approved() == ["b", "c"]


def test_approving_what_is_not_there_is_refused(store: SessionStore) -> None:
    with pytest.raises(ConfigurationError, match="'x' to become approved"):
        store.set_status("x", "approved")


def test_a_session_comes_back_as_it_was_added(store: SessionStore) -> None:
    assert store.transmissions(["a"]) == list(session("a").transmissions)


def test_a_recording_whose_receiver_has_no_row_is_there_without_a_place(store: SessionStore) -> None:
    with store._engine.begin() as connection:
        connection.execute(receivers.delete().where(receivers.c.session_id == "a", receivers.c.receiver_id == "rx1"))
    first = store.transmissions(["a"])[0]
    assert [each.receiver.receiver_id for each in first.recordings] == ["rx0", "rx1", "rx2"]
    assert math.isnan(first.recordings[1].receiver.latitude)


def test_transmissions_come_in_a_fixed_order(store: SessionStore) -> None:
    found = store.transmissions(["b", "a"])
    assert [item.id for item in found] == ["a-0000", "a-0001", "b-0000", "b-0001"]
    assert [each.receiver.receiver_id for each in found[0].recordings] == ["rx0", "rx1", "rx2"]


def test_more_sessions_than_a_query_takes_are_read_by_several(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SESSIONS_ASKED", 1)
    assert [item.id for item in store.transmissions(["a", "b"])] == ["a-0000", "a-0001", "b-0000", "b-0001"]


def test_a_session_that_is_there_is_not_added_again(store: SessionStore) -> None:
    assert not store.add_session(session("a", status="rejected", transmissions=5))
    assert store.approved(["a"]) == ["a"]
    assert len(store.transmissions(["a"])) == 2


def test_a_session_is_added_as_a_whole_or_not_at_all(store: SessionStore) -> None:
    doubled = session("e")
    doubled = type(doubled)(**{**vars(doubled), "transmissions": doubled.transmissions * 2})
    with pytest.raises(sa.exc.IntegrityError):
        store.add_session(doubled)
    assert store.session_name("e") is None


def test_a_session_has_its_name_whatever_its_status(store: SessionStore) -> None:
    assert store.session_name("d") == "session d"
    assert store.session_name("x") is None


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:canary@host:port/db",
        "postgresql://u:p@canary@db/heimdall",
        "postgresql://u:p@can/canary@db/heimdall",
        "sqlite://:",
    ],
)
def test_a_url_that_can_not_be_read_names_its_variable_and_no_password(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="HEIMDALL_DATABASE_URL can't be read: its port must") as caught:
        SessionStore.open(data_settings(tmp_path, database_url=url))
    assert "canary" not in str(caught.value)


def test_a_user_may_have_an_at_in_its_name_and_a_file_too(tmp_path: Path) -> None:
    for url in ("postgresql://me@there:canary@host/db", f"sqlite:///{tmp_path}/me@there.db"):
        SessionStore.open(data_settings(tmp_path, database_url=url)).close()


def test_a_password_that_a_caller_has_put_elsewhere_is_not_shown() -> None:
    reason = Exception("no route with password=canary to postgresql://u:canary@h")
    store = SessionStore(sa.create_engine("postgresql+psycopg://host/db?user=u&password=canary&sslpassword=canary"))
    with pytest.raises(ConnectionError, match=r"host/db.*does not answer") as caught:
        store._raise_unless_away(sa.exc.OperationalError("SELECT 1", {}, reason), "read", tries_left=0)
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("reason", "raised", "words"),
    [
        ('root certificate file "/a.pem" does not exist\nOr', ConfigurationError, r"can't be trusted .*sslrootcert"),
        ('FATAL:  database "db" does not exist', ConfigurationError, "is not there .*: check HEIMDALL_DATABASE_URL"),
        ('FATAL:  role "u" does not exist', ConfigurationError, "is not there .*: check HEIMDALL_DATABASE_URL"),
        ('relation "receivers" does not exist\nLINE 1', DataError, "holds no recording sessions .*data generate"),
        ("connection refused", ConnectionError, "does not answer: connection refused"),
    ],
)
def test_what_postgresql_says_is_told_with_what_helps(reason: str, raised: type[Exception], words: str) -> None:
    store = SessionStore(sa.create_engine("postgresql+psycopg://host/db"))
    with pytest.raises(raised, match=words):
        store._raise_unless_away(sa.exc.OperationalError("SELECT 1", {}, Exception(reason)), "read", tries_left=0)


WRITERS: dict[str, Callable[[SessionStore], object]] = {
    "create_schema": lambda store: store.create_schema(),
    "add_session": lambda store: store.add_session(session("a")),
    "set_status": lambda store: store.set_status("a", "approved"),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_database_that_is_away_is_told_whatever_was_to_be_written(
    write: Callable[[SessionStore], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits = list[float]()
    monkeypatch.setattr(time, "sleep", waits.append)
    store = SessionStore.open(data_settings(tmp_path, database_url="postgresql://u:canary@127.0.0.1:9/db"))
    with pytest.raises(ConnectionError, match=r"HEIMDALL_DATABASE_URL\) does not answer") as caught:
        write(store)
    assert "canary" not in str(caught.value)
    assert waits == [1, 2, 4, 8]
    store.close()


@pytest.mark.parametrize("write", [WRITERS["create_schema"], WRITERS["set_status"]])
def test_a_file_that_takes_nothing_is_named(write: Callable[[SessionStore], object], tmp_path: Path) -> None:
    (tmp_path / "heimdall.db").write_text("no database at all")
    store = SessionStore.open(data_settings(tmp_path))
    with pytest.raises(DataError, match=r"heimdall\.db .*can't be written to.*not a database"):
        write(store)
    store.close()


def test_without_tables_the_error_says_what_to_check(empty: SessionStore) -> None:
    with pytest.raises(DataError, match=r"no such table.*HEIMDALL_DATABASE_URL.*heimdall-train data generate"):
        empty.approved()


def test_without_approved_sessions_the_error_says_what_to_do(empty: SessionStore) -> None:
    empty.create_schema()
    empty.add_session(session("c", status="pending"))
    with pytest.raises(DataError, match="no approved recording session: approve one"):
        empty.approved()


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "heimdall.db").write_text("no database at all")
    store = SessionStore.open(data_settings(tmp_path))
    with pytest.raises(DataError, match=r"heimdall\.db .*can't be read.*not a database"):
        store.approved()
    store.close()


def test_making_the_tables_twice_does_no_harm(store: SessionStore) -> None:
    store.create_schema()
    assert store.approved() == ["a", "b"]
