"""A trainer in one plain script: it keeps docs/contract.md with mlflow-skinny alone.

It "trains" by counting steps, and does all that a trainer owes its operator: it goes on from the last checkpoint,
delivers parameters, metrics, progress and checkpoints to its MLflow run (of a group, the first worker does), heeds the
fence, makes a checkpoint on SIGTERM, logs a model, and tells how it ended. Copy it, and put your training where
`train_step` is.

`spec.model.args` steers it: steps, stepSeconds, checkpointEvery, checkpointBytes (how large one is at least), and
`fail` (user, configuration, cuda, memory, disk, crash, hang) at step `failAt` of attempt `failAttempt` (every attempt,
if it is not given).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from mlflow import MlflowClient

ERROR, CONFIGURATION, FENCED, DEVICE_MEMORY, UNDELIVERED, SIGTERM = 1, 78, 79, 80, 81, 143
RUN_ID = os.environ["MLFLOW_RUN_ID"]
ATTEMPT = int(os.environ["HEIMDALL_ATTEMPT"])
IS_FIRST = os.environ.get("PET_NODE_RANK", "0") == "0"
"""Of workers that train together, the first alone delivers."""
MESSAGE_LIMIT = 1024
FENCE_EVERY_S = 10


class Stop(Exception):  # noqa: N818 - not every stop is an error
    """Training must end: with this exit code, for this reason."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


def main() -> None:
    """Train, and tell how it ended."""
    asked_to_stop: list[int] = []
    # Before anything that takes its time: a container's first process ignores signals that it has no handler for.
    signal.signal(signal.SIGTERM, lambda number, _: asked_to_stop.append(number))
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        train(json.loads(Path(os.environ["HEIMDALL_RUN_FILE"]).read_text()), MlflowClient(), asked_to_stop)
    except Stop as stop:
        end(stop.code, stop.reason, str(stop))
    except MlflowException as error:  # not the training's fault: another attempt may go on
        end(UNDELIVERED, "TrackingUnavailable", f"MLflow did not take what was delivered: {error}")
    except Exception as error:  # noqa: BLE001 - whatever went wrong, the operator is told
        end(ERROR, "UserError", f"{type(error).__name__}: {error}")


def train(run_file: dict[str, Any], client: MlflowClient, asked_to_stop: list[int]) -> None:
    """Count from the last checkpoint to the last step."""
    from mlflow.entities import Param

    args = run_file["spec"].get("model", {}).get("args", {})
    steps = args.get("steps", 10)
    if not isinstance(steps, int) or steps < 1:
        raise Stop(CONFIGURATION, "InvalidConfiguration", f"spec.model.args.steps is {steps!r}: use a positive number")
    if IS_FIRST:
        client.log_batch(RUN_ID, params=[Param(name, str(value)) for name, value in args.items()])
    first = restore(client)
    print(f"attempt {ATTEMPT} of run {RUN_ID}: steps {first} to {steps}", flush=True)
    looked = time.monotonic()
    for step in range(first, steps):
        train_step(args, step)
        if time.monotonic() - looked > FENCE_EVERY_S:  # also after its machine stood still
            check_fence(client)
            looked = time.monotonic()
        if IS_FIRST:
            deliver(client, step, steps)
        if IS_FIRST and (asked_to_stop or (step + 1) % args.get("checkpointEvery", 5) == 0):
            save(client, step + 1, args.get("checkpointBytes", 0))
        if asked_to_stop:
            raise Stop(SIGTERM, "Preempted", f"Asked to end (SIGTERM); a checkpoint of step {step + 1} was delivered.")
    if IS_FIRST and run_file["spec"].get("registration"):
        log_model(client, steps)


def deliver(client: MlflowClient, step: int, steps: int) -> None:
    """Metrics, how far training is, and the best so far: here each step is better than the one before it."""
    from mlflow.entities import Metric, RunTag

    loss, at = 1.0 / (step + 1), int(1000 * time.time())
    progress = {"epoch": 0, "epochs": 1, "step": step + 1, "steps": steps, "time": now()}
    best = {"name": "val/loss", "value": loss, "step": step + 1}
    client.log_batch(
        RUN_ID,
        metrics=[Metric("train/loss", loss, at, step), Metric("val/loss", loss, at, step + 1)],
        tags=[RunTag("heimdall.progress", json.dumps(progress)), RunTag("heimdall.best", json.dumps(best))],
    )


def train_step(args: dict[str, Any], step: int) -> None:
    """One step of training: here it only takes its time, or fails as it was told to."""
    time.sleep(args.get("stepSeconds", 0.05))
    if step != args.get("failAt", 3) or args.get("failAttempt", ATTEMPT) != ATTEMPT:
        return
    match args.get("fail"):
        case "user":
            raise ValueError("the loss became NaN")
        case "configuration":
            raise Stop(CONFIGURATION, "InvalidConfiguration", "spec.model.args.fail asked for it: remove it")
        case "cuda":
            raise Stop(DEVICE_MEMORY, "CudaOutOfMemory", "The GPU's memory does not suffice: use a smaller batch.")
        case "memory":
            hog = [b"x" * 2**20 for _ in range(2**16)]
            print(len(hog))
        case "disk":
            Path(tempfile.gettempdir(), "hog").write_bytes(b"x" * 2**26)
            time.sleep(600)
        case "crash":
            os._exit(3)
        case "hang":  # as a collective that waits for a lost worker: alive, deaf to SIGTERM, no step ever again
            while True:
                time.sleep(60)


def restore(client: MlflowClient) -> int:
    """The step to go on from: that of the last whole checkpoint, or 0."""
    listed = json.loads(client.get_run(RUN_ID).data.tags.get("heimdall.checkpoints", "[]"))
    for checkpoint in reversed(listed):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(client.download_artifacts(RUN_ID, checkpoint["path"], folder))
            if hashlib.sha256(file.read_bytes()).hexdigest() == checkpoint["sha256"]:
                return int(json.loads(file.read_text())["step"])
    return 0


def save(client: MlflowClient, step: int, size: int) -> None:
    """Upload a checkpoint; only when it is whole, give it its name."""
    check_fence(client)
    content = json.dumps({"step": step}).ljust(size).encode()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"step-{step:08}-attempt-{ATTEMPT}.json"
        file.write_bytes(content)
        client.log_artifact(RUN_ID, str(file), "checkpoints")
    checkpoint = {
        "step": step,
        "path": f"checkpoints/{file.name}",
        "sha256": hashlib.sha256(content).hexdigest(),
        "size": len(content),
        "time": now(),
        "last": True,
    }
    check_fence(client)
    client.set_tag(RUN_ID, "heimdall.checkpoints", json.dumps([checkpoint]))


def log_model(client: MlflowClient, steps: int) -> None:
    """Log a model under the name that the operator registers."""
    from mlflow.entities import LoggedModelStatus

    check_fence(client)
    run = client.get_run(RUN_ID)
    model = client.create_logged_model(run.info.experiment_id, name="model", source_run_id=RUN_ID)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "MLmodel").write_text(f"model_id: {model.model_id}\nflavors:\n  steps:\n    trained: {steps}\n")
        client.log_model_artifacts(model.model_id, folder)
    client.finalize_logged_model(model.model_id, LoggedModelStatus.READY)


def check_fence(client: MlflowClient) -> None:
    """Publish nothing when a newer attempt exists."""
    newest = int(client.get_run(RUN_ID).data.tags.get("heimdall.attempt", ATTEMPT))
    if newest > ATTEMPT:
        raise Stop(FENCED, "Fenced", f"Attempt {newest} has taken over; attempt {ATTEMPT} publishes nothing.")


def end(code: int, reason: str, message: str) -> NoReturn:
    """Leave last words and go."""
    words = {"reason": reason, "message": message[:MESSAGE_LIMIT]}
    Path(os.environ["HEIMDALL_TERMINATION_MESSAGE"]).write_text(json.dumps(words))
    print(f"{reason}: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def now() -> str:
    """The time, as JSON has it."""
    return datetime.now(UTC).isoformat()


if __name__ == "__main__":
    main()
