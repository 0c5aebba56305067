"""MLflow server, PostgreSQL and MinIO as processes on loopback; each can be killed and started again on its port."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import secrets
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.programs import CACHE

ROOT: Final = Path(__file__).resolve().parents[2]
HOST: Final = "127.0.0.1"
START_TIMEOUT_S: Final = 180
STOP_TIMEOUT_S: Final = 20
BUILD_TIMEOUT_S: Final = 3600
"""Building MinIO from Go modules, and waiting for others that build."""
INSTALL_TIMEOUT_S: Final = 600
POLL_S: Final = 0.1
LOG_TAIL: Final = 3000


def wait_until(look: Callable[[], bool], *, what: str, timeout_s: float, tell: Callable[[], str] = lambda: "") -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + timeout_s
    while not look():
        assert time.monotonic() < deadline, f"{what}: not within {timeout_s} s. {tell()}"
        time.sleep(POLL_S)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def answers(url: str, certificate: Certificate | None = None) -> bool:
    """Whether a GET succeeds."""
    context = ssl.create_default_context(cafile=certificate.authority) if certificate else None
    try:
        with urllib.request.urlopen(url, timeout=5, context=context) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


@dataclass(frozen=True)
class Certificate:
    """A server's certificate and key, and the authority that vouches for it."""

    authority: Path
    certificate: Path
    key: Path


class Server:
    """A server that a test may stop, kill and start again; it keeps its port and its data."""

    name: str
    stop_signal = signal.SIGTERM

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        return {}

    def is_ready(self) -> bool:
        raise NotImplementedError

    def start(self) -> None:
        """Start it unless it runs, and wait until it answers."""
        if self._process is not None and self._process.poll() is None:
            return
        own = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "AWS_", "PG"))}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command(),
                env={**own, **self.environment()},
                cwd=self._log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_until(
            lambda: self._process.poll() is not None or self.is_ready(),  # type: ignore[union-attr]
            what=f"{self.name} answers",
            timeout_s=START_TIMEOUT_S,
            tell=self.log_tail,
        )
        assert self._process.poll() is None, f"{self.name} ended with {self._process.poll()}: {self.log_tail()}"

    def stop(self) -> None:
        """End it in good order; what is left after a while is killed."""
        self._end(self.stop_signal)

    def kill(self) -> None:
        """End it as a crash does."""
        self._end(signal.SIGKILL)

    @contextmanager
    def standing_still(self) -> Iterator[None]:
        """It takes connections and answers nothing."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self._process.send_signal(signal.SIGCONT)

    def log_tail(self) -> str:
        return self._log.read_text(errors="replace")[-LOG_TAIL:]

    def _end(self, how: signal.Signals) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        # Looked for now: those of a parent that is gone can't be found any more.
        family = [process.pid, *descendants(process.pid)]
        if how == signal.SIGKILL:
            kill_all(family)
        elif process.poll() is None:
            process.send_signal(how)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)
        kill_all(family[1:])
        wait_until(
            lambda: not any(is_alive(pid) for pid in family),
            what=f"{self.name} is gone with its children",
            timeout_s=STOP_TIMEOUT_S,
        )


def descendants(pid: int) -> list[int]:
    """Processes that a process started, and those that they started."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
    found, waiting = [], [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def is_alive(pid: int) -> bool:
    """Whether a process is there and more than a zombie that nobody has waited for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_all(pids: list[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


class Postgres(Server):
    """PostgreSQL with a cluster of its own; it refuses to run as root, so another user runs it there."""

    name = "postgres"
    stop_signal = signal.SIGINT  # the fast way: it does not wait for its clients
    user = "postgres"

    def __init__(self, folder: Path, certificate: Certificate | None = None) -> None:
        super().__init__(folder)
        self._certificate = certificate
        self.password = secrets.token_hex(12)
        self._programs = postgres_programs()
        # Outside pytest's folder, which no other user may enter.
        self._data = Path(tempfile.mkdtemp(prefix="heimdall-postgres-"))
        self._as_user: list[str] = []
        if os.getuid() == 0:
            account = _account("postgres", "nobody")
            os.chown(self._data, account.pw_uid, account.pw_gid)
            self._as_user = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
        self._make_cluster()
        if certificate is not None:
            self._take(certificate)

    def command(self) -> list[str]:
        options = {
            "listen_addresses": HOST,
            "port": self.port,
            "unix_socket_directories": "",
            "fsync": "off",  # processes are killed here, not the machine
        }
        if self._certificate is not None:
            options |= {"ssl": "on", "ssl_cert_file": "server.crt", "ssl_key_file": "server.key"}
        flags = [part for key, value in options.items() for part in ("-c", f"{key}={value}")]
        return [*self._as_user, str(self._programs / "postgres"), "-D", str(self._data / "data"), *flags]

    def is_ready(self) -> bool:
        import psycopg

        try:
            self.execute("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def url(self, database: str, scheme: str = "postgresql") -> str:
        return f"{scheme}://{self.user}:{self.password}@{HOST}:{self.port}/{database}"

    def execute(self, statement: str, database: str = "postgres") -> list[Any]:
        """Run a statement; its rows, if it has any."""
        import psycopg

        with psycopg.connect(self.url(database), autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []

    def create_database(self, name: str) -> None:
        self.execute(f'CREATE DATABASE "{name}"')

    def remove(self) -> None:
        """Remove its data."""
        shutil.rmtree(self._data)

    def _take(self, certificate: Certificate) -> None:
        """Copy certificate and key to where its user alone may read them, as it asks for."""
        owner = self._data.stat()
        for source, name in ((certificate.certificate, "server.crt"), (certificate.key, "server.key")):
            file = self._data / "data" / name
            shutil.copy(source, file)
            file.chmod(0o600)
            os.chown(file, owner.st_uid, owner.st_gid)

    def _make_cluster(self) -> None:
        password = self._data / "password"
        password.write_text(self.password)
        password.chmod(0o644)  # within a folder that only its user may enter
        initdb = [str(self._programs / "initdb"), "-D", str(self._data / "data"), "-U", self.user, "--no-sync"]
        options = ["--auth=scram-sha-256", f"--pwfile={password}", "--encoding=UTF8", "--locale=C.UTF-8"]
        done = subprocess.run(
            [*self._as_user, *initdb, *options],
            cwd=self._data,
            capture_output=True,
            text=True,
            timeout=START_TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"initdb: {done.stdout}{done.stderr}"
        password.unlink()


class Minio(Server):
    """MinIO on a folder."""

    name = "minio"
    access_key = "heimdall"

    def __init__(self, folder: Path, certificate: Certificate | None = None) -> None:
        super().__init__(folder)
        self.certificate = certificate
        self._certificates = folder / "minio-certificates"
        if certificate is not None:
            self._certificates.mkdir()
            shutil.copy(certificate.certificate, self._certificates / "public.crt")
            shutil.copy(certificate.key, self._certificates / "private.key")
        self.secret_key = secrets.token_hex(12)
        self._console_port = free_port()
        self._data = folder / "objects"
        self._home = folder / "minio-home"
        self._home.mkdir()
        self._program = built_program("minio")

    def command(self) -> list[str]:
        addresses = ["--address", f"{HOST}:{self.port}", "--console-address", f"{HOST}:{self._console_port}"]
        certificates = ["--certs-dir", str(self._certificates)] if self.certificate else []
        return [str(self._program), "server", str(self._data), *addresses, *certificates]

    def environment(self) -> dict[str, str]:
        return {
            "HOME": str(self._home),
            "MINIO_ROOT_USER": self.access_key,
            "MINIO_ROOT_PASSWORD": self.secret_key,
            "MINIO_BROWSER": "off",
            "MINIO_UPDATE": "off",
        }

    def is_ready(self) -> bool:
        return answers(f"{self.url}/minio/health/ready", self.certificate)

    @property
    def url(self) -> str:
        return f"{'https' if self.certificate else 'http'}://{HOST}:{self.port}"

    @property
    def s3(self) -> Any:
        """A client of its own."""
        import boto3

        return boto3.client(
            "s3",
            endpoint_url=self.url,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name="us-east-1",
            verify=str(self.certificate.authority) if self.certificate else None,
        )


class Redis(Server):
    """Redis, which asks for a password and keeps nothing on disk."""

    name = "redis"

    def __init__(self, folder: Path, certificate: Certificate | None = None) -> None:
        super().__init__(folder)
        self._certificate = certificate
        self.password = secrets.token_hex(12)
        # It goes by the name that it is called by.
        self._program = folder / "redis-server"
        self._program.symlink_to(redis_program())

    def command(self) -> list[str]:
        listen = ["--bind", HOST, "--requirepass", self.password, "--port"]
        listen += [str(self.port)] if self._certificate is None else ["0", "--tls-port", str(self.port)]
        if self._certificate is not None:
            files = [
                "--tls-cert-file",
                str(self._certificate.certificate),
                "--tls-key-file",
                str(self._certificate.key),
            ]
            listen += [*files, "--tls-ca-cert-file", str(self._certificate.authority), "--tls-auth-clients", "no"]
        return [str(self._program), *listen, "--save", "", "--appendonly", "no"]

    def is_ready(self) -> bool:
        from redis.exceptions import RedisError

        try:
            with self.client() as client:
                return bool(client.ping())
        except RedisError:
            return False

    @property
    def url(self) -> str:
        if self._certificate is None:
            return f"redis://:{self.password}@{HOST}:{self.port}/0"
        return f"rediss://:{self.password}@{HOST}:{self.port}/0?ssl_ca_certs={self._certificate.authority}"

    def client(self) -> Any:
        """A client of its own."""
        import redis

        return redis.Redis.from_url(self.url, socket_timeout=5)


class Prometheus(Server):
    """Prometheus, which scrapes one endpoint every second as a ServiceMonitor would have it scraped."""

    name = "prometheus"
    namespace = "heimdall"

    def __init__(self, folder: Path, target_port: int) -> None:
        super().__init__(folder)
        self._program = built_program("prometheus")
        self._config = folder / "prometheus.yml"
        targets = [{"targets": [f"{HOST}:{target_port}"], "labels": {"namespace": self.namespace}}]
        scraped = {"job_name": "operator", "scrape_interval": "1s", "static_configs": targets}
        self._config.write_text(json.dumps({"scrape_configs": [scraped]}))

    def command(self) -> list[str]:
        storage = f"--storage.tsdb.path={self._config.with_name('prometheus')}"
        return [
            *(str(self._program), f"--config.file={self._config}", storage),
            *(f"--web.listen-address={HOST}:{self.port}", "--log.level=warn"),
        ]

    def is_ready(self) -> bool:
        return answers(f"http://{HOST}:{self.port}/-/ready")

    def ask(self, path: str, **parameters: str) -> Any:
        """Data that its HTTP API has."""
        url = f"http://{HOST}:{self.port}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)["data"]


class Mlflow(Server):
    """MLflow's server with its metadata in PostgreSQL and artifacts in MinIO, which it alone has the keys of."""

    name = "mlflow"
    bucket = "artifacts"

    def __init__(self, folder: Path, postgres: Postgres, minio: Minio, certificate: Certificate | None = None) -> None:
        super().__init__(folder)
        self._certificate = certificate
        self._postgres = postgres
        self._minio = minio

    def command(self) -> list[str]:
        listen = ["--host", HOST, "--port", str(self.port), "--workers", "1"]
        artifacts = ["--artifacts-destination", f"s3://{self.bucket}", "--serve-artifacts"]
        program = [str(Path(sys.executable).parent / "mlflow"), "server"]
        if self._certificate is None:
            return [*program, *listen, *artifacts]
        tls = f"--ssl-certfile {self._certificate.certificate} --ssl-keyfile {self._certificate.key}"
        return [*program, *listen, *artifacts, "--uvicorn-opts", tls]

    def environment(self) -> dict[str, str]:
        store, private = self._postgres.url("mlflow", "postgresql+psycopg2"), {}
        if self._certificate is not None:
            store += f"?sslmode=verify-full&sslrootcert={self._certificate.authority}"
            private = {"AWS_CA_BUNDLE": str(self._certificate.authority)}
        return {
            **private,
            "MLFLOW_BACKEND_STORE_URI": store,
            "MLFLOW_S3_ENDPOINT_URL": self._minio.url,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "AWS_ACCESS_KEY_ID": self._minio.access_key,
            "AWS_SECRET_ACCESS_KEY": self._minio.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def is_ready(self) -> bool:
        return answers(f"{self.url}/health", self._certificate)

    @property
    def url(self) -> str:
        return f"{'https' if self._certificate else 'http'}://{HOST}:{self.port}"

    def artifact(self, run: Any, path: str) -> bytes:
        """The bytes of a run's artifact as they lie in MinIO."""
        key = f"{run.info.artifact_uri.removeprefix('mlflow-artifacts:/')}/{path}"
        content: bytes = self._minio.s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        return content


def built_program(name: str) -> Path:
    """A program in the project's cache; made there by the cluster tool where it is missing, which takes minutes."""
    program = CACHE / "bin" / name
    if not program.is_file():
        command = [sys.executable, "hack/cluster", "parts", name]
        subprocess.run(command, cwd=ROOT, check=True, timeout=BUILD_TIMEOUT_S)
    return program


def postgres_programs() -> Path:
    """The folder of PostgreSQL's programs; installed where they are missing, this is Debian and we may."""
    found = _installed_postgres()
    if found is None and os.getuid() == 0 and shutil.which("apt-get"):
        _install_postgres()
        found = _installed_postgres()
    assert found is not None, "PostgreSQL is missing: install it (Debian: apt-get install postgresql)"
    return found


def _installed_postgres() -> Path | None:
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda file: float(file.parts[-3]))
    on_path = shutil.which("initdb")
    found = [Path(on_path).resolve()] if on_path else debian[-1:]
    return found[0].parent if found else None


def redis_program() -> Path:
    """Redis's server; installed where it is missing, this is Debian and we may.

    Debian's tools hold the same program under another name, and start no service of the system's.
    """
    found = _installed_redis()
    if found is None and os.getuid() == 0 and shutil.which("apt-get"):
        _install("redis-tools")
        found = _installed_redis()
    assert found is not None, "Redis is missing: install it (Debian: apt-get install redis-tools)"
    return found


def _installed_redis() -> Path | None:
    found = shutil.which("redis-server") or shutil.which("redis-check-rdb")
    return Path(found).resolve() if found else None


def _install_postgres() -> None:
    settings = Path("/etc/postgresql-common/createcluster.conf")
    if not settings.exists():
        # Only the programs are wanted, no cluster of the system's.
        settings.parent.mkdir(parents=True, exist_ok=True)
        settings.write_text("create_main_cluster = false\n")
    _install("postgresql")


def _install(package: str) -> None:
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    keep = ["-o", "Dpkg::Options::=--force-confold"]
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "install.lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # apt refuses a second process; the cluster tool takes the lock too
        for arguments in (["update"], ["install", "-y", "--no-install-recommends", *keep, package]):
            subprocess.run(["apt-get", "-qq", *arguments], env=env, check=True, timeout=INSTALL_TIMEOUT_S)


def _account(*names: str) -> pwd.struct_passwd:
    for name in names:
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    raise AssertionError(f"there is no user of {', '.join(names)} to run PostgreSQL as")
