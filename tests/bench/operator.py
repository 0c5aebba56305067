"""`make bench-operator`: the operator's latency and throughput next to those of the bare calls it is made of.

The API server is kind's, on the loopback address; MLflow and PostgreSQL are processes there too; the operator is a
process of its own. Everything is bounded: the numbers of runs below, and STEP_TIMEOUT_S for each part.

No pod runs here. What is written in a whole life, whose goal is 6, is counted on a cluster where they do:
`test_a_life_takes_few_writes` in tests/e2e/test_monitoring.py.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Final

from heimdall_api.contract import API_VERSION, GROUP, KIND, LABEL_RUN, PLURAL, TAG_UID, VERSION
from heimdall_api.types import TrainingRunSpec
from heimdall_operator.kube import Kube
from heimdall_operator.manifests import AttemptPlan, TrainerDefaults, build_job
from heimdall_operator.settings import OperatorSettings
from tests.bench import cpu
from tests.bench.report import Figure, at_least, at_most, percentile, publish
from tests.bench.servers import servers
from tests.e2e.cluster import ROOT, Cluster, cluster_environment, hack
from tests.integration.servers import free_port

NAMESPACE: Final = "heimdall-bench"
CONCURRENCY: Final[int] = OperatorSettings.model_fields["workers"].default
STEP_TIMEOUT_S: Final = 600
STAMP: Final = "2026-01-01T00:00:00Z"
SETTLED_S: Final = 10
SPEC: Final[dict[str, Any]] = {
    # No node has so many: the pods wait, and what is measured is the operator.
    "resources": {"gpusPerWorker": 64, "cpu": "10m", "memory": "16Mi"},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000, help="TrainingRuns at once")
    parser.add_argument("--alone", type=int, default=20, help="TrainingRuns one after the other")
    parser.add_argument("--finished", type=int, default=10_000, help="finished TrainingRuns")
    arguments = parser.parse_args()
    hack("hack/cluster", "up")
    cluster = Cluster(cluster_environment(), NAMESPACE)
    os.environ["KUBECONFIG"] = cluster.env["KUBECONFIG"]
    refuse_another_operator(cluster)
    shipped_python()  # made before anything is measured
    with servers(artifacts=False) as started, namespace(cluster):
        figures = asyncio.run(measure(cluster, started.mlflow.url, arguments))
        publish("operator", figures)  # before anything that may fail is removed


def refuse_another_operator(cluster: Cluster) -> None:
    listed = cluster.run("kubectl", "get", "pods", "-A", "-l", "app.kubernetes.io/component=operator", "-o", "name")
    if listed.stdout.strip():
        sys.exit("another operator is at work in the cluster; uninstall it first (helm uninstall)")


@contextmanager
def namespace(cluster: Cluster) -> Iterator[None]:
    had_crd = cluster.run("kubectl", "get", "crd", f"{PLURAL}.{GROUP}", check=False).returncode == 0
    cluster.run("kubectl", "apply", "--server-side", "--force-conflicts", "-f", "manifests/crd/trainingruns.yaml")
    cluster.run("kubectl", "wait", "--for=condition=Established", "crd", f"{PLURAL}.{GROUP}", "--timeout=60s")
    cluster.run("kubectl", "create", "namespace", NAMESPACE)
    try:
        yield
    finally:
        # Finalizers of runs that a failure left behind would keep the namespace.
        for item in cluster.list("trainingruns"):
            if item["metadata"].get("finalizers"):
                patch = '{"metadata": {"finalizers": null}}'
                cluster.kubectl("patch", "trainingrun", item["metadata"]["name"], "--type=merge", "-p", patch)
        delete(cluster, "namespace", NAMESPACE)
        if not had_crd:
            delete(cluster, "crd", f"{PLURAL}.{GROUP}")


def delete(cluster: Cluster, *what: str) -> None:
    """Delete something and wait until it is gone: a definition on its way out would be in the way of a next release."""
    print(f"removing {' '.join(what)}", flush=True)
    cluster.run("kubectl", "delete", *what, f"--timeout={STEP_TIMEOUT_S}s", timeout_s=STEP_TIMEOUT_S + 30)


# --- the parts ---------------------------------------------------------------------------------------------------


async def measure(cluster: Cluster, tracking_uri: str, arguments: argparse.Namespace) -> list[Figure]:
    async with Kube(timeout_s=60) as kube:
        bare = await bare_parts(kube, tracking_uri, arguments.runs // 2)
        alone = await one_alone(kube, tracking_uri, arguments.alone)
        together = await all_at_once(kube, tracking_uri, arguments.runs)
        finished = await many_finished(kube, tracking_uri, arguments.finished)
    slower = min(bare["jobs"], bare["patches"], bare["runs"])
    return [
        Figure("bare: Jobs created", bare["jobs"], "1/s"),
        Figure("bare: statuses patched", bare["patches"], "1/s"),
        Figure("bare: MLflow runs created", bare["runs"], "1/s"),
        Figure("bare: runs of which all calls are made", bare["lives"], "1/s"),
        Figure("bare: the calls of one run, one after the other (p50)", alone["bare"] * 1000, "ms"),
        Figure("one alone: created to Job (p50)", alone["p50"] * 1000, "ms"),
        at_most("one alone / bare calls", alone["p50"] / alone["bare"], "ratio", 1.2),
        Figure(f"{arguments.runs} at once: created to Job (p50)", together.p50, "s"),
        Figure(f"{arguments.runs} at once: created to Job (p99)", together.p99, "s"),
        at_least(f"{arguments.runs} at once: throughput", together.rate, "runs/s", 100),
        at_least("throughput / slower bare part", together.rate / slower, "ratio", 0.8),
        Figure("throughput / bare runs of which all calls are made", together.rate / bare["lives"], "ratio"),
        Figure("writes up to a waiting pod (a life: test_monitoring)", together.writes, "per run"),
        Figure("Events up to a waiting pod", together.events, "per run"),
        *(Figure(f"processor time of {part}", ms, "ms/run") for part, ms in together.cpu_ms.items()),
        Figure(f"memory with {arguments.runs} active runs", together.memory_mib, "MiB"),
        at_most(f"memory with {arguments.finished} finished runs", finished["memory_mib"], "MiB", 300),
        at_most(f"restart with {arguments.finished} finished runs until whole", finished["seconds"], "s", 30),
    ]


async def gathered(calls: list[Callable[[], Awaitable[Any]]], concurrency: int = CONCURRENCY) -> list[Any]:
    """Make calls, so many at a time."""
    gate = asyncio.Semaphore(concurrency)

    async def one(call: Callable[[], Awaitable[Any]]) -> Any:
        async with gate:
            return await call()

    return await asyncio.wait_for(asyncio.gather(*(one(call) for call in calls)), STEP_TIMEOUT_S)


def path(*parts: str) -> str:
    return "/".join([f"/apis/{GROUP}/{VERSION}/namespaces/{NAMESPACE}/{PLURAL}", *parts])


def resource(name: str, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": {**SPEC, **spec}}


def bare_job(name: str) -> dict[str, Any]:
    defaults = TrainerDefaults(image="x:1", image_pull_policy="Never", secret="none", tracking_uri="http://x")
    plan = AttemptPlan(
        name=name,
        namespace=NAMESPACE,
        uid="0",
        spec=TrainingRunSpec.model_validate(SPEC),
        attempt=1,
        run_id="r",
    )
    job = build_job(plan, defaults)
    del job["metadata"]["ownerReferences"], job["metadata"]["labels"], job["spec"]["template"]["metadata"]["labels"]
    return job


def create_run(client: Any, experiment: str, uid: str) -> Any:
    return client.create_run(experiment, tags={TAG_UID: uid})


async def bare_parts(kube: Kube, tracking_uri: str, count: int) -> dict[str, float]:
    """Each kind of call alone, as many at a time as the operator looks at runs."""
    from mlflow import MlflowClient

    print(f"bare parts: {count} of each", flush=True)
    began = time.perf_counter()
    await gathered([lambda i=i: kube.create_job(NAMESPACE, bare_job(f"bare-{i}")) for i in range(count)])
    jobs = count / (time.perf_counter() - began)
    await gathered([lambda i=i: kube.delete_job(NAMESPACE, f"bare-{i}-a1") for i in range(count)])
    await gathered([lambda i=i: kube._call("POST", path(), resource(f"bare-{i}", suspend=True)) for i in range(count)])
    began = time.perf_counter()
    status = {"status": {"phase": "Pending", "runID": "r", "attempt": 1}}
    await gathered([lambda i=i: kube._call("PATCH", path(f"bare-{i}", "status"), status) for i in range(count)])
    patches = count / (time.perf_counter() - began)
    await gathered([lambda i=i: kube._call("DELETE", path(f"bare-{i}")) for i in range(count)])
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment("bare")
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        create_run(client, experiment, "warm")
        began = time.perf_counter()
        list(pool.map(lambda i: create_run(client, experiment, str(i)), range(count)))
        runs = count / (time.perf_counter() - began)
        lives = await bare_lives(kube, pool, client, experiment, count)
    return {"jobs": jobs, "patches": patches, "runs": runs, "lives": lives}


async def bare_lives(kube: Kube, pool: ThreadPoolExecutor, client: Any, experiment: str, count: int) -> float:
    """Per second: all that is asked of API server and MLflow for a run until its pod waits, by nobody in particular."""

    async def live(name: str) -> None:
        made = await kube._call("POST", path(), resource(name, suspend=True))
        made = await kube.patch_finalizers(NAMESPACE, name, ["a.b/c"], made["metadata"]["resourceVersion"])
        await asyncio.get_running_loop().run_in_executor(pool, create_run, client, experiment, name)
        for step in ("Pending", "Waiting"):
            status = {"phase": "Pending", "runID": "r", "attempt": 1, "jobName": step}
            made = await kube.patch_status(NAMESPACE, name, status, made["metadata"]["resourceVersion"])
            if step == "Pending":
                await kube.create_job(NAMESPACE, bare_job(name))
            await kube.create_event(NAMESPACE, bare_event(name, step, made["metadata"]["uid"]))

    names = [f"life-{i}" for i in range(count)]
    began = time.perf_counter()
    await gathered([lambda name=name: live(name) for name in names])
    rate = count / (time.perf_counter() - began)
    await gathered([lambda name=name: kube.delete_job(NAMESPACE, f"{name}-a1") for name in names])
    await clean(kube)
    return rate


def bare_event(name: str, reason: str, uid: str) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{name}.{reason.lower()}", "namespace": NAMESPACE},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "type": "Normal",
        "reason": reason,
        "action": reason,
        "note": "Something happened.",
        "reportingController": "bench",
        "reportingInstance": "bench",
        "regarding": {"apiVersion": API_VERSION, "kind": KIND, "name": name, "namespace": NAMESPACE, "uid": uid},
    }


@dataclass
class Watch:
    """When each TrainingRun was asked for, and when its Job was seen."""

    asked: dict[str, float] = field(default_factory=dict)
    seen: dict[str, float] = field(default_factory=dict)

    @property
    def waits(self) -> list[float]:
        return [self.seen[name] - asked for name, asked in self.asked.items()]


@asynccontextmanager
async def watching(kube: Kube) -> AsyncIterator[Watch]:
    """See Jobs as the API server accepts them."""
    from kubernetes.aio import client, watch

    seen = Watch()
    api, stream = client.BatchV1Api(kube._client), watch.Watch()

    async def follow() -> None:
        async for event in stream.stream(api.list_namespaced_job, NAMESPACE, timeout_seconds=STEP_TIMEOUT_S):
            name = event["raw_object"]["metadata"].get("labels", {}).get(LABEL_RUN)
            if name is not None:
                seen.seen.setdefault(name, time.perf_counter())

    task = asyncio.create_task(follow())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], bool], what: str, every_s: float = 0.02) -> None:
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        await asyncio.sleep(every_s)


async def one_alone(kube: Kube, tracking_uri: str, count: int) -> dict[str, float]:
    """One run at a time, and the same calls by hand."""
    from mlflow import MlflowClient

    print(f"one alone, {count} times", flush=True)
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment("alone")
    bare = []
    for i in range(count):
        made = await kube._call("POST", path(), resource(f"hand-{i}", suspend=True))
        began = time.perf_counter()
        version = made["metadata"]["resourceVersion"]
        made = await kube.patch_finalizers(NAMESPACE, f"hand-{i}", ["a.b/c"], version)
        await asyncio.to_thread(create_run, client, experiment, f"hand-{i}")
        status = {"phase": "Pending", "runID": "r", "attempt": 1}
        await kube.patch_status(NAMESPACE, f"hand-{i}", status, made["metadata"]["resourceVersion"])
        await kube.create_job(NAMESPACE, bare_job(f"hand-{i}"))
        bare.append(time.perf_counter() - began)
        await kube._call("PATCH", path(f"hand-{i}"), {"metadata": {"finalizers": None}})
        await kube._call("DELETE", path(f"hand-{i}"))
        await kube.delete_job(NAMESPACE, f"hand-{i}-a1")
    async with operator(tracking_uri), watching(kube) as seen:
        for i in range(count + 1):
            seen.asked[f"alone-{i}"] = time.perf_counter()
            await kube._call("POST", path(), resource(f"alone-{i}"))
            await until(lambda i=i: f"alone-{i}" in seen.seen, f"the Job of alone-{i}", every_s=0.001)
    del seen.asked["alone-0"]  # the first one makes the experiment and the connections
    await clean(kube)
    return {"bare": percentile(bare, 0.5), "p50": percentile(seen.waits, 0.5)}


@dataclass(frozen=True)
class Together:
    """Many at once."""

    p50: float
    p99: float
    rate: float
    writes: float
    events: float
    memory_mib: float
    cpu_ms: dict[str, float]
    """Processor time of each part until the last Job was there, per run."""


async def all_at_once(kube: Kube, tracking_uri: str, count: int) -> Together:
    """So many runs created as fast as the API server takes them."""
    print(f"{count} at once", flush=True)
    async with operator(tracking_uri) as process, watching(kube) as seen:

        async def create(name: str) -> None:
            seen.asked[name] = time.perf_counter()
            await kube._call("POST", path(), resource(name))

        before = metric(process.metrics(), "heimdall_api_writes_total")
        used = cpu.snapshot()
        began = time.perf_counter()
        await gathered([lambda i=i: create(f"run-{i}") for i in range(count)])
        await until(lambda: len(seen.seen) >= count, f"{count} Jobs")
        rate = count / (max(seen.seen.values()) - began)
        used = cpu.snapshot() - used
        await asyncio.to_thread(process.wait_idle)
        text = process.metrics()
        memory = process.memory_mib()
        total = metric(text, "heimdall_api_writes_total") - before
        events = metric(text, "heimdall_api_writes_total", 'resource="events"')
    await clean(kube)
    return Together(
        p50=percentile(seen.waits, 0.5),
        p99=percentile(seen.waits, 0.99),
        rate=rate,
        writes=(total - events) / count,
        events=events / count,
        memory_mib=memory,
        cpu_ms={part: seconds * 1000 / count for part, seconds in used.most_common()},
    )


async def many_finished(kube: Kube, tracking_uri: str, count: int) -> dict[str, float]:
    """What a restart costs when there is much behind it."""
    print(f"{count} finished", flush=True)
    status = finished_status()

    async def create(i: int) -> None:
        await kube._call("POST", path(), resource(f"done-{i}"))
        await kube._call("PATCH", path(f"done-{i}", "status"), {"status": status})

    await gathered([lambda i=i: create(i) for i in range(count)])
    began = time.perf_counter()
    async with operator(tracking_uri) as process:
        await asyncio.to_thread(process.wait_idle)
        seconds = time.perf_counter() - began
        held = metric(process.metrics(), "heimdall_trainingruns")
        if held < count:
            raise AssertionError(f"the operator holds {held:.0f} runs, not {count}")
        memory = await asyncio.to_thread(process.settled_memory_mib)
    return {"seconds": seconds, "memory_mib": memory}


def finished_status() -> dict[str, Any]:
    condition = {"type": "Complete", "status": "True", "reason": "Completed", "message": "Training finished."}
    attempt = {"number": 1, "job": "done-a1", "reason": "Completed", "startTime": STAMP, "endTime": STAMP}
    return {
        "phase": "Succeeded",
        "observedGeneration": 1,
        "runID": "0" * 32,
        "modelVersion": "1",
        "modelURI": "models:/m/1",
        "attempt": 1,
        "attempts": [attempt],
        "failures": 0,
        "startTime": STAMP,
        "completionTime": STAMP,
        "conditions": [{**condition, "lastTransitionTime": STAMP, "observedGeneration": 1}],
    }


async def clean(kube: Kube) -> None:
    """Remove every run and Job, without an operator."""
    runs = await kube.list_training_runs(NAMESPACE)
    names = [item["metadata"]["name"] for item in runs]
    await gathered([lambda n=n: kube._call("PATCH", path(n), {"metadata": {"finalizers": None}}) for n in names])
    await gathered([lambda n=n: kube._call("DELETE", path(n)) for n in names])
    deadline = time.monotonic() + STEP_TIMEOUT_S
    while await kube.list_jobs(NAMESPACE):
        if time.monotonic() > deadline:
            raise TimeoutError("the Jobs did not go")
        await asyncio.sleep(1)


# --- the operator as a process -----------------------------------------------------------------------------------


@dataclass
class Process:
    process: subprocess.Popen[bytes]
    metrics_url: str

    def metrics(self) -> str:
        with urllib.request.urlopen(self.metrics_url, timeout=10) as answer:
            text: str = answer.read().decode()
            return text

    def wait_idle(self) -> None:
        """Until nothing waits to be looked at, and nothing was looked at for a moment."""
        deadline = time.monotonic() + STEP_TIMEOUT_S
        looks = -1.0
        while time.monotonic() < deadline:
            try:
                text = self.metrics()
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, "the operator ended"
                time.sleep(0.05)
                continue
            now = metric(text, "heimdall_reconcile_seconds_count")
            if metric(text, "heimdall_queue_depth") == 0 and now == looks and now > 0:
                return
            looks = now
            time.sleep(0.25)
        raise TimeoutError("the operator does not come to rest")

    def settled_memory_mib(self) -> float:
        """The most that it has held once it grows no more: kopf's own listings come after the first looks."""
        deadline, most, grown = time.monotonic() + STEP_TIMEOUT_S, 0.0, time.monotonic()
        while time.monotonic() < min(deadline, grown + SETTLED_S):
            held = self.memory_mib()
            if held > most + 1:
                most, grown = held, time.monotonic()
            time.sleep(0.5)
        return most

    def memory_mib(self) -> float:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert found is not None
        return int(found.group(1)) / 1024


@cache
def shipped_python() -> Path:
    """An interpreter with what the operator's image holds: MLflow imports more where more is installed."""
    python = ROOT / "build/bench/operator-environment/bin/python"
    uv = [Path(sys.executable).with_name("uv"), "--quiet"]
    if not python.exists():
        subprocess.run([*uv, "venv", "--python", sys.executable, python.parents[1]], check=True)
    locked = ROOT / "requirements/operator.txt"
    sync = [*uv, "pip", "sync", "--python", python, "--require-hashes", locked]
    subprocess.run(sync, check=True, timeout=STEP_TIMEOUT_S)
    return python


@asynccontextmanager
async def operator(tracking_uri: str) -> AsyncIterator[Process]:
    """The operator, as it runs in its pod, but on this machine."""
    health, metrics = free_port(), free_port()
    settings = {
        "TRACKING_URI": tracking_uri,
        "TRAINER_IMAGE": "none:1",
        "NAMESPACES": NAMESPACE,
        "HEALTH_PORT": str(health),
        "METRICS_PORT": str(metrics),
    }
    env = {**os.environ, **{f"HEIMDALL_OPERATOR_{name}": value for name, value in settings.items()}}
    env["PYTHONPATH"] = os.pathsep.join(str(ROOT / room) for room in ("api", "tracking", "operator"))
    log = ROOT / "build/bench/operator.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as out:
        command = [shipped_python(), "-m", "heimdall_operator.main"]
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)  # noqa: ASYNC220 - it is brief
    try:
        started = Process(process, f"http://127.0.0.1:{metrics}/metrics")
        await until(lambda: is_up(started), "the operator's metrics", every_s=0.02)
        yield started
    finally:
        process.terminate()
        await asyncio.to_thread(process.wait, 30)


def is_up(process: Process) -> bool:
    assert process.process.poll() is None, "the operator ended: see build/bench/operator.log"
    try:
        process.metrics()
    except (urllib.error.URLError, ConnectionError):
        return False
    return True


def metric(text: str, name: str, labels: str = "") -> float:
    """The sum of a metric's samples."""
    lines = [line for line in text.splitlines() if re.match(rf"{name}(\{{| )", line) and labels in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


if __name__ == "__main__":
    main()
