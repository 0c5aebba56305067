"""Stand-ins are set up as the official images are, so that chart and compose.yaml know no difference.

What is said of the official ones is what their Dockerfiles say: docker-library/postgres (15/bookworm),
redis/docker-library-redis (7.4/debian), minio/minio (Dockerfile.release), mlflow/mlflow (docker/Dockerfile.full).
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


def instructions(name: str) -> dict[str, list[str]]:
    """What a Dockerfile says in its last stage, by instruction."""
    text = (ROOT / "images" / name / "Dockerfile").read_text().replace("\\\n", " ")
    said: dict[str, list[str]] = defaultdict(list)
    for line in text.splitlines():
        instruction, _, rest = line.partition(" ")
        if instruction == "FROM":
            said.clear()
        said[instruction].append(rest.strip())
    return said


def environment(said: dict[str, list[str]]) -> dict[str, str]:
    return dict(word.split("=", 1) for line in said["ENV"] for word in line.split())


@pytest.mark.parametrize(
    ("name", "ports", "volumes"),
    [
        ("postgresql", {"5432"}, ["/var/lib/postgresql/data"]),
        ("redis", {"6379"}, ["/data"]),
        ("minio", {"9000", "9001"}, ["/data"]),
        ("mlflow", {"5000"}, []),
    ],
)
def test_ports_and_volumes(name: str, ports: set[str], volumes: list[str]) -> None:
    said = instructions(name)
    assert set(" ".join(said["EXPOSE"]).split()) == ports
    assert [folder for line in said["VOLUME"] for folder in json.loads(line)] == volumes


@pytest.mark.parametrize("name", ["postgresql", "redis"])
def test_users_have_the_official_numbers(name: str) -> None:
    said = instructions(name)
    account = {"postgresql": "postgres"}.get(name, name)
    assert re.search(rf"groupadd --gid 999 {account}\b", said["RUN"][0])
    assert re.search(rf"useradd --uid 999 --gid 999 .*\b{account}\b", said["RUN"][0])


def test_postgresql_keeps_its_data_and_ends_as_the_official_one() -> None:
    said = instructions("postgresql")
    assert environment(said)["PGDATA"] == "/var/lib/postgresql/data"
    assert "/usr/lib/postgresql/15/bin" in environment(said)["PATH"].split(":")
    assert said["STOPSIGNAL"] == ["SIGINT"]
    assert json.loads(said["ENTRYPOINT"][0]) == ["docker-entrypoint.sh"]
    assert json.loads(said["CMD"][0]) == ["postgres"]
    entry = (ROOT / "images/postgresql/docker-entrypoint.sh").read_text()
    for variable in ("POSTGRES_USER", "POSTGRES_PASSWORD", "POSTGRES_DB", "POSTGRES_INITDB_ARGS"):
        assert f"value {variable} " in entry, "with NAME_FILE beside NAME"


@pytest.mark.parametrize(
    ("said", "told"),
    [({}, []), ({"POSTGRES_INITDB_ARGS": "--auth-host=md5 --no-sync"}, ["--auth-host=md5", "--no-sync"])],
    ids=["none", "two"],
)
def test_postgresql_makes_its_database_with_the_arguments_that_it_is_told(
    said: dict[str, str], told: list[str], tmp_path: Path
) -> None:
    """And with no others: whom the server trusts is what the chart says, with this image as with the official one."""
    for program in ("initdb", "pg_ctl", "psql", "postgres"):
        (tmp_path / program).write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/{program}.said\n')
        (tmp_path / program).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PGDATA": str(tmp_path), "POSTGRES_PASSWORD": "word", **said}

    script = ROOT / "images/postgresql/docker-entrypoint.sh"
    subprocess.run(["bash", str(script), "postgres"], env=env, check=True, timeout=20)

    user, password, *more = (tmp_path / "initdb.said").read_text().splitlines()
    assert (user, password.partition("=")[0], more) == ("--username=postgres", "--pwfile", told)
    assert (tmp_path / "pg_hba.conf").read_text() == "host all all all scram-sha-256\n"


@pytest.mark.parametrize(("name", "program"), [("minio", "minio"), ("redis", "redis-server")])
def test_programs_are_what_containers_start(name: str, program: str) -> None:
    said = instructions(name)
    assert program in [word for line in (*said["ENTRYPOINT"], *said["CMD"]) for word in json.loads(line)]


def test_nobody_is_asked_for_where_the_official_image_runs_as_root() -> None:
    assert "USER" not in instructions("minio")
    assert "USER" not in instructions("mlflow")


def test_postgresql_runs_scripts_and_sql_when_its_volume_is_empty() -> None:
    """The official image runs a script within its own shell where it is not executable, as a ConfigMap's is."""
    entry = (ROOT / "images/postgresql/docker-entrypoint.sh").read_text()
    assert '*.sh) if [ -x "$file" ]; then "$file"; else . "$file"; fi ;;' in entry
    assert "*.sql) psql" in entry
