"""What a kill leaves of the cluster tool is recognised: taken up by the next `up`, or taken away by `down`.

The tool is killed where it has just begun a step that takes a while, with what it had called or without: a machine that
runs out of memory kills one process, a terminal that is closed kills all.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.e2e.cluster import ROOT, cluster_environment
from tests.e2e.conftest import left_behind, links, own_engine

UP_S, STATUS_S = 1800, 60
ENGINE = "starting a Docker engine of our own"
CLUSTER = "creating the cluster with kind"
NODES = "waiting for the nodes"


def tool(command: str, timeout_s: float = UP_S) -> str:
    """What a whole call says."""
    done = subprocess.run(
        [sys.executable, "hack/cluster", command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    print(done.stdout, done.stderr)
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def killed_at(step: str, *, alone: bool) -> None:
    """Call `up` and kill it as soon as it says that it begins a step.

    Args:
        step: What it says.
        alone: Whether what it had called goes on.
    """
    with subprocess.Popen(
        [sys.executable, "hack/cluster", "up"], cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith(f"→ {step}"):
                break
        else:
            pytest.fail(f"`up` did not come to {step}:\n{''.join(said)}")
        if alone:
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    print(*said, f"killed with SIGKILL, {'alone' if alone else 'with what it had called'}\n")
    assert process.returncode == -signal.SIGKILL


def ready_nodes() -> int:
    """How many nodes the API server knows to be Ready."""
    listed = subprocess.run(
        ["kubectl", "get", "nodes", "-o", "json"],
        env=cluster_environment(),
        capture_output=True,
        text=True,
        timeout=STATUS_S,
        check=True,
    ).stdout
    conditions = [item for node in json.loads(listed)["items"] for item in node["status"]["conditions"]]
    return sum(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


@pytest.fixture
def before() -> Iterator[set[str]]:
    """The links of a machine on which nothing of ours runs; nor does anything afterwards."""
    status = tool("status", STATUS_S)
    assert "not running" in status, f"this needs a machine without an engine (python3 hack/cluster down):\n{status}"
    yield links()
    tool("down")


def test_what_a_kill_leaves_is_taken_up_or_taken_down(before: set[str]) -> None:
    killed_at(ENGINE, alone=False)
    tool("down")
    assert left_behind(before) == []

    killed_at(CLUSTER, alone=False)
    tool("down")
    assert left_behind(before) == []

    # kind goes on alone; the next call waits for it, and takes up or replaces what it made.
    killed_at(CLUSTER, alone=True)
    tool("up")
    assert ready_nodes() == 3
    tool("down")
    assert left_behind(before) == []

    killed_at(NODES, alone=False)
    tool("up")
    assert ready_nodes() == 3

    # The engine itself, with a cluster in it: its containers' processes outlive it.
    engine = own_engine()
    os.kill(engine._pid(), signal.SIGKILL)
    assert "up after" in tool("up")
    assert ready_nodes() == 3
    os.kill(engine._pid(), signal.SIGKILL)
    tool("down")
    assert left_behind(before) == []
