"""The cluster: kind's, with one control plane and two workers, of which one pretends to have GPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from heimdall_cluster import engine, images, parts, pulling, stores
from heimdall_cluster.paths import HERE, KUBECONFIG, LOGS
from heimdall_cluster.steps import TAIL_LINES, ClusterError, held, read, run, say, step, wait_until

NAME: Final = "heimdall"
PLATFORM: Final = f"linux/{images.ARCHITECTURE}"
CONTROL_PLANE: Final = f"{NAME}-control-plane"
WORKERS: Final = (f"{NAME}-worker", f"{NAME}-worker2")
GPU_NODE: Final = WORKERS[1]
GPUS: Final = 2
GPU_RESOURCE: Final = "nvidia.com/gpu"
SERVICES: Final = (("kube-system", "coredns"), ("local-path-storage", "local-path-provisioner"))
"""What pods of any node stand on: namespace and name of Deployments."""
MARKER: Final = KUBECONFIG.with_name("kind.json")
"""Configuration of a cluster that this tool made: under an engine of others, one of its name may be somebody's."""
NODE_GRACE_S: Final = 20
GARBAGE_PERCENT: Final = "400"
RECOVERY_TIMEOUT_S: Final = 30
"""How long a cluster whose nodes all run may take to be Ready again, before it is made anew."""
NODES_TIMEOUT_S: Final = 180
LOAD_TIMEOUT_S: Final = 900
DROP_TIMEOUT_S: Final = 300
NO_ROOM: Final = "no space left on device"
CREATE_TIMEOUT_S: Final = 600
DELETE_TIMEOUT_S: Final = 120
KUBE_ROUTER_MANIFEST: Final = HERE / "kube-router.yaml"


def config(*, own_cni: bool, cgroup_v1: bool, kept: Sequence[Path] = ()) -> dict[str, Any]:
    """Kind's configuration.

    Args:
        own_cni: Whether we bring the pod network (kube-router), because the node image is not kind's own.
        cgroup_v1: Whether the host has cgroup v1, which a kubelet refuses unless told otherwise.
        kept: Folder of each worker's image store, where they are kept.

    Returns:
        A kind.x-k8s.io/v1alpha4 Cluster.
    """
    document: dict[str, Any] = {
        "kind": "Cluster",
        "apiVersion": "kind.x-k8s.io/v1alpha4",
        "name": NAME,
        "networking": {"apiServerAddress": "127.0.0.1"},
        "nodes": [{"role": "control-plane"}, {"role": "worker"}, {"role": "worker"}],
    }
    for node, store in zip(document["nodes"][1:], kept, strict=False):
        node["extraMounts"] = [{"hostPath": str(store), "containerPath": stores.CONTAINERD}]
    if own_cni:
        document["networking"]["disableDefaultCNI"] = True
    # A node that is gone is noticed in seconds: tests take nodes away.
    patience = [{"name": "node-monitor-grace-period", "value": f"{NODE_GRACE_S}s"}]
    # Garbage is collected less often, which takes memory instead of processors.
    spared = {"extraEnvs": [{"name": "GOGC", "value": GARBAGE_PERCENT}]}
    cluster = {
        "kind": "ClusterConfiguration",
        "apiServer": spared,
        "controllerManager": {"extraArgs": patience, **spared},
        "etcd": {"local": spared},
    }
    kubelet: dict[str, Any] = {"kind": "KubeletConfiguration", "nodeStatusUpdateFrequency": "4s"}
    if cgroup_v1:
        kubelet |= {"failCgroupV1": False}
    document["kubeadmConfigPatches"] = [
        json.dumps({"apiVersion": "kubeadm.k8s.io/v1beta4", **cluster}),
        json.dumps({"apiVersion": "kubelet.config.k8s.io/v1beta1", **kubelet}),
    ]
    return document


def kubectl(*arguments: str, timeout_s: float = 60) -> str | None:
    """The output of kubectl against the cluster, or None where it failed."""
    return read([kubectl_path(), "--kubeconfig", KUBECONFIG, *arguments], timeout_s=timeout_s)


def kubectl_path() -> str:
    """kubectl: ours where it was built, otherwise the host's."""
    built = parts.path_of("kubernetes", "kubectl")
    return str(built) if built.exists() else "kubectl"


def require_kubectl() -> None:
    """Make sure that there is a kubectl: without one a cluster that is up seems never to be.

    Raises:
        ClusterError: There is none.
    """
    if shutil.which(kubectl_path()) is None:
        raise ClusterError("kubectl is missing: install it (https://kubernetes.io/docs/tasks/tools), then call again")


def exists() -> bool:
    """Whether the cluster's containers are there, running or not."""
    return bool(_containers(all_states=True))


def runs() -> bool:
    """Whether the container of every node runs."""
    return len(_containers(all_states=False)) == 1 + len(WORKERS)


def is_healthy() -> bool:
    """Whether every node runs and is Ready."""
    if not runs() or not KUBECONFIG.exists():
        return False
    listed = kubectl("get", "nodes", "-o", "json", timeout_s=10)
    if listed is None:
        return False
    ready = [node for node in json.loads(listed)["items"] if _is_ready(node)]
    return len(ready) == 1 + len(WORKERS)


def is_of_others() -> bool:
    """Whether the cluster of our name is one that this tool did not make."""
    return not MARKER.exists() and not engine.environment() and exists()


def recovers() -> bool:
    """Whether the cluster is healthy, or is so in a moment: a node may just have missed a beat."""
    try:
        wait_until(
            lambda: is_healthy() or not runs(),
            what="that all nodes are Ready",
            timeout_s=RECOVERY_TIMEOUT_S if KUBECONFIG.exists() else 0,
        )
    except ClusterError:
        return False
    return is_healthy()


def _is_ready(node: dict[str, Any]) -> bool:
    return any(item["type"] == "Ready" and item["status"] == "True" for item in node["status"]["conditions"])


def _containers(*, all_states: bool) -> list[str]:
    options = ["--all"] if all_states else []
    listed = read(
        [engine.docker(), "ps", *options, "--filter", f"label=io.x-k8s.kind.cluster={NAME}", "--format", "{{.Names}}"],
        env=engine.environment(),
    )
    return (listed or "").split()


def create() -> None:
    """Make the cluster, taking down what is left of a broken one."""
    if is_of_others():
        raise ClusterError(
            f"there is a kind cluster {NAME} that this tool did not make: it is left alone. If nobody needs it, "
            f"kind delete cluster --name {NAME}"
        )
    if exists():
        say("  what is left of an earlier cluster does not work: it is taken down first")
        delete()
    node_image = images.ensure_node()
    require_kubectl()  # where the node image was built, so was one
    parts.ensure(["kind"])
    had_stores = stores.exist()
    try:
        _create(node_image)
    except ClusterError as error:
        if not had_stores:
            raise
        say(f"  {error}; once more, without what earlier clusters kept")
        delete()
        stores.drop()
        _create(node_image)


def _create(node_image: str | None) -> None:
    own_cni = node_image is not None
    kept = list(stores.ensure(node_image, WORKERS).values()) if node_image and engine.environment() else []
    cgroup_v1 = not Path("/sys/fs/cgroup/cgroup.controllers").exists()
    MARKER.write_text(json.dumps(config(own_cni=own_cni, cgroup_v1=cgroup_v1, kept=kept)))
    with step("creating the cluster with kind"):
        image = ["--image", node_image] if node_image else []
        _kind("create", "cluster", "--config", MARKER, *image, timeout_s=CREATE_TIMEOUT_S)
    if own_cni:
        with step("installing kube-router (pod network and NetworkPolicies)"):
            _apply(KUBE_ROUTER_MANIFEST)
    with step("waiting for the nodes"):
        wait_until(is_healthy, what="that all nodes are Ready", timeout_s=NODES_TIMEOUT_S)
    settle()


def _kind(*arguments: str | Path, timeout_s: float) -> None:
    # One that was killed as it wrote the kubeconfig left its lock, which the next would fail at for ever.
    KUBECONFIG.with_name(f"{KUBECONFIG.name}.lock").unlink(missing_ok=True)
    command = [parts.path_of("kind"), *arguments, "--kubeconfig", KUBECONFIG]
    run(command, log=LOGS / "kind.log", env=images.client_environment(), timeout_s=timeout_s)


def _apply(manifest: Path) -> None:
    run([kubectl_path(), "--kubeconfig", KUBECONFIG, "apply", "-f", manifest], log=LOGS / "kind.log")


def gpu_patch() -> dict[str, Any]:
    """The patch of a node's status that makes it offer GPUs."""
    amount = {GPU_RESOURCE: str(GPUS)}
    return {"status": {"capacity": amount, "allocatable": amount}}


def settle() -> None:
    """Have the cluster be what tests and demonstration count on, unless it is."""
    keep_services_off_workers()
    simulate_gpus()


def service_patch() -> dict[str, Any]:
    """The patch that keeps a Deployment's pods on the control plane."""
    return {"spec": {"template": {"spec": {"nodeSelector": {"node-role.kubernetes.io/control-plane": ""}}}}}


def keep_services_off_workers() -> None:
    """Have names resolved and volumes made on the control plane: workers are stopped, and must take neither along."""
    patch = json.dumps(service_patch())
    for namespace, name in SERVICES:
        deployment = f"deployment/{name}"
        done = kubectl("-n", namespace, "patch", deployment, "-p", patch)
        timeout = f"--timeout={NODES_TIMEOUT_S}s"
        rolled = kubectl("-n", namespace, "rollout", "status", deployment, timeout, timeout_s=NODES_TIMEOUT_S + 10)
        if done is None or rolled is None:
            raise ClusterError(f"{name} could not be kept on the control plane")


def simulate_gpus() -> None:
    """Have a worker offer GPUs, unless it does."""
    path = "{.status.allocatable.nvidia\\.com/gpu}"
    if kubectl("get", "node", GPU_NODE, "-o", f"jsonpath={path}") == str(GPUS):
        return
    with step(f"simulating {GPUS} GPUs on {GPU_NODE}"):
        patch = json.dumps(gpu_patch())
        done = kubectl("patch", "node", GPU_NODE, "--subresource=status", "--type=merge", "-p", patch)
        labelled = kubectl("label", "--overwrite", "node", GPU_NODE, "heimdall.dev/gpu=simulated")
        if done is None or labelled is None:
            raise ClusterError(f"{GPU_NODE} could not be made to offer {GPU_RESOURCE}")


def delete() -> None:
    """Take the cluster down."""
    parts.ensure(["kind"])
    _kind("delete", "cluster", "--name", NAME, timeout_s=DELETE_TIMEOUT_S)
    KUBECONFIG.unlink(missing_ok=True)
    MARKER.unlink(missing_ok=True)
    if engine.environment():
        # The network is shared by all kind clusters of an engine: only of our own engine it is ours.
        read([engine.docker(), "network", "rm", "kind"], env=engine.environment())


def load(names: list[str], nodes: list[str]) -> None:
    """Give nodes images that the engine has; nodes that have them already are left alone."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        wanted = images.inspect(name, "{{.Id}}")
        if wanted is None:
            raise ClusterError(f"the engine has no image {name}: build it first (python3 hack/images build)")
        missing = tuple(node for node in nodes if wanted not in image_ids(node, name))
        if missing:
            lacking.setdefault(missing, []).append(name)
    for missing, images_of in lacking.items():
        with step(f"loading {', '.join(images_of)} into {', '.join(missing)}"):
            for node in missing:
                _load_into(node, images_of)
            _drop_replaced(missing)


def _load_into(node: str, names: Sequence[str]) -> None:
    """Load images, if need be in the room of those that they replace.

    Raises:
        ClusterError: The engine or the node failed, or the disk is full without the replaced ones, too.
    """
    if (why := _stream(names, node)) is not None and NO_ROOM in why:
        whole = [pulling.whole_name(name) for name in names]
        remove = [engine.docker(), "exec", node, "ctr", "--namespace", "k8s.io", "images", "remove", "--sync", *whole]
        if read(remove, env=engine.environment(), timeout_s=DROP_TIMEOUT_S) is not None:
            say(f"no room is left on the disk: removed what {', '.join(names)} in {node} was before, trying again")
        why = _stream(names, node)
    if why is None:
        return
    if NO_ROOM in why:
        raise ClusterError(
            f"{', '.join(names)} could not be loaded into {node}, which may have none of it now: no room is left on "
            "the disk; an image takes three times its size there while it is loaded: make some (docker system df says "
            "what Docker keeps), then call again"
        )
    raise ClusterError(f"{', '.join(names)} could not be loaded into {node}: {why or 'no reason given'}")


def _stream(names: Sequence[str], node: str) -> str | None:
    """What `kind load` does, without a file between: all images in one archive, so that what they share is moved once.

    Returns:
        None, or the last words of what failed.

    Raises:
        ClusterError: It took too long.
    """
    env = {**os.environ, **engine.environment()}
    # An image that was pulled names platforms of which only the machine's own is there.
    importing = ["ctr", "--namespace", "k8s.io", "images", "import", "--platform", PLATFORM, "--digests"]
    saving = [engine.docker(), "save", *names]
    command = [engine.docker(), "exec", "-i", node, *importing, "--snapshotter=overlayfs", "-"]
    with (
        (LOGS / "kind.log").open("ab") as log,
        subprocess.Popen(saving, env=env, stdout=subprocess.PIPE, stderr=log, pass_fds=held) as save,
    ):
        begin = log.tell()
        try:
            done = subprocess.run(
                command,
                env=env,
                stdin=save.stdout,
                stdout=log,
                stderr=log,
                timeout=LOAD_TIMEOUT_S,
                check=False,
                pass_fds=held,
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterError(f"loading into {node} took longer than {LOAD_TIMEOUT_S} s") from error
        finally:
            save.kill()
    if done.returncode == 0:
        return None
    with (LOGS / "kind.log").open("rb") as written:
        written.seek(begin)
        return "\n".join(written.read().decode(errors="replace").splitlines()[-TAIL_LINES:])


def image_ids(node: str, name: str) -> set[str]:
    """What a node's image of a name may be called: by its configuration, or by its manifest."""
    whole, inside = pulling.whole_name(name), [engine.docker(), "exec", node]
    template = ("-o", "go-template", "--template", "{{.status.id}}")
    by_configuration = read([*inside, "crictl", "inspecti", *template, whole], env=engine.environment())
    listed = ["ctr", "--namespace", "k8s.io", "images", "list", f"name=={whole}"]
    by_manifest = (read([*inside, *listed], env=engine.environment()) or "").splitlines()[1:]
    return {*(by_configuration or "").split(), *(word for line in by_manifest for word in line.split()[2:3])}


def _drop_replaced(nodes: Iterable[str]) -> None:
    """Remove images that lost their name to a newer one: a trainer that nobody can name any more holds gigabytes."""
    for node in nodes:
        ctr = [engine.docker(), "exec", node, "ctr", "--namespace", "k8s.io", "images"]
        listed = read([*ctr, "list", "--quiet"], env=engine.environment()) or ""
        nameless = [name for name in listed.split() if name.startswith("docker.io/library/import-")]
        if nameless:
            read([*ctr, "remove", *nameless], env=engine.environment())
