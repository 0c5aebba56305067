"""`make bench-kopf`: three ways to use kopf, with the same work: what decision 1 rests on.

The work is one child (a ConfigMap in the Job's place) and one status for each TrainingRun. The ways are

- queue: `on.event` says which run to look at, and a queue of our own has workers look, as the operator does it;
- changes: kopf's `on.create`, `on.update` and `on.resume`, with their state where kopf keeps it;
- daemons: one of kopf's daemons for each run, which looks at it again every few seconds.

Each is measured with many runs at once, killed (SIGKILL) half-way and started again, with the API server away half-way,
and with children that somebody deletes. The API server is kind's; everything is bounded by STEP_TIMEOUT_S.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from heimdall_api.contract import GROUP, PLURAL, VERSION
from heimdall_operator.handlers import Backoffs, NoDiffs, login
from heimdall_operator.kube import ConflictError, Kube, answer_of
from heimdall_operator.workqueue import WorkQueue
from tests.bench import operator as bench
from tests.bench.report import Figure, publish
from tests.e2e.chaos.test_chaos import api_server_away
from tests.e2e.cluster import ROOT, Cluster, cluster_environment, hack

MARK: Final = "bench.heimdall.dev/child"
WORKERS: Final = bench.CONCURRENCY
LOST: Final = 50
LOST_WAIT_S: Final = 30
GONE: Final = 404
DAEMON_S: Final = 10.0
RETRY_S: Final = 1.0
CHILDREN: Final = f"/api/v1/namespaces/{bench.NAMESPACE}/configmaps"


# --- the ways ----------------------------------------------------------------------------------------------------


async def work(kube: Kube, name: str) -> dict[str, Any]:
    """What there is to do for one run."""
    child = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "labels": {MARK: "yes"}}}
    with contextlib.suppress(ConflictError):
        await kube._call("POST", CHILDREN, child)
    return await kube._call("PATCH", bench.path(name, "status"), {"status": {"phase": "Pending", "attempt": 1}})


def by_queue(registry: Any, kube: Kube) -> None:
    """Events name the run, workers look at it."""
    import kopf

    runs: dict[str, Any] = {}
    children: set[str] = set()
    names: WorkQueue[str] = WorkQueue()
    tasks: list[asyncio.Task[None]] = []

    async def serve() -> None:
        while True:
            name = await names.get()
            try:
                if name in runs and (name not in children or "status" not in runs[name]):
                    runs[name] = await work(kube, name)
                    children.add(name)
                names.forget_failures(name)
            except Exception as error:  # noqa: BLE001 - it is tried again
                if answer_of(error) != GONE:
                    names.add_after_failure(name)
            finally:
                names.done(name)

    async def start(**_: Any) -> None:
        tasks.extend(asyncio.create_task(serve()) for _ in range(WORKERS))

    def seen(event: Any, name: str, **_: Any) -> None:
        if event["type"] == "DELETED":
            runs.pop(name, None)
        else:
            runs[name] = event["object"]
        names.add(name)

    def child(event: Any, name: str, **_: Any) -> None:
        (children.discard if event["type"] == "DELETED" else children.add)(name)
        names.add(name)

    kopf.on.startup(registry=registry)(start)
    kopf.on.event(GROUP, VERSION, PLURAL, registry=registry)(seen)
    kopf.on.event("", "v1", "configmaps", labels={MARK: "yes"}, registry=registry)(child)


def by_changes(registry: Any, kube: Kube) -> None:
    """kopf finds out what has changed, and keeps in the resource how far it is."""
    import kopf

    async def changed(name: str, **_: Any) -> None:
        await work(kube, name)

    for on in (kopf.on.create, kopf.on.update, kopf.on.resume):
        on(GROUP, VERSION, PLURAL, registry=registry, backoff=RETRY_S)(changed)


def by_daemons(registry: Any, kube: Kube) -> None:
    """A task of kopf's for each run."""
    import kopf

    async def follow(name: str, stopped: Any, **_: Any) -> None:
        while not stopped:
            await work(kube, name)
            await stopped.wait(DAEMON_S)

    kopf.on.daemon(GROUP, VERSION, PLURAL, registry=registry, backoff=RETRY_S, cancellation_timeout=RETRY_S)(follow)


WAYS: Final[dict[str, Callable[[Any, Kube], None]]] = {
    "queue": by_queue,
    "changes": by_changes,
    "daemons": by_daemons,
}


def serve(way: str) -> None:
    """Be the operator that works in a way."""
    import kopf

    async def run() -> None:
        async with Kube(timeout_s=30) as kube:
            registry, settings = kopf.OperatorRegistry(), kopf.OperatorSettings()
            settings.scanning.disabled = True
            settings.posting.enabled = False
            settings.networking.error_backoffs = Backoffs()
            if way == "queue":
                settings.persistence.diffbase_storage = NoDiffs()
            kopf.on.login(registry=registry)(login)
            WAYS[way](registry, kube)
            await kopf.operator(registry=registry, settings=settings, standalone=True, namespaces=[bench.NAMESPACE])

    asyncio.run(run())


# --- what is measured --------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="TrainingRuns at once")
    parser.add_argument("--serve", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    hack("hack/cluster", "up")
    cluster = Cluster(cluster_environment(), bench.NAMESPACE)
    os.environ["KUBECONFIG"] = cluster.env["KUBECONFIG"]
    bench.refuse_another_operator(cluster)
    figures = []
    for way in WAYS:
        with bench.namespace(cluster):
            figures += asyncio.run(measure(cluster, way, arguments.runs))
    publish("kopf", figures)


async def measure(cluster: Cluster, way: str, count: int) -> list[Figure]:
    async with Kube(timeout_s=60) as kube:
        print(f"{way}: {count} at once", flush=True)
        async with operator(way) as process:
            await create(kube, "warm", 1)
            await until_done(kube, "warm", 1)
            began, before, used = time.perf_counter(), await writes(kube), processor_s(process)
            await create(kube, "first", count)
            await until_done(kube, "first", count)
            at_once = time.perf_counter() - began
            made = {kind: of - before[kind] for kind, of in (await writes(kube)).items()}
            memory, seconds = bench.Process(process, "").memory_mib(), processor_s(process) - used

            print(f"{way}: {LOST} children deleted", flush=True)
            names = [f"first-{i}" for i in range(LOST)]
            await bench.gathered([partial(kube._call, "DELETE", f"{CHILDREN}/{name}") for name in names])
            again = await made_again(kube, names)

        print(f"{way}: killed half-way", flush=True)
        async with operator(way) as process, half_way(kube, "killed", count):
            process.kill()
        left_killed = count - await done(kube, "killed")
        async with operator(way):
            began = time.perf_counter()
            await until_done(kube, "killed", count)
            killed = time.perf_counter() - began

        print(f"{way}: the API server away half-way", flush=True)
        async with operator(way) as process:
            async with half_way(kube, "away", count):
                pass
            with contextlib.ExitStack() as stack:
                await asyncio.to_thread(stack.enter_context, api_server_away(cluster))
                await asyncio.to_thread(stack.close)
            began = time.perf_counter()
            left_away = count - await done(kube, "away")
            await until_done(kube, "away", count)
            away = time.perf_counter() - began
            survived = process.poll() is None
        await clean(kube)
    return [
        Figure(f"{way}: {count} at once", count / at_once, "runs/s"),
        Figure(f"{way}: writes of TrainingRuns (the work is 1)", made["trainingruns"] / count, "per run"),
        Figure(f"{way}: writes of children", made["configmaps"] / count, "per run"),
        Figure(f"{way}: processor time", 1000 * seconds / count, "ms/run"),
        Figure(f"{way}: memory", memory, "MiB"),
        Figure(f"{way}: deleted children made again in {LOST_WAIT_S} s", again / LOST, "share"),
        Figure(f"{way}: killed half-way, runs left", left_killed, ""),
        Figure(f"{way}: killed half-way, whole after the next start", killed, "s"),
        Figure(f"{way}: API server away half-way, runs left", left_away, ""),
        Figure(f"{way}: API server away half-way, whole after its return", away, "s"),
        Figure(f"{way}: the process survived that", float(survived), ""),
    ]


async def create(kube: Kube, word: str, count: int) -> None:
    """Create runs as fast as the API server takes them."""
    names = [f"{word}-{i}" for i in range(count)]
    await bench.gathered([partial(kube._call, "POST", bench.path(), bench.resource(name)) for name in names])


@asynccontextmanager
async def half_way(kube: Kube, word: str, count: int) -> AsyncIterator[None]:
    """The moment at which half of some runs are done; all have been created afterwards."""
    creating = asyncio.create_task(create(kube, word, count))
    await until_done(kube, word, count // 2)
    yield
    await creating


async def done(kube: Kube, word: str) -> int:
    """How many of some runs have a status and their child."""
    runs = await kube.list_training_runs(bench.NAMESPACE)
    told = {run["metadata"]["name"] for run in runs if run.get("status", {}).get("phase")}
    there = {item["metadata"]["name"] for item in await kube._list(CHILDREN)}
    return sum(name.startswith(f"{word}-") for name in told & there)


async def until_done(kube: Kube, word: str, count: int) -> None:
    """Wait until so many are done."""
    deadline = time.monotonic() + bench.STEP_TIMEOUT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(Exception):  # the API server is away, or just back
            if await done(kube, word) >= count:
                return
        await asyncio.sleep(0.25)
    raise TimeoutError(f"{word}: {count} runs")


async def made_again(kube: Kube, names: list[str]) -> int:
    """How many of the children that were deleted are there again after a while."""
    deadline, there = time.monotonic() + LOST_WAIT_S, 0
    while time.monotonic() < deadline and there < len(names):
        listed = {item["metadata"]["name"] for item in await kube._list(CHILDREN)}
        there = len(listed & set(names))
        await asyncio.sleep(0.25)
    return there


async def writes(kube: Kube) -> dict[str, float]:
    """Writes that the API server has carried out, by resource; runs are created by the benchmark itself."""
    text = (await kube._text("/metrics")).decode()
    kinds = {"trainingruns": "PATCH", "configmaps": "POST"}
    return {
        kind: sum(
            float(line.rsplit(" ", 1)[1])
            for line in text.splitlines()
            if line.startswith('apiserver_request_total{code="2')
            and f'resource="{kind}"' in line
            and f'verb="{verb}"' in line
        )
        for kind, verb in kinds.items()
    }


async def clean(kube: Kube) -> None:
    names = [
        item["metadata"]["name"] for item in await kube._list(CHILDREN) if MARK in item["metadata"].get("labels", {})
    ]
    await bench.gathered([partial(kube._call, "DELETE", f"{CHILDREN}/{name}") for name in names])
    await bench.clean(kube)


def processor_s(process: subprocess.Popen[bytes]) -> float:
    fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@asynccontextmanager
async def operator(way: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    log = ROOT / "build/bench" / f"kopf-{way}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        command = [sys.executable, "-m", "tests.bench.kopf_ways", "--serve", way]
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=subprocess.STDOUT)  # noqa: ASYNC220 - it is brief
    try:
        yield process
    finally:
        process.terminate()
        try:
            await asyncio.to_thread(process.wait, 30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
