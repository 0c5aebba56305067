"""Images: pulled where a registry has them; otherwise stand-ins built from Debian packages and Go modules."""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Final

from heimdall_cluster import engine, parts
from heimdall_cluster.folders import scratch
from heimdall_cluster.parts import KUBERNETES_VERSION
from heimdall_cluster.paths import IMAGES_SOURCE, LOGS, PARTS
from heimdall_cluster.pulling import pull, whole_name
from heimdall_cluster.steps import ClusterError, TooLongError, read, run, step

DEBIAN: Final = "heimdall/debian:bookworm"
PYTHON: Final = "python:3.11-slim-bookworm"
NETWORK_TOOLS: Final = "heimdall/network-tools:bookworm"
NODE_BASE: Final = "heimdall/kind-base:dev"
NODE_NAME: Final = "heimdall/kind-node"
OURS: Final = "dev.heimdall.image"
"""On every image that is built here: its name. What others build on it has the label too, but not the name."""
ARCHITECTURE: Final = {"aarch64": "arm64", "arm64": "arm64"}.get(platform.machine(), "amd64")
KUBE_ROUTER: Final = "docker.io/heimdall/kube-router:v2.1.0"
SUITE: Final = "bookworm"
CA_BUNDLE: Final = Path("/etc/ssl/certs/ca-certificates.crt")
KINDS_NODE: Final = re.compile(rb"kindest/node:v[0-9.]+@sha256:[0-9a-f]{64}")
STAND_INS: Final = "HEIMDALL_STAND_INS"
"""Variable that has official images built in any engine where they can't be pulled, as in our own."""
PROXIES: Final = ("http_proxy", "https_proxy", "no_proxy")
INDEXES: Final = ("PIP_INDEX_URL", "UV_DEFAULT_INDEX")
LOOPBACK: Final = re.compile(r"(\w+://)?([^@/]*@)?(localhost|127(\.\d+)+|\[::1\])(:\d+)?(/.*)?")
KUBE_BINARIES: Final = ("kube-apiserver", "kube-controller-manager", "kube-scheduler", "kube-proxy")


def exists(image: str) -> bool:
    """Whether the engine has an image."""
    return inspect(image, "{{.Id}}") is not None


def inspect(image: str, template: str) -> str | None:
    """A property of an image, or None where the engine has none."""
    command = [engine.docker(), "image", "inspect", "--format", template, image]
    found = read(command, env=engine.environment())
    return found.strip() if found else None


def label(name: str) -> str:
    """The template of a label's value."""
    return f'{{{{index .Config.Labels "{name}"}}}}'


def docker(*arguments: str | Path, log: str, text: str | None = None) -> None:
    """Run the Docker client with its output in a log file."""
    run(
        [engine.docker(), *arguments],
        log=LOGS / f"{log}.log",
        env={**engine.environment(), "DOCKER_BUILDKIT": "1"},
        text=text,
    )


def ensure_python() -> None:
    """Make sure that the base image of the project's own images is there."""
    if exists(PYTHON) or pull(PYTHON):
        return
    require_stand_ins(PYTHON)
    engine.require_builder(PYTHON)
    _ensure_debian()
    with step(f"building a stand-in for {PYTHON} from Debian packages"):
        _build_own(PYTHON, "python")


def require_stand_ins(image: str) -> None:
    """Make sure that an official name may be given to what is built here.

    In somebody's own engine it would stay when a registry that was away for a moment is back, for all that they do.

    Args:
        image: What could not be pulled.

    Raises:
        ClusterError: The engine is not ours, and nobody has asked for it.
    """
    if engine.environment() or os.environ.get(STAND_INS):
        return
    raise ClusterError(
        f"{image} can't be pulled, for the reason above: call again when docker pull {image} works. A Docker that was "
        f"there gets a stand-in of that name only where {STAND_INS}=1 is set"
    )


def build(image: str, *arguments: str | Path, text: str | None = None) -> None:
    """Build an image.

    Args:
        image: Its name.
        arguments: Of `docker build`.
        text: Standard input.
    """
    named = ("--quiet", "--tag", image, "--label", f"{OURS}={image}")
    try:
        docker("build", *named, *_way_out(), *arguments, log="images", text=text)
    except TooLongError as error:
        raise ClusterError(f"{error}. Call again: it goes on from the layers that are done") from error


def _way_out() -> list[str]:
    """Options that tell a build of this machine's proxy and package index; the image keeps neither.

    Docker knows a proxy's variables by itself; those of the index are declared in a stage that is left behind. What is
    at the loopback address no build's container reaches.
    """
    names = [*PROXIES, *map(str.upper, PROXIES), *INDEXES]
    told = [name for name in names if (value := os.environ.get(name)) and not LOOPBACK.fullmatch(value)]
    return [word for name in told for word in ("--build-arg", name)]


def _build_own(image: str, folder: str, *, context: Path | None = None) -> None:
    """Build an image from a folder of `images/`, or with its Dockerfile from another context."""
    source = IMAGES_SOURCE / folder
    build(image, "--file", source / "Dockerfile", context or source)


def _ensure_debian() -> None:
    if exists(DEBIAN):
        return
    with step("making a Debian base image with debootstrap"), scratch() as folder:
        tree, archive = folder / "tree", folder / "tree.tar"
        run(
            ["debootstrap", "--variant=minbase", "--include=ca-certificates", SUITE, tree], log=LOGS / "debootstrap.log"
        )
        shutil.rmtree(tree / "var/cache/apt/archives", ignore_errors=True)
        shutil.rmtree(tree / "var/lib/apt/lists", ignore_errors=True)
        if CA_BUNDLE.exists():
            # What this host trusts, containers that are built here must trust too.
            shutil.copyfile(CA_BUNDLE, tree / CA_BUNDLE.relative_to("/"))
        run(["tar", "-C", tree, "-cf", archive, "."], log=LOGS / "debootstrap.log")
        changes = [f"--change=ENV {name}={CA_BUNDLE}" for name in ("SSL_CERT_FILE", "PIP_CERT")]
        docker("import", *changes, "--change=ENV UV_SYSTEM_CERTS=1", archive, DEBIAN, log="images")


# --- the node image ----------------------------------------------------------------------------------------------


def ensure_node() -> str | None:
    """Make sure that a node image is there.

    Returns:
        Its name; None where it is kind's own.
    """
    node = node_name()
    if exists(node):
        return node
    kinds = kinds_node()
    if exists(kinds) or pull(kinds):
        return None
    engine.require_builder(kinds)
    parts.ensure(["kind", *parts.NODE_PARTS])
    _ensure_debian()
    with scratch() as folder:
        with step("building the images of Kubernetes' own parts"):
            if not exists(NETWORK_TOOLS):
                _build_own(NETWORK_TOOLS, "network-tools")
            tarball = _server_tarball(folder)
        with step("building kind's base image"):
            _build_node_base()
        with step("building the node image"):
            kind, made_of = parts.path_of("kind"), ("--type", "file", tarball, "--base-image", NODE_BASE)
            # kind leaves what it unpacks, 1 GB, in the folder for temporary files.
            env = {**client_environment(), "TMPDIR": str(folder)}
            run([kind, "build", "node-image", *made_of, "--image", node], log=LOGS / "node-image.log", env=env)
            _remove([NODE_BASE, *(name for name in _listed(NODE_NAME) if name != node)])
    return node


def node_name() -> str:
    """The node image, named after all that it is made of: of other parts, another one is made."""
    digest = hashlib.sha256()
    for name in ("kind", *parts.NODE_PARTS):
        digest.update(parts.fingerprint(parts.CATALOGUE[name]).encode())
    for file in sorted(path for path in IMAGES_SOURCE.rglob("*") if path.is_file()):
        digest.update(file.read_bytes())
    return f"{NODE_NAME}:{KUBERNETES_VERSION}-{digest.hexdigest()[:12]}"


def kinds_node() -> str:
    """The node image that kind takes where it is told of no other; its program holds the name."""
    parts.ensure(["kind"])
    found = KINDS_NODE.search(parts.path_of("kind").read_bytes())
    if found is None:
        raise ClusterError("kind does not tell which node image it takes")
    return found[0].decode()


def has_pulled_node() -> bool:
    """Whether the engine that was there has the node image that kind takes: which one, only kind itself tells."""
    if not parts.is_built(parts.CATALOGUE["kind"]):
        return False
    return bool(read(["docker", "image", "inspect", "--format", "{{.Id}}", kinds_node()]))


def remove_ours() -> None:
    """Remove every image that was built here from an engine that is not ours; what was pulled stays."""
    command = [engine.docker(), "image", "ls", "--quiet", "--no-trunc", "--filter", f"label={OURS}"]
    labelled = {each: inspect(each, label(OURS)) for each in (read(command, env=engine.environment()) or "").split()}
    built = {name for each, name in labelled.items() if name and inspect(name, "{{.Id}}") == each}
    # What debootstrap and kind have made carries no label.
    _remove({*built, *_listed(DEBIAN), *_listed(NODE_NAME)})


def _listed(reference: str) -> list[str]:
    command = [engine.docker(), "image", "ls", "--format", "{{.Repository}}:{{.Tag}}", reference]
    return (read(command, env=engine.environment()) or "").split()


def _remove(names: Iterable[str]) -> None:
    for name in names:
        read([engine.docker(), "image", "rm", name], env=engine.environment())


def client_environment() -> dict[str, str]:
    """What kind must be told to find engine and client."""
    path = f"{Path(engine.docker()).parent}:{os.environ.get('PATH', '')}"
    return {**engine.environment(), "PATH": path}


def _build_node_base() -> None:
    """What kind's own base image does after its packages, with our binaries."""
    source = parts.module_dir("sigs.k8s.io/kind", "kind") / "images/base/files"
    with scratch() as context:
        shutil.copytree(source, context / "files")
        for folder, part in {"bin": "containerd", "cni": "cni-plugins"}.items():
            shutil.copytree(PARTS / part, context / folder, ignore=shutil.ignore_patterns("stamp.json"))
        shutil.copy(parts.path_of("crictl"), context / "bin")
        config = context / "files/etc/containerd/config.toml"
        config.chmod(0o644)
        text = config.read_text()
        if not engine.has_capability(engine.CAP_SYS_RESOURCE):
            # Lowering a process's out-of-memory score needs the capability that this host lacks.
            text = text.replace("restrict_oom_score_adj = false", "restrict_oom_score_adj = true")
        config.write_text(text)
        _build_own(NODE_BASE, "kind-base", context=context)


def _server_tarball(target_folder: Path) -> Path:
    """What kind takes for a Kubernetes release: binaries, and an image archive for each part."""
    target = target_folder / "kubernetes-server.tar.gz"
    images = wanted_images()
    with scratch() as folder, tarfile.open(target, "w:gz", compresslevel=1) as tar:
        _add_text(tar, "kubernetes/version", KUBERNETES_VERSION)
        for binary in ("kubeadm", "kubelet", "kubectl"):
            tar.add(parts.path_of("kubernetes", binary), f"kubernetes/server/bin/{binary}")
        for binary in KUBE_BINARIES:
            image = f"registry.k8s.io/{binary}-{ARCHITECTURE}:{KUBERNETES_VERSION}"
            base = NETWORK_TOOLS if binary == "kube-proxy" else "scratch"
            build_binary(image, parts.path_of("kubernetes", binary), base=base)
            # What no archive names, kind would pull: so the last one holds everything else too.
            extra = _build_extras(images) if binary == "kube-proxy" else []
            archive = folder / f"{binary}.tar"
            docker("save", "--output", archive, image, *extra, log="images")
            rewritten = folder / f"{binary}.new"
            rewrite_archive(archive, rewritten)
            tar.add(rewritten, f"kubernetes/server/bin/{binary}.tar")
    return target


def wanted_images() -> list[str]:
    """Every image that kubeadm and kind ask for beside Kubernetes' own."""
    kubeadm = parts.path_of("kubernetes", "kubeadm")
    listed = read([kubeadm, "config", "images", "list", "--kubernetes-version", KUBERNETES_VERSION]) or ""
    source = parts.module_dir("sigs.k8s.io/kind", "kind")
    kinds = []
    for file in sorted((source / "pkg/build/nodeimage").glob("const_*.go")):
        kinds += [word.strip('"') for word in file.read_text().split() if word.startswith('"docker.io/kindest/')]
    config = (source / "images/base/files/etc/containerd/config.toml").read_text()
    pause = next(line.split('"')[1] for line in config.splitlines() if "sandbox_image" in line)
    others = [image for image in listed.split() if not any(name in image for name in KUBE_BINARIES)]
    if not others or not kinds:
        raise ClusterError("kubeadm or kind did not tell which images they need")
    return sorted({*others, *kinds, pause, KUBE_ROUTER})


def _build_extras(images: list[str]) -> list[str]:
    binaries = {
        "etcd": ("etcd", "scratch"),
        "coredns": ("coredns", "scratch"),
        "local-path-provisioner": ("local-path-provisioner", NETWORK_TOOLS),
        "kube-router": ("kube-router", NETWORK_TOOLS),
    }
    for image in images:
        name = image.rsplit("/", 1)[1].split(":")[0]
        if name in binaries:
            part, base = binaries[name]
            build_binary(image, parts.path_of(part), base=base)
        else:
            # pause waits for a signal; the helper needs a shell; kindnetd is named, but not used.
            build(image, "-", text=WAITING)
    return images


_WAIT_SCRIPT: Final = 'trap "exit 0" TERM INT; while :; do sleep 3600 & wait $!; done'
WAITING: Final = f"FROM {NETWORK_TOOLS}\nENTRYPOINT {json.dumps(['/bin/sh', '-c', _WAIT_SCRIPT])}\n"


def build_binary(image: str, binary: Path, *, base: str) -> None:
    """Build an image that holds one static binary on its PATH."""
    with scratch() as context:
        shutil.copy(binary, context / binary.name)
        (context / "Dockerfile").write_text(
            f"FROM {base}\n"
            "ENV PATH=/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n"
            f"COPY {binary.name} /usr/local/bin/{binary.name}\n"
            f'ENTRYPOINT ["/usr/local/bin/{binary.name}"]\n'
        )
        build(image, context)


def rewrite_archive(source: Path, target: Path) -> None:
    """Put an image archive's `repositories` first, with whole names.

    kind reads names from whichever of `repositories` and `manifest.json` comes first, and of the latter only the
    first image; and it compares them with names that begin with their registry.
    """
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        listed = old.extractfile("repositories")
        if listed is None:
            raise ClusterError(f"{source} is no image archive")
        names = {whole_name(name): tags for name, tags in json.load(listed).items()}
        _add_text(new, "repositories", json.dumps(names))
        for member in old.getmembers():
            if member.name == "repositories":
                continue
            content: IO[bytes] | None = old.extractfile(member) if member.isfile() else None
            new.addfile(member, content)


def _add_text(tar: tarfile.TarFile, name: str, text: str) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(text.encode())
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(text.encode()))
