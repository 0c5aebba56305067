"""`heimdall-train export`, `evaluate` and `plot`: look at a localizer that was trained before."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from heimdall_trainer.evaluation import Predictions
    from heimdall_trainer.settings import DataSettings
    from heimdall_trainer.trained import TrainedLocalizer


def add(commands: Any) -> None:
    """Add the commands to a parser."""
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument(
        "--model", required=True, help="models:/NAME/VERSION, models:/NAME@ALIAS, or the path of a checkpoint"
    )
    data = argparse.ArgumentParser(add_help=False)
    data.add_argument("--split", default="test", choices=("train", "validation", "test"), help="default: test")
    data.add_argument(
        *("-f", "--file"),
        help="TrainingRun that says which sessions are on which side (default: those that the model was trained with)",
    )

    export = commands.add_parser("export", parents=[model], help="write a trained localizer as ONNX, and verify it")
    export.add_argument("-o", "--output", type=Path, required=True, metavar="FILE", help="the ONNX file")
    export.set_defaults(call=_export)

    evaluate = commands.add_parser("evaluate", parents=[model, data], help="tell how good a trained localizer is")
    evaluate.add_argument("--json", action="store_true", help="print JSON, for machines")
    evaluate.add_argument("--places", action="store_true", help="also tell where each transmission was located")
    evaluate.set_defaults(call=_evaluate)

    plot = commands.add_parser("plot", parents=[model, data], help="draw errors, calibration and losses of a localizer")
    plot.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="folder for the PNGs")
    plot.set_defaults(call=_plot)


@dataclass(frozen=True)
class _Evaluation:
    localizer: TrainedLocalizer
    sessions: Sequence[str]
    predictions: Predictions


def _export(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.errors import ConfigurationError, ExportError
    from heimdall_trainer.export import export_localizer
    from heimdall_trainer.trained import find_localizer

    if not arguments.output.absolute().parent.is_dir():
        raise ConfigurationError(f"--output {arguments.output}: there is no folder {arguments.output.parent}")
    if arguments.output.is_dir():
        raise ConfigurationError(f"--output {arguments.output} is a folder: name a file in it")
    localizer = find_localizer(arguments.model, _client())
    try:
        exported = export_localizer(localizer.net, arguments.output)
    except ExportError as error:
        raise ConfigurationError(f"--model {arguments.model}: {error}") from error
    differences = ", ".join(f"{name} {value:.2g} m" for name, value in exported.differences.items())
    print(f"{exported.file}: {exported.file.stat().st_size / 2**20:.1f} MiB, verified against PyTorch")
    print(f"largest differences: {differences}")


def _evaluate(arguments: argparse.Namespace) -> None:
    done = _located(arguments)
    figures = done.predictions.figures()
    count = len(done.predictions.truth)
    if arguments.json:
        about = {"model": arguments.model, "run": done.localizer.run_id, "split": arguments.split}
        places = {"places": _places(done.predictions)} if arguments.places else {}
        print(json.dumps({**about, "sessions": list(done.sessions), "transmissions": count, **figures, **places}))
        return
    print(f"model:    {arguments.model}")
    print(f"split:    {arguments.split}, sessions: {len(done.sessions)}, transmissions: {count}")
    print(
        f"error:    median {figures['position_error_median_m']:.1f} m, "
        f"90 % within {figures['position_error_p90_m']:.1f} m"
    )
    print(
        f"coverage: {100 * figures['coverage_68']:.1f} % within the 68 % ellipse, "
        f"{100 * figures['coverage_95']:.1f} % within the 95 % ellipse"
    )
    for place in _places(done.predictions) if arguments.places else ():
        print(
            f"{place['session']} {place['transmission']}: {place['latitude']:.6f}, {place['longitude']:.6f} "
            f"± {place['sigma_east_m']:.1f} m east, {place['sigma_north_m']:.1f} m north, "
            f"{place['error_m']:.1f} m from the truth"
        )


def _places(predictions: Predictions) -> list[dict[str, Any]]:
    """Where each transmission was located: degrees, and metres of doubt and error."""
    return [
        {
            "session": session,
            "transmission": transmission,
            "latitude": float(place[0]),
            "longitude": float(place[1]),
            "sigma_east_m": float(sigma[0]),
            "sigma_north_m": float(sigma[1]),
            "error_m": float(error),
        }
        for session, transmission, place, sigma, error in zip(
            predictions.sessions,
            predictions.transmissions,
            predictions.geographic,
            predictions.sigma,
            predictions.errors_m,
            strict=True,
        )
    ]


def _plot(arguments: argparse.Namespace) -> None:
    from heimdall_trainer.errors import ConfigurationError
    from heimdall_trainer.plots import draw
    from heimdall_trainer.results import loss_history

    folder = arguments.output.absolute()
    standing = next(each for each in (folder, *folder.parents) if each.exists())
    if not standing.is_dir():
        raise ConfigurationError(f"--output {arguments.output}: {standing} is no folder")
    done = _located(arguments)
    run_id = done.localizer.run_id
    history = loss_history(_client(), run_id) if run_id else {}
    for file in draw(done.predictions, history, arguments.output):
        print(file)
    if not any(history.values()):
        print("no loss curves: a checkpoint does not know its run, and the run of a version may be gone")


def _located(arguments: argparse.Namespace) -> _Evaluation:
    """Load the model, and have it locate the transmissions of the split."""
    from heimdall_trainer.config import load_training_config
    from heimdall_trainer.data.dataset import HeimdallDataset
    from heimdall_trainer.errors import ConfigurationError
    from heimdall_trainer.evaluation import predict, sessions_of
    from heimdall_trainer.settings import load_data_settings
    from heimdall_trainer.trained import find_localizer

    settings = load_data_settings()
    localizer = find_localizer(arguments.model, _client())
    if arguments.file:
        spec = load_training_config(arguments.file).spec
        sessions = sessions_of(settings, spec.data, spec.training.seed, arguments.split)
    elif localizer.sessions:
        sessions = localizer.sessions[arguments.split]
        _check_still_there(settings, sessions, arguments)
    else:
        raise ConfigurationError(
            f"--model {arguments.model} does not say which sessions it was trained with: name its TrainingRun with -f"
        )
    if not sessions:
        raise ConfigurationError(f"--split {arguments.split} holds no session: its TrainingRun keeps none for it")
    dataset = HeimdallDataset.open(settings, sessions, arrivals=localizer.arrivals, withdrawn=True)
    return _Evaluation(localizer, sessions, predict(localizer.net, dataset))


def _check_still_there(settings: DataSettings, sessions: Sequence[str], arguments: argparse.Namespace) -> None:
    """Make sure that the sessions of a model's training are there; those that were withdrawn since are warned about.

    Raises:
        ConfigurationError: Sessions were removed.
    """
    import structlog

    from heimdall_trainer.data.sessions import NAMED_IDS, SessionStore
    from heimdall_trainer.errors import ConfigurationError

    database = SessionStore.open(settings)
    try:
        gone, withdrawn = database.changed(sessions)
    finally:
        database.close()
    if gone:
        raise ConfigurationError(
            f"--model {arguments.model} keeps recording sessions for --split {arguments.split} that the database no "
            f"longer holds: {', '.join(gone[:NAMED_IDS])}{' …' if len(gone) > NAMED_IDS else ''}; restore them, or "
            "name others by a TrainingRun (-f)"
        )
    if withdrawn:
        structlog.get_logger().warning(
            "recording sessions of the model's training are approved no longer, and used all the same",
            sessions=withdrawn,
        )


def _client() -> MlflowClient:
    from heimdall_tracking import initialize_mlflow

    return initialize_mlflow().client
