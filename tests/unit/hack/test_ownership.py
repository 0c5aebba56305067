"""What the cluster tool did not make it leaves alone, and what a kill has left half-done it takes up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from heimdall_cluster import cli, engine, folders, images, kind, parts, pulling, steps
from tests.programs import hack

ROOT = Path(__file__).resolve().parents[3]
BOOT = "one"


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An engine that was there before; what is done to its clusters."""
    did: list[str] = []
    for module in (kind, cli):
        monkeypatch.setattr(module, "KUBECONFIG", tmp_path / "kubeconfig")
    for module in (engine, cli):
        monkeypatch.setattr(module, "BEFORE", tmp_path / "before.json")
    monkeypatch.setattr(kind, "MARKER", tmp_path / "kind.json")
    monkeypatch.setattr(engine, "SOCKET", tmp_path / "socket")
    monkeypatch.setattr(engine, "_foreign_answers", lambda: True)
    monkeypatch.setattr(kind, "exists", lambda: True)
    monkeypatch.setattr(kind, "delete", lambda: did.append("deleted"))
    monkeypatch.setattr(kind, "_create", lambda _: did.append("created"))
    monkeypatch.setattr(kind, "require_kubectl", lambda: None)
    monkeypatch.setattr(images, "ensure_node", lambda: None)
    monkeypatch.setattr(parts, "ensure", lambda _: None)
    return did


def test_a_cluster_of_our_name_that_somebody_else_made_is_left_alone(foreign: list[str]) -> None:
    with pytest.raises(steps.ClusterError, match="that this tool did not make: it is left alone"):
        kind.create()
    cli._down(Namespace(all=False))
    assert foreign == []


def test_what_is_left_of_a_cluster_of_ours_is_replaced_and_taken_down(foreign: list[str]) -> None:
    kind.MARKER.touch()
    kind.create()
    cli._down(Namespace(all=False))
    assert foreign == ["deleted", "created", "deleted"]
    assert not kind.MARKER.exists(), "a later cluster of this name may be somebody else's"


def test_a_cluster_in_an_engine_that_does_not_answer_is_not_called_gone(
    foreign: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "_foreign_answers", lambda: False)
    kind.MARKER.touch()
    kind.KUBECONFIG.touch()
    with pytest.raises(steps.ClusterError, match="start Docker first"):
        cli._down(Namespace(all=False))
    assert kind.KUBECONFIG.exists()


def test_our_engine_is_ended_also_where_the_cluster_can_not_be_taken_down(
    foreign: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails() -> None:
        raise steps.ClusterError("kind fails")

    kind.MARKER.touch()
    monkeypatch.setattr(kind, "delete", fails)
    monkeypatch.setattr(engine, "stop", lambda: foreign.append("stopped"))
    with pytest.raises(steps.ClusterError, match="kind fails"):
        cli._down(Namespace(all=False))
    assert foreign == ["stopped"]


@pytest.mark.parametrize(
    ("boot", "other_engine", "restored"), [(BOOT, False, True), ("another", False, False), (BOOT, True, False)]
)
def test_links_and_firewall_are_put_back_only_where_nobody_else_used_them_since(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, boot: str, other_engine: bool, restored: bool
) -> None:
    did: list[str] = []
    (tmp_path / "boot").write_text(f"{BOOT}\n")
    monkeypatch.setattr(engine, "BOOT_ID", tmp_path / "boot")
    monkeypatch.setattr(engine, "_foreign_answers", lambda: other_engine)
    monkeypatch.setattr(engine, "_bridges", lambda: {"docker0"})
    monkeypatch.setattr(engine, "read", lambda command, **_: did.append(" ".join(command)) or "")
    monkeypatch.setattr(Path, "write_text", lambda path, text: did.append(f"{path} {text}"))

    before: dict[str, Any] = {"boot": boot, "links": ["lo"], "chains": [], "ip_forward": "0"}
    engine._restore_host({**before, "forward": {"iptables": "ACCEPT", "ip6tables": "DROP"}})

    wanted = ["ip link delete docker0", "iptables -P FORWARD ACCEPT", "ip6tables -P FORWARD DROP"]
    assert [call for call in did if call in wanted] == (wanted if restored else [])
    assert bool(did) is restored


@dataclass
class Host:
    """What the engine's code finds and does, without an engine."""

    pid: int | None = None
    command: str = ""
    is_answering: bool = False
    did: list[str] = field(default_factory=list)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Host:
    """A host of the test's own, on which nothing runs."""
    made = Host()
    for name in ("ENGINE", "RUN", "LOGS", "EXEC_ROOT"):
        monkeypatch.setattr(engine, name, tmp_path / name.lower())
    monkeypatch.setattr(engine, "BEFORE", tmp_path / "engine/before.json")
    monkeypatch.setattr(engine, "DATA_ROOT", tmp_path / "engine/data")
    monkeypatch.setattr(engine, "BOOT_ID", tmp_path / "boot")
    (tmp_path / "boot").write_text(f"{BOOT}\n")
    (tmp_path / "engine").mkdir()
    monkeypatch.setattr(engine, "START_TIMEOUT_S", 0)
    monkeypatch.setattr(engine, "_pid", lambda: made.pid)
    monkeypatch.setattr(engine, "_command", lambda _: made.command)
    monkeypatch.setattr(engine, "answers", lambda: made.is_answering)
    monkeypatch.setattr(engine, "_host_state", lambda: {"boot": BOOT})
    monkeypatch.setattr(engine, "_clean_after_kill", lambda: made.did.append("cleaned"))
    monkeypatch.setattr(engine, "_restore_host", lambda _: made.did.append("restored"))
    monkeypatch.setattr(engine, "_runtime_options", list)

    def end(_: int) -> None:
        made.did.append("ended")
        made.pid, made.is_answering = None, False

    def start(command: list[str], **_: object) -> None:
        made.did.append(f"started {command[0]}")
        made.is_answering = True

    monkeypatch.setattr(engine, "_end", end)
    monkeypatch.setattr(engine.subprocess, "Popen", start)
    return made


def test_an_engine_that_an_interrupted_call_has_started_is_taken_up(host: Host) -> None:
    host.pid, host.is_answering = 7, True
    engine._start()
    assert host.did == []


def test_an_engine_that_hangs_is_replaced(host: Host) -> None:
    host.pid = 7
    engine._start()
    assert host.did == ["ended", "cleaned", "started dockerd"]


@pytest.mark.parametrize(("boot", "is_kept"), [(BOOT, True), ("another", False)])
def test_what_the_host_was_like_is_noted_once_a_boot(host: Host, boot: str, is_kept: bool) -> None:
    """A killed engine's traces are none of the host's; after a restart of the machine there are none."""
    engine.BEFORE.write_text(json.dumps({"boot": boot, "links": ["of then"]}))
    engine._start()
    noted = json.loads(engine.BEFORE.read_text())
    assert noted == ({"boot": BOOT, "links": ["of then"]} if is_kept else {"boot": BOOT})


@pytest.mark.parametrize("was_killed", [False, True])
def test_an_engine_of_another_cache_is_left_alone(host: Host, was_killed: bool) -> None:
    """Also where an engine of this cache was killed once, and left the note of what the host was like before."""
    host.pid, host.command, host.is_answering = 7, "dockerd --data-root /elsewhere/engine/data", True
    if was_killed:
        engine.BEFORE.write_text("{}")
    for call in (engine.ensure, lambda: cli._down(Namespace(all=True))):
        with pytest.raises(steps.ClusterError, match=r"of another cache than .*: set HEIMDALL_CACHE as it was"):
            call()
    engine.stop()
    assert host.did == []


def test_an_engine_whose_cache_was_removed_is_ended(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next `up`, or by `down`. What the host was like before is not known any more."""
    monkeypatch.setattr(engine, "_foreign_answers", lambda: False)
    for name in ("_require_debian_root", "_install", "_ensure_buildx"):
        monkeypatch.setattr(engine, name, lambda: None)
    host.pid, host.command, host.is_answering = 7, f"dockerd --data-root {engine.DATA_ROOT}", True
    engine.ensure()
    assert host.did == ["ended", "cleaned", "cleaned", "started dockerd"]

    host.did.clear()
    engine.BEFORE.unlink()
    host.pid = 7
    engine.stop()
    assert host.did == ["ended", "cleaned"]


def test_a_process_that_has_the_number_of_our_engine_is_not_taken_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(engine, "PID_FILE", tmp_path / "docker.pid")
    idle = [sys.executable, "-c", "import time; time.sleep(300)", "dockerd", "--pidfile"]
    for file, is_ours in (("/run/docker.pid", False), (str(engine.PID_FILE), True)):
        process = subprocess.Popen([*idle, file])
        try:
            engine.PID_FILE.write_text(str(process.pid))
            steps.wait_until(lambda file=file, pid=process.pid: file in engine._command(pid), what=file, timeout_s=20)
            assert engine._pid() == (process.pid if is_ours else None)
        finally:
            process.kill()
            process.wait()


def test_an_engine_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(300)"
    monkeypatch.setattr(engine, "STOP_TIMEOUT_S", 0.2)
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            engine._end(process.pid)
            assert process.wait(timeout=20) == -signal.SIGKILL
        finally:
            process.kill()


def tag(cache: Path) -> None:
    (cache / folders.TAG).write_text(folders.TAG_TEXT)


@pytest.mark.parametrize(
    ("holds", "is_ours"),
    [
        ([], True),
        (["lock", "install.lock"], True),
        (["lock", "parts", "bin", "engine"], True),
        (["thesis.tex"], False),
        (["tmp", "bin"], False),
        (["lock", "thesis.tex"], False),
    ],
    ids=str,
)
def test_a_folder_that_somebody_uses_is_not_taken_for_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, holds: list[str], is_ours: bool
) -> None:
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    for module in (cli, folders):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    for name in holds:
        (tmp_path / name).touch()
    if is_ours:
        for _ in range(2):
            with cli.locked():
                assert (tmp_path / folders.TAG).exists()
        (tmp_path / "made later").touch()
        with cli.locked():
            return
    with (
        pytest.raises(steps.ClusterError, match=r"holds what this tool did not make \((tmp|bin|thesis.tex)\)"),
        cli.locked(),
    ):
        pytest.fail("it was taken")
    assert {path.name for path in tmp_path.iterdir()} == set(holds)


@pytest.mark.parametrize("whose", ["ours", "another"])
def test_a_shell_that_was_told_of_our_engine_finds_others_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """`hack/cluster env` was evaluated, our engine ended, and somebody has started one of his own."""
    told = engine._own_environment() if whose == "ours" else {"DOCKER_HOST": "tcp://other:2375", "DOCKER_CONFIG": "/c"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    engine.forget_environment()
    assert {name: os.environ.get(name) for name in told} == (dict.fromkeys(told) if whose == "ours" else told)


def test_a_lock_whose_file_was_removed_is_not_taken_for_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    with (tmp_path / "lock").open("w") as old:
        (tmp_path / "lock").unlink()
        (tmp_path / "lock").touch()
        assert not cli._taken(old)
    with (tmp_path / "lock").open("w") as new:
        assert cli._taken(new)


def test_what_a_call_has_begun_holds_the_lock_as_long_as_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    for module in (cli, folders):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    tag(tmp_path)
    left = tmp_path / f"{folders.PREFIX}abc"
    left.mkdir()
    (tmp_path / "tmpabc").mkdir()
    takes = f"import fcntl; fcntl.flock(open({str(tmp_path / 'lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with cli.locked():
        assert not left.exists(), "what a killed call left half-done is removed"
        assert (tmp_path / "tmpabc").exists()
        inherits = "import os; os.fstat(int(os.environ['HELD']))"
        steps.run([sys.executable, "-c", inherits], log=tmp_path / "log", env={"HELD": str(steps.held[0])})
        other = subprocess.run([sys.executable, "-c", takes], capture_output=True, text=True, check=False, timeout=60)
        assert "BlockingIOError" in other.stderr
    with (tmp_path / "lock").open("w") as free:
        fcntl.flock(free, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_no_package_starts_a_service_while_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setattr(engine, "POLICY", policy)
    with engine._no_services():
        assert subprocess.run([policy], check=False, timeout=60).returncode == 101
    assert not policy.exists()
    policy.write_text("somebody's own")
    with engine._no_services():
        assert policy.read_text() == "somebody's own"
    assert policy.exists()


@pytest.mark.parametrize(("text", "stays"), [(engine.NO_SERVICES, False), ("somebody's own", True)])
def test_a_call_that_was_killed_in_an_installation_leaves_services_startable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, stays: bool
) -> None:
    engine.POLICY.parent.mkdir()
    monkeypatch.setattr(engine, "_is_installed", lambda _: True)
    engine.POLICY.write_text(text)
    engine._install()
    assert engine.POLICY.exists() is stays


@dataclass
class Debian:
    """What apt and systemd would do, in files: Docker's packages enable its units as they are installed."""

    root: Path
    is_killed: bool = False
    is_interrupted: bool = False
    did: list[str] = field(default_factory=list)

    def has(self, name: str) -> bool:
        return (self.root / name).exists()

    def starts_with_the_machine(self) -> set[str]:
        held = {file.parent.name.removesuffix(".d") for file in self.root.glob("*.d/heimdall.conf")}
        return {file.name.removesuffix(".enabled") for file in self.root.glob("*.enabled")} - held

    def apt(self, *words: str) -> None:
        self.did.append(words[0])
        if words[0] == "install":
            for name in ("dockerd", "debootstrap", "docker", "docker.service.enabled", "docker.socket.enabled"):
                (self.root / name).touch()
            if self.is_killed:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.is_interrupted:
                raise KeyboardInterrupt

    def run(self, command: list[str], **_: object) -> None:
        self.did.append(" ".join(command))

    def read(self, command: list[str], **_: object) -> str:
        enabled = self.root / f"{command[-1]}.enabled"
        if command[1] == "disable":
            enabled.unlink(missing_ok=True)
        return f"{command[-1]} enabled" if command[1] == "list-unit-files" and enabled.exists() else ""


SETTLED = "dpkg --configure -a"


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Debian:
    """A machine without Docker, on which somebody has a containerd of his own."""
    made = Debian(tmp_path / "machine")
    made.root.mkdir()
    for name in ("iptables", "containerd.service.enabled"):
        (made.root / name).touch()
    engine.POLICY.parent.mkdir()
    monkeypatch.setattr(engine, "UNIT_FOLDERS", made.root)
    for name in ("run", "read"):
        monkeypatch.setattr(engine, name, getattr(made, name))
    monkeypatch.setattr(engine, "_apt", made.apt)
    monkeypatch.setattr(engine, "_is_installed", made.has)
    monkeypatch.setattr(shutil, "which", lambda program, **_: f"/usr/bin/{program}")
    return made


def test_an_engine_that_is_installed_does_not_start_with_the_machine(debian: Debian) -> None:
    engine._install()
    assert debian.did == [SETTLED, "update", "install"]
    assert debian.starts_with_the_machine() == {"containerd.service"}, "somebody's own does as before"
    assert list(debian.root.glob("*.d")) == [], "nothing is held back for ever"


@pytest.mark.parametrize("next_call", ["up", "down"])
@pytest.mark.parametrize("end", ["killed", "interrupted"])
@pytest.mark.usefixtures("foreign")
def test_an_engine_that_a_killed_call_has_installed_does_not_start_with_the_machine(
    debian: Debian, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, end: str, next_call: str
) -> None:
    """Nor is what held it back left for ever, though nobody calls `up` again. Ctrl-C leaves the same, but no policy."""
    monkeypatch.setattr(engine, "_foreign_answers", lambda: False)
    monkeypatch.setattr(cli, "CACHE", tmp_path / "cache")
    if end == "killed":
        debian.is_killed = True
        child = os.fork()
        if child == 0:
            engine._install()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    else:
        debian.is_interrupted = True
        with pytest.raises(KeyboardInterrupt):
            engine._install()
        assert not engine.POLICY.exists()
        debian.did.clear()
    assert debian.has("docker.service.enabled")
    assert debian.starts_with_the_machine() == {"containerd.service"}

    debian.is_killed = debian.is_interrupted = False
    if next_call == "up":
        engine._install()
        engine._install()
        assert debian.did == [SETTLED, "update"], "the next call ends what was begun, once"
    else:
        cli._down(Namespace(all=True))
    assert not debian.has("docker.service.enabled")
    assert list(debian.root.glob("*.d")) == []
    assert not engine.POLICY.exists()


@pytest.mark.parametrize("is_installed", [False, True])
def test_packages_that_can_not_be_settled_end_this_only_where_apt_says_nothing_of_it(
    debian: Debian, monkeypatch: pytest.MonkeyPatch, is_installed: bool
) -> None:
    """Another holds dpkg's lock, which apt waits for."""

    def fails(*_: object, **__: object) -> None:
        raise steps.ClusterError("dpkg frontend lock was locked by another process")

    monkeypatch.setattr(engine, "run", fails)
    if not is_installed:
        engine._install()
        assert debian.did == ["update", "install"]
        return
    debian.apt("install")
    engine._held_back_by("docker.service").parent.mkdir()
    engine._held_back_by("docker.service").touch()
    with pytest.raises(steps.ClusterError, match="was locked"):
        engine._install()


def test_apt_waits_where_the_machine_itself_installs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran: list[list[str]] = []
    monkeypatch.setattr(engine, "INSTALL_LOCK", tmp_path / "lock")
    monkeypatch.setattr(engine, "run", lambda command, **_: ran.append(command))
    engine._apt("install", "docker.io")
    assert ran == [["apt-get", "-o", "DPkg::Lock::Timeout=300", "install", "docker.io"]]


def test_a_client_that_a_killed_call_did_not_come_to_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[tuple[str, ...]] = []
    engine.POLICY.parent.mkdir()
    monkeypatch.setattr(engine, "_is_installed", lambda program: program != "docker")
    monkeypatch.setattr(engine, "run", lambda *_, **__: None)
    monkeypatch.setattr(engine, "_apt", lambda *words: did.append((words[0], words[-1])))
    engine._install()
    assert did == [("update", "-qq"), ("install", "docker-cli")]


def test_what_a_killed_call_did_not_come_to_is_made_up_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cluster is up; what comes after it is not done."""
    did: list[str] = []
    monkeypatch.setattr(cli, "check_machine", lambda: None)
    monkeypatch.setattr(engine, "ensure", dict)
    monkeypatch.setattr(parts, "ensure", did.extend)
    monkeypatch.setattr(parts, "drop_go_caches", lambda: did.append("no caches"))
    monkeypatch.setattr(kind, "runs", lambda: False)
    monkeypatch.setattr(kind, "recovers", lambda: True)
    monkeypatch.setattr(kind, "settle", lambda: did.append("settled"))
    cli._up(Namespace())
    assert did == ["kind", "helm", "settled", "minio", "kubeconform", "no caches"]


def test_modules_half_removed_are_out_of_gos_sight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = tmp_path / "go/mod/example.com"
    module.mkdir(parents=True)
    (module / "go.mod").touch()
    module.chmod(0o555)

    def killed(_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(parts, "GO", tmp_path / "go")
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    for module in (cli, folders):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    with monkeypatch.context() as while_it_is_killed:
        while_it_is_killed.setattr(folders, "remove_tree", killed)
        with pytest.raises(KeyboardInterrupt):
            parts.drop_go_caches()
    assert not parts.GO.exists()
    tag(tmp_path)
    with cli.locked():
        assert {path.name for path in tmp_path.iterdir()} == {"lock", folders.TAG}, "the next call removes the rest"


def test_a_kill_never_leaves_a_cache_that_is_taken_for_somebody_elses(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def cut_short(path: Path, text: str) -> None:
        path.write_bytes(text.encode()[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(folders, "CACHE", tmp_path)
    with monkeypatch.context() as while_it_is_killed:
        while_it_is_killed.setattr(Path, "write_text", cut_short)
        with pytest.raises(KeyboardInterrupt):
            folders.ensure_cache()
    folders.ensure_cache()
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(folders.TAG, folders.TAG_TEXT)]


def test_of_base_images_that_were_being_built_a_kill_leaves_what_the_next_call_removes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """debootstrap is killed as it has something mounted in its tree."""

    def killed(command: list[object], **_: object) -> None:
        (Path(str(command[-1])) / "proc").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    for module in (cli, folders):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    monkeypatch.setattr(images, "exists", lambda _: False)
    monkeypatch.setattr(images, "run", killed)
    with monkeypatch.context() as while_it_is_killed:
        while_it_is_killed.setattr(folders, "remove_tree", lambda _: None)
        with pytest.raises(KeyboardInterrupt):
            images._ensure_debian()
    (left,) = tmp_path.iterdir()
    tag(tmp_path)

    unmounted: list[str] = []
    mounted = [f"{left}/tree/proc", f"{left}/tree/sys"]

    def umount(command: list[str]) -> None:
        unmounted.append(command[-1])
        mounted.remove(command[-1])

    monkeypatch.setattr(folders, "mounts_under", lambda folder: list(mounted) if folder == left else [])
    monkeypatch.setattr(folders, "read", umount)
    with cli.locked():
        assert {path.name for path in tmp_path.iterdir()} == {"lock", folders.TAG}
    assert unmounted == [f"{left}/tree/sys", f"{left}/tree/proc"]


def test_what_stays_mounted_in_a_leftover_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "tree/proc/of the kernel").mkdir(parents=True)
    monkeypatch.setattr(folders, "mounts_under", lambda _: ["/tree/proc"])
    monkeypatch.setattr(folders, "read", lambda _: None)
    folders.remove_tree(tmp_path / "tree")
    assert (tmp_path / "tree/proc/of the kernel").exists()


def test_the_lock_that_a_killed_kind_left_on_the_kubeconfig_is_removed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    left = tmp_path / "kubeconfig.lock"
    found: list[bool] = []
    monkeypatch.setattr(kind, "KUBECONFIG", tmp_path / "kubeconfig")
    monkeypatch.setattr(images, "client_environment", dict)
    monkeypatch.setattr(kind, "run", lambda *_, **__: found.append(left.exists()))
    left.touch()
    kind._kind("delete", "cluster", timeout_s=1)
    assert found == [False]


def test_images_on_their_way_hold_the_lock_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    client = tmp_path / "docker"
    client.write_text('#!/bin/sh\n[ -e "/proc/self/fd/$HELD" ] && case $1 in save) echo held ;; *) grep held ;; esac\n')
    client.chmod(0o755)
    with (tmp_path / "lock").open("w") as lock:
        monkeypatch.setattr(kind, "held", [lock.fileno()])
        monkeypatch.setattr(kind, "LOGS", tmp_path)
        monkeypatch.setattr(engine, "docker", lambda: str(client))
        monkeypatch.setattr(engine, "environment", lambda: {"HELD": str(lock.fileno())})
        assert kind._stream(["heimdall/operator:dev"], "heimdall-worker") is None


@pytest.mark.parametrize("is_short_of", ["room for two", "room for one"])
def test_an_image_that_finds_no_room_takes_that_of_its_predecessor(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_short_of: str
) -> None:
    client, removed = tmp_path / "docker", tmp_path / "removed"
    full = f"[ -e {removed} ] || " if is_short_of == "room for two" else ""
    client.write_text(
        "#!/bin/sh\n"
        'case "$*" in\n'
        "*inspect*) echo sha256:1 ;;\n"
        f'*"images remove --sync docker.io/heimdall/trainer:dev") touch {removed} ;;\n'
        f"*import*) {full}{{ echo 'ctr: write /data: no space left on device' >&2; exit 1; }} ;;\n"
        "esac\n"
    )
    client.chmod(0o755)
    monkeypatch.setattr(kind, "LOGS", tmp_path)
    monkeypatch.setattr(engine, "docker", lambda: str(client))
    monkeypatch.setattr(engine, "environment", dict)
    monkeypatch.setattr(kind, "image_ids", lambda *_: set())
    if full:
        kind.load(["heimdall/trainer:dev"], ["heimdall-worker2"])
    else:
        with pytest.raises(
            steps.ClusterError, match=r"could not be loaded into heimdall-worker2, .* no room is left on the disk"
        ):
            kind.load(["heimdall/trainer:dev"], ["heimdall-worker2"])
    assert removed.exists()


FULL = "No space left on device"


@pytest.mark.parametrize(
    ("tool", "fails"), [("cluster up", "_up"), ("images build", "build"), ("demo", "_hack")], ids=lambda each: each[:5]
)
def test_a_disk_that_is_full_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tool: str, fails: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, FULL, str(tmp_path / "logs/kind.log"))

    name, *arguments = tool.split()
    program: Any = cli if name == "cluster" else hack(f"{name}/__main__.py", monkeypatch)
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(engine, "ensure", dict)
    monkeypatch.setattr(program, fails, full)
    monkeypatch.setattr(sys, "argv", [f"hack/{name}", *arguments])
    wanted = rf"^hack/{name}: no room is left on the disk \(.*/logs/kind.log\): make some, then call again$"
    with pytest.raises(SystemExit, match=wanted):
        program.main()


@pytest.mark.parametrize(
    ("error", "where"),
    [
        (OSError(errno.ENOSPC, FULL, "/small/source", None, "/full/target"), "/full/target"),
        (shutil.Error([("/small/source", "/full/target", f"[Errno 28] {FULL}: '/full/target'")]), "/full/target"),
        (OSError(errno.ENOSPC, FULL), str(steps.CACHE)),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/full/target"), "/full/target"),
        (shutil.Error([("/small/source", "/full/target", "[Errno 122] Disk quota exceeded")]), "/full/target"),
    ],
    ids=["a copy", "a folder's copy", "no name", "a quota", "a folder's copy beyond a quota"],
)
def test_of_a_copy_its_target_is_named(error: OSError, where: str) -> None:
    with pytest.raises(SystemExit, match=f"hack/x: no room is left on the disk \\({where}\\)"), steps.told("hack/x"):
        raise error


@pytest.mark.parametrize(
    "file", [steps.CACHE, steps.CACHE / "lock", steps.CACHE.parent], ids=["it", "in it", "around it"]
)
def test_a_cache_that_sudo_has_made_is_named(file: Path) -> None:
    wanted = (
        rf"^hack/x: {file} may not be written by you .*: sudo chown -R \$USER {steps.CACHE}, or set HEIMDALL_CACHE to"
    )
    with pytest.raises(SystemExit, match=wanted), steps.told("hack/x"):
        raise PermissionError(errno.EACCES, "Permission denied", str(file))


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "no"),
        PermissionError(errno.EACCES, "no", "/usr/bin/somebodys"),
        shutil.Error([("a", "b", "[Errno 13] no")]),
    ],
)
def test_another_error_is_none_of_a_full_disk(error: OSError) -> None:
    with pytest.raises(OSError, match="no"), steps.told("hack/x"):
        raise error


@pytest.mark.parametrize(
    ("ensure", "lacking"), [(images.ensure_node, "kindest/node:v1@sha256:0"), (images.ensure_python, images.PYTHON)]
)
def test_an_image_that_can_be_neither_pulled_nor_built_is_named(
    monkeypatch: pytest.MonkeyPatch, ensure: Callable[[], object], lacking: str
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(engine, "environment", lambda: {"DOCKER_HOST": "unix:///ours"})
    monkeypatch.setattr(images, "exists", lambda _: False)
    monkeypatch.setattr(images, "kinds_node", lambda: "kindest/node:v1@sha256:0")
    monkeypatch.setattr(images, "pull", lambda _: False)
    said = (
        rf"{lacking} can't be pulled, and building one needs root .* a registry that has it \(docker pull {lacking}\),"
    )
    with pytest.raises(steps.ClusterError, match=said):
        ensure()


@pytest.fixture
def image_tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    return hack("images/__main__.py", monkeypatch)


@pytest.mark.parametrize(
    ("label", "built"), [("", False), ("ours, of now", False), ("ours, of before", True), (None, True)]
)
def test_an_official_image_that_somebody_has_pulled_is_never_replaced(
    image_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str | None, built: bool
) -> None:
    did: list[str] = []
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(pulling, "pull", lambda image: did.append(f"asked for {image}"))
    monkeypatch.setattr(engine, "environment", lambda: {"DOCKER_HOST": "unix:///ours"})
    monkeypatch.setattr(images, "ensure_python", lambda: None)
    monkeypatch.setattr(images, "inspect", lambda _, template: label if "Labels" in template else None)
    monkeypatch.setattr(image_tool, "inputs_digest", lambda _: "ours, of now")
    monkeypatch.setattr(image_tool, "_build", lambda image, _: did.append(image.name))
    monkeypatch.setattr(image_tool, "read", lambda *_, **__: None)
    image_tool.build([image_tool.CATALOGUE["postgresql"]])
    assert did == (["asked for docker.io/library/postgres:15", "postgresql"] if built else [])


def test_of_official_images_those_are_built_that_no_registry_gives(
    image_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a stand-in whose image can be pulled now goes."""
    did: list[str] = []
    ids = iter(["stand-in", "pulled", None, "built"])
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(engine, "docker", lambda: "docker")
    monkeypatch.setattr(engine, "environment", lambda: {"DOCKER_HOST": "unix:///ours"})
    monkeypatch.setattr(pulling, "pull", lambda image: image.startswith("docker.io/"))
    monkeypatch.setattr(images, "ensure_python", lambda: None)
    monkeypatch.setattr(images, "inspect", lambda _, template: None if "Labels" in template else next(ids))
    monkeypatch.setattr(image_tool, "read", lambda command, **_: did.append(" ".join(command[1:])))
    monkeypatch.setattr(image_tool, "_build", lambda image, _: did.append(f"built {image.name}"))
    image_tool.build(image_tool.CATALOGUE[name] for name in ("redis", "versitygw"))
    assert did == ["image rm stand-in", "built versitygw", "builder prune --force --keep-storage 26GB"]


@pytest.fixture
def theirs(image_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """An engine that was there, and a registry that gives nothing; what is built."""
    built: list[str] = []
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(engine, "environment", dict)
    monkeypatch.setattr(engine, "docker", lambda: "docker")
    monkeypatch.setattr(engine, "require_builder", lambda _: None)
    monkeypatch.delenv(images.STAND_INS, raising=False)
    for module in (images, pulling):
        monkeypatch.setattr(module, "pull", lambda _: False)
    monkeypatch.setattr(images, "inspect", lambda *_: None)
    monkeypatch.setattr(images, "_ensure_debian", lambda: None)
    monkeypatch.setattr(images, "_build_own", lambda image, _: built.append(image))
    monkeypatch.setattr(image_tool, "_build", lambda image, _: built.append(image.reference))
    return built


def test_no_stand_in_takes_an_official_name_in_an_engine_that_was_there(theirs: list[str], image_tool: Any) -> None:
    """A registry that counts pulls gives the real one an hour later."""
    redis = image_tool.CATALOGUE["redis"]
    for image, build in ((redis.reference, lambda: image_tool.build([redis])), (images.PYTHON, images.ensure_python)):
        said = (
            rf"^{image} can't be pulled, .*: call again when docker pull {image} works.* HEIMDALL_STAND_INS=1 is set$"
        )
        with pytest.raises(steps.ClusterError, match=said):
            build()
    assert theirs == []


def test_a_stand_in_takes_an_official_name_where_that_is_asked_for(
    theirs: list[str], image_tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine of continuous integration that has a Docker and no registry."""
    monkeypatch.setenv(images.STAND_INS, "1")
    image_tool.build([image_tool.CATALOGUE["redis"]])
    assert theirs == [images.PYTHON, "docker.io/library/redis:7.4"]


def test_what_is_the_project_s_own_is_built_in_any_engine(
    theirs: list[str], image_tool: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, "pull", lambda _: True)
    image_tool.build([image_tool.CATALOGUE["operator"]])
    assert theirs == ["heimdall/operator:dev"]


def test_a_build_is_told_of_the_proxy_and_the_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """By name: a value may be a login, and commands are logged."""
    ran: list[tuple[str, ...]] = []
    monkeypatch.setattr(images, "docker", lambda *arguments, **_: ran.append(arguments))
    for name in (*images.PROXIES, *map(str.upper, images.PROXIES), *images.INDEXES):
        monkeypatch.delenv(name, raising=False)
    images.build("heimdall/x:dev", ".")
    assert "--build-arg" not in ran.pop()

    monkeypatch.setenv("HTTPS_PROXY", "http://user:secret@proxy.example.com:3128")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost,.example.com")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pypi.example.com/simple")
    for name, value in {"http_proxy": "http://127.0.0.1:3128", "HTTP_PROXY": "user:word@localhost:3128/"}.items():
        monkeypatch.setenv(name, value)  # within a container that is the container's own
    monkeypatch.setenv("UV_DEFAULT_INDEX", "http://[::1]:3141/root/pypi")
    images.build("heimdall/x:dev", ".")
    (words,) = ran
    assert [words[at + 1] for at, word in enumerate(words) if word == "--build-arg"] == [
        "no_proxy",
        "HTTPS_PROXY",
        "PIP_INDEX_URL",
    ]


def test_of_an_engine_s_images_those_are_removed_that_were_built_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what somebody has built on one of them, nor what has taken its name since."""
    labels = {"one": "postgres:15", "above": "postgres:15", "replaced": "redis:7.4"}
    names = {"postgres:15": "one", "redis:7.4": "pulled"}
    unlabelled = [images.DEBIAN, f"{images.NODE_NAME}:v1", "heimdall/my-model:v1"]
    removed: list[str] = []

    def read(command: list[str], **_: object) -> str:
        if f"label={images.OURS}" in command:
            return "\n".join(labels)
        return "\n".join(name for name in unlabelled if name.startswith(command[-1].rstrip("*")))

    monkeypatch.setattr(engine, "docker", lambda: "docker")
    monkeypatch.setattr(images, "read", read)
    monkeypatch.setattr(images, "inspect", lambda name, template: (names if "Id" in template else labels)[name])
    monkeypatch.setattr(images, "_remove", removed.extend)
    images.remove_ours()
    assert sorted(removed) == sorted(["postgres:15", *unlabelled[:2]])


def test_kind_s_own_node_image_is_read_out_of_its_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    name = f"kindest/node:v1.37.0@sha256:{'0a' * 32}"
    (tmp_path / "kind").write_bytes(b"\0kindest/node:latest" + name.encode() + b"the next string\xff")
    monkeypatch.setattr(parts, "ensure", lambda _: None)
    monkeypatch.setattr(parts, "path_of", lambda _: tmp_path / "kind")
    assert images.kinds_node() == name
