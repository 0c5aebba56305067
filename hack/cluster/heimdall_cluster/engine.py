"""The Docker engine: the one that answers, or else one of our own that can be ended and removed whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from heimdall_cluster import parts
from heimdall_cluster.folders import link, mounts_under
from heimdall_cluster.paths import (
    BEFORE,
    CLIENT_CONFIG,
    DATA_ROOT,
    ENGINE,
    EXEC_ROOT,
    INSTALL_LOCK,
    LOGS,
    PID_FILE,
    RUN,
    SOCKET,
)
from heimdall_cluster.steps import ClusterError, read, run, say, step, wait_until

START_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 60
CAP_SYS_RESOURCE: Final = 24
FIREWALLS: Final = ("iptables", "ip6tables")
HAIRPIN: Final = re.compile(r"-A POSTROUTING -s (\S+)/32 -d \1/32 -p \w+ .*-j MASQUERADE$")
"""By this rule a container reaches a port of its own that is published."""
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
POLICY: Final = Path("/usr/sbin/policy-rc.d")
"""Asked by Debian's packages whether they may start their services."""
LOCK_OPTION: Final = "DPkg::Lock::Timeout=300"
"""Seconds that apt waits where the machine's own timer is installing something."""
UNATTENDED: Final = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
NO_SERVICES: Final = "#!/bin/sh\n# hack/cluster, while it installs packages: they start no services\nexit 101\n"
UNITS: Final = ("docker.service", "docker.socket", "containerd.service")
UNIT_FOLDERS: Final = Path("/etc/systemd/system")
HELD_BACK: Final = """\
# hack/cluster installs packages, or was killed as it did so: call it once more, or remove this file.
[Unit]
ConditionPathExists=!{file}
"""
"""What keeps a unit from starting, also with the machine, as long as it lies in its file."""
BRIDGE: Final = re.compile(r"docker0|br-[0-9a-f]{12}")
"""Links that Docker's engine makes."""
RUNC_WRAPPER: Final = '''#!/usr/bin/python3 -S
"""runc without CAP_SYS_RESOURCE, which this host does not have: privileged containers ask for it all the same."""
import json, os, sys

def without(capabilities):
    for kind in capabilities or {}:
        capabilities[kind] = [name for name in capabilities[kind] if name != "CAP_SYS_RESOURCE"]

def edit(path, find):
    with open(path) as file:
        document = json.load(file)
    without(find(document))
    with open(path, "w") as file:
        json.dump(document, file)

arguments = sys.argv[1:]
if "--bundle" in arguments:
    edit(arguments[arguments.index("--bundle") + 1] + "/config.json", lambda doc: doc["process"].get("capabilities"))
if "--process" in arguments:
    edit(arguments[arguments.index("--process") + 1], lambda doc: doc.get("capabilities"))
os.execv("@RUNC@", ["runc", *arguments])
'''


def environment() -> dict[str, str]:
    """What a Docker client must be told to reach the engine; empty for an engine that is not ours."""
    if not is_ours():
        return {}
    return _own_environment()


def _own_environment() -> dict[str, str]:
    return {"DOCKER_HOST": f"unix://{SOCKET}", "DOCKER_CONFIG": str(CLIENT_CONFIG)}


def forget_environment() -> None:
    """Forget that the shell was told of our engine (`hack/cluster env`): it may be gone, and another one there."""
    for name, value in _own_environment().items():
        if os.environ.get(name) == value:
            del os.environ[name]


def docker() -> str:
    """The Docker client."""
    # Debian's own first: it fits Debian's engine.
    found = shutil.which("docker", path=f"/usr/bin:{os.environ.get('PATH', '')}")
    if found is None:
        raise ClusterError("no Docker client was found")
    return found


def is_ours() -> bool:
    """Whether the engine in use is the one that this tool started (or is to start)."""
    return SOCKET.exists() or BEFORE.exists() or not _foreign_answers()


def answers() -> bool:
    """Whether the own engine answers."""
    return SOCKET.exists() and _answers({"DOCKER_HOST": f"unix://{SOCKET}"})


def _foreign_answers() -> bool:
    return _answers({})


def _answers(env: dict[str, str]) -> bool:
    client = shutil.which("docker", path=f"/usr/bin:{os.environ.get('PATH', '')}")
    if client is None:
        return False
    return bool(read([client, "version", "--format", "{{.Server.Version}}"], env=env, timeout_s=15))


def foreign_root() -> Path | None:
    """Where an engine that was there keeps all that it has, if that is on this machine."""
    if is_ours():
        return None
    root = (read(["docker", "info", "--format", "{{.DockerRootDir}}"], timeout_s=15) or "").strip()
    return Path(root) if root and Path(root).exists() else None


def ensure() -> dict[str, str]:
    """Make sure that a Docker engine answers.

    Returns:
        The environment that reaches it.

    Raises:
        ClusterError: There is none, and none can be started here; or the one that runs belongs to another cache.
    """
    refuse_another_cache()
    if not BEFORE.exists() and _pid() is not None:
        stop()  # its cache, and with it all that it had, was removed while it ran
    if not BEFORE.exists() and _foreign_answers():
        return {}
    if not answers():
        _require_debian_root()
        _install()
        with step("starting a Docker engine of our own"):
            _start()
    _ensure_buildx()
    return environment()


def _require_debian_root() -> None:
    if platform.system() != "Linux" or not Path("/etc/debian_version").exists():
        raise ClusterError("no Docker engine answers: start Docker (on Debian, as root, this tool can install one)")
    if os.geteuid() != 0:
        raise ClusterError("no Docker engine answers, and starting one needs root: start Docker, or call this as root")


def refuse_another_cache() -> None:
    """Leave an engine of another cache, and what it runs, to whoever works with that one.

    Raises:
        ClusterError: One runs.
    """
    pid = _pid()
    if pid is not None and not _is_of_this_cache(pid):
        raise ClusterError(
            f"the Docker engine at {SOCKET} is of another cache than {ENGINE.parent}: set HEIMDALL_CACHE as it was "
            "when that one was started, or take it down with that first"
        )


def _install() -> None:
    _allow_services()
    packages = {"dockerd": "docker.io", "iptables": "iptables", "debootstrap": "debootstrap"}
    missing = [package for program, package in packages.items() if not _is_installed(program)]
    was_killed = any(_held_back_by(unit).exists() for unit in UNITS)
    if not missing and _is_installed("docker") and not was_killed:
        return
    names = ", ".join(missing or ["what a killed call left"] * was_killed or ["docker-cli"])
    with step(f"installing {names} from Debian"), _no_services(), _held_back():
        _settle_packages(last_word=not missing and _is_installed("docker"))
        _apt("update", "-qq")
        if missing:
            _apt("install", "-y", "-qq", "--no-install-recommends", *missing)
        if not _is_installed("docker"):
            # Since Debian 13 the client is a package of its own.
            _apt("install", "-y", "-qq", "--no-install-recommends", "docker-cli")


def _settle_packages(*, last_word: bool) -> None:
    """End what was interrupted as it installed packages, ours or another's: till then nothing can be installed.

    Args:
        last_word: Whether a failure ends this. Where apt installs something next, it waits for what holds the lock, and
            tells what is wrong.

    Raises:
        ClusterError: It failed.
    """
    try:
        run(["dpkg", "--configure", "-a"], log=LOGS / "apt.log", env=UNATTENDED)
    except ClusterError:
        if last_word:
            raise


def settle_installation() -> None:
    """Take back what a call that was killed as it installed packages has left in the system's own folders."""
    _allow_services()
    if any(_held_back_by(unit).exists() for unit in UNITS):
        _let_units_go()


def _allow_services() -> None:
    if POLICY.exists() and POLICY.read_text(errors="replace") == NO_SERVICES:
        POLICY.unlink()


def _is_installed(program: str) -> bool:
    return shutil.which(program, path="/usr/sbin:/usr/bin:/sbin") is not None


def _apt(*arguments: str) -> None:
    with INSTALL_LOCK.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # apt refuses a second process instead of waiting
        run(["apt-get", "-o", LOCK_OPTION, *arguments], log=LOGS / "apt.log", env=UNATTENDED)


@contextmanager
def _no_services() -> Iterator[None]:
    """Packages that are installed meanwhile start no service."""
    if POLICY.exists():
        yield  # whoever put it there has decided
        return
    POLICY.write_text(NO_SERVICES)
    POLICY.chmod(0o755)
    try:
        yield
    finally:
        POLICY.unlink()


@contextmanager
def _held_back() -> Iterator[None]:
    """Units that packages bring meanwhile are disabled in the end, and till then do not start with the machine either.

    An engine of the system's own, started with the machine, would take the place of ours. Packages enable it as they
    are installed; who is killed or interrupted then leaves the file that holds it back, and the next call ends both.
    """
    if shutil.which("systemctl") is None:
        yield
        return
    for unit in UNITS:
        file = _held_back_by(unit)
        if not file.exists() and not read(["systemctl", "list-unit-files", "--no-legend", unit]):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(HELD_BACK.format(file=file))
    try:
        yield
    except Exception:
        _let_units_go()
        raise
    _let_units_go()


def _let_units_go() -> None:
    """Disable the units that were held back, and hold them back no more."""
    for unit in UNITS:
        file = _held_back_by(unit)
        if file.exists():
            read(["systemctl", "disable", unit])
            file.unlink()
            with contextlib.suppress(OSError):  # somebody else's settings may lie beside it
                file.parent.rmdir()
    read(["systemctl", "daemon-reload"])


def _held_back_by(unit: str) -> Path:
    return UNIT_FOLDERS / f"{unit}.d/heimdall.conf"


def require_builder(image: str) -> None:
    """Make sure that images can be built from Debian's packages here, whoever's engine it is.

    Args:
        image: What can't be pulled.

    Raises:
        ClusterError: This is no Debian, or not root.
    """
    if platform.system() != "Linux" or not Path("/etc/debian_version").exists() or os.geteuid() != 0:
        raise ClusterError(
            f"{image} can't be pulled, and building one needs root on Debian: let Docker reach a registry that has it "
            f"(docker pull {image}), or call this as root on Debian"
        )
    _install()


def _start() -> None:
    pid = _pid()
    if pid is not None:
        # An interrupted call may just have started it; one that hangs is ended.
        with contextlib.suppress(ClusterError):
            wait_until(answers, what="an answer of the Docker engine", timeout_s=START_TIMEOUT_S)
            return
        _end(pid)
    _clean_after_kill()
    ENGINE.mkdir(parents=True, exist_ok=True)
    RUN.mkdir(parents=True, exist_ok=True)
    if not BEFORE.exists() or not _is_of_this_boot(json.loads(BEFORE.read_text())):
        fresh = BEFORE.with_suffix(".new")
        fresh.write_text(json.dumps(_host_state()))
        fresh.replace(BEFORE)
    command = [
        *("dockerd", "--host", f"unix://{SOCKET}", "--data-root", str(DATA_ROOT), "--exec-root", str(EXEC_ROOT)),
        *("--pidfile", str(PID_FILE), "--storage-driver", "overlay2", "--log-level", "warn"),
        *_runtime_options(),
    ]
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / "dockerd.log").open("a") as log:
        # A session of its own: it must outlive this process and its terminal.
        subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    wait_until(answers, what=f"the start of the Docker engine (see {LOGS / 'dockerd.log'})", timeout_s=START_TIMEOUT_S)


def _runtime_options() -> list[str]:
    if has_capability(CAP_SYS_RESOURCE):
        return []
    wrapper = ENGINE / "runc-wrapper"
    wrapper.write_text(
        RUNC_WRAPPER.replace("@RUNC@", shutil.which("runc", path="/usr/sbin:/usr/bin") or "/usr/sbin/runc")
    )
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    return ["--add-runtime", f"heimdall={wrapper}", "--default-runtime", "heimdall"]


def has_capability(number: int) -> bool:
    """Whether this process has a Linux capability."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> number & 1)
    return False


def _host_state() -> dict[str, object]:
    return {
        "boot": BOOT_ID.read_text().strip(),
        "links": sorted(link.name for link in Path("/sys/class/net").iterdir()),
        "ip_forward": Path("/proc/sys/net/ipv4/ip_forward").read_text().strip(),
        "chains": sorted(_docker_chains()),
        "forward": {tool: _forward_policy(tool) for tool in FIREWALLS},
    }


def _ensure_buildx() -> None:
    parts.ensure(["buildx"])
    link(CLIENT_CONFIG / "cli-plugins" / "docker-buildx", parts.path_of("buildx"))


# --- ending ------------------------------------------------------------------------------------------------------


def stop() -> None:
    """End the own engine and take back what it did to the host; an engine that is not ours is left alone."""
    pid = _pid()
    if pid is not None and not _is_of_this_cache(pid):
        return
    if pid is None and not BEFORE.exists():
        return
    with step("ending our Docker engine"):
        if pid is not None:
            _end(pid)
        _clean_after_kill()
        if BEFORE.exists():  # it is not where the cache was removed while the engine ran
            _restore_host(json.loads(BEFORE.read_text()))
            BEFORE.unlink()
        shutil.rmtree(RUN, ignore_errors=True)


def _pid() -> int | None:
    """The engine that wrote our pid file; its number may be another process's since, even another engine's."""
    try:
        pid = int(PID_FILE.read_text())
    except (OSError, ValueError):
        return None
    words = _command(pid)
    return pid if _alive(pid) and "dockerd" in words and str(PID_FILE) in words else None


def _is_of_this_cache(pid: int) -> bool:
    return str(DATA_ROOT) in _command(pid)


def _end(pid: int) -> None:
    """End an engine in good order, or by force where it does not come to an end."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)
        with contextlib.suppress(ClusterError):
            wait_until(lambda: not _alive(pid), what="the end of the Docker engine", timeout_s=STOP_TIMEOUT_S)
            return
    raise ClusterError(f"the Docker engine (process {pid}) does not end")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _clean_after_kill() -> None:
    """Remove what an engine that was killed left behind: its children, their children, mounts, the socket."""
    if _pid() is not None:
        return
    leftovers = list(_descendants_of_ours())
    if leftovers:
        say(f"  ending {len(leftovers)} processes that a killed engine left behind")
    for pid in leftovers:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    wait_until(lambda: not any(_alive(pid) for pid in leftovers), what="the end of leftover processes", timeout_s=30)
    for mount in reversed(_our_mounts()):
        read(["umount", "--lazy", mount])
    SOCKET.unlink(missing_ok=True)
    PID_FILE.unlink(missing_ok=True)
    shutil.rmtree(EXEC_ROOT, ignore_errors=True)


def _descendants_of_ours() -> Iterator[int]:
    """Containerd and its shims of our exec-root, and everything below them."""
    children: dict[int, list[int]] = {}
    roots = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        pid = int(entry.name)
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError):
            continue
        children.setdefault(parent, []).append(pid)
        command = _command(pid)
        if str(EXEC_ROOT) in command and ("containerd" in command or "docker-proxy" in command):
            roots.append(pid)
    waiting = roots
    seen: set[int] = set()
    while waiting:
        pid = waiting.pop()
        if pid not in seen:
            seen.add(pid)
            yield pid
            waiting.extend(children.get(pid, []))


def _our_mounts() -> list[str]:
    return mounts_under(DATA_ROOT, RUN)


def _restore_host(before: dict[str, Any]) -> None:
    """Take back what our engine did to links and firewall, unless somebody else's may have done the same since."""
    if not _is_of_this_boot(before):
        return  # links and rules went with the machine's restart (or an earlier version did not say when it was)
    if _foreign_answers():
        say("  another Docker engine answers: links and firewall rules are left to it")
        return
    for name in _bridges() - set(before["links"]):
        # What a killed container had plugged in goes with its bridge.
        for port in Path(f"/sys/class/net/{name}/brif").glob("*"):
            read(["ip", "link", "delete", port.name])
        read(["ip", "link", "delete", name])
    if not before["chains"]:
        remove_firewall_rules(policies=before["forward"])
    Path("/proc/sys/net/ipv4/ip_forward").write_text(before["ip_forward"])


def _is_of_this_boot(state: Mapping[str, Any]) -> bool:
    return bool(state.get("boot") == BOOT_ID.read_text().strip())


def _bridges() -> set[str]:
    return {link.name for link in Path("/sys/class/net").iterdir() if BRIDGE.fullmatch(link.name)}


def _forward_policy(tool: str) -> str:
    """What the host does with packets between its links that no rule speaks of."""
    listing = (read([tool, "-S", "FORWARD"]) or "").split()
    return listing[2] if listing[:2] == ["-P", "FORWARD"] else "ACCEPT"


def remove_firewall_rules(*, policies: Mapping[str, str]) -> None:
    """Remove Docker's chains, and the rules that lead to them or name its bridges.

    Args:
        policies: The forward chain's policy before, by tool.
    """
    for tool in FIREWALLS:
        for table in ("filter", "nat", "raw", "mangle"):
            listing = (read([tool, "-t", table, "-S"]) or "").splitlines()
            for rule in listing:
                if rule.startswith("-A ") and is_docker_rule(rule):
                    read([tool, "-t", table, "-D", *rule.split()[1:]])
            for rule in listing:
                if rule.startswith("-N DOCKER"):
                    read([tool, "-t", table, "-X", rule.split()[1]])
        # Docker's engine makes the forward chain refuse what it does not know.
        read([tool, "-P", "FORWARD", policies[tool]])


def is_docker_rule(rule: str) -> bool:
    """Whether a rule (as `iptables -S` prints it) is one of Docker's."""
    words = rule.split()
    if HAIRPIN.match(rule):
        return True
    return any(word.startswith("DOCKER") or BRIDGE.fullmatch(word) for word in words[1:])


def _docker_chains() -> set[str]:
    listing = read(["iptables", "-S"]) or ""
    return {line.split()[1] for line in listing.splitlines() if line.startswith("-N DOCKER")}
