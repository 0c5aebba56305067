"""`heimdall-train run`, `train`, `validate`, `deliver`: train a TrainingRun, on a cluster or without one; check it."""

from __future__ import annotations

import argparse
import os
import sys
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from heimdall_api.types import TrainingRun
    from heimdall_tracking import MLflowTracker
    from heimdall_tracking.registry import Registration
    from heimdall_trainer.grace import Grace

LOCAL_RUN_ID: Final = "HEIMDALL_LOCAL_RUN_ID"
"""Where a group's processes without an operator find the run that was made for them all."""


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    run = commands.add_parser("run", help="train a TrainingRun: on a cluster by its pod, elsewhere on SQLite and files")
    run.add_argument("-f", "--file", help="TrainingRun, YAML or JSON (default: the one that a pod is given)")
    run.add_argument("--output-dir", type=Path, default=None, help="folder for what is on its way (default: outputs)")
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

    grace = _watch_sigterm()
    run = load_training_config(arguments.file or os.environ.get(ENV_RUN_FILE, RUN_FILE))
    if ENV_MLFLOW_RUN_ID in os.environ:
        if group.is_group():
            group.become_torchrun(sys.argv[1:])
        _train_in_pod(run, arguments.output_dir or Path.cwd() / "outputs", grace)
    else:
        _train_locally(run, arguments.output_dir or Path("outputs"), grace)


def _watch_sigterm() -> Grace:
    """From the start: a container's first process ignores the signals that it does not handle."""
    from heimdall_trainer.grace import Grace

    grace = Grace()
    grace.watch()
    return grace


def _train(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.config import load_training_config, override, parse

    grace = _watch_sigterm()
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
    _train_locally(override(run, flags), arguments.output_dir or Path("outputs"), grace)


def _train_in_pod(run: TrainingRun, output_dir: Path, grace: Grace) -> None:
    """The operator owns the run: it is neither created nor ended here."""
    from heimdall_api.contract import ENV_ATTEMPT, ENV_MLFLOW_RUN_ID
    from heimdall_tracking import initialize_mlflow
    from heimdall_trainer.pipeline import TrainingPipeline

    tracker = initialize_mlflow()
    tracker.attach(os.environ[ENV_MLFLOW_RUN_ID])
    attempt = int(os.environ.get(ENV_ATTEMPT, "1"))
    TrainingPipeline(run, tracker, output_dir=output_dir, attempt=attempt, fenced=True, grace=grace).train()


def _train_locally(run: TrainingRun, output_dir: Path, grace: Grace) -> None:
    """Without an operator this process owns the run, with the operator's own code."""
    from heimdall_tracking import initialize_mlflow, load_settings, runs
    from heimdall_trainer import group
    from heimdall_trainer.errors import UndeliveredError
    from heimdall_trainer.pipeline import TrainingPipeline

    _check_start()
    asked = run.spec.tracking
    # A file that names no experiment leaves it to the environment.
    named = {"experiment_name": asked.experiment} if "experiment" in asked.model_fields_set else {}
    tracker = initialize_mlflow(load_settings(**named))
    if LOCAL_RUN_ID not in os.environ:
        made = runs.ensure_run(
            tracker.client,
            uid=run.metadata.uid or str(uuid.uuid4()),
            experiment=tracker.settings.experiment_name,
            name=asked.run_name or run.metadata.name,
            tags=asked.tags,
        )
        os.environ[LOCAL_RUN_ID] = made.run_id
        print(f"run:     {made.run_id} in {tracker.settings.display_uri}", flush=True)
        if group.is_group():
            group.become_torchrun(sys.argv[1:])
    run_id = os.environ[LOCAL_RUN_ID]
    if not group.is_first():
        tracker.attach(run_id)
        TrainingPipeline(run, tracker, output_dir=output_dir, grace=grace).train()
        return
    tracker.start_run(run_id=run_id)
    training: TrainingPipeline | None = None
    try:
        training = TrainingPipeline(run, tracker, output_dir=output_dir, grace=grace)
        metrics = training.train()
        registration = _register(run, tracker)
        grace.settle()
    except BaseException as error:
        grace.settle()
        is_whole = training is not None and training.is_whole
        _end_without_success(run, tracker, error, is_whole=is_whole, left_s=grace.left_s())
        raise
    ended = tracker.end_run_in_time("FINISHED")
    for name, value in sorted(metrics.items()):
        print(f"  {name:34}{value:12.4f}")
    if registration is not None:
        print(f"model:   {registration.uri}")
    if not ended and tracker.undelivered is not None:
        raise UndeliveredError(tracker.undelivered.sentence)


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
    from heimdall_trainer.config import load_training_config

    run = load_training_config(arguments.file)
    print(f"{arguments.file}: {run.metadata.name} is valid")


def _deliver(arguments: argparse.Namespace) -> None:
    from heimdall_tracking import TrackingError
    from heimdall_tracking.deliver import deliver
    from heimdall_trainer.errors import ConfigurationError

    try:
        print(deliver(arguments.folder))
    except TrackingError as error:
        raise ConfigurationError(str(error)) from None
