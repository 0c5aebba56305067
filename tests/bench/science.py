"""`make bench-science`: what the localizer learns, next to classical estimators and to the bound of the physics.

Sessions are generated, divided by session, and trained on as anybody would without a cluster: TrainingPipeline, an
SQLite file, a folder. Everything is compared on the same recordings of the sessions that were held out.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from heimdall_tracking import initialize_mlflow, load_settings, runs
from heimdall_trainer.config import parse
from heimdall_trainer.data import physics
from heimdall_trainer.data.arrivals import Arrivals, estimate_arrivals
from heimdall_trainer.data.generator import Scene, generate
from heimdall_trainer.data.geo import to_local
from heimdall_trainer.data.recordings import RecordingStore
from heimdall_trainer.data.sessions import Transmission
from heimdall_trainer.evaluation import Predictions, predict
from heimdall_trainer.model.metrics import LEVELS, ellipse_bound
from heimdall_trainer.pipeline import TrainingPipeline
from heimdall_trainer.settings import DataSettings, load_data_settings
from tests.bench import baselines, representation
from tests.bench.report import Figure, at_most, publish

BACKBONE: Final = "test_vit"
"""The smallest vision transformer of timm: on two cores, what counts is how many steps there are."""
EXPERIMENT: Final = "heimdall-science"
GOAL_S: Final = 20 * 60
GOAL_SHARE: Final = 1 / 3
GOAL_POINTS: Final = 3.0
DRAWS_SEED: Final = 1
PIECE: Final = 24
"""So many transmissions are compared by a process at a time."""
INPUTS: Final = {"spectrograms": False, "spectrograms and arrivals": True}
"""What the network is given: whether spec.data.arrivals is set."""

Reals = NDArray[np.float64]


def main() -> None:
    """Generate, train, compare, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sessions", type=int, default=200)
    parser.add_argument("--transmissions", type=int, default=12, help="transmissions of each session")
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--folder", type=Path, help="keep recordings and runs here, and take up what is there")
    arguments = parser.parse_args()
    with folder_of(arguments.folder) as folder:
        publish("science", measure(folder, arguments))


def workers() -> ProcessPoolExecutor:
    """Processes beside each other, each with one thread: a second thread brings little to networks this small."""
    return ProcessPoolExecutor(
        max_workers=os.cpu_count(),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(1,),
    )


@contextmanager
def folder_of(given: Path | None) -> Iterator[Path]:
    if given is not None:
        given.mkdir(parents=True, exist_ok=True)
        yield given.resolve()
        return
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def measure(folder: Path, arguments: argparse.Namespace) -> list[Figure]:
    settings = settings_of(folder)
    clock = Clock()
    scene = Scene()
    with clock.part("recordings generated"):
        generate(
            settings,
            sessions=arguments.sessions,
            transmissions_per_session=arguments.transmissions,
            scene=scene,
        )
    with workers() as pool:
        with clock.part("trained"):
            training = {
                name: pool.submit(train, folder, name, arrivals=arrivals, epochs=arguments.epochs)
                for name, arrivals in INPUTS.items()
            }
            trained = {name: each.result() for name, each in training.items()}
        held_out = next(iter(trained.values())).held_out
        with clock.part("compared"):
            errors, informations = compare_in(pool, settings, scene, held_out)
    errors |= {f"network: {name}": each.predictions.errors_m for name, each in trained.items()}
    with clock.part("delays measured"):
        delays = {name: representation.delay_errors_m(name) for name in sorted(physics.MODULATIONS)}
    return [
        Figure("held-out transmissions", len(held_out), ""),
        *errors_of(errors, informations),
        *coverages_of(trained),
        *delays_of(delays),
        *(Figure(f"time: trained on {name}", each.seconds, "s") for name, each in trained.items()),
        *clock.figures(),
    ]


def settings_of(folder: Path) -> DataSettings:
    """Recordings in a folder, sessions in an SQLite file: also for the pipeline, which reads its environment."""
    os.environ |= {
        "HEIMDALL_DATABASE_URL": f"sqlite:///{folder}/heimdall.db",
        "HEIMDALL_RECORDINGS_URL": f"file:{folder}/recordings",
        "HEIMDALL_CACHE_DIR": str(folder / "cache"),
        "HEIMDALL_READ_THREADS": "2",
    }
    return load_data_settings()


@dataclass
class Clock:
    """Wall-clock time of the parts, and the processor time of this process and of those that it waited for."""

    wall_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self.wall_s[name] = time.monotonic() - begun
        print(f"{name}: {self.wall_s[name]:.0f} s", file=sys.stderr)

    def figures(self) -> list[Figure]:
        return [
            *(Figure(f"time: {name}", seconds, "s") for name, seconds in self.wall_s.items()),
            Figure("time: processor, all cores", processor_s(), "s"),
            at_most("time: all", sum(self.wall_s.values()), "s", GOAL_S),
        ]


def processor_s() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    )


# --- the network -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A network with its best weights, on the sessions that the pipeline kept for the test."""

    held_out: list[Transmission]
    predictions: Predictions
    seconds: float


def train(folder: Path, name: str, *, arrivals: bool, epochs: int) -> Trained:
    begun = time.monotonic()
    run = parse(
        {
            "metadata": {"name": name.replace(" ", "-")},
            "spec": {
                "model": {"backbone": BACKBONE},
                "data": {"validationFraction": 0.3, "testFraction": 0.3, "arrivals": arrivals},
                "training": {"epochs": epochs, "dataLoaderWorkers": 0, "earlyStopping": {"patience": 0}},
            },
        }
    )
    tracker = initialize_mlflow(
        load_settings(tracking_uri=f"sqlite:///{folder}/{run.metadata.name}.db", experiment_name=EXPERIMENT)
    )
    made = runs.ensure_run(
        tracker.client, uid=f"{name}-{time.time_ns()}", experiment=EXPERIMENT, name=run.metadata.name, tags={}
    )
    tracker.start_run(run_id=made.run_id)
    pipeline = TrainingPipeline(run, tracker, output_dir=folder / "outputs" / run.metadata.name)
    pipeline.train()
    runs.end_run(tracker.client, made.run_id, "FINISHED")
    dataset = pipeline.data.dataset(pipeline.data.split.test)
    predictions = predict(pipeline.module.net, dataset)
    return Trained(held_out=dataset.transmissions, predictions=predictions, seconds=time.monotonic() - begun)


# --- the classics ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Heard:
    """A transmission as the estimators see it, and the truth."""

    places_m: Reals
    truth_m: Reals
    power_dbm: Reals
    """Without the noise."""
    arrivals: Arrivals
    phat: Arrivals


def compare_in(
    pool: ProcessPoolExecutor, settings: DataSettings, scene: Scene, held_out: list[Transmission]
) -> tuple[dict[str, Reals], dict[str, list[Reals]]]:
    """What compare() says of all of them, a piece in each process."""
    pieces = [held_out[begin : begin + PIECE] for begin in range(0, len(held_out), PIECE)]
    done = list(pool.map(partial(compare, settings, scene), pieces))
    errors = {name: np.concatenate([each[name] for each, _ in done]) for name in done[0][0]}
    informations = {name: [one for _, each in done for one in each[name]] for name in done[0][1]}
    return errors, informations


def compare(
    settings: DataSettings, scene: Scene, held_out: list[Transmission]
) -> tuple[dict[str, Reals], dict[str, list[Reals]]]:
    """Errors of the classical estimators in metres, and Fisher information, of each transmission."""
    store = RecordingStore.open(settings)
    known = baselines.Physics(
        frequency_hz=scene.frequency_hz,
        exponent=scene.exponent,
        shadowing_db=scene.shadowing_db,
        power_dbm=scene.power_dbm,
        radius_m=scene.radius_m,
    )
    estimators: dict[str, Callable[[Heard], Reals]] = {
        "weighted centroid": lambda it: baselines.weighted_centroid(it.places_m, it.power_dbm),
        "time difference, phase transform": lambda it: baselines.time_difference(it.places_m, it.phat, known.radius_m),
        "time difference, cross-ambiguity": lambda it: baselines.time_difference(
            it.places_m, it.arrivals, known.radius_m
        ),
        "most likely: power": lambda it: baselines.most_likely(it.places_m, it.power_dbm, known),
        "posterior mean: power": lambda it: baselines.posterior_mean(it.places_m, it.power_dbm, known),
        "most likely: power and arrivals": lambda it: baselines.most_likely(
            it.places_m, it.power_dbm, known, it.arrivals
        ),
    }
    errors: dict[str, list[float]] = {name: [] for name in estimators}
    informations: dict[str, list[Reals]] = {"power": [], "power and arrivals": []}
    for sent in held_out:
        heard = hear(store, sent)
        for name, estimate in estimators.items():
            errors[name].append(float(np.linalg.norm(estimate(heard) - heard.truth_m)))
        place = heard.truth_m, heard.places_m
        informations["power"].append(baselines.information(*place, physics=known))
        informations["power and arrivals"].append(
            baselines.information(*place, physics=known, sigma_s=heard.arrivals.sigma_s)
        )
    return {name: np.array(each) for name, each in errors.items()}, informations


def hear(store: RecordingStore, sent: Transmission) -> Heard:
    recordings = sent.recordings
    signals = [store.read(recording) for recording in recordings]
    places = to_local([(item.receiver.latitude, item.receiver.longitude) for item in recordings], sent.origin)
    rate_hz = recordings[0].sample_rate_hz
    noise_dbm = np.array([physics.thermal_noise_dbm(rate_hz, item.receiver.noise_figure_db) for item in recordings])
    arrivals = estimate_arrivals(
        signals, places, noise_dbm=noise_dbm, sample_rate_hz=rate_hz, frequency_hz=sent.center_frequency_hz
    )
    return Heard(
        places_m=places,
        truth_m=to_local((sent.latitude, sent.longitude), sent.origin),
        power_dbm=noise_dbm + 10 * np.log10(arrivals.snr),
        arrivals=arrivals,
        phat=baselines.phat_arrivals(signals, places, arrivals, sample_rate_hz=rate_hz),
    )


# --- the table ---------------------------------------------------------------------------------------------------


def errors_of(errors: dict[str, Reals], informations: dict[str, list[Reals]]) -> list[Figure]:
    goal_m = float(np.median(errors["weighted centroid"])) * GOAL_SHARE
    rng = np.random.default_rng(DRAWS_SEED)
    bounds = {f"Cramér-Rao bound: {name}": baselines.bound_errors_m(each, rng) for name, each in informations.items()}
    figures = []
    for name, each in (errors | bounds).items():
        median = float(np.median(each))
        figures.append(
            at_most(f"{name} (median)", median, "m", round(goal_m, 1))
            if name.startswith("network")
            else Figure(f"{name} (median)", median, "m")
        )
        figures.append(Figure(f"{name} (p90)", float(np.quantile(each, 0.9)), "m"))
    return figures


def coverages_of(trained: dict[str, Trained]) -> list[Figure]:
    figures = []
    for name, each in trained.items():
        for level in LEVELS.values():
            held = 100 * float(np.mean(each.predictions.squares <= ellipse_bound(level)))
            goal = f"{100 * level:.0f} ± {GOAL_POINTS:g}"
            label = f"network: {name}, held by its {100 * level:.0f} % region"
            figures.append(Figure(label, held, "%", goal, abs(held - 100 * level) <= GOAL_POINTS))
    return figures


def delays_of(delays: dict[str, tuple[float, float]]) -> list[Figure]:
    figures = []
    for name, (spectrograms_m, samples_m) in delays.items():
        figures.append(Figure(f"delay of one {name} receiver, all else known: spectrograms", spectrograms_m, "m"))
        figures.append(Figure(f"delay of one {name} receiver, all else known: samples", samples_m, "m"))
    return figures


if __name__ == "__main__":
    main()
