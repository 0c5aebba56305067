"""One cluster, one release and one set of recordings for all e2e cases.

A cluster that these tests brought up is taken down by them; one that was there stays. HEIMDALL_CLUSTER says otherwise:
keep, or down. `hack/e2e` calls pytest more than once: HEIMDALL_RELEASE tells whether the release of a call is to begin,
go-on or end; without it, it is of this call alone.
"""

from __future__ import annotations

import base64
import fcntl
import importlib
import json
import os
import secrets
import select
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from heimdall_api.contract import TAG_UID
from tests.e2e.cluster import ROOT, Cluster, cluster_environment, condition, hack, port_forward, wait_for

NAMESPACE = "heimdall-e2e"
RESTRICTED = "pod-security.kubernetes.io/enforce=restricted"
PRIVILEGED = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "privileged"},
    "spec": {"containers": [{"name": "c", "image": "heimdall/contract:dev", "securityContext": {"privileged": True}}]},
}
"""What no namespace of these tests takes."""
SMALL = ("operator", "contract", "mlflow", "postgresql", "minio")
SMALL_IMAGES = (
    "heimdall/operator:dev",
    "heimdall/contract:dev",
    "ghcr.io/mlflow/mlflow:v3.17.2-full",
    "docker.io/library/postgres:15",
    "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z",
)
INSTALL_TIMEOUT_S = 420
LOG_READ_S = 60
OF_SEVERAL_CALLS = os.environ.get("HEIMDALL_RELEASE", "")
CANARY_KEYS = {
    "database": ("postgres-password", "mlflow-password", "writer-password", "reader-password"),
    "object-store": ("root-password", "mlflow-secret-key", "writer-secret-key", "reader-secret-key"),
    "tracking": ("admin-password", "operator-password", "trainer-password", "flask-secret-key"),
}
IS_SPREAD = "HEIMDALL_SPREAD" in os.environ
"""Whether a group of the real trainer's is spread over both workers: its image is 6 GB, and a node has two copies."""
MONITORING = "monitoring"
"""Where Prometheus would be: ends the name of its namespace."""


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.e2e)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, where files run beside each other."""
    items.sort(key=lambda item: not item.path.name.startswith("test_localizer"))


@pytest.fixture(scope="session")
def cluster() -> Iterator[dict[str, str]]:
    """The environment that reaches the cluster, with the small images loaded."""
    if OF_SEVERAL_CALLS == "go-on":
        yield cluster_environment()
        return
    status = subprocess.run(
        [sys.executable, "hack/cluster", "status"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    was_up = "cluster: up" in status.stdout
    try:
        hack("hack/cluster", "up")
        hack("hack/images", "build", *SMALL)
        hack("hack/cluster", "load", *SMALL_IMAGES)
        yield cluster_environment()
    finally:
        if os.environ.get("HEIMDALL_CLUSTER", "keep" if was_up else "down") == "down":
            before = links_before()
            hack("hack/cluster", "down")
            assert left_behind(before) == []


def links() -> set[str]:
    """Network links that a Docker engine makes."""
    return {link.name for link in NET.iterdir() if link.name.startswith(("docker", "br-", "veth"))}


def cluster_tool(module: str) -> Any:
    """A module of the cluster tool: a program, not a package."""
    sys.path.insert(0, str(ROOT / "hack/cluster"))
    return importlib.import_module(f"heimdall_cluster.{module}")


def own_engine() -> Any:
    """The cluster tool's module of the Docker engine."""
    return cluster_tool("engine")


def links_before() -> set[str]:
    """Which of these links there were before an engine of our own was started."""
    before = own_engine().BEFORE
    return set(json.loads(before.read_text())["links"]) if before.exists() else links()


def left_behind(before: set[str]) -> list[str]:
    """What `down` should have taken away of an engine of our own: processes, mounts, links, firewall rules, sockets."""
    engine = own_engine()
    if engine.environment() == {}:
        return []  # the engine was there before: it stays
    left = [f"process {pid}" for pid in engine._descendants_of_ours()]
    left += [f"mount {mount}" for mount in engine._our_mounts()]
    left += [f"link {name}" for name in links() - before]
    left += [f"chain {name}" for name in engine._docker_chains()]
    return left + [str(path) for path in (engine.RUN, engine.BEFORE) if path.exists()]


@pytest.fixture(scope="session")
def trainer_loading(cluster: dict[str, str]) -> Iterator[Future[None]]:
    """The trainer's image on its way to the node with the GPUs, behind the cases that need none: it is 6 GB."""
    nodes = () if IS_SPREAD else ("--gpu-node",)

    def load() -> None:
        if OF_SEVERAL_CALLS in ("", "begin"):
            hack("hack/images", "build", "trainer")
            hack("hack/cluster", "load", *nodes, "heimdall/trainer:dev")

    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load)
        yield loading
        loading.result()


@pytest.fixture(scope="session")
def canaries(cluster: dict[str, str]) -> dict[str, str]:
    """A password for every secret, that must be found nowhere else."""
    names = [(role, key) for role, keys in CANARY_KEYS.items() for key in keys]
    if OF_SEVERAL_CALLS in ("go-on", "end"):
        there = Cluster(cluster, NAMESPACE)
        found = {role: there.get("secret", f"heimdall-{role}") for role in CANARY_KEYS}
        kept = {role: secret["data"] for role, secret in found.items() if secret is not None}
        assert kept.keys() == found.keys(), "the release that an earlier call was to install is not there"
        return {f"{role}/{key}": base64.b64decode(kept[role][key]).decode() for role, key in names}
    # They begin alike: one word is looked for much faster than twenty in the gigabytes of all images.
    beginning = f"canary{secrets.token_hex(8)}"
    return {f"{role}/{key}": f"{beginning}{secrets.token_hex(8)}" for role, key in names}


@pytest.fixture(scope="session")
def release(cluster: dict[str, str], trainer_loading: Future[None], canaries: dict[str, str]) -> Iterator[Cluster]:
    """The chart, installed once, on Secrets that were there, with canaries as passwords; removed whole afterwards."""
    installed = Cluster(cluster, NAMESPACE)
    if OF_SEVERAL_CALLS in ("go-on", "end"):
        yield installed
        if OF_SEVERAL_CALLS == "end":
            remove_release(installed)
        return
    remove_release(installed)
    installed.run("kubectl", "create", "namespace", NAMESPACE)
    restrict(installed)
    for role in CANARY_KEYS:
        installed.apply(canary_secret(role, canaries))
    # A CRD that is there belongs to another release: it is brought up to date, and stays when the tests are over.
    has_crd = installed.run("kubectl", "get", "crd", CRD, check=False).returncode == 0
    if has_crd:
        installed.run("kubectl", "apply", "--server-side", "--force-conflicts", "-f", "charts/heimdall/files/crd.yaml")
    options = (*INSTALL_OPTIONS, *EXISTING_SECRETS, "--set", f"crd.install={str(not has_crd).lower()}")
    try:
        installed.helm(
            "install", "heimdall", "charts/heimdall", *options, "--wait", "--timeout", f"{INSTALL_TIMEOUT_S}s"
        )
        yield installed
    finally:
        if OF_SEVERAL_CALLS != "begin":
            remove_release(installed)


NET = Path("/sys/class/net")
CRD = "trainingruns.training.heimdall.dev"
OTHER_NODE, GPU_NODE = "heimdall-worker", "heimdall-worker2"
PLACES = tuple(
    option
    for role in ("operator", "tracking", "database", "objectStore")
    for option in ("--set", f"{role}.nodeSelector.kubernetes\\.io/hostname={OTHER_NODE}")
)
"""Nodes are stopped and drained: the one with the GPUs, which nothing but training pods runs on."""
INSTALL_OPTIONS = (
    *("--set", "operator.progressSeconds=3,operator.resyncSeconds=30,operator.lostPodSeconds=10"),
    # One worker process: MLflow is started many times, and each takes seconds of a processor to begin.
    *("--set", "trainer.gracePeriodSeconds=15,tracking.workers=1"),
    *(
        "--set",
        f"networkPolicies.metrics.namespaceSelector.matchLabels.kubernetes\\.io/metadata\\.name={NAMESPACE}-{MONITORING}",
    ),
    *PLACES,
)


EXISTING_SECRETS = (
    *("--set", "database.existingSecret=heimdall-database,objectStore.existingSecret=heimdall-object-store"),
    *("--set", "tracking.auth.existingSecret=heimdall-tracking"),
)
"""Under the names that the chart would give them: the documents' commands look for those."""


def canary_secret(role: str, canaries: dict[str, str]) -> dict[str, Any]:
    """A Secret of somebody who installs the chart."""
    data = {key: canaries[f"{role}/{key}"] for key in CANARY_KEYS[role]}
    if role == "object-store":
        data |= {f"{who}-access-key": f"heimdall-{who}" for who in ("mlflow", "writer", "reader")}
        data["root-user"] = "heimdall-root"
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": f"heimdall-{role}"},
        "data": {key: base64.b64encode(value.encode()).decode() for key, value in data.items()},
    }


def remove_release(installed: Cluster) -> None:
    """Runs first, while the operator can still end them; then the release, its volumes, and a CRD of its own."""
    owner = "jsonpath={.metadata.annotations.meta\\.helm\\.sh/release-namespace}"
    has_crd = installed.run("kubectl", "get", "crd", CRD, "-o", owner, check=False).stdout == NAMESPACE
    if installed.run("kubectl", "get", "namespace", NAMESPACE, check=False).returncode == 0:
        installed.run("kubectl", "-n", NAMESPACE, "delete", "trainingruns", "--all", "--timeout=120s", check=False)
        installed.run("helm", "-n", NAMESPACE, "uninstall", "heimdall", "--wait", "--timeout", "120s", check=False)
        installed.run("kubectl", "delete", "namespace", NAMESPACE, "--timeout=180s")
    if has_crd:
        installed.run("kubectl", "delete", "crd", CRD, "--timeout=120s")


def restrict(where: Cluster) -> None:
    """Have a namespace take restricted pods alone, and see that it does: a label that nobody reads looks the same."""
    where.run("kubectl", "label", "namespace", where.namespace, RESTRICTED)
    # The API server hears of a new namespace's label, and of its account, a moment later.
    wait_for(
        lambda: "violates PodSecurity" in dry_run(where, PRIVILEGED),
        what=f"the refusal of a privileged pod in {where.namespace}",
        timeout_s=60,
        tell=lambda: dry_run(where, PRIVILEGED),
    )


def dry_run(where: Cluster, manifest: dict[str, Any]) -> str:
    """What the API server says of a manifest; nothing is made of it."""
    dry = ("kubectl", "-n", where.namespace, "create", "--dry-run=server", "-f", "-")
    done = where.run(*dry, text=json.dumps(manifest), check=False)
    return done.stdout + done.stderr


@contextmanager
def namespace(release: Cluster, suffix: str) -> Iterator[Cluster]:
    """Another namespace beside the release's, restricted as that is; removed with everything in it."""
    made = Cluster(release.env, f"{release.namespace}-{suffix}")
    release.run("kubectl", "create", "namespace", made.namespace)
    try:
        restrict(made)
        yield made
    finally:
        # Runs first: their operator may still have to end them.
        made.run("kubectl", "-n", made.namespace, "delete", "trainingruns", "--all", "--timeout=120s", check=False)
        release.run("kubectl", "delete", "namespace", made.namespace, "--timeout=180s")


@contextmanager
def operator_setting(release: Cluster, name: str, value: str) -> Iterator[None]:
    """The release's operator with another value of one of its settings, as the chart would set it.

    Not by the chart: an upgrade starts the servers anew too.
    """
    operator, variable = "deployment/heimdall-operator", f"HEIMDALL_OPERATOR_{name}"
    chosen = f"jsonpath={{.spec.template.spec.containers[0].env[?(@.name=='{variable}')].value}}"
    before = release.kubectl("get", operator, "-o", chosen)

    def set_to(wanted: str) -> None:
        release.kubectl("set", "env", operator, f"{variable}={wanted}")
        release.kubectl("rollout", "status", operator, "--timeout=180s")

    try:
        set_to(value)
        yield
    finally:
        set_to(before)


@pytest.fixture(scope="module")
def confined(release: Cluster) -> Iterator[None]:
    """The release's operator looks at its own namespace alone: operators of other releases work beside it."""
    with operator_setting(release, "NAMESPACES", release.namespace):
        yield


@dataclass(frozen=True)
class Mlflow:
    """MLflow, asked over HTTP."""

    url: str
    login: tuple[str, str] = field(repr=False)

    @property
    def client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient(self.url, self.url)

    def runs_of(self, uid: str) -> list[Any]:
        """Every run that carries a TrainingRun's UID, in every state."""
        from mlflow.entities import ViewType

        experiments = [item.experiment_id for item in self.client.search_experiments(view_type=ViewType.ALL)]
        found: list[Any] = self.client.search_runs(
            experiments, filter_string=f"tags.`{TAG_UID}` = '{uid}'", run_view_type=ViewType.ALL
        )
        return found

    def versions_of(self, model: str, run_id: str) -> list[Any]:
        found: list[Any] = self.client.search_model_versions(f"name = '{model}' and run_id = '{run_id}'")
        return found

    def artifact(self, run_id: str, path: str) -> str:
        """The text of an artifact, through the server (its own addresses lead into the cluster)."""
        wanted = {"run_uuid": run_id, "path": path}
        answer = requests.get(f"{self.url}/get-artifact", params=wanted, auth=self.login, timeout=30)
        answer.raise_for_status()
        return answer.text


@pytest.fixture(scope="session")
def mlflow(release: Cluster, canaries: dict[str, str]) -> Iterator[Mlflow]:
    """MLflow for somebody who may see everything; clients of this process log in as this user."""
    login = ("admin", canaries["tracking/admin-password"])
    with port_forward(release, "svc/heimdall-tracking", 5000) as port, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_USERNAME", login[0])
        patch.setenv("MLFLOW_TRACKING_PASSWORD", login[1])
        yield Mlflow(f"http://127.0.0.1:{port}", login)


@pytest.fixture(scope="session")
def trainer(trainer_loading: Future[None]) -> None:
    """The trainer's image is where it trains."""
    trainer_loading.result()


@pytest.fixture(scope="session")
def recordings(release: Cluster, trainer: None) -> None:
    """Generated recordings in the release's PostgreSQL and MinIO."""
    manifest = yaml.safe_load((ROOT / "manifests/examples/recordings.yaml").read_text())
    pod = manifest["spec"]["template"]["spec"]
    pod["nodeSelector"] = {"kubernetes.io/hostname": GPU_NODE}
    # Half of what the demonstration trains on: what is shown is that it learns, not how well.
    arguments = pod["containers"][0]["args"]
    arguments[arguments.index("--transmissions") + 1] = "12"
    lock = ROOT / "build/recordings.lock"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # two processes may want them at once
        release.apply(manifest)
    release.kubectl("wait", "--for=condition=Complete", "job/generate-recordings", "--timeout=240s")


@pytest.fixture
def name(request: pytest.FixtureRequest, release: Cluster) -> Iterator[str]:
    """A TrainingRun's name of the test's own; the run is deleted afterwards."""
    short = request.node.name.split("[")[0].removeprefix("test_").replace("_", "-")[:36].strip("-")
    name = f"{short}-{secrets.token_hex(3)}"
    yield name
    release.kubectl("delete", "trainingrun", name, "--ignore-not-found", "--timeout=150s")


def contract_run(name: str, *, spec: dict[str, Any] | None = None, **args: Any) -> dict[str, Any]:
    """A TrainingRun of the contract image: seconds, no torch, and no GPU unless `spec` asks for one (`ON_GPU`)."""
    return {
        "apiVersion": "training.heimdall.dev/v1alpha1",
        "kind": "TrainingRun",
        "metadata": {"name": name},
        "spec": {
            "image": "heimdall/contract:dev",
            "model": {"module": "contract:Script", "args": args},
            "resources": {"gpusPerWorker": 0, "cpu": "20m", "memory": "256Mi", "sharedMemory": "16Mi"},
            "registration": {"model": "steps"},
            **(spec or {}),
        },
    }


ON_GPU = {"resources": {"gpusPerWorker": 1, "cpu": "20m", "memory": "256Mi", "sharedMemory": "16Mi"}}
"""What a run asks for that is about a GPU. There are two: files beside each other must not wait for one another's."""


@dataclass
class DyingOperator:
    """The operator, which dies right after each of its actions and writes about one run, and is started again."""

    release: Cluster

    def arm(self, name: str, times: int) -> None:
        """From now on the operator dies at everything that it does for the first time about a TrainingRun.

        Args:
            name: The TrainingRun.
            times: After how many writes of the same of its status' fields it dies: each is another one.
        """
        container = {
            "name": "operator",
            "command": ["python3", "/dying/dying.py", name, str(times)],
            "volumeMounts": [{"name": "dying", "mountPath": "/dying"}, {"name": "died", "mountPath": "/died"}],
        }
        volumes = [{"name": "dying", "configMap": {"name": "dying"}}, {"name": "died", "emptyDir": {}}]
        patch = {"spec": {"template": {"spec": {"containers": [container], "volumes": volumes}}}}
        self.release.kubectl("patch", "deployment", "heimdall-operator", "-p", json.dumps(patch))
        self.release.kubectl("rollout", "status", "deployment/heimdall-operator", "--timeout=120s")

    def deaths(self) -> list[str]:
        """After what it died, in order."""
        return self.release.kubectl("exec", "deployment/heimdall-operator", "--", "cat", "/died/points").splitlines()


DYING = '''
"""The operator in a process that dies (as by kill -9: no handler, no clean-up), and is started again at once."""
import os, pathlib, signal, sys

from heimdall_operator.mlflow_gateway import bound_http
bound_http()  # as main does, before anything imports MLflow
import kopf
from mlflow import MlflowClient
from heimdall_operator import act, handlers, kube
from heimdall_operator.main import main

POINTS = pathlib.Path("/died/points")
KILLED = 137
name, times = sys.argv[1], int(sys.argv[2])

def supervise():
    """Each life is a process of its own; what it has imported was imported before, which takes most of a start."""
    while True:
        child = os.fork()
        if child == 0:
            operate()
            os._exit(0)
        signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != KILLED:
            sys.exit(code)

def operate():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    known = POINTS.read_text().splitlines() if POINTS.exists() else []

    def die(point):
        with POINTS.open("a") as file:
            file.write(f"{point}\\n")
        os._exit(KILLED)

    do, write = act.Actor.act, kube.Kube.patch_status

    async def acting(self, action, observed):
        result = await do(self, action, observed)
        if observed.name == name and str(action) not in known:
            die(str(action))  # the next life does it again
        return result

    async def writing(self, namespace, of, status, version):
        result = await write(self, namespace, of, status, version)
        point = "status: " + " ".join(sorted(status))
        before = sum(each.startswith(f"{point} #") for each in known)
        if of == name and before < times:
            die(f"{point} #{before + 1}")
        return result

    act.Actor.act, kube.Kube.patch_status = acting, writing
    sys.argv = ["heimdall-operator"]
    main()

supervise()
'''


@pytest.fixture
def dying(release: Cluster) -> Iterator[DyingOperator]:
    release.apply({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "dying"}, "data": {"dying.py": DYING}})
    yield DyingOperator(release)
    release.kubectl("rollout", "undo", "deployment/heimdall-operator")
    release.kubectl("rollout", "status", "deployment/heimdall-operator", "--timeout=120s")


def scraped(release: Cluster) -> str:
    """The operator's metrics."""
    with port_forward(release, "deployment/heimdall-operator", 8081) as port:
        return requests.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text


def signal_container(release: Cluster, job: str, signal: str, pod: str = "") -> None:
    """Send a signal to the first process of a Job's pod, from its node: within the container it would be ignored."""
    pods = release.list("pods", f"batch.kubernetes.io/job-name={job}")
    chosen = next(item for item in pods if pod in ("", item["metadata"]["name"]))
    _signal(release, chosen, signal)


def kill_operator(release: Cluster) -> None:
    """`kill -9` of the operator's process, from its node."""
    pods = release.list("pods", "app.kubernetes.io/component=operator")
    running = [pod for pod in pods if pod["status"]["phase"] == "Running" and pod["status"].get("containerStatuses")]
    assert running, "there is no operator to be killed"
    for pod in running:
        _signal(release, pod, "KILL")


def _signal(release: Cluster, pod: dict[str, Any], signal: str) -> None:
    release.run("docker", "exec", pod["spec"]["nodeName"], "sh", "-c", f"kill -{signal} {_inspected(pod, 'info.pid')}")


def _inspected(pod: dict[str, Any], field: str) -> str:
    """What the runtime of a pod's node knows of its container, for a shell on that node."""
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    return f"$(crictl inspect --output go-template --template '{{{{.{field}}}}}' {container})"


@contextmanager
def last_words(release: Cluster, job: str) -> Iterator[Callable[[float], str]]:
    """What a Job's pod says until it ends, read on its node: later nobody has it any more.

    Yields:
        Waits so many seconds for the end, and gives what was said.
    """
    (pod,) = release.list("pods", f"batch.kubernetes.io/job-name={job}")
    script = f"exec tail -n +1 -f --pid={_inspected(pod, 'info.pid')} {_inspected(pod, 'status.logPath')}"
    command = ("docker", "exec", pod["spec"]["nodeName"], "sh", "-c", script)
    with subprocess.Popen(command, env=release.env, stdout=subprocess.PIPE, text=True) as following:
        try:
            # It has said something already: before that is read, the node must not be frozen.
            assert select.select([following.stdout], [], [], LOG_READ_S)[0], f"{command} reads nothing"
            yield lambda timeout_s: following.communicate(timeout=timeout_s)[0]
        finally:
            following.kill()


def wait_for_admission(release: Cluster, name: str, reason: str, timeout_s: float) -> dict[str, Any]:
    """The status once a run's Admitted condition has a reason."""

    def look() -> dict[str, Any] | None:
        status = release.status(name)
        return status if condition(status, "Admitted").get("reason") == reason else None

    return wait_for(look, what=f"{name} being {reason}", timeout_s=timeout_s, tell=lambda: release.explain(name))


def kept_log(release: Cluster, mlflow: Mlflow, name: str, number: int) -> str:
    """The log of an attempt as it is kept with the run: it may be on its way when the next one is over."""

    def look() -> dict[str, Any] | None:
        attempts = release.status(name)["attempts"]
        return next((item for item in attempts if item["number"] == number and "logs" in item), None)

    what = f"the log of attempt {number} of {name}"
    attempt = wait_for(look, what=what, timeout_s=60, tell=lambda: release.explain(name))
    folder = f"attempts/{number}"
    run_id = release.status(name)["runID"]
    assert attempt["logs"] == f"runs:/{run_id}/{folder}"
    return mlflow.artifact(run_id, f"{folder}/{attempt['pod']}.log")


def wait_for_step(release: Cluster, mlflow: Mlflow, run_id: str, step: int, timeout_s: float) -> int:
    """Wait until a run's training has made some steps; the step it is at."""

    def look() -> int | None:
        progress = json.loads(mlflow.client.get_run(run_id).data.tags.get("heimdall.progress", "{}"))
        at = int(progress.get("step", 0))
        return at if at >= step else None

    return wait_for(look, what=f"step {step} of {run_id}", timeout_s=timeout_s, tell=lambda: release.explain(""))
