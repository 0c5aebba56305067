"""`make bench-trainer`: what the trainer costs, next to what it is made of. Every figure with a goal is a ratio.

Whatever is compared is measured in turns within this run (turns.py). MLflow, PostgreSQL and MinIO are processes on the
loopback address. On the processor, tensors are computed by one thread, which leaves cores to the servers, that are
elsewhere in earnest; only the loader is compared with what a model consumes on all cores.
"""

from __future__ import annotations

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import sub
from pathlib import Path
from statistics import median
from typing import Final

import numpy as np
import torch

from heimdall_api.types import DEFAULT_BACKBONE, DataSpec, TrainingSpec
from heimdall_trainer.data.augment import Augmentation
from heimdall_trainer.data.cache import Caches
from heimdall_trainer.data.dataset import HeimdallDataset
from heimdall_trainer.data.features import FeatureSource
from heimdall_trainer.data.generator import generate
from heimdall_trainer.data.loader import ResumableLoader
from heimdall_trainer.data.module import HeimdallDataModule
from heimdall_trainer.data.recordings import RecordingStore
from heimdall_trainer.data.spectrogram import mel_spectrogram
from heimdall_trainer.settings import DataSettings, load_data_settings
from tests.bench import cpu, training
from tests.bench.report import ROOT, Figure, at_least, at_most, publish
from tests.bench.servers import Servers, servers
from tests.bench.spectrograms import by_librosa, torchaudio_mel
from tests.bench.training import Load, Marks, Pace
from tests.bench.turns import Comparison, compare, in_turns

SMALL_BACKBONE: Final = "test_vit"
"""The smallest vision transformer of timm, whose steps on a processor are as short as a larger model's on a GPU."""
SAMPLES: Final = 4096
"""Of a recording; as the generator makes them."""
SERVERS: Final = ("MLflow", "PostgreSQL", "MinIO")
GOAL_OVERHEAD_PERCENT: Final = 1.0
GOAL_LOADER: Final = 1.5
GOAL_THROUGHPUT: Final = 0.97
GOAL_STALL_STEPS: Final = 1.0
GOAL_HELP_S: Final = 0.3
MICRO: Final = 1e6
MILLI: Final = 1e3
MIB: Final = 2**20


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured."""

    rounds: int = 6
    """Of trainings, each of `steps` steps."""
    steps: int = 40
    default_steps: int = 15
    """Of a training of the default backbone on a processor, where a step takes half a second."""
    tiny_steps: int = 1000
    logger_steps: int = 40
    """Tiny steps with Lightning's own logger, each of which waits for the server."""
    sessions: int = 4
    loader_rounds: int = 2
    passes: int = 8
    """How often an epoch goes through the cached samples."""
    model_steps: int = 2
    """Steps of the default backbone, which take seconds on a processor."""
    checkpoints: int = 3
    """In a round."""
    checkpoint_rounds: int = 2


FULL: Final = Size()
SHORT: Final = Size(
    rounds=3,
    steps=15,
    default_steps=8,
    tiny_steps=300,
    logger_steps=15,
    sessions=2,
    loader_rounds=1,
    model_steps=1,
    checkpoint_rounds=1,
)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="a minute or two, to try it: figures are noisy")
    parser.add_argument("--cpu", action="store_true", help="leave a GPU alone")
    arguments = parser.parse_args()
    if arguments.cpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"AWS_EC2_METADATA_DISABLED": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    on_gpu = torch.cuda.is_available()
    with training.quiet(ROOT / "build/bench/trainer.log"), servers(artifacts=True) as started:
        figures = measure(started, SHORT if arguments.short else FULL)
    publish("trainer" if on_gpu or not arguments.cpu else "trainer-cpu", figures)
    if on_gpu:
        # A process that has used a GPU can't forget it.
        short = ["--short"] if arguments.short else []
        subprocess.run([sys.executable, "-m", "tests.bench.trainer", "--cpu", *short], cwd=ROOT, check=True)


def measure(started: Servers, size: Size) -> list[Figure]:
    with tempfile.TemporaryDirectory() as name:
        parts: dict[str, Callable[[], list[Figure]]] = {
            "command line": command_line,
            "spectrogram": lambda: spectrogram(size),
            "tracking and throughput": lambda: tracking(started.mlflow.url, size),
            "the default backbone": lambda: default_backbone(started.mlflow.url, size),
            "loader": lambda: loader(started, Path(name), size),
            "checkpoints": lambda: checkpoints(started.mlflow.url, size),
        }
        figures = []
        for part, call in parts.items():
            began = time.monotonic()
            figures += call()
            print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    return figures


def command_line() -> list[Figure]:
    """How long somebody waits for `--help`; the best of some, as the first reads programs from the disk."""
    command = [str(Path(sys.executable).with_name("heimdall-train")), "--help"]
    took = min(seconds(lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL), 1) for _ in range(5))
    return [at_most("heimdall-train --help", took, "s", GOAL_HELP_S)]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Have tensors computed by so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spread_of(name: str, found: Comparison, unit: str = "ratio") -> Figure:
    """How far apart the rounds were."""
    return Figure(f"{name}, ±", found.spread, unit)


# --- tracking, and the step's throughput -------------------------------------------------------------------------


def tracking(tracking_uri: str, size: Size) -> list[Figure]:
    """The same training in four ways, with steps of a usual length and with tiny ones."""
    if torch.cuda.is_available():
        load = training.localizer(DEFAULT_BACKBONE, batch_size=TrainingSpec().batch_size, steps=size.steps)
    else:
        load = training.localizer(SMALL_BACKBONE, batch_size=8, steps=size.steps)
    tiny, few = training.tiny(size.tiny_steps), training.tiny(size.logger_steps)
    used: dict[str, list[Counter[str]]] = {"tracked": [], "logger": []}

    def counted(name: str, train: Callable[[], Marks]) -> Pace:
        before = cpu.snapshot()
        marks = train()
        used[name].append(cpu.snapshot() - before)
        return marks.pace()

    with threads(1):
        usual = in_turns(
            {
                "plain": lambda: training.plain(load).pace(),
                "bare": lambda: training.bare(load).pace(),
                "logger": lambda: counted("logger", lambda: training.with_mlflow_logger(load, tracking_uri)),
                "tracked": lambda: counted("tracked", lambda: training.tracked(load, tracking_uri)),
            },
            size.rounds,
        )
        short = in_turns(
            {
                "bare": lambda: training.bare(tiny).pace(),
                "logger": lambda: training.with_mlflow_logger(few, tracking_uri).pace(),
                "tracked": lambda: training.tracked(tiny, tracking_uri).pace(),
            },
            size.rounds,
        )
    servers_s = server_time_of(used, len(load.batches))
    return [*throughput_of(usual), *overhead_of(usual), *microseconds_of(short), *servers_s]


def default_backbone(tracking_uri: str, size: Size) -> list[Figure]:
    """What somebody trains who names no backbone; on a GPU, `tracking` has measured that."""
    if torch.cuda.is_available():
        return []
    load = training.localizer(DEFAULT_BACKBONE, batch_size=4, steps=size.default_steps)
    with threads(1):
        paces = in_turns(
            {
                "plain": lambda: training.plain(load).pace(),
                "bare": lambda: training.bare(load).pace(),
                "tracked": lambda: training.tracked(load, tracking_uri).pace(),
            },
            size.rounds,
        )
    return throughput_of(paces, f"{DEFAULT_BACKBONE}: ")


def steps_s(paces: Sequence[Pace]) -> list[float]:
    return [pace.step_s for pace in paces]


def threads_s(paces: Sequence[Pace]) -> list[float]:
    """The training thread's processor time: what others on the machine do hardly shows in it, nor do waits."""
    return [pace.thread_s for pace in paces]


def throughput_of(paces: dict[str, list[Pace]], of: str = "") -> list[Figure]:
    """Steps a second, next to a plain loop's."""
    plain = steps_s(paces["plain"])
    figures = [Figure(f"{of}step of a plain PyTorch loop", median(plain) * MILLI, "ms")]
    for name, key in (("the trainer", "tracked"), ("bare Lightning", "bare")):
        found = compare(plain, steps_s(paces[key]))
        label = f"{of}throughput: {name} / plain loop"
        goal = at_least(label, found.median, "ratio", GOAL_THROUGHPUT)
        figures += [goal if key == "tracked" else Figure(label, found.median, "ratio"), spread_of(label, found)]
        processor = compare(threads_s(paces["plain"]), threads_s(paces[key]))
        figures.append(Figure(f"{of}… by the processor: {name} / plain loop", processor.median, "ratio"))
    return figures


def overhead_of(paces: dict[str, list[Pace]]) -> list[Figure]:
    """What tracking adds to a step of a usual length."""
    figures = []

    def percent(one: float, other: float) -> float:
        return 100 * (one / other - 1)

    figures.append(Figure("step of bare Lightning", median(steps_s(paces["bare"])) * MILLI, "ms"))
    for name, one, other, goal in (
        ("the trainer over bare Lightning", "tracked", "bare", True),
        ("the trainer over MLFlowLogger", "tracked", "logger", True),
        ("MLFlowLogger over bare Lightning", "logger", "bare", False),
    ):
        label = f"tracking: {name}"
        found = compare(steps_s(paces[one]), steps_s(paces[other]), percent)
        figures.append(
            at_most(label, found.median, "%", GOAL_OVERHEAD_PERCENT) if goal else Figure(label, found.median, "%")
        )
        figures.append(spread_of(label, found, "%"))
        processor = compare(threads_s(paces[one]), threads_s(paces[other]), percent)
        figures.append(Figure(f"… by the processor: {name}", processor.median, "%"))
    return figures


def microseconds_of(paces: dict[str, list[Pace]]) -> list[Figure]:
    """What is added to a step: seen where the steps themselves cost next to nothing.

    By the clock, that is what the training thread loses; of the processor, what it uses itself, and what the threads
    behind it use.
    """
    figures = [Figure("tiny steps: bare Lightning", median(steps_s(paces["bare"])) * MICRO, "µs")]
    for name, key in (("the trainer", "tracked"), ("MLFlowLogger", "logger")):
        wall = compare(steps_s(paces[key]), steps_s(paces["bare"]), sub)
        figures.append(Figure(f"tiny steps: {name} adds", wall.median * MICRO, "µs"))
        processor = [
            compare([getattr(pace, kind) for pace in paces[key]], [getattr(pace, kind) for pace in paces["bare"]], sub)
            for kind in ("thread_s", "process_s")
        ]
        figures.append(Figure(f"… processor of the training thread: {name}", processor[0].median * MICRO, "µs"))
        behind = processor[1].median - processor[0].median
        figures.append(Figure(f"… processor of other threads: {name}", behind * MICRO, "µs"))
    return figures


def server_time_of(used: dict[str, list[Counter[str]]], steps: int) -> list[Figure]:
    """Processor time of the servers, whatever they work for; a training's start and end are part of it."""
    return [
        Figure(
            f"servers' processor time per step: {name}",
            median(sum(each[part] for part in SERVERS) for each in used[key]) / steps * MILLI,
            "ms",
        )
        for name, key in (("the trainer", "tracked"), ("MLFlowLogger", "logger"))
    ]


# --- the spectrogram ---------------------------------------------------------------------------------------------


def spectrogram(size: Size) -> list[Figure]:
    """A batch's recordings at once, and one by itself as the cache is filled."""
    batch = TrainingSpec().batch_size * training.RECEIVERS
    rng = np.random.default_rng(training.SEED)
    parts = rng.standard_normal((2, batch, SAMPLES), dtype=np.float32)
    iq = (1e-6 * (parts[0] + 1j * parts[1])).astype(np.complex64)
    figures = []
    with threads(1):
        figures += _spectrograms(str(batch), iq, repeat=1, rounds=size.rounds)
        figures += _spectrograms("1", iq[0], repeat=50, rounds=size.rounds)
    return figures


def _spectrograms(name: str, iq: np.ndarray, *, repeat: int, rounds: int) -> list[Figure]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tensor, by_torchaudio = torch.from_numpy(iq), torchaudio_mel()
    variants: dict[str, Callable[[], object]] = {
        "librosa": lambda: by_librosa(iq),
        "torchaudio": lambda: by_torchaudio(tensor),
        "torch": lambda: mel_spectrogram(tensor),
    }
    if device == "cuda":
        there = tensor.to(device)
        variants["torch on the GPU"] = lambda: mel_spectrogram(there).sum().item()  # waits for the result
    for same in (by_librosa(iq), by_torchaudio(tensor)):
        np.testing.assert_allclose(mel_spectrogram(tensor).numpy(), same, atol=1e-3)
    times = in_turns({key: lambda call=call: seconds(call, repeat) for key, call in variants.items()}, rounds + 1)
    measured = {key: found[1:] for key, found in times.items()}  # the first round makes tables and plans
    figures = [Figure(f"spectrogram of {name}: torch", median(measured["torch"]) * MILLI, "ms")]
    for key in ("librosa", "torchaudio"):
        for ours in variants.keys() - {"librosa", "torchaudio"}:
            found = compare(measured[key], measured[ours])
            label = f"spectrogram of {name}: {ours} faster than {key}"
            figures += [at_least(label, found.median, "times", 1.0), spread_of(label, found, "times")]
    return figures


def seconds(call: Callable[[], object], repeat: int) -> float:
    """What a call takes in the mean."""
    began = time.perf_counter()
    for _ in range(repeat):
        call()
    return (time.perf_counter() - began) / repeat


# --- the loader --------------------------------------------------------------------------------------------------


def loader(started: Servers, folder: Path, size: Size) -> list[Figure]:
    """Samples a second out of PostgreSQL and MinIO, next to what models consume."""
    settings = data_settings(started, folder / "cache")
    generate(settings, sessions=size.sessions, samples=SAMPLES)
    batch_size, workers = TrainingSpec().batch_size, TrainingSpec().data_loader_workers
    data = HeimdallDataModule(settings, DataSpec(validation_fraction=0, test_fraction=0))
    data.setup()
    cached = data.dataset(data.split.train, training=True)
    once = list(cached.transmissions)
    cached.transmissions *= size.passes
    source = FeatureSource(RecordingStore.open(settings), Caches([]))
    uncached = HeimdallDataset(once, source, augmentation=Augmentation())
    fresh = (folder / f"cache-{number}" for number in itertools.count())
    models = {
        backbone: training.localizer(backbone, batch_size=batch_size, steps=steps, warmup=1)
        for backbone, steps in ((DEFAULT_BACKBONE, size.model_steps), (SMALL_BACKBONE, 10 * size.model_steps))
    }
    if torch.cuda.is_available():
        models = {name: training.localizer(name, batch_size=batch_size, steps=size.steps) for name in models}

    def rate(dataset: HeimdallDataset) -> float:
        return loaded_per_s(dataset, batch_size=batch_size, workers=workers)

    def consumed(load: Load) -> float:
        return batch_size / training.bare(load).pace().step_s

    with threads(os.cpu_count() or 1):
        rates = in_turns(
            {
                **{name: lambda load=load: consumed(load) for name, load in models.items()},
                "cached": lambda: rate(cached),
                "not cached": lambda: rate(uncached),
                "first look": lambda: first_look_per_s(data_settings(started, next(fresh))),
            },
            size.loader_rounds,
        )
    return loader_figures(rates, workers)


def data_settings(started: Servers, cache: Path) -> DataSettings:
    """Sessions in PostgreSQL, recordings in MinIO; both are made where they are missing."""
    name = "recordings"
    if not started.postgres.execute(f"SELECT 1 FROM pg_database WHERE datname = '{name}'"):
        started.postgres.create_database(name)
        started.minio.s3.create_bucket(Bucket=name)
    return load_data_settings(
        database_url=started.postgres.url(name),
        recordings_url=f"s3://{name}",
        s3_endpoint_url=started.minio.url,
        s3_access_key=started.minio.access_key,
        s3_secret_key=started.minio.secret_key,
        cache_dir=cache,
        redis_url=None,
    )


def loaded_per_s(dataset: HeimdallDataset, *, batch_size: int, workers: int) -> float:
    """Samples a second of an epoch, from the start of its workers to its last batch."""
    batches = ResumableLoader(
        dataset,
        batch_size=batch_size,
        num_workers=workers,
        seed=training.SEED,
        shuffle=True,
        pin_memory=torch.cuda.is_available(),
    )
    began = time.perf_counter()
    count = sum(len(batch["position"]) for batch in batches)
    return count / (time.perf_counter() - began)


def first_look_per_s(settings: DataSettings) -> float:
    """Samples a second of what comes before the first epoch: everything read, checked and put into the cache."""
    data = HeimdallDataModule(settings, DataSpec(validation_fraction=0, test_fraction=0))
    began = time.perf_counter()
    data.setup()
    taken = time.perf_counter() - began
    return len(data.dataset(data.split.train)) / taken


def loader_figures(rates: dict[str, list[float]], workers: int) -> list[Figure]:
    """Rates, and each of the loader's as a multiple of what the models consume."""
    figures = [
        Figure(f"consumed by {name}", median(rates[name]), "samples/s") for name in (DEFAULT_BACKBONE, SMALL_BACKBONE)
    ]
    for kind, label in (
        ("cached", f"loader, {workers} workers, cached"),
        ("not cached", f"loader, {workers} workers, not cached"),
        ("first look", "first look, which fills the cache"),
    ):
        figures.append(Figure(label, median(rates[kind]), "samples/s"))
        for backbone in (DEFAULT_BACKBONE, SMALL_BACKBONE):
            found = compare(rates[kind], rates[backbone])
            name = f"{label} / {backbone}"
            counts = kind != "first look" and backbone == DEFAULT_BACKBONE
            figures.append(
                at_least(name, found.median, "times", GOAL_LOADER) if counts else Figure(name, found.median, "times")
            )
    return figures


# --- checkpoints -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Stalls:
    """What checkpoints add to a training, in seconds."""

    in_step: list[float]
    """To the step that makes each."""
    in_all: float
    """To all steps from the first checkpoint on, for each checkpoint."""

    @classmethod
    def of(cls, intervals_s: Sequence[float], saves: Sequence[int], step_s: float) -> Stalls:
        """Take what was measured.

        Args:
            intervals_s: Of each step.
            saves: Which of them made a checkpoint.
            step_s: Of a step without.
        """
        since = intervals_s[min(saves) :]
        return cls(
            in_step=[intervals_s[index] - step_s for index in saves],
            in_all=(sum(since) - len(since) * step_s) / len(saves),
        )


def checkpoints(tracking_uri: str, size: Size) -> list[Figure]:
    """The same training with checkpoints in mid-epoch and without."""
    if torch.cuda.is_available():
        cases = {DEFAULT_BACKBONE: (TrainingSpec().batch_size, 50), SMALL_BACKBONE: (TrainingSpec().batch_size, 50)}
    else:
        cases = {DEFAULT_BACKBONE: (8, 4), SMALL_BACKBONE: (8, 20)}
    figures = []
    for backbone, (batch_size, apart) in cases.items():
        load = training.localizer(backbone, batch_size=batch_size, steps=size.checkpoints * apart, warmup=2)
        saves = [apart * number for number in range(size.checkpoints)]
        with threads(1):
            found = in_turns(
                {
                    "without": lambda load=load: training.tracked(load, tracking_uri),
                    "with": lambda load=load, saves=saves: training.tracked(
                        load, tracking_uri, checkpoints_at={load.warmup + index for index in saves}
                    ),
                },
                size.checkpoint_rounds,
            )
        parameters = sum(each.numel() for each in load.make().parameters())
        figures += [
            Figure(f"{backbone}: checkpoint, about", 12 * parameters / MIB, "MiB"),  # weights and AdamW's two moments
            *stall_figures(backbone, found, saves),
        ]
    return figures


def stall_figures(backbone: str, found: dict[str, list[Marks]], saves: Sequence[int]) -> list[Figure]:
    """Stalls in steps, each against the usual step of its own round."""
    usual, stalls, in_all, longest = [], [], [], []
    for without, made in zip(found["without"], found["with"], strict=True):
        step_s = median(without.intervals_s)
        each = Stalls.of(made.intervals_s, saves, step_s)
        usual.append(step_s)
        stalls += [stall / step_s for stall in each.in_step]
        in_all.append(each.in_all / step_s)
        longest.append(max(without.intervals_s) / step_s - 1)
    return [
        Figure(f"{backbone}: step", median(usual) * MILLI, "ms"),
        at_most(f"{backbone}: stall by a checkpoint (median)", median(stalls), "steps", GOAL_STALL_STEPS),
        at_most(f"{backbone}: stall by a checkpoint (longest)", max(stalls), "steps", GOAL_STALL_STEPS),
        Figure(f"{backbone}: stall without one, by whatever (longest)", max(longest), "steps"),
        Figure(f"{backbone}: all that a checkpoint adds", median(in_all), "steps"),
    ]


if __name__ == "__main__":
    main()
