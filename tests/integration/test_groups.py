"""Several processes on one machine train as one: torchrun is this program's own affair. SIGTERM reaches them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from heimdall_api.contract import TAG_CHECKPOINTS, ExitCode, parse_checkpoints
from tests.integration.conftest import Stack
from tests.integration.servers import ROOT, wait_until
from tests.integration.test_undelivered import HEIMDALL_TRAIN

TIMEOUT_S = 600
STEPS = 5
"""So many are made before a training is told to end."""
LOADED = f"""
import threading
from pathlib import Path
import torch
from torch.utils.data import DataLoader, Dataset
from tests.unit.trainer.user_modules import Line

class Points(Dataset):
    '''So many that an epoch has no end; one of them may never come.'''

    def __init__(self, never):
        self.never = never

    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        if index == self.never:
            threading.Event().wait()
        x = torch.full((1,), index % 8 / 8)
        return x, 2 * x

class Loaded(Line):
    '''Its data is loaded by processes; it tells when it has made some steps.'''

    def __init__(self, context="fork", never=-1):
        super().__init__()
        self.context, self.never = context, never

    def train_dataloader(self):
        return DataLoader(Points(self.never), batch_size=1, num_workers=2, multiprocessing_context=self.context)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        if self.global_step == {STEPS}:
            Path(f"rank-{{self.global_rank}}").touch()
"""


def test_two_processes_make_one_run_and_one_version(stack: Stack, name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"metadata: {{name: {name}}}\n"
        f"spec: {{model: {{module: 'tests.unit.trainer.user_modules:Line'}}, training: {{epochs: 3}}, "
        f"tracking: {{experiment: {name}}}, registration: {{model: {name}}}}}\n"
    )
    (tmp_path / "tmp").mkdir()
    own = {"MLFLOW_TRACKING_URI": stack.mlflow.url, "PYTHONPATH": str(ROOT), "PET_NPROC_PER_NODE": "2"}
    own["TMPDIR"] = str(tmp_path / "tmp")

    done = subprocess.run(
        [HEIMDALL_TRAIN, "run", "-f", "run.yaml", "--output-dir", "out"],
        cwd=tmp_path,
        env={**os.environ, **own},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "tmp").glob("torchelastic_*")) == []
    client = stack.client()
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["environment.devices"] == "2"
    steps = [item.step for item in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps == sorted(set(steps)), "one of the two speaks"
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert version.run_id == run.info.run_id


@pytest.mark.parametrize(
    ("processes", "arguments"),
    [(2, {}), (1, {}), (1, {"context": "spawn", "never": STEPS})],
    ids=["a group", "one process", "one that waits for a batch of a process that has ended"],
)
def test_sigterm_for_processes_that_load_data_too_leaves_a_checkpoint(
    processes: int, arguments: dict[str, str | int], *, stack: Stack, name: str, tmp_path: Path
) -> None:
    (tmp_path / "loaded.py").write_text(LOADED)
    (tmp_path / "run.yaml").write_text(
        f"metadata: {{name: {name}}}\n"
        f"spec: {{model: {{module: 'loaded:Loaded', args: {json.dumps(arguments)}}}, "
        f"tracking: {{experiment: {name}}}}}\n"
    )
    own = {"MLFLOW_TRACKING_URI": stack.mlflow.url, "PYTHONPATH": str(ROOT), "PET_NPROC_PER_NODE": str(processes)}
    with (tmp_path / "printed").open("w") as printed:
        training = subprocess.Popen(
            [HEIMDALL_TRAIN, "run", "-f", "run.yaml", "--output-dir", "out"],
            cwd=tmp_path,
            env={**os.environ, **own, "OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def trains() -> bool:
        assert training.poll() is None, (tmp_path / "printed").read_text()
        return all((tmp_path / f"rank-{rank}").exists() for rank in range(processes))

    try:
        wait_until(trains, what="some steps are made", timeout_s=TIMEOUT_S)
        os.killpg(training.pid, signal.SIGTERM)
        training.wait(TIMEOUT_S)
    finally:
        training.kill()
        training.wait()

    said = (tmp_path / "printed").read_text()
    assert training.returncode == ExitCode.SIGTERM, said
    assert "its checkpoint was delivered" in said
    client = stack.client()
    experiment = client.get_experiment_by_name(name)
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    (checkpoint,) = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])
    assert checkpoint.step >= STEPS
