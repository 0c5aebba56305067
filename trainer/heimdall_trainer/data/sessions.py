"""Recording sessions in PostgreSQL (or SQLite, on a laptop): who recorded what, where, and whether it may be used."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal, TypeVar

import sqlalchemy as sa

from heimdall_tracking.redact import redact
from heimdall_tracking.settings import ESCAPED
from heimdall_trainer.errors import ConfigurationError, DataError
from heimdall_trainer.settings import DataSettings

POOL_SIZE: Final = 4
"""Most connections to the database at a time; who wants one more waits."""
CONNECT_TIMEOUT_S: Final = 10
SILENCE_S: Final = 30
"""How long a connection whose other end says nothing, not even that it is there, is trusted."""
CONNECTION: Final = {
    "connect_timeout": CONNECT_TIMEOUT_S,
    "tcp_user_timeout": 1000 * SILENCE_S,
    "keepalives_idle": SILENCE_S // 3,
    "keepalives_interval": SILENCE_S // 3,
    "keepalives_count": 2,
}
"""What libpq is told where the URL says nothing else: a node that is gone must not be waited for for hours."""
TRIES: Final = 5
"""Tries at a database that does not answer; the waits between them double from 1 s."""
SCHEMA_LOCK: Final = 0x4845494D
"""Advisory lock of PostgreSQL that two processes making the tables at once wait for."""
SESSIONS_ASKED: Final = 10_000
"""Sessions that one query asks for: PostgreSQL takes 65,535 values."""
NAMED_IDS: Final = 10
"""How many sessions an error names."""
_MISSING: Final = re.compile(r'\b(?:database|role) "[^"]*" does not exist')
"""How PostgreSQL says that it has no such database or user: no command of ours makes them."""

Status = Literal["pending", "approved", "rejected"]
T = TypeVar("T")

metadata = sa.MetaData()
recording_sessions = sa.Table(
    "recording_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("status", sa.Text, sa.CheckConstraint("status IN ('pending', 'approved', 'rejected')"), nullable=False),
    sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("center_frequency_hz", sa.Double, nullable=False),
    sa.Column("sample_rate_hz", sa.Double, nullable=False),
    sa.Column("origin_latitude", sa.Double, nullable=False),
    sa.Column("origin_longitude", sa.Double, nullable=False),
)
receivers = sa.Table(
    "receivers",
    metadata,
    sa.Column("session_id", sa.Text, sa.ForeignKey("recording_sessions.id"), primary_key=True),
    sa.Column("receiver_id", sa.Text, primary_key=True),
    sa.Column("latitude", sa.Double, nullable=False),
    sa.Column("longitude", sa.Double, nullable=False),
    sa.Column("altitude_m", sa.Double, nullable=False),
    sa.Column("noise_figure_db", sa.Double, nullable=False),
)
transmissions = sa.Table(
    "transmissions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey("recording_sessions.id"), nullable=False, index=True),
    sa.Column("started_at", sa.DateTime(timezone=True), nullable=False),
    sa.Column("latitude", sa.Double, nullable=False),
    sa.Column("longitude", sa.Double, nullable=False),
    sa.Column("modulation", sa.Text, nullable=False),
)
recordings = sa.Table(
    "recordings",
    metadata,
    sa.Column("transmission_id", sa.Text, sa.ForeignKey("transmissions.id"), primary_key=True),
    sa.Column("receiver_id", sa.Text, primary_key=True),
    sa.Column("object_key", sa.Text, nullable=False),
    sa.Column("sample_count", sa.BigInteger, nullable=False),
    sa.Column("sha256", sa.Text, nullable=False),
    sa.Column("full_scale_dbm", sa.Double, nullable=False),
)


@dataclass(frozen=True, kw_only=True)
class Receiver:
    """A receiver and its place: degrees, metres above the ellipsoid, decibels.

    The place is NaN where a recording names a receiver that its session has no row of.
    """

    receiver_id: str
    latitude: float
    longitude: float
    altitude_m: float = 0.0
    noise_figure_db: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What one receiver recorded of a transmission."""

    session_id: str
    transmission_id: str
    receiver: Receiver
    object_key: str
    """Key of the `.sigmf-meta` object."""
    sample_count: int
    sha256: str
    """SHA-256 of the data, hexadecimal."""
    full_scale_dbm: float
    """Power in dBm of a sample of magnitude 1, the converter's full scale."""
    sample_rate_hz: float

    def __str__(self) -> str:
        """As reports name it."""
        return f"session {self.session_id}, transmission {self.transmission_id}, receiver {self.receiver.receiver_id}"


@dataclass(frozen=True, kw_only=True)
class Transmission:
    """A transmission, where it truly came from (degrees), and who recorded it."""

    id: str
    session_id: str
    started_at: datetime
    latitude: float
    longitude: float
    modulation: str
    origin: tuple[float, float]
    """Latitude and longitude of the session's origin."""
    recordings: tuple[Recording, ...]
    center_frequency_hz: float = 0.0
    """What the receivers were tuned to; 0: not known."""


@dataclass(frozen=True, kw_only=True)
class Session:
    """A recording session: receivers that stood still, on one frequency, at one sampling rate."""

    id: str
    name: str
    status: Status = "pending"
    center_frequency_hz: float
    sample_rate_hz: float
    origin: tuple[float, float]
    """Latitude and longitude that local metres are counted from."""
    receivers: tuple[Receiver, ...]
    transmissions: tuple[Transmission, ...]


class SessionStore:
    """Reads and writes recording sessions."""

    def __init__(self, engine: sa.Engine) -> None:
        """Nothing is asked of the database yet.

        Args:
            engine: PostgreSQL (psycopg) or SQLite.
        """
        self._engine = engine

    @classmethod
    def open(cls, settings: DataSettings) -> SessionStore:
        """Open the settings' database with a small pool of connections that are checked before use.

        Raises:
            ConfigurationError: Its URL can't be read.
        """
        url = _parse(settings.database_url.get_secret_value())
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.get_backend_name() == "postgresql":
            connection = {name: value for name, value in CONNECTION.items() if name not in url.query}
            options |= {"pool_size": POOL_SIZE, "max_overflow": 0, "connect_args": connection}
        return cls(sa.create_engine(url, **options))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def create_schema(self) -> None:
        """Make the tables that are not there; two processes may do so at once.

        Raises:
            ConfigurationError: The database can't be used as it is asked.
            DataError: It can't be written to.
            ConnectionError: It does not answer.
        """

        def make(connection: sa.Connection) -> None:
            if self._engine.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(SCHEMA_LOCK)))
            metadata.create_all(connection)

        self._write(make)

    def session_name(self, session_id: str) -> str | None:
        """Name of a session, whatever its status; None where there is none.

        Raises:
            DataError: The database holds no recording sessions.
            ConnectionError: The database does not answer.
        """
        query = sa.select(recording_sessions.c.name).where(recording_sessions.c.id == session_id)
        rows = self._read(query)
        return str(rows[0][0]) if rows else None

    def add_session(self, session: Session) -> bool:
        """Add a session with its receivers, transmissions and recordings, all or nothing.

        Returns:
            False where a session of this ID is there already; it is left as it is.

        Raises:
            DataError: The database can't be written to.
            ConnectionError: It does not answer.
        """
        if self.session_name(session.id) is not None:
            return False

        def add(connection: sa.Connection) -> None:
            for table, rows in _rows_of(session):
                if rows:
                    connection.execute(table.insert(), rows)

        try:
            self._write(add)
        except sa.exc.IntegrityError:
            if self.session_name(session.id) is None:
                raise
            return False  # another process was faster
        return True

    def set_status(self, session_id: str, status: Status) -> None:
        """Approve or reject a session.

        Raises:
            ConfigurationError: There is no such session.
            DataError: The database can't be written to.
            ConnectionError: It does not answer.
        """
        update = recording_sessions.update().where(recording_sessions.c.id == session_id).values(status=status)
        if self._write(lambda connection: connection.execute(update).rowcount) == 0:
            raise ConfigurationError(f"there is no recording session {session_id!r} to become {status}")

    def statuses(self) -> dict[str, Status]:
        """Status of every session by its ID.

        Raises:
            DataError: The database holds no recording sessions.
            ConnectionError: The database does not answer.
        """
        rows = self._read(sa.select(recording_sessions.c.id, recording_sessions.c.status))
        return {row.id: row.status for row in rows}

    def approved(self, ids: Iterable[str] = ()) -> list[str]:
        """IDs of approved sessions, sorted.

        Args:
            ids: Sessions that are asked for; all approved ones if empty.

        Raises:
            ConfigurationError: A session that was asked for is missing or not approved.
            DataError: The database holds no recording sessions, or none that is approved.
            ConnectionError: The database does not answer.
        """
        wanted = sorted(set(ids))
        status = self.statuses()
        found = sorted(name for name, state in status.items() if state == "approved")
        problems = [f"{name} ({status.get(name, 'unknown')})" for name in wanted if status.get(name) != "approved"]
        if problems:
            more = f" and {len(problems) - NAMED_IDS} more" if len(problems) > NAMED_IDS else ""
            raise ConfigurationError(
                f"spec.data.sessions.ids names sessions that can't be used: {', '.join(problems[:NAMED_IDS])}{more}; "
                "approve them, correct their IDs, or leave them out"
            )
        if not found:
            raise DataError(
                "the database holds no approved recording session: approve one, or make some with "
                "`heimdall-train data generate`"
            )
        return wanted or found

    def changed(self, ids: Iterable[str]) -> tuple[list[str], list[str]]:
        """Which of the sessions that were approved once are gone, and which are approved no longer.

        Raises:
            DataError: The database holds no recording sessions.
            ConnectionError: The database does not answer.
        """
        status, known = self.statuses(), list(ids)
        withdrawn = [name for name in known if status.get(name, "approved") != "approved"]
        return [name for name in known if name not in status], withdrawn

    def transmissions(self, session_ids: Sequence[str]) -> list[Transmission]:
        """Transmissions of sessions with their recordings, in a fixed order: one query for thousands of sessions.

        Args:
            session_ids: Sessions, whatever their status.

        Raises:
            ConnectionError: The database does not answer.
        """
        grouped: dict[str, list[Any]] = {}
        for start in range(0, len(session_ids), SESSIONS_ASKED):
            for row in self._read(_transmissions_query(session_ids[start : start + SESSIONS_ASKED])):
                grouped.setdefault(row.id, []).append(row)
        return [_transmission(rows) for rows in grouped.values()]

    def _read(self, query: sa.Executable) -> Sequence[Any]:
        def read() -> Sequence[Any]:
            with self._engine.connect() as connection:
                return connection.execute(query).all()

        return self._try(read, "read")

    def _write(self, work: Callable[[sa.Connection], T]) -> T:
        """Do something in one transaction; done again where nobody knows whether it was done, it must do no harm."""

        def write() -> T:
            with self._engine.begin() as connection:
                return work(connection)

        return self._try(write, "written to")

    def _try(self, ask: Callable[[], T], what: str) -> T:
        wait_s = 1.0
        for left in reversed(range(TRIES)):
            try:
                return ask()
            except sa.exc.IntegrityError:
                raise  # an answer, which the one who wrote understands
            except sa.exc.DBAPIError as error:
                self._raise_unless_away(error, what, tries_left=left)
            time.sleep(wait_s)
            wait_s *= 2
        raise AssertionError("the last try raises")

    def _raise_unless_away(self, error: sa.exc.DBAPIError, what: str, *, tries_left: int) -> None:
        where = redact(self._engine.url.render_as_string(hide_password=True))
        reason = redact(error.orig).strip()
        # First: a file with certificates that is not there "does not exist", too.
        if "certificate verify failed" in reason or "root certificate file" in reason:
            raise ConfigurationError(
                f"the certificate of the database {where} can't be trusted ({reason.splitlines()[0]}): let "
                "HEIMDALL_DATABASE_URL end in ?sslmode=verify-full&sslrootcert=FILE, with a file that holds the "
                "certificate of the authority that signed it"
            ) from None
        if "password authentication failed" in reason:
            raise ConfigurationError(
                f"the database {where} refuses the password: check HEIMDALL_DATABASE_URL, or PGPASSWORD"
            ) from None
        if _MISSING.search(reason):
            raise ConfigurationError(
                f"the database {where} is not there ({reason.splitlines()[0]}): check HEIMDALL_DATABASE_URL, or make it"
            ) from None
        if "no such table" in reason or "does not exist" in reason:
            raise DataError(
                f"the database {where} holds no recording sessions ({reason.splitlines()[0]}): "
                "check HEIMDALL_DATABASE_URL, or make some with `heimdall-train data generate`"
            ) from None
        if not isinstance(error, sa.exc.OperationalError) or self._engine.dialect.name != "postgresql":
            raise DataError(f"the database {where} (HEIMDALL_DATABASE_URL) can't be {what}: {reason}") from None
        if tries_left == 0:
            raise ConnectionError(f"the database {where} (HEIMDALL_DATABASE_URL) does not answer: {reason}") from None


def _parse(text: str) -> sa.URL:
    """The URL of a database.

    Raises:
        ConfigurationError: It is none, or seems to be cut in the middle of a password, which is not shown.
    """
    try:
        url = sa.make_url(text)
        cut = url.get_backend_name() == "postgresql" and "@" in f"{url.host}{url.database}"
    except (sa.exc.ArgumentError, ValueError):
        cut = True
    if cut:
        # Words of others may show a part of the password.
        raise ConfigurationError(
            f"HEIMDALL_DATABASE_URL can't be read: its port must be a number; write {ESCAPED}"
        ) from None
    return url


def _rows_of(session: Session) -> list[tuple[sa.Table, list[dict[str, Any]]]]:
    head = {
        "id": session.id,
        "name": session.name,
        "status": session.status,
        "created_at": datetime.now(UTC),
        "center_frequency_hz": session.center_frequency_hz,
        "sample_rate_hz": session.sample_rate_hz,
        "origin_latitude": session.origin[0],
        "origin_longitude": session.origin[1],
    }
    return [
        (recording_sessions, [head]),
        (receivers, [{"session_id": session.id, **vars(receiver)} for receiver in session.receivers]),
        (
            transmissions,
            [
                _row(transmissions, item, session_id=session.id, started_at=item.started_at.astimezone(UTC))
                for item in session.transmissions
            ],
        ),
        (
            recordings,
            [
                _row(recordings, item, transmission_id=sent.id, receiver_id=item.receiver.receiver_id)
                for sent in session.transmissions
                for item in sent.recordings
            ],
        ),
    ]


def _row(table: sa.Table, item: Transmission | Recording, **more: str | datetime) -> dict[str, Any]:
    return {column.name: more.get(column.name, getattr(item, column.name, None)) for column in table.columns}


def _transmissions_query(session_ids: Sequence[str]) -> sa.Select[Any]:
    sessions, heard = recording_sessions.c, receivers.c
    return (
        sa.select(
            transmissions,
            *(
                sessions.origin_latitude,
                sessions.origin_longitude,
                sessions.sample_rate_hz,
                sessions.center_frequency_hz,
            ),
            *(recordings.c.receiver_id, heard.altitude_m, heard.noise_figure_db),
            heard.latitude.label("receiver_latitude"),
            heard.longitude.label("receiver_longitude"),
            *(recordings.c.object_key, recordings.c.sample_count, recordings.c.sha256, recordings.c.full_scale_dbm),
        )
        .join(recording_sessions, sessions.id == transmissions.c.session_id)
        .join(recordings, recordings.c.transmission_id == transmissions.c.id)
        # A recording without its receiver's row is to be reported, not lost.
        .outerjoin(
            receivers,
            sa.and_(heard.session_id == transmissions.c.session_id, heard.receiver_id == recordings.c.receiver_id),
        )
        .where(transmissions.c.session_id.in_(session_ids))
        .order_by(transmissions.c.id, recordings.c.receiver_id)
    )


def _transmission(rows: Sequence[Any]) -> Transmission:
    first = rows[0]
    return Transmission(
        id=first.id,
        session_id=first.session_id,
        # SQLite keeps no time zone.
        started_at=first.started_at.replace(tzinfo=first.started_at.tzinfo or UTC),
        latitude=first.latitude,
        longitude=first.longitude,
        modulation=first.modulation,
        origin=(first.origin_latitude, first.origin_longitude),
        recordings=tuple(_recording(row) for row in rows),
        center_frequency_hz=first.center_frequency_hz,
    )


def _recording(row: Any) -> Recording:
    return Recording(
        session_id=row.session_id,
        transmission_id=row.id,
        receiver=Receiver(
            receiver_id=row.receiver_id,
            latitude=_number(row.receiver_latitude),
            longitude=_number(row.receiver_longitude),
            altitude_m=_number(row.altitude_m),
            noise_figure_db=_number(row.noise_figure_db),
        ),
        object_key=row.object_key,
        sample_count=row.sample_count,
        sha256=row.sha256,
        full_scale_dbm=row.full_scale_dbm,
        sample_rate_hz=row.sample_rate_hz,
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value
