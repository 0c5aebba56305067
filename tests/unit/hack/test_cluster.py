"""The cluster tool's pure parts, what it refuses, and how it takes half-done work."""

from __future__ import annotations

import io
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from heimdall_cluster import cli, engine, folders, images, kind, parts, pulling, steps, stores

ROOT = Path(__file__).resolve().parents[3]


def patches(document: dict[str, object]) -> list[dict[str, object]]:
    listed = document["kubeadmConfigPatches"]
    assert isinstance(listed, list)
    return [json.loads(item) for item in listed]


def test_the_cluster_has_a_control_plane_and_two_workers_on_the_loopback_address() -> None:
    document = kind.config(own_cni=False, cgroup_v1=False)

    assert [node["role"] for node in document["nodes"]] == ["control-plane", "worker", "worker"]
    assert document["networking"] == {"apiServerAddress": "127.0.0.1"}
    assert not any("failCgroupV1" in patch for patch in patches(document))


def test_the_configuration_for_a_kind_of_one_s_own_is_the_same() -> None:
    ours = kind.config(own_cni=False, cgroup_v1=False)
    theirs = yaml.safe_load((ROOT / "manifests/kind/cluster.yaml").read_text())

    said = [[yaml.safe_load(patch) for patch in document.pop("kubeadmConfigPatches")] for document in (ours, theirs)]
    assert said[0] == said[1]
    assert ours == theirs


def test_an_own_network_and_cgroup_v1_are_told_to_kind() -> None:
    document = kind.config(own_cni=True, cgroup_v1=True)

    assert document["networking"]["disableDefaultCNI"] is True
    assert any(patch.get("failCgroupV1") is False for patch in patches(document))


def test_what_pods_of_any_node_stand_on_is_kept_off_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, ...]] = []

    def kubectl(*arguments: str, timeout_s: float = 60) -> str:
        called.append(arguments)
        return ""

    monkeypatch.setattr(kind, "kubectl", kubectl)

    kind.keep_services_off_workers()

    patched = {words[3]: json.loads(words[-1]) for words in called if words[2] == "patch"}
    assert patched.keys() == {"deployment/coredns", "deployment/local-path-provisioner"}
    selectors = [patch["spec"]["template"]["spec"]["nodeSelector"] for patch in patched.values()]
    assert selectors == [{"node-role.kubernetes.io/control-plane": ""}] * 2


def test_each_worker_has_an_image_store_that_outlives_the_cluster() -> None:
    document = kind.config(own_cni=True, cgroup_v1=False, kept=[Path("/kept/one"), Path("/kept/two")])

    mounts = [node.get("extraMounts", []) for node in document["nodes"]]
    assert mounts == [
        [],
        [{"hostPath": "/kept/one", "containerPath": "/var/lib/containerd"}],
        [{"hostPath": "/kept/two", "containerPath": "/var/lib/containerd"}],
    ]


def test_a_store_begins_anew_with_another_node_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seeded: list[str] = []
    image_ids = {"node:1": "sha256:1", "node:2": "sha256:2"}

    def run(command: list[object], **_: object) -> None:
        seeded.append(str(command[command.index("--volume") + 1]))

    monkeypatch.setattr(stores, "STORES", tmp_path)
    monkeypatch.setattr(stores, "run", run)
    monkeypatch.setattr(images, "inspect", lambda image, _: image_ids[image])
    monkeypatch.setattr(engine, "docker", lambda: "docker")
    monkeypatch.setattr(engine, "environment", dict)

    stores.ensure("node:1", ("one",))
    (tmp_path / "one" / "image").touch()
    kept = stores.ensure("node:1", ("one",))
    assert (kept["one"] / "image").exists()
    assert len(seeded) == 1

    fresh = stores.ensure("node:2", ("one",))
    assert not (fresh["one"] / "image").exists()
    assert len(seeded) == 2


def test_a_cluster_that_does_not_come_up_with_kept_images_is_made_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    did: list[str] = []

    def create(_: str | None) -> None:
        did.append("create")
        if len(did) == 1:
            raise steps.ClusterError("the nodes are not Ready")

    monkeypatch.setattr(stores, "STORES", tmp_path)
    monkeypatch.setattr(kind, "exists", lambda: False)
    monkeypatch.setattr(kind, "_create", create)
    monkeypatch.setattr(kind, "delete", lambda: did.append("delete"))
    monkeypatch.setattr(images, "ensure_node", lambda: "node:1")
    monkeypatch.setattr(kind, "require_kubectl", lambda: None)
    monkeypatch.setattr(parts, "ensure", lambda _: None)
    monkeypatch.setattr(kind, "settle", lambda: None)

    kind.create()

    assert did == ["create", "delete", "create"]
    assert not stores.exist()


def test_two_gpus_are_simulated_by_an_extended_resource() -> None:
    assert kind.gpu_patch()["status"]["allocatable"] == {"nvidia.com/gpu": "2"}


# --- what is missing is named in one sentence ---------------------------------------------------------------------


@pytest.fixture
def cold(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine on which everything is still to be made, without an engine; where its cache lies."""
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(cli, "_is_cold", lambda: True)
    monkeypatch.setattr(engine, "foreign_root", lambda: None)
    return tmp_path


def test_too_little_disk_is_named(monkeypatch: pytest.MonkeyPatch, cold: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=57.99e9))

    with pytest.raises(steps.ClusterError) as refused:
        cli.check_machine()
    assert str(refused.value) == (
        f"58 GB of disk are needed under {cold}, 57.9 GB are free: make room, or set HEIMDALL_CACHE to a folder on "
        "another disk"
    )


def test_where_an_engine_that_was_there_keeps_images_is_measured_too(
    monkeypatch: pytest.MonkeyPatch, cold: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("docker")
    free = {cold: 1e12, root: 2e9}
    monkeypatch.setattr(engine, "foreign_root", lambda: root)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free[folder]))

    with pytest.raises(steps.ClusterError, match=f"30 GB of disk are needed under {root}, 2 GB are free: Docker keeps"):
        cli.check_machine()


@pytest.mark.parametrize(
    ("is_ours", "said", "found"),
    [(False, "{here}\n", True), (False, "/not/here", False), (False, None, False), (True, "{here}", False)],
)
def test_the_folder_of_an_engine_is_one_of_this_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, is_ours: bool, said: str | None, found: bool
) -> None:
    monkeypatch.setattr(engine, "is_ours", lambda: is_ours)
    monkeypatch.setattr(engine, "read", lambda *_, **__: said and said.format(here=tmp_path))

    assert engine.foreign_root() == (tmp_path if found else None)


@pytest.mark.parametrize(
    ("built", "has", "is_cold"), [(True, "v1.37.0", False), (True, "v1.30.0", True), (False, "v1.37.0", True)]
)
def test_another_cluster_s_node_image_makes_no_machine_warm(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, built: bool, has: str, is_cold: bool
) -> None:
    monkeypatch.setattr(cli, "KUBECONFIG", tmp_path / "kubeconfig")
    monkeypatch.setattr(parts, "is_built", lambda part: built and part.name == "kind")
    monkeypatch.setattr(images, "kinds_node", lambda: "kindest/node:v1.37.0")
    monkeypatch.setattr(
        images, "read", lambda command: "sha256:1" if command[-1].endswith((has, "kindest/node")) else None
    )

    assert cli._is_cold() is is_cold


def test_a_new_machine_is_measured_where_the_cache_will_lie(
    monkeypatch: pytest.MonkeyPatch, cold: Path, tmp_path: Path
) -> None:
    """Neither the cache nor the folder it lies in is there, and looking makes neither."""
    measured: list[Path] = []

    def usage(folder: Path) -> SimpleNamespace:
        measured.append(folder)
        return SimpleNamespace(free=1e12)

    monkeypatch.setattr(cli, "CACHE", cold / ".cache" / "heimdall")
    monkeypatch.setattr(shutil, "disk_usage", usage)

    cli.check_machine()

    assert measured == [tmp_path]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("pages", "said"), [(262_144, "1"), (1_953_124, "7.9")])
@pytest.mark.usefixtures("cold")
def test_too_little_memory_is_named(monkeypatch: pytest.MonkeyPatch, pages: int, said: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e12))
    monkeypatch.setattr(os, "sysconf", lambda name: 2**12 if name == "SC_PAGE_SIZE" else pages)

    with pytest.raises(steps.ClusterError, match=f"8 GB of memory are needed, this machine has {said}$"):
        cli.check_machine()


def test_no_engine_and_no_root_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(Path, "exists", lambda _: True)

    with pytest.raises(steps.ClusterError, match="starting one needs root: start Docker, or call this as root"):
        engine._require_debian_root()


def test_no_engine_and_no_debian_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")

    with pytest.raises(steps.ClusterError, match="no Docker engine answers: start Docker"):
        engine._require_debian_root()


def test_a_command_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(steps.ClusterError, match=r"failed \(3\)\. Its last lines .*\n.*out of luck"):
        steps.run(["sh", "-c", "echo out of luck; exit 3"], log=tmp_path / "log")


def test_a_command_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(steps.ClusterError, match="no-such-program is missing"):
        steps.run(["no-such-program"], log=tmp_path / "log")


def test_a_command_is_bounded_in_time(tmp_path: Path) -> None:
    with pytest.raises(steps.ClusterError, match="took longer than 0 s"):
        steps.run(["sleep", "60"], log=tmp_path / "log", timeout_s=0.1)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is pressed as soon as something is waited for."""

    def communicate(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "communicate", communicate)


@pytest.mark.usefixtures("interrupted")
def test_what_ctrl_c_has_reached_may_end_in_good_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also where that takes longer than the moment that subprocess gives it."""
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def say(text: str) -> None:
        assert text == "  waiting for sh to end; Ctrl-C kills it"
        gate.write_text("on")

    monkeypatch.setattr(steps, "say", say)
    with pytest.raises(KeyboardInterrupt):
        steps.run(["sh", "-c", 'read said < "$1"; echo whole', "sh", gate], log=tmp_path / "log")
    assert (tmp_path / "log").read_text().splitlines()[-1] == "whole"


@pytest.mark.usefixtures("interrupted")
def test_what_does_not_end_at_ctrl_c_is_killed() -> None:
    process = subprocess.Popen(["sleep", "300"], text=True)
    with pytest.raises(KeyboardInterrupt):
        steps.see_through(process, what="sleep", interrupt_timeout_s=0)
    assert process.returncode == -signal.SIGKILL


def test_a_tool_that_is_interrupted_ends_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended, steps.told("hack/x"):
        raise KeyboardInterrupt
    assert ended.value.code == 130
    assert capsys.readouterr().err == "hack/x: interrupted; the next call takes up what is there\n"


def test_a_tool_whose_reader_has_gone_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as ended, steps.told("hack/x"):
            print("engine: our own")
        assert ended.value.code == 141
        stdout.flush()


def test_a_build_that_takes_too_long_is_told_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def docker(*_: object, **__: object) -> None:
        raise steps.TooLongError("docker took longer than 1800 s; see log")

    monkeypatch.setattr(images, "docker", docker)
    with pytest.raises(
        steps.ClusterError, match=r"longer than 1800 s; see log\. Call again: it goes on from the layers"
    ):
        images.build("heimdall/x:dev", ".")


def test_without_proc_nothing_is_mounted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On macOS."""
    monkeypatch.setattr(folders, "MOUNTS", tmp_path / "nowhere")
    (tmp_path / "scratch-1").mkdir()
    folders.remove_tree(tmp_path / "scratch-1")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("comes_first", ["it is missing", "it is there"])
def test_a_cluster_that_runs_is_not_taken_down_for_want_of_kubectl(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, comes_first: str
) -> None:
    did: list[str] = []
    monkeypatch.setattr(cli, "check_machine", lambda: None)
    monkeypatch.setattr(engine, "ensure", dict)
    monkeypatch.setattr(parts, "ensure", lambda _: None)
    monkeypatch.setattr(parts, "drop_go_caches", lambda: None)
    monkeypatch.setattr(kind, "runs", lambda: True)
    monkeypatch.setattr(kind, "recovers", lambda: did.append("asked") or True)
    monkeypatch.setattr(kind, "settle", lambda: None)
    monkeypatch.setattr(parts, "PARTS", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    if comes_first == "it is there":
        (tmp_path / "kubectl").touch(mode=0o755)
        cli._up(Namespace())
        assert did == ["asked"]
        return
    with pytest.raises(steps.ClusterError, match=r"^kubectl is missing: install it \(https://\S+\), then call again$"):
        cli._up(Namespace())
    assert did == []


def test_no_cluster_is_made_that_nothing_can_look_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A node image that is pulled brings no kubectl."""
    monkeypatch.setattr(kind, "is_of_others", lambda: False)
    monkeypatch.setattr(kind, "exists", lambda: False)
    monkeypatch.setattr(kind, "_create", lambda _: pytest.fail("it was made"))
    monkeypatch.setattr(images, "ensure_node", lambda: None)
    monkeypatch.setattr(parts, "PARTS", tmp_path)
    monkeypatch.setattr(parts, "ensure", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(steps.ClusterError, match="kubectl is missing"):
        kind.create()


# --- parts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> parts.Part:
    """A part that is built, in folders of the test's own."""
    monkeypatch.setattr(parts, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(parts, "PARTS_SOURCE", tmp_path / "source")
    (tmp_path / "source/tool").mkdir(parents=True)
    (tmp_path / "source/tool/go.mod").write_text("module tool\n")
    (tmp_path / "source/tool/go.sum").write_text("")
    (tmp_path / "parts/tool").mkdir(parents=True)
    made = parts.Part("tool", ("tool",))
    (tmp_path / "parts/tool/tool").write_bytes(b"binary")
    stamp = {"source": parts.fingerprint(made), "binaries": {"tool": [6, "x"]}}
    (tmp_path / "parts/tool/stamp.json").write_text(json.dumps(stamp))
    return made


def test_a_part_that_is_built_is_left_alone(part: parts.Part) -> None:
    assert parts.is_built(part)


def test_a_part_of_another_version_is_built_anew(part: parts.Part, tmp_path: Path) -> None:
    (tmp_path / "source/tool/go.mod").write_text("module tool // newer\n")

    assert not parts.is_built(part)


def test_a_part_whose_own_source_changed_is_built_anew(part: parts.Part, tmp_path: Path) -> None:
    (tmp_path / "source/tool/main.go").write_text("package main\n")

    assert not parts.is_built(part)


@pytest.mark.parametrize("damage", ["binary", "stamp", "half a stamp"])
def test_a_part_that_a_kill_left_half_done_is_built_anew(part: parts.Part, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "parts/tool"
    match damage:
        case "binary":
            (folder / "tool").write_bytes(b"bin")
        case "stamp":
            (folder / "stamp.json").unlink()
        case _:
            (folder / "stamp.json").write_text('{"source": "')

    assert not parts.is_built(part)


def test_every_part_is_pinned_with_checksums() -> None:
    for name in parts.CATALOGUE:
        assert (parts.PARTS_SOURCE / name / "go.mod").is_file()
        assert (parts.PARTS_SOURCE / name / "go.sum").read_text().count(" h1:") > 0


def test_a_part_that_there_is_not_is_named() -> None:
    with pytest.raises(steps.ClusterError, match="there is no part 'kubectal'; there are kind"):
        parts.ensure(["kubectal"])


# --- images -------------------------------------------------------------------------------------------------------


def test_an_archive_names_its_images_whole_and_first(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "old.tar", "w") as tar:
        for name, text in {
            "manifest.json": "[]",
            "repositories": '{"kindest/x": {"v1": "abc"}}',
            "abc": "data",
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(text)
            tar.addfile(info, io.BytesIO(text.encode()))

    images.rewrite_archive(tmp_path / "old.tar", tmp_path / "new.tar")

    with tarfile.open(tmp_path / "new.tar") as tar:
        assert tar.getnames() == ["repositories", "manifest.json", "abc"]
        listed = tar.extractfile("repositories")
        assert listed is not None
        assert json.load(listed) == {"docker.io/kindest/x": {"v1": "abc"}}


@pytest.mark.parametrize(
    ("name", "whole"),
    [("kindest/x", "docker.io/kindest/x"), ("registry.k8s.io/x", "registry.k8s.io/x"), ("localhost/x", "localhost/x")],
)
def test_names_are_made_whole(name: str, whole: str) -> None:
    assert pulling.whole_name(name) == whole


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "is_docker"),
    [
        ("-A FORWARD -j DOCKER-USER", True),
        ("-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE", True),
        ("-A FORWARD -i br-0123456789ab -j ACCEPT", True),
        ("-A INPUT -p tcp --dport 22 -j ACCEPT", False),
        ("-A INPUT -i bridge0 -j ACCEPT", False),
        ("-A FORWARD -i br-lan -j ACCEPT", False),
        ("-A POSTROUTING -s 172.18.0.4/32 -d 172.18.0.4/32 -p tcp -m tcp --dport 6443 -j MASQUERADE", True),
        ("-A POSTROUTING -s 10.0.0.0/8 -o eth0 -j MASQUERADE", False),
    ],
)
def test_only_dockers_own_firewall_rules_are_removed(rule: str, is_docker: bool) -> None:
    assert engine.is_docker_rule(rule) == is_docker


def test_runc_is_called_without_the_capability_that_the_host_lacks(tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    capabilities = {"bounding": ["CAP_KILL", "CAP_SYS_RESOURCE"]}
    (bundle / "config.json").write_text(json.dumps({"process": {"capabilities": capabilities}}))
    runc = tmp_path / "runc"
    runc.write_text('#!/bin/sh\necho called "$@"\n')
    runc.chmod(0o755)
    wrapper = tmp_path / "wrapper.py"
    wrapper.write_text(engine.RUNC_WRAPPER.replace("@RUNC@", str(runc)))

    done = subprocess.run(
        [sys.executable, wrapper, "create", "--bundle", str(bundle), "id"], capture_output=True, text=True, check=True
    )

    assert done.stdout == f"called create --bundle {bundle} id\n"
    config = json.loads((bundle / "config.json").read_text())
    assert config["process"]["capabilities"]["bounding"] == ["CAP_KILL"]


def test_what_a_killed_engine_left_is_ended_and_nothing_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A process of our exec-root with a child, and one that is not ours."""
    exec_root = tmp_path / "exec"
    for name, value in {"EXEC_ROOT": exec_root, "SOCKET": tmp_path / "s", "PID_FILE": tmp_path / "p"}.items():
        monkeypatch.setattr(engine, name, value)
    monkeypatch.setattr(engine, "_our_mounts", list)
    exec_root.mkdir()
    (tmp_path / "p").write_text("999999")
    script = "import subprocess, sys; subprocess.run(['sleep', '300'])"
    ours = subprocess.Popen([sys.executable, "-c", script, "containerd-shim", str(exec_root)], start_new_session=True)
    other = subprocess.Popen(["sleep", "300"])
    try:
        steps.wait_until(lambda: len(list(engine._descendants_of_ours())) == 2, what="the child", timeout_s=20)
        # Reaped here: a zombie of this process would count as alive no longer, but stay in the table.
        engine._clean_after_kill()

        assert ours.wait(timeout=10) == -signal.SIGKILL
        assert other.poll() is None
        assert not exec_root.exists()
        assert not (tmp_path / "p").exists()
    finally:
        other.kill()
        other.wait()
        if ours.poll() is None:
            os.killpg(ours.pid, signal.SIGKILL)
            ours.wait()
