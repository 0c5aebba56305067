"""Recording sessions in PostgreSQL (or SQLite, on a laptop): who recorded what, where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import sqlalchemy as sa

from heimdall_trainer.errors import ConfigurationError, DataError
from heimdall_trainer.settings import DataSettings

POOL_SIZE: Final = 4
CONNECT_TIMEOUT_S: Final = 10

metadata = sa.MetaData()
recording_sessions = sa.Table(
    "recording_sessions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
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
    sa.Column("noise_figure_db", sa.Double, nullable=False),
)
transmissions = sa.Table(
    "transmissions",
    metadata,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("session_id", sa.Text, sa.ForeignKey("recording_sessions.id"), nullable=False, index=True),
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
    sa.Column("samples", sa.Integer, nullable=False),
    sa.Column("sha512", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class Recording:
    """One receiver's recording of a transmission."""

    session_id: str
    transmission_id: str
    receiver_id: str
    latitude: float
    longitude: float
    object_key: str
    samples: int
    sha512: str
    sample_rate_hz: float

    def __str__(self) -> str:
        """As reports name it."""
        return f"session {self.session_id}, transmission {self.transmission_id}, receiver {self.receiver_id}"


@dataclass(frozen=True)
class Transmission:
    """A transmission, where it truly came from, and who recorded it."""

    id: str
    session_id: str
    latitude: float
    longitude: float
    origin: tuple[float, float]
    recordings: tuple[Recording, ...]


class SessionStore:
    """Reads and writes recording sessions."""

    def __init__(self, engine: sa.Engine) -> None:
        self._engine = engine

    @classmethod
    def open(cls, settings: DataSettings) -> SessionStore:
        """Open the settings' database; nothing is asked of it yet."""
        url = sa.make_url(settings.database_url.get_secret_value())
        if url.drivername in {"postgresql", "postgres"}:
            url = url.set(drivername="postgresql+psycopg")
        options: dict[str, Any] = {"pool_pre_ping": True}
        if url.drivername.startswith("postgresql"):
            options |= {"pool_size": POOL_SIZE, "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S}}
        return cls(sa.create_engine(url, **options))

    def close(self) -> None:
        """Give the connections back."""
        self._engine.dispose()

    def create_schema(self) -> None:
        """Make the tables that are not there."""
        metadata.create_all(self._engine)

    def has_session(self, session_id: str) -> bool:
        """Whether there is such a session."""
        with self._engine.connect() as connection:
            query = sa.select(recording_sessions.c.id).where(recording_sessions.c.id == session_id)
            return connection.execute(query).first() is not None

    def add_session(self, session: dict[str, Any], **rows: Sequence[dict[str, Any]]) -> None:
        """Add a session with its receivers, transmissions and recordings, all or nothing."""
        with self._engine.begin() as connection:
            created = {"created_at": datetime.now(UTC), "status": "approved"}
            connection.execute(recording_sessions.insert(), [created | session])
            for table in (receivers, transmissions, recordings):
                connection.execute(table.insert(), list(rows[table.name]))

    def approved(self, ids: Iterable[str] = ()) -> list[str]:
        """IDs of approved sessions, sorted.

        Args:
            ids: Sessions that are asked for; all approved ones if empty.

        Raises:
            ConfigurationError: A session that was asked for is missing or not approved.
            DataError: The database can't be read, or holds no approved session.
        """
        wanted = sorted(set(ids))
        query = sa.select(recording_sessions.c.id).where(recording_sessions.c.status == "approved")
        found = sorted(row[0] for row in self._read(query))
        missing = [session for session in wanted if session not in set(found)]
        if missing:
            raise ConfigurationError(
                f"spec.data.sessions.ids names sessions that are missing or not approved: {', '.join(missing[:10])}; "
                f"approve them, or leave them out"
            )
        if not found:
            raise DataError(
                "the database holds no approved recording session: record some, or make some with "
                "`heimdall-train data generate`"
            )
        return wanted or found

    def transmissions(self, session_ids: Sequence[str]) -> list[Transmission]:
        """Transmissions of sessions with their recordings, in a fixed order: one query."""
        query = (
            sa.select(
                *(transmissions.c.id, transmissions.c.session_id, transmissions.c.latitude, transmissions.c.longitude),
                *(recording_sessions.c.origin_latitude, recording_sessions.c.origin_longitude),
                *(recording_sessions.c.sample_rate_hz, recordings.c.receiver_id),
                receivers.c.latitude.label("receiver_latitude"),
                receivers.c.longitude.label("receiver_longitude"),
                *(recordings.c.object_key, recordings.c.samples, recordings.c.sha512),
            )
            .join(recording_sessions, recording_sessions.c.id == transmissions.c.session_id)
            .join(recordings, recordings.c.transmission_id == transmissions.c.id)
            .join(
                receivers,
                sa.and_(
                    receivers.c.session_id == transmissions.c.session_id,
                    receivers.c.receiver_id == recordings.c.receiver_id,
                ),
            )
            .where(transmissions.c.session_id.in_(session_ids))
            .order_by(transmissions.c.id, recordings.c.receiver_id)
        )
        grouped: dict[str, list[Any]] = {}
        for row in self._read(query):
            grouped.setdefault(row.id, []).append(row)
        return [_transmission(rows) for rows in grouped.values()]

    def _read(self, query: Any) -> Sequence[Any]:
        try:
            with self._engine.connect() as connection:
                return connection.execute(query).all()
        except sa.exc.OperationalError as error:
            where = self._engine.url.render_as_string(hide_password=True)
            raise DataError(f"the database {where} (HEIMDALL_DATABASE_URL) can't be read: {error.orig}") from None
        except sa.exc.ProgrammingError as error:
            raise DataError(
                f"the database has no recording sessions ({error.orig}): make some with `heimdall-train data generate`"
            ) from None


def _transmission(rows: Sequence[Any]) -> Transmission:
    first = rows[0]
    return Transmission(
        id=first.id,
        session_id=first.session_id,
        latitude=first.latitude,
        longitude=first.longitude,
        origin=(first.origin_latitude, first.origin_longitude),
        recordings=tuple(
            Recording(
                session_id=row.session_id,
                transmission_id=row.id,
                receiver_id=row.receiver_id,
                latitude=row.receiver_latitude,
                longitude=row.receiver_longitude,
                object_key=row.object_key,
                samples=row.samples,
                sha512=row.sha512,
                sample_rate_hz=row.sample_rate_hz,
            )
            for row in rows
        ),
    )
