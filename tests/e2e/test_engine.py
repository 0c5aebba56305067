"""A Docker engine that was there: the cluster comes up in it, and what else is in it is left alone.

The engine is started here as somebody's own, at Docker's usual address, with a container, a volume and a network of
theirs. It asks a mirror of Docker's registry first, which has some images and not others: what it has is pulled, the
rest is built.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

import pytest
import urllib3

from tests.e2e.cluster import ROOT, wait_for
from tests.e2e.conftest import cluster_tool, own_engine
from tests.programs import CACHE

UP_S, STOP_S = 1800, 60
CACHED = CACHE.resolve()
THEIRS = "somebodys"
FORMATS = {
    "image": "{{.Repository}}",
    "container": "{{.Names}} {{.State}}",
    "volume": "{{.Name}}",
    "network": "{{.Name}}",
}
PYTHON = "python:3.11-slim-bookworm"
PROGRAM = "etcd"
"""A static program of those that the cluster is made of: it runs until it is ended."""


@dataclass(frozen=True)
class Mirror:
    """A registry of somebody's, in which their engine looks before it asks Docker's."""

    address: str
    log: Path

    def asked_for(self, path: str) -> list[int]:
        """What it has answered to who asked for something: codes of HTTP."""
        asked = re.findall(rf'"(?:GET|HEAD) /v2/{re.escape(path)} HTTP/1.1" (\d+)', self.log.read_text())
        return [int(code) for code in asked]


@dataclass(frozen=True)
class Machine:
    """A machine on which an engine answers, and the tool's cache, which has the parts already."""

    cache: Path
    config: Path
    mirror: Mirror

    def run(self, *command: str, timeout_s: float = UP_S) -> str:
        """What a command prints; as somebody calls it who knows nothing of an engine of ours."""
        mine = {name: value for name, value in os.environ.items() if not name.startswith(("DOCKER_", "KUBE"))}
        path = f"/usr/bin:{mine['PATH']}"
        env = mine | {"HEIMDALL_CACHE": str(self.cache), "DOCKER_CONFIG": str(self.config), "PATH": path}
        env["HEIMDALL_STAND_INS"] = "1"  # its mirror lacks most
        done = subprocess.run(
            command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        assert done.returncode == 0, f"{' '.join(command)}:\n{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
        return done.stdout

    def hack(self, tool: str, *arguments: str) -> str:
        """What a tool says, on both of its outputs."""
        said = self.run("sh", "-c", 'exec "$@" 2>&1', "sh", sys.executable, f"hack/{tool}", *arguments)
        print(said)
        return said

    def publish(self, image: str, name: str) -> str:
        """Move an image into the mirror, under a name of Docker's registry; its digest there."""
        there = f"{self.mirror.address}/{name}"
        self.run("docker", "tag", image, there)
        pushed = self.run("docker", "push", there)
        self.run("docker", "image", "rm", there, image)
        return re.findall(r"sha256:[0-9a-f]{64}", pushed)[-1]

    def listed(self, kind: str) -> set[str]:
        """What the engine has of a kind."""
        every = ("--all",) if kind == "container" else ()
        return set(self.run("docker", kind, "ls", *every, "--format", FORMATS[kind]).splitlines())


@pytest.fixture
def mirror(tmp_path: Path) -> Iterator[Mirror]:
    """An empty registry on the loopback address."""
    subprocess.run([sys.executable, "hack/cluster", "parts", "registry"], cwd=ROOT, check=True, timeout=UP_S)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    settings = {
        "version": 0.1,
        "storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}},
        "http": {"addr": address},
    }
    (tmp_path / "registry.json").write_text(json.dumps(settings))
    made = Mirror(address, tmp_path / "registry.log")
    command = [CACHED / "parts/registry/registry", "serve", tmp_path / "registry.json"]
    with (
        made.log.open("w") as log,
        subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "OTEL_TRACES_EXPORTER": "none"}
        ) as process,
    ):
        try:
            wait_for(lambda: listens(address), what="the mirror", timeout_s=STOP_S, tell=made.log.read_text)
            yield made
        finally:
            process.kill()


def listens(address: str) -> bool:
    try:
        return urllib3.request("GET", f"http://{address}/v2/", retries=False).status == HTTPStatus.OK
    except urllib3.exceptions.HTTPError:
        return False


@pytest.fixture
def machine(tmp_path: Path, mirror: Mirror) -> Iterator[Machine]:
    """An engine with something of somebody's in it; ended afterwards, with what it left on the host."""
    status = subprocess.run(
        [sys.executable, "hack/cluster", "status"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert "not running" in status, f"this needs a machine without an engine (python3 hack/cluster down):\n{status}"
    engine = own_engine()
    engine._require_debian_root()
    engine._install()
    wanted = ("kind", "helm", "minio", "kubeconform", "buildx", *engine.parts.NODE_PARTS)
    subprocess.run([sys.executable, "hack/cluster", "parts", *wanted], cwd=ROOT, check=True, timeout=UP_S)
    parts = tmp_path / "cache/parts"
    parts.mkdir(parents=True)
    for part in (CACHED / "parts").iterdir():
        (parts / part.name).symlink_to(part)  # `down --all` removes the links alone
    folders = cluster_tool("folders")
    (tmp_path / "cache" / folders.TAG).write_text(folders.TAG_TEXT)  # or it would be taken for somebody's folder
    plugins = tmp_path / "config/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(CACHED / "parts/buildx/buildx")
    made = Machine(tmp_path / "cache", tmp_path / "config", mirror)
    before = engine._host_state()
    with (tmp_path / "dockerd.log").open("w") as log:
        # What this host's kernel lets an engine do is the same for everybody's.
        options = runtime(tmp_path)
        options += ["--registry-mirror", f"http://{mirror.address}"]
        places = ("--data-root", str(tmp_path / "data"), "--exec-root", "/run/somebodys-engine")
        process = subprocess.Popen(["dockerd", *places, *options], stdout=log, stderr=log, start_new_session=True)
    try:
        wait_for(lambda: answers(made), what="somebody's engine", timeout_s=STOP_S)
        populate(made)
        yield made
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_S)
        engine._restore_host(before)
        shutil.rmtree("/run/somebodys-engine", ignore_errors=True)
        shutil.rmtree(tmp_path / "data", ignore_errors=True)


def runtime(folder: Path) -> list[str]:
    """Options of an engine on a host that lacks a capability, which privileged containers ask for."""
    engine = own_engine()
    if engine.has_capability(engine.CAP_SYS_RESOURCE):
        return []
    wrapper = folder / "runc-wrapper"
    wrapper.write_text(engine.RUNC_WRAPPER.replace("@RUNC@", shutil.which("runc", path="/usr/sbin:/usr/bin") or ""))
    wrapper.chmod(0o755)
    return ["--add-runtime", f"narrow={wrapper}", "--default-runtime", "narrow"]


def answers(machine: Machine) -> bool:
    try:
        return bool(machine.run("docker", "version", "--format", "{{.Server.Version}}"))
    except AssertionError:
        return False


def populate(machine: Machine) -> None:
    """An image, a container that runs, a volume and a network that this project knows nothing of."""
    make_image(machine, THEIRS)
    machine.run("docker", "network", "create", THEIRS)
    machine.run("docker", "volume", "create", THEIRS)
    options = ("--detach", "--name", THEIRS, "--network", THEIRS, "--volume", f"{THEIRS}:/data")
    machine.run("docker", "run", *options, THEIRS, f"/{PROGRAM}", "--data-dir=/data")
    wait_for(
        lambda: "ready to serve client requests" in machine.run("sh", "-c", f"docker logs {THEIRS} 2>&1"),
        what="somebody's container",
        timeout_s=STOP_S,
    )


def make_image(machine: Machine, name: str) -> None:
    """An image with one program."""
    archive = machine.cache / "image.tar"
    with tarfile.open(archive, "w") as tar:
        content = (CACHED / "parts" / PROGRAM / PROGRAM).read_bytes()
        info = tarfile.TarInfo(PROGRAM)
        info.size, info.mode = len(content), 0o755
        tar.addfile(info, io.BytesIO(content))
    machine.run("docker", "import", str(archive), name)
    archive.unlink()


def test_what_a_mirror_has_is_pulled_and_the_rest_built(machine: Machine) -> None:
    for image in ("postgres:15", "redis:7.4"):
        make_image(machine, "made")
        machine.publish("made", f"library/{image}")

    said = machine.hack("images", "build", "postgresql", "redis")

    assert "pulling docker.io/library/postgres:15: " in said
    assert "building" not in said
    assert machine.mirror.asked_for("library/postgres/manifests/15")[-1] == HTTPStatus.OK
    assert machine.hack("images", "build", "postgresql", "redis").splitlines() == ["images are up to date"]

    # The mirror lacks Python, until somebody gives it one.
    said = machine.hack("cluster", "images")
    assert f"{PYTHON} can't be pulled: " in said
    assert f"building a stand-in for {PYTHON} from Debian packages: " in said
    assert HTTPStatus.NOT_FOUND in machine.mirror.asked_for("library/python/manifests/3.11-slim-bookworm")
    machine.run("sh", "-c", f"printf 'FROM {PYTHON}\nLABEL dev.heimdall.image=theirs' | docker build --tag made -")
    machine.run("docker", "image", "rm", PYTHON)
    machine.publish("made", f"library/{PYTHON}")

    said = machine.hack("images", "build", "minio")

    # A mirror is asked for Docker's images alone.
    lacking, _, then = said.partition("pulling python")
    assert "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z can't be pulled: " in lacking
    assert f"pulling {PYTHON}: " in said
    assert "building quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z: " in then
    assert "can't be pulled" not in then

    machine.hack("cluster", "down", "--all")

    left = machine.run("docker", "image", "ls", "--format", "{{.Repository}}:{{.Tag}}").split()
    assert set(left) == {f"{THEIRS}:latest", "postgres:15", "redis:7.4", PYTHON}, "what was built here is gone, alone"


def test_kind_s_node_image_is_pulled_where_a_registry_has_it(machine: Machine) -> None:
    """kind names it by its digest: here one that the mirror has, in place of the real one's, which nobody can make."""
    make_image(machine, "made")
    digest = machine.publish("made", "kindest/node:v0")
    part = machine.cache / "parts/kind"
    part.unlink()
    shutil.copytree(CACHED / "parts/kind", part)
    program = (part / "kind").read_bytes()
    (part / "kind").write_bytes(
        re.sub(rb"(kindest/node:v[0-9.]+@)sha256:[0-9a-f]{64}", rb"\1" + digest.encode(), program)
    )
    asks = "from heimdall_cluster import images; print(images.ensure_node())"

    for first in (True, False):
        said = machine.run("sh", "-c", f'PYTHONPATH=hack/cluster {sys.executable} -c "{asks}" 2>&1')
        assert ("pulling kindest/node:" in said) is first
        assert said.endswith("None\n"), "kind's own, of which it needs no name"
    assert HTTPStatus.OK in machine.mirror.asked_for(f"kindest/node/manifests/{digest}")

    machine.hack("cluster", "down", "--all")

    assert "kindest/node" in machine.listed("image"), "what was pulled stays"


def test_a_cluster_in_somebody_s_engine_comes_and_goes(machine: Machine) -> None:
    before = {kind: machine.listed(kind) for kind in FORMATS}
    assert f"{THEIRS} running" in before["container"]

    said = machine.hack("cluster", "up")

    (digest,) = re.findall(r"kindest/node:\S+@(sha256:\w+) can't be pulled: ", said)
    assert HTTPStatus.NOT_FOUND in machine.mirror.asked_for(f"kindest/node/manifests/{digest}")
    assert "building the node image: " in said, "that a registry answers does not mean that it has this one"
    status = machine.hack("cluster", "status")
    assert "the one that was there" in status
    assert "cluster: up" in status
    built = machine.cache / "parts/kubernetes/kubectl"
    kubectl = (str(built) if built.exists() else "kubectl", "--kubeconfig", str(machine.cache / "kubeconfig"))
    nodes = json.loads(machine.run(*kubectl, "get", "nodes", "-o", "json"))["items"]
    gpus = {node["metadata"]["name"]: node["status"]["allocatable"].get("nvidia.com/gpu") for node in nodes}
    assert gpus == {"heimdall-control-plane": None, "heimdall-worker": None, "heimdall-worker2": "2"}
    machine.hack("images", "build", "contract")
    machine.hack("cluster", "load", "heimdall/contract:dev")
    run = ("run", "says", "--image=heimdall/contract:dev", "--restart=Never", "--image-pull-policy=Never")
    machine.run(*kubectl, *run, "--command", "--", "python3", "-c", "print('from within')")
    machine.run(*kubectl, "wait", "pod/says", "--for=jsonpath={.status.phase}=Succeeded", "--timeout=120s")
    assert machine.run(*kubectl, "logs", "says").strip() == "from within"

    machine.hack("cluster", "down")

    # The network that all kind clusters of an engine share may be another one's too.
    assert machine.listed("container") == before["container"], machine.run("docker", "inspect", THEIRS)
    assert machine.listed("volume") == before["volume"]
    assert machine.listed("network") - {"kind"} == before["network"]
    assert {"heimdall/kind-node", "kindest/node"} & machine.listed("image"), "a next one begins with it"

    machine.hack("cluster", "down", "--all")

    assert machine.listed("image") == before["image"]
    assert machine.listed("container") == before["container"]
    assert not machine.cache.exists()
    assert (CACHED / "parts" / PROGRAM / PROGRAM).is_file()
