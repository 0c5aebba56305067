"""A real training, through which MLflow server, PostgreSQL and MinIO go away, each in turn and all at once.

Each time they stay away for at least HEIMDALL_OUTAGE_S, counted in steps that the training makes meanwhile; the last
time until the training is over. `make outages` is the long form, of three minutes each.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path

from heimdall_api.contract import TAG_CHECKPOINTS, Checkpoint, parse_checkpoints
from tests.integration.conftest import Stack
from tests.integration.servers import LOG_TAIL, ROOT, wait_until
from tests.integration.test_tracking import OUTAGE_S, arrivals
from tests.integration.test_undelivered import HEIMDALL_TRAIN, when_steps_arrive

AWAY = (("mlflow",), ("postgres",), ("minio",), ("mlflow", "postgres", "minio"))
STEP_S = 0.05
EPOCH_STEPS = 40
"""An epoch, and with it a checkpoint, takes two seconds."""
TIMEOUT_S = 600 + 10 * OUTAGE_S
"""Only so that a test that hangs ends."""
MODULE = f"""
import time
from pathlib import Path
import torch
from torch.utils.data import DataLoader, TensorDataset
from tests.unit.trainer.user_modules import Line

class Paced(Line):
    '''Trains until there is a file named enough, and tells how far it is.'''

    def train_dataloader(self):
        x = torch.linspace(-1, 1, {EPOCH_STEPS}).unsqueeze(1)
        return DataLoader(TensorDataset(x, 2 * x), batch_size=1)

    def training_step(self, batch, batch_idx):
        time.sleep({STEP_S})
        self.log("number", float(self.global_step))
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, outputs, batch, batch_idx):
        Path("step.new").write_text(str(self.global_step))
        Path("step.new").replace("step")

    def on_train_epoch_end(self):
        self.trainer.should_stop = Path("enough").exists()

    def on_train_end(self):
        Path("over").touch()
"""


def test_a_training_goes_on_through_every_outage_and_everything_is_there_once(
    stack: Stack, name: str, tmp_path: Path
) -> None:
    training = start(stack, name, tmp_path)
    try:
        run_id = when_steps_arrive(stack, name, training)
        for away in AWAY:
            outage(stack, away, tmp_path, run_id)
        training.wait(TIMEOUT_S)
    finally:
        training.kill()
        training.wait()
    assert training.returncode == 0, (tmp_path / "printed").read_text()[-LOG_TAIL:]
    is_there_once(stack, run_id, name, steps=made(tmp_path))


def test_a_checkpoint_whose_upload_was_cut_off_by_a_kill_is_none(stack: Stack, name: str, tmp_path: Path) -> None:
    """MinIO stands still: the bytes of the next checkpoint are under way, and do not arrive."""

    def listed(run_id: str) -> list[Checkpoint]:
        return parse_checkpoints(stack.client().get_run(run_id).data.tags.get(TAG_CHECKPOINTS))

    training = start(stack, name, tmp_path)
    try:
        run_id = when_steps_arrive(stack, name, training)
        wait_until(lambda: bool(listed(run_id)), what="a whole checkpoint", timeout_s=TIMEOUT_S)
        with stack.minio.standing_still():
            at = made(tmp_path)
            wait_until(lambda: made(tmp_path) > at + 2 * EPOCH_STEPS, what="two epochs more", timeout_s=TIMEOUT_S)
            training.kill()
            training.wait()
            known = listed(run_id)
    finally:
        training.kill()
        training.wait()

    assert listed(run_id) == known, "what is named was whole before"
    assert known[-1].step < made(tmp_path) - EPOCH_STEPS
    is_whole(stack, run_id)
    (tmp_path / "enough").touch()
    again = start(stack, name, tmp_path)
    try:
        again.wait(TIMEOUT_S)
    finally:
        again.kill()
        again.wait()
    assert again.returncode == 0, (tmp_path / "printed").read_text()[-LOG_TAIL:]
    printed = (tmp_path / "printed").read_text().splitlines()
    (line,) = [line for line in printed if "going on from a checkpoint" in line]
    assert json.loads(line)["step"] == known[-1].step
    is_whole(stack, run_id)


def is_whole(stack: Stack, run_id: str) -> None:
    """Every checkpoint that is named lies there as it was made."""
    run = stack.client().get_run(run_id)
    for checkpoint in parse_checkpoints(run.data.tags[TAG_CHECKPOINTS]):
        assert hashlib.sha256(stack.mlflow.artifact(run, checkpoint.path)).hexdigest() == checkpoint.sha256


def start(stack: Stack, name: str, folder: Path) -> subprocess.Popen[str]:
    (folder / "paced.py").write_text(MODULE)
    (folder / "run.yaml").write_text(
        f"metadata: {{name: {name}, uid: {name}}}\n"
        f"spec: {{model: {{module: 'paced:Paced'}}, training: {{epochs: 100000}}, tracking: {{experiment: {name}}}, "
        f"registration: {{model: {name}}}}}\n"
    )
    # A file, not a pipe: nobody reads while the training goes on, and it must not wait for that.
    with (folder / "printed").open("w") as printed:
        return subprocess.Popen(
            [HEIMDALL_TRAIN, "run", "-f", "run.yaml", "--output-dir", "out"],
            cwd=folder,
            env={
                **os.environ,
                "MLFLOW_TRACKING_URI": stack.mlflow.url,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
            },
            stdout=printed,
            stderr=subprocess.STDOUT,
            text=True,
        )


def made(folder: Path) -> int:
    """Steps that the training has made."""
    return int((folder / "step").read_text())


def outage(stack: Stack, away: tuple[str, ...], folder: Path, run_id: str) -> None:
    """Take servers away and bring them back; the training makes as many steps as ever, and they arrive."""
    servers = stack.servers(*away)
    for server in reversed(servers):
        server.kill()
    began, first = time.monotonic(), made(folder)
    wait_until(lambda: made(folder) >= first + OUTAGE_S / STEP_S, what=f"steps without {away}", timeout_s=TIMEOUT_S)
    if away == AWAY[-1]:
        (folder / "enough").touch()
        wait_until((folder / "over").exists, what="the training is over", timeout_s=TIMEOUT_S)
    last, gone_s = made(folder), time.monotonic() - began
    for server in servers:
        server.start()
    began = time.monotonic()
    wait_until(lambda: newest(stack, run_id) >= last - 1, what="all steps are there", timeout_s=TIMEOUT_S)
    print(
        f"{'+'.join(away)}: away for {gone_s:.0f} s, {last - first} steps made meanwhile, all of them there "
        f"{time.monotonic() - began:.1f} s after the return"
    )


def newest(stack: Stack, run_id: str) -> int:
    """The newest step that has arrived."""
    query = f"SELECT max(step) FROM metrics WHERE run_uuid = '{run_id}' AND key = 'number'"
    return int(stack.postgres.execute(query, "mlflow")[0][0])


def is_there_once(stack: Stack, run_id: str, name: str, *, steps: int) -> None:
    client = stack.client()
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert arrivals(stack, run_id, "number") == list(range(steps)), "each once, and in order"
    losses = stack.postgres.execute(
        f"SELECT step FROM metrics WHERE run_uuid = '{run_id}' AND key = 'train/loss' ORDER BY step", "mlflow"
    )
    assert [step for (step,) in losses] == list(range(steps))

    checkpoints = parse_checkpoints(run.data.tags[TAG_CHECKPOINTS])
    assert checkpoints[-1].step == steps
    stored = [item.path for item in client.list_artifacts(run_id, "checkpoints")]
    assert len(stored) == len(set(stored))
    # One that made room while MinIO was away may lie there still: what the tag does not name does not exist.
    assert set(stored) >= {checkpoint.path for checkpoint in checkpoints}
    is_whole(stack, run_id)

    (model,) = client.search_logged_models([run.info.experiment_id])
    assert (str(model.status), model.source_run_id) == ("READY", run_id)
    (version,) = client.search_model_versions(f"name = '{name}'")
    assert (str(version.version), version.run_id) == ("1", run_id)
    print(f"{steps} steps, {len(checkpoints)} checkpoints, one model: all there, once")
