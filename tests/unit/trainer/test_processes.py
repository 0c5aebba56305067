"""Processes that judge a model together, really: they say what one alone says, whatever they share unevenly."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.trainer.judged import judged

PROCESSES = 2
PATIENCE_S = 300
ROOT = Path(__file__).parents[3]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_metrics_do_not_depend_on_the_number_of_processes() -> None:
    group = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(PROCESSES),
        "LOCAL_WORLD_SIZE": str(PROCESSES),
        "TORCHELASTIC_RUN_ID": "test",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "tests.unit.trainer.judged"]
    started = [
        subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | group | {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [each.communicate(timeout=PATIENCE_S)[0] for each in started]
    finally:
        for each in started:
            each.kill()
    alone = judged(1, 0)
    for output in said:
        assert json.loads(output.splitlines()[-1]) == pytest.approx(alone, rel=1e-3)
