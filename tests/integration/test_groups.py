"""Several processes on one machine train as one: torchrun is this program's own affair."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from tests.integration.conftest import Stack
from tests.integration.servers import ROOT
from tests.integration.test_undelivered import HEIMDALL_TRAIN

TIMEOUT_S = 600


def test_two_processes_make_one_run_and_one_version(stack: Stack, name: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"metadata: {{name: {name}}}\n"
        f"spec: {{model: {{module: 'tests.unit.trainer.user_modules:Line'}}, training: {{epochs: 3}}, "
        f"tracking: {{experiment: {name}}}, registration: {{model: {name}}}}}\n"
    )
    own = {"MLFLOW_TRACKING_URI": stack.mlflow.url, "PYTHONPATH": str(ROOT), "PET_NPROC_PER_NODE": "2"}

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
