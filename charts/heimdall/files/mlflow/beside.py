"""What runs beside the MLflow server: `migrate` in a Job, `wait` before the server starts, `ready` as its probe.

Told by environment variables alone, so that no password is in an argument: BACKEND_STORE_URI and PGPASSWORD; with
authentication MLFLOW_AUTH_CONFIG_PATH, too, and the passwords of the three users of which the chart knows.
"""

import base64
import http.client
import json
import os
import sys
import time

DATABASE_TIMEOUT_S = 300
SCHEMA_TIMEOUT_S = float(os.environ.get("WAIT_S", "900"))
"""A migration of a large database takes minutes."""
POLL_S = 2
PROBE_TIMEOUT_S = 8
ALL = "*"
# What a user may do beyond reading, which everybody may who is let in. The operator owns runs and models. A training
# pod writes to runs, removes the checkpoints that newer ones replace, and can change no registered model.
GRANTS = {
    "admin": {},
    "heimdall-operator": {"experiment": "MANAGE", "registered_model": "MANAGE"},
    "heimdall-trainer": {"experiment": "EDIT", "run": "MANAGE"},
}


def main() -> None:
    """Do what the first argument names."""
    {"migrate": migrate, "wait": wait, "ready": ready}[sys.argv[1]]()


def migrate() -> None:
    """Bring MLflow's schema up to date, an empty database's too, then the users."""
    import click
    import mlflow.db

    _connect().dispose()
    click.Context(mlflow.db.upgrade).invoke(mlflow.db.upgrade, url=_uri())
    print("the schema is up to date")
    if _has_auth():
        _set_up_users()


def wait() -> None:
    """Return once the schema is the one that this image's server needs: the Job migrates, the server never does."""
    engine = _connect()
    deadline = time.monotonic() + SCHEMA_TIMEOUT_S
    while (missing := _missing(engine)) is not None:
        if time.monotonic() > deadline:
            sys.exit(f"{missing}: did the migration's Job fail? Look at its log.")
        time.sleep(POLL_S)


def ready() -> None:
    """Exit with 0 when the server answers from its database: its own /health says OK whatever the database does."""
    headers = {"Host": os.environ.get("PROBE_HOST", "localhost")}
    if _has_auth():
        login = f"heimdall-operator:{os.environ['OPERATOR_PASSWORD']}"
        headers["Authorization"] = f"Basic {base64.b64encode(login.encode()).decode()}"
    port = int(os.environ.get("PROBE_PORT", "5000"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/api/2.0/mlflow/experiments/get?experiment_id=0", headers=headers)
        answer = connection.getresponse()
    except OSError as error:
        sys.exit(f"MLflow does not answer: {error}")
    # A login that is refused was looked up in the database, too. A password that was changed behind a server that still
    # has the old one in its environment must not take everybody's server away.
    if answer.status not in (http.client.OK, http.client.UNAUTHORIZED):
        sys.exit(f"MLflow answers {answer.status}")


def _uri() -> str:
    return os.environ["BACKEND_STORE_URI"]


def _has_auth() -> bool:
    return "MLFLOW_AUTH_CONFIG_PATH" in os.environ


def _connect():
    """An engine of a database that answers."""
    import sqlalchemy

    engine = sqlalchemy.create_engine(_uri())
    deadline = time.monotonic() + DATABASE_TIMEOUT_S
    while True:
        try:
            engine.connect().close()
        except sqlalchemy.exc.OperationalError as error:
            if time.monotonic() > deadline:
                sys.exit(f"the database did not answer within {DATABASE_TIMEOUT_S} s: {error.orig}")
            time.sleep(POLL_S)
        else:
            return engine


def _missing(engine) -> str | None:
    """What of the database is not as the server needs it."""
    import mlflow.store.db_migrations
    import sqlalchemy

    problem = _behind(engine, mlflow.store.db_migrations, "alembic_version")
    if problem is None and _has_auth():
        import mlflow.server.auth.db.migrations

        problem = _behind(engine, mlflow.server.auth.db.migrations, "alembic_version_auth")
        if problem is None:
            with engine.connect() as connection:
                there = set(connection.execute(sqlalchemy.text("SELECT username FROM users")).scalars())
            lacking = sorted(GRANTS.keys() - there)
            problem = f"there is no user {', '.join(lacking)} yet" if lacking else None
    return problem


def _behind(engine, migrations, table: str) -> str | None:
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    wanted = ScriptDirectory(os.path.dirname(migrations.__file__)).get_current_head()  # noqa: PTH120
    with engine.connect() as connection:
        at = MigrationContext.configure(connection, opts={"version_table": table}).get_current_revision()
    return None if at == wanted else f"the schema ({table}) is at {at} and should be at {wanted}"


def _set_up_users() -> None:
    """The users of the chart, with the passwords of its Secret: that Secret wins, so changing it changes them."""
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore()
    store.init_db(read_auth_config().database_uri)
    for name, grants in GRANTS.items():
        password = os.environ[f"{name.removeprefix('heimdall-').upper()}_PASSWORD"]
        if not store.has_user(name):
            store.create_user(name, password, is_admin=name == "admin")
        elif not store.authenticate_user(name, password):
            store.update_user(name, password=password)
        for kind, permission in grants.items():
            store.grant_user_permission(name, kind, ALL, permission)
    print("users:", json.dumps(GRANTS))


if __name__ == "__main__":
    main()
