"""What the cluster tool did not make it leaves alone, and what a kill has left half-done it takes up."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

from heimdall_cluster import cli, engine, images, kind, parts, steps

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
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    (tmp_path / "tmpabc").mkdir()
    takes = f"import fcntl; fcntl.flock(open({str(tmp_path / 'lock')!r}, 'w'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with cli.locked():
        assert not (tmp_path / "tmpabc").exists(), "what a killed call left half-done is removed"
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


def test_images_are_built_only_where_that_can_be_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(steps.ClusterError, match=r"let Docker reach its registries .* or call this as root on Debian"):
        engine.require_builder()


@pytest.fixture
def image_tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("hack_images", ROOT / "hack/images/__main__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hack_images", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("label", "built"), [("", False), ("ours, of now", False), ("ours, of before", True), (None, True)]
)
def test_an_official_image_that_somebody_has_pulled_is_never_replaced(
    image_tool: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, label: str | None, built: bool
) -> None:
    did: list[str] = []
    monkeypatch.setattr(cli, "LOCK", tmp_path / "lock")
    monkeypatch.setattr(cli, "CACHE", tmp_path)
    monkeypatch.setattr(images, "can_pull", lambda: False)
    monkeypatch.setattr(images, "ensure_python", lambda: None)
    monkeypatch.setattr(image_tool, "inputs_digest", lambda _: "ours, of now")
    monkeypatch.setattr(image_tool, "_inspect", lambda _, template: label if "Labels" in template else None)
    monkeypatch.setattr(image_tool, "_build", lambda image, _: did.append(image.name))
    image_tool.build([image_tool.CATALOGUE["postgresql"]])
    assert did == (["postgresql"] if built else [])
