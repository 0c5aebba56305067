"""The cluster as tests see it: kubectl and helm with one kubeconfig, and waits with a deadline."""

from __future__ import annotations

import base64
import json
import os
import shlex
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import urllib3
import yaml

from tests.programs import lasting_environment

ROOT = Path(__file__).resolve().parents[2]
POLL_MIN_S, POLL_MAX_S = 0.2, 1.0
POLL_SHARE = 0.1
"""How often is looked: what comes soon is seen soon, what takes long is not looked at more than a wait is worth."""
FORWARD_POLL_S = 0.2
COMMAND_TIMEOUT_S = 300
API_TIMEOUT_S = 30
TRAINING_RUNS = "apis/training.heimdall.dev/v1alpha1/namespaces/{}/trainingruns"

T = TypeVar("T")


def hack(*arguments: str, timeout_s: float = 5400) -> None:
    """Call one of the project's own tools; what it says goes to the terminal."""
    env = lasting_environment()  # an engine that it starts may be kept
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=env, check=True, timeout=timeout_s)


def cluster_environment() -> dict[str, str]:
    """Variables that reach the cluster."""
    listed = subprocess.run(
        [sys.executable, "hack/cluster", "env"], cwd=ROOT, check=True, capture_output=True, text=True, timeout=60
    ).stdout
    script = f"{listed}\nenv -0"
    out = subprocess.run(
        ["bash", "-c", script], check=True, capture_output=True, timeout=60, env=dict(os.environ)
    ).stdout
    return dict(item.split("=", 1) for item in out.decode().split("\0") if "=" in item)


@cache
def api(kubeconfig: str) -> tuple[urllib3.PoolManager, str]:
    """Connections that the API server lets in, and the server's address."""
    config = yaml.safe_load(Path(kubeconfig).read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as pair:
        pair.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        pair.flush()
        context.load_cert_chain(pair.name)
    return urllib3.PoolManager(ssl_context=context), cluster["server"]


@dataclass(frozen=True)
class Cluster:
    """A namespace of the cluster."""

    env: dict[str, str] = field(repr=False)
    namespace: str

    def run(
        self, *command: str, text: str | None = None, check: bool = True, timeout_s: float = COMMAND_TIMEOUT_S
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            command,
            env=self.env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            input=text,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            raise AssertionError(f"{shlex.join(command)} failed: {done.stderr}{done.stdout}")
        return done

    def kubectl(self, *arguments: str, text: str | None = None) -> str:
        return self.run("kubectl", "-n", self.namespace, *arguments, text=text).stdout

    def refused(self, *arguments: str, text: str | None = None) -> str:
        """What kubectl says of something that must not work."""
        done = self.run("kubectl", "-n", self.namespace, *arguments, text=text, check=False)
        assert done.returncode != 0, f"kubectl {shlex.join(arguments)} was not refused: {done.stdout}"
        return done.stderr

    def helm(self, *arguments: str) -> str:
        return self.run("helm", "-n", self.namespace, *arguments).stdout

    def get(self, kind: str, name: str) -> dict[str, Any] | None:
        done = self.run("kubectl", "-n", self.namespace, "get", kind, name, "-o", "json", "--ignore-not-found")
        return json.loads(done.stdout) if done.stdout.strip() else None

    def list(self, kind: str, selector: str = "") -> list[dict[str, Any]]:
        chosen = ["-l", selector] if selector else []
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, *chosen, "-o", "json"))["items"]
        return items

    def apply(self, manifest: dict[str, Any]) -> None:
        self.kubectl("apply", "-f", "-", text=json.dumps(manifest))

    def training_run(self, name: str) -> dict[str, Any]:
        """A TrainingRun, asked for without kubectl: it is what tests look at again and again."""
        pool, server = api(self.env["KUBECONFIG"])
        address = f"{server}/{TRAINING_RUNS.format(self.namespace)}/{name}"
        try:
            answer = pool.request("GET", address, timeout=API_TIMEOUT_S, retries=False)
        except urllib3.exceptions.HTTPError as error:
            raise AssertionError(f"the API server does not answer: {error}") from error
        assert answer.status == HTTPStatus.OK, f"there is no TrainingRun {name}: {answer.data.decode()}"
        found: dict[str, Any] = answer.json()
        return found

    def status(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self.training_run(name).get("status", {})
        return status

    def wait_for_phase(self, name: str, *phases: str, timeout_s: float) -> dict[str, Any]:
        """The status once the run is in one of the phases; what it hung on is told where it is not."""

        def look() -> dict[str, Any] | None:
            status = self.status(name)
            return status if status.get("phase") in phases else None

        return wait_for(
            look, what=f"{name} being {' or '.join(phases)}", timeout_s=timeout_s, tell=lambda: self.explain(name)
        )

    def explain(self, name: str) -> str:
        """What a person would look at."""
        parts = [json.dumps(self.status(name), indent=1)]
        parts += [self.run("kubectl", "-n", self.namespace, "get", "pods", "-o", "wide", check=False).stdout]
        selector = f"training.heimdall.dev/run={name}"
        parts += [self.run("kubectl", "-n", self.namespace, "logs", "-l", selector, "--tail=30", check=False).stdout]
        parts += [
            self.run(
                "kubectl", "-n", self.namespace, "logs", "deploy/heimdall-operator", "--tail=30", check=False
            ).stdout
        ]
        return "\n".join(parts)


def wait_for(
    look: Callable[[], T | None],
    *,
    what: str,
    timeout_s: float,
    tell: Callable[[], str] = lambda: "",
) -> T:
    """Poll until there is something, with a deadline."""
    began = time.monotonic()
    while True:
        found = look()
        if found:
            return found
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise AssertionError(f"{what}: not within {timeout_s:.0f} s\n{tell()}")
        time.sleep(min(max(POLL_SHARE * waited_s, POLL_MIN_S), POLL_MAX_S))


def condition(resource_status: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of a status; empty where there is none."""
    return next((item for item in resource_status.get("conditions", []) if item["type"] == kind), {})


@contextmanager
def port_forward(cluster: Cluster, target: str, port: int) -> Iterator[int]:
    """A local port that leads to a Service or pod, also to the one that replaces it; ended afterwards."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        local = probe.getsockname()[1]
    command = ["kubectl", "-n", cluster.namespace, "port-forward", target, f"{local}:{port}"]
    over = threading.Event()

    def keep() -> None:
        while not over.is_set():
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            with subprocess.Popen(command, env=cluster.env, **quiet) as process:
                while process.poll() is None and not over.wait(FORWARD_POLL_S):
                    pass
                process.terminate()

    def connected() -> bool:
        try:
            with socket.create_connection(("127.0.0.1", local), timeout=1):
                return True
        except OSError:
            return False

    keeper = threading.Thread(target=keep)
    keeper.start()
    try:
        wait_for(connected, what=f"a connection to {target}", timeout_s=60)
        yield local
    finally:
        over.set()
        keeper.join()
