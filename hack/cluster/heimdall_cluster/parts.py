"""Parts: programs built from Go modules, once, into the cache.

Each part is a go.mod with a `tool` block; its go.sum holds the checksums of everything that goes into it. A tool may be
our own program beside the go.mod. A stamp beside the binaries tells what they were built from and their own checksums.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from heimdall_cluster.folders import link, scratch
from heimdall_cluster.paths import BIN, GO, LOGS, PARTS, PARTS_SOURCE
from heimdall_cluster.steps import ClusterError, read, run, step

KUBERNETES_VERSION: Final = "v1.37.2"
_VERSION: Final = "k8s.io/component-base/version"


@dataclass(frozen=True)
class Part:
    """A Go module of tools."""

    name: str
    binaries: tuple[str, ...]
    rename: tuple[tuple[str, str], ...] = ()
    """Binaries whose package has an unhelpful name."""
    ldflags: str = ""


def _part(name: str, *binaries: str, **more: object) -> tuple[str, Part]:
    return name, Part(name, binaries or (name,), **more)  # type: ignore[arg-type]


CATALOGUE: Final = dict(
    [
        _part("kind"),
        _part("helm"),
        _part("kubeconform"),
        _part("gitops-health"),
        _part("argo-health"),
        _part("minio", "minio", "mc"),
        _part("versitygw"),
        _part("kueue"),
        _part("registry"),
        _part("buildx"),
        _part("compose", "docker-compose", rename=(("cmd", "docker-compose"),)),
        _part("containerd", "containerd", "containerd-shim-runc-v2", "ctr"),
        _part("crictl"),
        _part("cni-plugins", "bridge", "host-local", "loopback", "portmap", "ptp"),
        _part("etcd", rename=(("server", "etcd"),)),
        _part("coredns"),
        _part("local-path-provisioner"),
        _part("kube-router"),
        _part(
            "kubernetes",
            *("kubeadm", "kubelet", "kubectl"),
            *("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy"),
            ldflags=f"-X {_VERSION}.gitVersion={KUBERNETES_VERSION} -X {_VERSION}.gitMajor=1 -X {_VERSION}.gitMinor=37",
        ),
    ]
)
NODE_PARTS: Final = (
    *("kubernetes", "containerd", "crictl", "cni-plugins"),
    *("etcd", "coredns", "local-path-provisioner", "kube-router"),
)
ON_PATH: Final = {name: (name,) for name in ("kind", "helm", "kubeconform", "gitops-health", "argo-health")} | {
    "compose": ("docker-compose",),
    "minio": ("minio", "mc"),
    "kubernetes": ("kubectl",),
}
"""Which binaries of which part are put on the user's PATH."""


def ensure(names: Iterable[str]) -> None:
    """Build the parts that are not there yet.

    Args:
        names: Their names in the catalogue.

    Raises:
        ClusterError: Go is missing, or a build failed.
    """
    wanted = list(names)
    for name in wanted:
        if name not in CATALOGUE:
            raise ClusterError(f"there is no part {name!r}; there are {', '.join(CATALOGUE)}")
    lacking = [CATALOGUE[name] for name in wanted if not is_built(CATALOGUE[name])]
    with ThreadPoolExecutor(1) as ahead:
        # A build keeps the processors busy, a download the network: the next part's modules come meanwhile.
        downloads = {part.name: ahead.submit(_download, part) for part in lacking}
        try:
            for part in lacking:
                with step(f"building {part.name} from Go modules"):
                    downloads[part.name].result()
                    _build(part)
        finally:
            ahead.shutdown(wait=False, cancel_futures=True)
    for name in wanted:
        _put_on_path(CATALOGUE[name])


def path_of(name: str, binary: str | None = None) -> Path:
    """Where a part's binary lies."""
    return PARTS / name / (binary or CATALOGUE[name].binaries[0])


def fingerprint(part: Part) -> str:
    """What a part is built from, as a checksum."""
    source = PARTS_SOURCE / part.name
    digest = hashlib.sha256()
    for file in sorted(source.iterdir()):
        digest.update(file.read_bytes())
    digest.update(repr((part.binaries, part.rename, part.ldflags)).encode())
    return digest.hexdigest()


def is_built(part: Part) -> bool:
    """Whether a part's binaries are there, whole, and of this version."""
    stamp = PARTS / part.name / "stamp.json"
    try:
        data = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return False
    if data.get("source") != fingerprint(part):
        return False
    return all(_size(PARTS / part.name / name) == size for name, (size, _) in data["binaries"].items())


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _download(part: Part) -> None:
    """Fetch the modules that a part's packages lie in. Where that fails, the build says so."""
    go = shutil.which("go")
    if go is not None:
        read([go, "-C", str(PARTS_SOURCE / part.name), "list", "-deps", "tool"], env=go_environment(), timeout_s=900)


def _build(part: Part) -> None:
    go = shutil.which("go")
    if go is None:
        raise ClusterError(
            "Go is missing: install Go 1.26 or newer (https://go.dev/dl), or a Docker that can pull images"
        )
    source, target, fresh = PARTS_SOURCE / part.name, PARTS / part.name, PARTS / f"{part.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    env = go_environment()
    tools = read([go, "-C", str(source), "list", "-f", "{{.ImportPath}}", "tool"], env=env, timeout_s=600)
    if not tools:
        raise ClusterError(f"the modules of {part.name} can't be loaded: is the Go module proxy reachable?")
    ldflags = f"-s -w {part.ldflags}".strip()
    run(
        [go, "-C", source, "build", "-ldflags", ldflags, "-o", f"{fresh}/", *tools.split()],
        log=LOGS / f"{part.name}.log",
        env=env,
    )
    for old, new in part.rename:
        (fresh / old).rename(fresh / new)
    binaries = {name: (_size(fresh / name), _sha256(fresh / name)) for name in part.binaries}
    (fresh / "stamp.json").write_text(json.dumps({"source": fingerprint(part), "binaries": binaries}, indent=1))
    shutil.rmtree(target, ignore_errors=True)
    fresh.rename(target)


def go_environment() -> dict[str, str]:
    """Go's caches lie in ours, so that they can be removed when everything is built."""
    return {
        "GOCACHE": str(GO / "build"),
        "GOMODCACHE": str(GO / "mod"),
        "CGO_ENABLED": "0",
        "GOFLAGS": "-mod=readonly -trimpath -buildvcs=false",
    }


def drop_go_caches() -> None:
    """Remove Go's caches: 14 GB that nothing needs once all parts are built."""
    if not GO.exists():
        return
    with step("removing Go's caches"), scratch() as doomed:
        # First out of Go's sight: it would take for whole what a call that is killed leaves of a module.
        GO.rename(doomed / GO.name)


def module_dir(module: str, part: str) -> Path:
    """Where a module's source lies in the module cache."""
    found = read(
        ["go", "-C", str(PARTS_SOURCE / part), "list", "-m", "-f", "{{.Dir}}", module],
        env=go_environment(),
        timeout_s=300,
    )
    if found is None or not found.strip():
        run(
            ["go", "-C", PARTS_SOURCE / part, "mod", "download", module], log=LOGS / f"{part}.log", env=go_environment()
        )
        found = read(
            ["go", "-C", str(PARTS_SOURCE / part), "list", "-m", "-f", "{{.Dir}}", module], env=go_environment()
        )
    if found is None or not found.strip():
        raise ClusterError(f"the source of {module} can't be loaded: is the Go module proxy reachable?")
    return Path(found.strip())


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _put_on_path(part: Part) -> None:
    for name in ON_PATH.get(part.name, ()):
        link(BIN / name, PARTS / part.name / name)
