"""`heimdall-train run`, `train`, `validate`, `deliver`: train a TrainingRun, on a cluster or without one; check it."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from heimdall_api.types import TrainingRun
    from heimdall_tracking import MLflowTracker
    from heimdall_tracking.registry import Registration
    from heimdall_trainer.grace import Grace

LOCAL_RUN_ID: Final = "HEIMDALL_LOCAL_RUN_ID"
"""Where a group's processes without an operator find the run that was made for them all."""
RESUME: Final = "--resume"
RESUME_HELP: Final = "go on in this run from its last checkpoint, without an operator"


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    run = commands.add_parser("run", help="train a TrainingRun: on a cluster by its pod, elsewhere on SQLite and files")
    run.add_argument("-f", "--file", help="TrainingRun, YAML or JSON (default: the one that a pod is given)")
    run.add_argument("--output-dir", type=Path, default=None, help="folder for what is on its way (default: outputs)")
    run.add_argument(RESUME, metavar="RUN_ID", help=RESUME_HELP)
    run.set_defaults(call=_run)

    train = commands.add_parser("train", help="train from flags and a configuration; a flag beats the file")
    train.add_argument("--config", help="TrainingRun or configuration, YAML or JSON")
    train.add_argument("--backbone")
    train.add_argument("--pretrained", action=argparse.BooleanOptionalAction)
    train.add_argument("--freeze-backbone", action=argparse.BooleanOptionalAction)
    train.add_argument("--learning-rate", type=float)
    train.add_argument("--batch-size", type=int)
    train.add_argument("--epochs", type=int)
    train.add_argument("--run-name")
    train.add_argument("--output-dir", type=Path, default=None)
    train.add_argument(RESUME, metavar="RUN_ID", help=RESUME_HELP)
    train.set_defaults(call=_train)

    validate = commands.add_parser("validate", help="check a TrainingRun without training it")
    validate.add_argument("-f", "--file", required=True)
    validate.set_defaults(call=_validate)

    deliver = commands.add_parser("deliver", help="deliver what a training had to leave while MLflow was away")
    deliver.add_argument("folder", type=Path, help="the folder that it named")
    deliver.set_defaults(call=_deliver)


def _run(arguments: argparse.Namespace) -> None:
    from heimdall_api.contract import ENV_MLFLOW_RUN_ID, ENV_RUN_FILE, RUN_FILE
    from heimdall_trainer import group
    from heimdall_trainer.config import load_training_config
    from heimdall_trainer.errors import ConfigurationError

    grace = _watch()
    file = arguments.file or os.environ.get(ENV_RUN_FILE)
    if not file and not Path(RUN_FILE).exists():
        raise ConfigurationError(f"name a TrainingRun with -f FILE: {RUN_FILE}, which a pod is given, is not here")
    run = load_training_config(file or RUN_FILE)
    if ENV_MLFLOW_RUN_ID in os.environ:
        if arguments.resume is not None:
            raise ConfigurationError(f"{RESUME} and {ENV_MLFLOW_RUN_ID} both name a run to go on in: leave one out")
        if group.is_group():
            group.become_torchrun(sys.argv[1:])
        _train_in_pod(run, arguments.output_dir or Path.cwd() / "outputs", grace)
    else:
        _train_locally(run, arguments.output_dir or Path("outputs"), grace, arguments.resume)


def _watch() -> Grace:
    """From the start: a container's first process ignores the signals that it does not handle."""
    from heimdall_trainer.grace import Grace

    grace = Grace(by_hand=True)
    grace.watch()
    return grace


def _train(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.config import load_training_config, override, parse

    grace = _watch()
    run = (
        load_training_config(arguments.config)
        if arguments.config
        else parse({"metadata": {"name": "train"}, "spec": {}})
    )
    flags = {
        "model.backbone": arguments.backbone,
        "model.pretrained": arguments.pretrained,
        "model.freezeBackbone": arguments.freeze_backbone,
        "training.learningRate": arguments.learning_rate,
        "training.batchSize": arguments.batch_size,
        "training.epochs": arguments.epochs,
        "tracking.runName": arguments.run_name,
    }
    _train_locally(override(run, flags), arguments.output_dir or Path("outputs"), grace, arguments.resume)


def _train_in_pod(run: TrainingRun, output_dir: Path, grace: Grace) -> None:
    """The operator owns the run: it is neither created nor ended here."""
    from heimdall_api.contract import ENV_ATTEMPT, ENV_MLFLOW_RUN_ID
    from heimdall_tracking import initialize_mlflow
    from heimdall_trainer.devices import check_gpu
    from heimdall_trainer.pipeline import TrainingPipeline

    if run.spec.resources.gpus_per_worker:
        check_gpu()
    tracker = initialize_mlflow()
    tracker.attach(os.environ[ENV_MLFLOW_RUN_ID])
    attempt = int(os.environ.get(ENV_ATTEMPT, "1"))
    TrainingPipeline(run, tracker, output_dir=output_dir, attempt=attempt, fenced=True, grace=grace).train()


def _train_locally(run: TrainingRun, output_dir: Path, grace: Grace, resume: str | None = None) -> None:
    """Without an operator this process owns the run, with the operator's own code."""
    from heimdall_tracking import initialize_mlflow, load_settings
    from heimdall_trainer import group
    from heimdall_trainer.devices import check_architecture
    from heimdall_trainer.errors import UndeliveredError
    from heimdall_trainer.pipeline import TrainingPipeline

    _check_start()
    check_architecture()
    asked = run.spec.tracking
    # A file that names no experiment leaves it to the environment.
    named = {"experiment_name": asked.experiment} if "experiment" in asked.model_fields_set else {}
    tracker = initialize_mlflow(load_settings(**named))
    run_id = _open_run(run, tracker, resume, output_dir)
    if not group.is_first():
        tracker.attach(run_id)
        TrainingPipeline(run, tracker, output_dir=output_dir, grace=grace).train()
        return
    training: TrainingPipeline | None = None
    try:
        grace.hint = _how_to_go_on(run_id)
        tracker.start_run(run_id=run_id)
        training = TrainingPipeline(run, tracker, output_dir=output_dir, grace=grace)
        metrics = training.train()
        registration = _register(run, tracker)
        grace.settle()
    except BaseException as error:
        grace.settle()
        is_whole = training is not None and training.is_whole
        tracker.adopt(run_id)  # it was made for this training, which may not have come so far as to start it
        _end_without_success(run, tracker, error, is_whole=is_whole, left_s=grace.left_s())
        if training is not None and training.can_go_on and not is_whole:
            error.add_note(_how_to_go_on(run_id, tracker))
        raise
    ended = tracker.end_run_in_time("FINISHED")
    _tell(metrics, registration)
    if not ended and tracker.undelivered is not None:
        raise UndeliveredError(tracker.undelivered.sentence)


def _tell(metrics: dict[str, float], registration: Registration | None) -> None:
    """Print what came of a training, which is done whether that can be printed or not: a module may close stdout."""
    with suppress(OSError, ValueError):
        for name, value in sorted(metrics.items()):
            print(f"  {name:34}{value:12.4f}")
        if registration is not None:
            print(f"model:   {registration.uri}")


def _open_run(run: TrainingRun, tracker: MLflowTracker, resume: str | None, output_dir: Path) -> str:
    """The run of this training, for all processes of a group: the first process of all makes or finds it."""
    from heimdall_tracking import runs
    from heimdall_trainer import group

    if LOCAL_RUN_ID not in os.environ:
        if resume is not None:
            _check_unfinished(tracker, resume)
            _check_delivered(tracker, resume, output_dir)
        made = (
            resume
            or runs.ensure_run(
                tracker.client,
                uid=run.metadata.uid or str(uuid.uuid4()),
                experiment=tracker.settings.experiment_name,
                name=run.spec.tracking.run_name or run.metadata.name,
                tags=run.spec.tracking.tags,
            ).run_id
        )
        os.environ[LOCAL_RUN_ID] = made
        print(f"run:     {made} in {tracker.settings.display_uri}", flush=True)
        if group.is_group():
            group.become_torchrun(sys.argv[1:])
    return os.environ[LOCAL_RUN_ID]


def _check_unfinished(tracker: MLflowTracker, run_id: str) -> None:
    """Make sure that there is something to go on with.

    Raises:
        ConfigurationError: There is no such run, it is finished, or an operator makes its attempts.
    """
    from mlflow.exceptions import MlflowException

    from heimdall_tracking import runs
    from heimdall_tracking.errors import is_permanent
    from heimdall_trainer.errors import ConfigurationError

    try:
        found = runs.read_facts(tracker.client, run_id)
    except MlflowException as error:
        if not is_permanent(error):
            raise
        found = None
    if found is None:
        raise ConfigurationError(f"{RESUME} {run_id}: {tracker.settings.display_uri} has no such run")
    if found.status == "FINISHED":
        raise ConfigurationError(f"{RESUME} {run_id}: that run is finished, there is nothing to go on with")
    if found.attempt > 0:  # nobody else opens a run for an attempt
        raise ConfigurationError(
            f"{RESUME} {run_id}: that run is an operator's, which makes its attempts by itself: look at its "
            "TrainingRun (kubectl describe trainingrun)"
        )


def _check_delivered(tracker: MLflowTracker, run_id: str, output_dir: Path) -> None:
    """Make sure that no checkpoint lies on this disk, which training would have to go on from and doesn't look at.

    Raises:
        ConfigurationError: One does.
    """
    from heimdall_tracking.undelivered import command_for, folder_of_checkpoints
    from heimdall_trainer.errors import ConfigurationError
    from heimdall_trainer.pipeline import undelivered_in

    chosen = tracker.settings.undelivered_dir
    left = folder_of_checkpoints(chosen / run_id if chosen is not None else undelivered_in(output_dir / run_id), run_id)
    if left is not None:
        raise ConfigurationError(
            f"{RESUME} {run_id}: its newest checkpoint was not delivered to MLflow: deliver it first, with: "
            f"{command_for(left.absolute())}"
        )


def _how_to_go_on(run_id: str, tracker: MLflowTracker | None = None) -> str:
    """This command, in the run that it has begun; before it the one that delivers a checkpoint that was left."""
    from heimdall_tracking.undelivered import command_for

    kept = tracker.undelivered if tracker is not None else None
    first = f"{command_for(kept.folder)} && " if kept is not None and kept.manifest.checkpoints else ""
    words = sys.argv[1:]
    if RESUME in words:
        place = words.index(RESUME)
        del words[place : place + 2]
    words = [word for word in words if not word.startswith(f"{RESUME}=")]
    return f"Go on with: {first}{shlex.join(['heimdall-train', *words, RESUME, run_id])}"


def _check_start() -> None:
    """Processes that were started side by side, and not by this program, would each make a run of its own.

    Raises:
        ConfigurationError: There are such.
    """
    from heimdall_api.contract import ENV_MLFLOW_RUN_ID
    from heimdall_trainer import group
    from heimdall_trainer.errors import ConfigurationError

    if LOCAL_RUN_ID not in os.environ and (group.world_size() > 1 or group.spans_nodes()):
        raise ConfigurationError(
            "several processes are to train together, and no run was made for all of them: on one machine call "
            "`heimdall-train` itself, without torchrun and with PET_NPROC_PER_NODE=N; on several nodes make a run, and "
            f"call `heimdall-train run` on each with its ID in {ENV_MLFLOW_RUN_ID}"
        )


def _end_without_success(
    run: TrainingRun, tracker: MLflowTracker, error: BaseException, *, is_whole: bool, left_s: float
) -> None:
    """End the run. One that is whole is finished, though a server was away: what is left of it can be made up for.

    Raises:
        UndeliveredError: It is whole, with the command that does the rest.
    """
    from heimdall_api.contract import ExitCode
    from heimdall_trainer.errors import UndeliveredError
    from heimdall_trainer.termination import TerminatedError, judge

    told = isinstance(error, TerminatedError)
    whole = is_whole and (told or judge(error)[0] == ExitCode.UNDELIVERED)
    if whole and run.spec.registration is not None:
        tracker.leave_registration(run.spec.registration)
    if told:
        tracker.end_run_in_time("FINISHED" if whole else "KILLED", left_s)
        return
    tracker.end_run_in_time("FINISHED" if whole else "FAILED")
    if whole and tracker.undelivered is not None:
        raise UndeliveredError(f"the training is whole, but {tracker.undelivered.sentence}") from error


def _register(run: TrainingRun, tracker: MLflowTracker) -> Registration | None:
    """Register the model, if that was asked for."""
    from heimdall_tracking import registry, runs

    if run.spec.registration is None:
        return None
    found = runs.read_facts(tracker.client, tracker.run_id)
    assert found is not None  # noqa: S101 - it was just trained
    return registry.register(tracker.client, found, run.spec.registration)


def _validate(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.config import check_file

    print(f"{arguments.file}: {check_file(arguments.file)}")


def _deliver(arguments: argparse.Namespace) -> None:
    from heimdall_tracking import TrackingError
    from heimdall_tracking.deliver import deliver
    from heimdall_trainer.errors import ConfigurationError

    try:
        print(deliver(arguments.folder))
    except TrackingError as error:
        raise ConfigurationError(str(error)) from None
