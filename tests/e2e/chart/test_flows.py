"""Every flow of docs/network.md, tried on the cluster, and flows that must not be."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import GPU_NODE, MONITORING, OTHER_NODE, namespace

IMAGE = "heimdall/contract:dev"
SERVE = "import http.server as s; s.ThreadingHTTPServer(('', 29400), s.SimpleHTTPRequestHandler).serve_forever()"
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=4).close()
except socket.gaierror:
    sys.exit(8)
except OSError:
    sys.exit(7)
"""
OPEN, CLOSED = 0, 7
DIAL = ("timeout", "5", "bash", "-c", "exec 3<>/dev/tcp/$0/$1")
"""Opens a connection with what is in every image: the official ones of PostgreSQL and MinIO have no Python."""
DIAL_REFUSED, DIAL_TIMED_OUT = 1, 124
SETTLE_S = 60.0
"""How long a network takes at most to hear of a pod or a policy."""
TRAINING = {
    "app.kubernetes.io/managed-by": "heimdall-operator",
    "training.heimdall.dev/run": "flow-probe",
    "training.heimdall.dev/uid": "00000000-0000-4000-8000-000000000000",
    "training.heimdall.dev/attempt": "1",
}
PROBES: dict[str, dict[str, str]] = {
    "trainer": TRAINING,
    "trainer2": TRAINING,
    "recorder": {"training.heimdall.dev/access": "recordings"},
    "stranger": {"app": "stranger"},
}
ELSEWHERE: dict[str, dict[str, str]] = {"prometheus": {"app": "prometheus"}, "trainer elsewhere": TRAINING}
"""Probes of another namespace, whose pods no policy of the chart chooses."""
ON_GPU_NODE = "trainer2"
"""The workers of a group may be on several nodes."""
CONTROL_PLANE = "heimdall-control-plane"
"""The node of the API server, which listens at its address too: one outside the network of the pods."""


def pod_of(name: str) -> str:
    """A probe's pod."""
    return f"flow-{name.replace(' ', '-')}"


def probe(name: str, labels: dict[str, str]) -> dict[str, Any]:
    """A pod that listens where workers of a group do, and that one can ask from."""
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod_of(name), "labels": {**labels, "flow": pod_of(name)}},
        "spec": {
            "nodeSelector": {"kubernetes.io/hostname": GPU_NODE if name == ON_GPU_NODE else OTHER_NODE},
            "terminationGracePeriodSeconds": 0,
            "automountServiceAccountToken": False,
            "enableServiceLinks": False,
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                {"name": "c", "image": IMAGE, "command": ["python3", "-c", SERVE], "securityContext": security}
            ],
        },
    }


@dataclass(frozen=True)
class Network:
    """The release with probes beside it."""

    release: Cluster
    monitoring: Cluster

    def ask(self, source: str, target: str, port: int) -> bool:
        """Whether a source opens a connection; a name is resolved by the source itself."""
        where, pod = self.place(source)
        command = ("kubectl", "-n", where.namespace, "exec", pod, "--", "python3", "-c", CONNECT)
        done = self.release.run(*command, self.address(target), str(port), check=False)
        assert done.returncode in (OPEN, CLOSED), f"{source} could not even try: {done.stderr}"
        return done.returncode == OPEN

    def dial(self, pod: str, address: str, port: int) -> bool:
        """Whether a pod of the release's namespace opens a connection to an address."""
        command = ("kubectl", "-n", self.release.namespace, "exec", pod, "--", *DIAL, address, str(port))
        done = self.release.run(*command, check=False)
        assert done.returncode in (OPEN, DIAL_REFUSED, DIAL_TIMED_OUT), f"{pod} could not even try: {done.stderr}"
        return done.returncode == OPEN

    def place(self, source: str) -> tuple[Cluster, str]:
        if source in ELSEWHERE:
            return self.monitoring, pod_of(source)
        if source in PROBES:
            return self.release, pod_of(source)
        return self.release, f"deploy/heimdall-{source}"

    def address(self, target: str) -> str:
        """Services by name; what has none by the address of its pod."""
        if target in ("tracking", "database", "object-store"):
            return f"heimdall-{target}.{self.release.namespace}.svc"
        if target == "API server":
            return "kubernetes.default.svc"
        if target == "DNS":
            return "kube-dns.kube-system.svc"
        if target == CONTROL_PLANE:
            path = 'jsonpath={.status.addresses[?(@.type=="InternalIP")].address}'
            return self.release.kubectl("get", "node", target, "-o", path).split()[0]
        is_probe = target in (*PROBES, *ELSEWHERE)
        selector = f"flow={pod_of(target)}" if is_probe else f"app.kubernetes.io/component={target}"
        where = self.monitoring if target in ELSEWHERE else self.release
        return where.kubectl("get", "pods", "-l", selector, "-o", "jsonpath={.items[0].status.podIP}")


@pytest.fixture(scope="module")
def network(release: Cluster) -> Iterator[Network]:
    with namespace(release, MONITORING) as monitoring:
        try:
            for where, probes in ((monitoring, ELSEWHERE), (release, PROBES)):
                for name, labels in probes.items():
                    where.apply(probe(name, labels))
            for where in (release, monitoring):
                where.kubectl("wait", "--for=condition=Ready", "pod", "-l", "flow", "--timeout=120s")
            yield Network(release, monitoring)
        finally:
            release.kubectl("delete", "pods", "-l", "flow", "--ignore-not-found", "--timeout=60s")


Flow = tuple[str, str, int]
"""Source, target and port."""
ALLOWED: list[Flow] = [
    *(("operator", target, port) for target, port in (("tracking", 5000), ("API server", 443), ("DNS", 53))),
    ("operator", CONTROL_PLANE, 6443),
    *(("tracking", target, port) for target, port in (("database", 5432), ("object-store", 9000), ("DNS", 53))),
    *(("trainer", target, port) for target, port in (("tracking", 5000), ("database", 5432), ("object-store", 9000))),
    *(("trainer", target, port) for target, port in (("trainer2", 29400), ("DNS", 53))),
    *(("recorder", target, port) for target, port in (("database", 5432), ("object-store", 9000))),
    ("prometheus", "operator", 8081),
    # The operator watches every namespace: its training pods are let in from all.
    *(("trainer elsewhere", target, port) for target, port in (("tracking", 5000), ("object-store", 9000))),
]
REFUSED: list[Flow] = [
    *(("operator", target, port) for target, port in (("database", 5432), ("object-store", 9000), ("trainer", 29400))),
    *(("tracking", target, port) for target, port in (("API server", 443), ("operator", 8081), ("trainer", 29400))),
    *(("trainer", target, port) for target, port in (("API server", 443), ("operator", 8081), ("stranger", 29400))),
    *(("trainer", target, port) for target, port in ((CONTROL_PLANE, 6443), ("trainer elsewhere", 29400))),
    ("trainer elsewhere", "trainer", 29400),
    *(("stranger", target, port) for target, port in (("tracking", 5000), ("database", 5432), ("object-store", 9000))),
    *(("stranger", target, port) for target, port in (("operator", 8081), ("operator", 8080), ("trainer", 29400))),
    ("recorder", "tracking", 5000),
    *(("prometheus", target, port) for target, port in (("tracking", 5000), ("database", 5432), ("operator", 8080))),
    ("prometheus", "object-store", 9000),
]


@pytest.fixture(scope="module")
def tried(network: Network) -> Iterator[dict[Flow, Future[bool]]]:
    """All flows, tried beside each other: that one is refused is known when the time to answer is over."""

    def settle(flow: Flow, opens: bool) -> bool:
        what = f"{flow[1]} {'open' if opens else 'closed'} to {flow[0]}"

        troubles: list[str] = []

        def look() -> bool:
            try:
                # One that does not come through may just have been slow.
                return network.ask(*flow) == opens and (opens or not network.ask(*flow))
            except AssertionError as error:  # a name that is not resolved yet
                troubles[:] = [str(error)]
                return False

        return wait_for(look, what=what, timeout_s=SETTLE_S, tell=lambda: "".join(troubles))

    with ThreadPoolExecutor(8) as pool:
        wanted = {**dict.fromkeys(ALLOWED, True), **dict.fromkeys(REFUSED, False)}
        yield {flow: pool.submit(settle, flow, opens) for flow, opens in wanted.items()}


@pytest.mark.parametrize("flow", ALLOWED, ids=lambda flow: "-".join(map(str, flow)))
def test_what_is_needed_is_let_through(tried: dict[Flow, Future[bool]], flow: Flow) -> None:
    assert tried[flow].result()


@pytest.mark.parametrize("flow", REFUSED, ids=lambda flow: "-".join(map(str, flow)))
def test_what_nobody_needs_is_refused(tried: dict[Flow, Future[bool]], flow: Flow) -> None:
    assert tried[flow].result()


@pytest.mark.parametrize(("role", "port"), [("database", 5432), ("object-store", 9000)])
def test_what_keeps_data_begins_no_connection(network: Network, role: str, port: int) -> None:
    """To a pod that no policy keeps anybody out of: so it is the policy of this end that stops them."""
    open_to_all, keeper = network.address("stranger"), f"heimdall-{role}-0"
    assert network.dial("flow-recorder", open_to_all, 29400), "the same words from elsewhere get there"
    assert network.dial(keeper, "127.0.0.1", port), "the same words from here reach what is here"
    wait_for(
        lambda: not network.dial(keeper, open_to_all, 29400),
        what=f"{open_to_all} closed to {keeper}",
        timeout_s=SETTLE_S,
    )
