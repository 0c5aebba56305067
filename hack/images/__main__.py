"""`python3 hack/images build [NAME …]` makes the images of chart and tests; `list` names them.

The project's own are built; MLflow, PostgreSQL, MinIO, Redis, versitygw and Kueue are pulled, and those that no
registry gives are built from packages and Go modules under the same names: in the engine that the cluster's tool has
started, in another one only where HEIMDALL_STAND_INS is set. An image whose inputs have not changed is left alone.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "hack/cluster"))

from heimdall_cluster import engine, images, parts, pulling  # noqa: E402
from heimdall_cluster.cli import locked  # noqa: E402
from heimdall_cluster.steps import read, say, step, told  # noqa: E402

INPUTS: Final = "dev.heimdall.inputs"
"""Label of what is built here: a checksum of what it is made of."""
CACHE_KEPT_GB: Final = 26
"""Of layers, in our own engine: all images of one state of the code are built with 24."""
PRUNE_TIMEOUT_S: Final = 300


@dataclass(frozen=True)
class Image:
    """An image and what it is made of."""

    name: str
    reference: str
    dockerfile: str
    inputs: tuple[str, ...]
    official: bool = False
    """Whether the same name can be pulled where a registry has it."""
    part: str = ""
    """The part of the cluster's tool whose programs are all that the Dockerfile copies."""


CATALOGUE: Final = {
    image.name: image
    for image in (
        Image(
            "operator",
            "heimdall/operator:dev",
            "Dockerfile.operator",
            ("requirements/operator.txt", "requirements/bootstrap.txt", "api", "tracking", "operator"),
        ),
        Image(
            "trainer",
            "heimdall/trainer:dev",
            "Dockerfile.trainer",
            ("requirements/trainer.txt", "requirements/bootstrap.txt", "api", "tracking", "trainer"),
        ),
        Image(
            "contract",
            "heimdall/contract:dev",
            "images/contract/Dockerfile",
            ("requirements/contract.txt", "requirements/bootstrap.txt", "images/contract"),
        ),
        Image(
            "mlflow",
            "ghcr.io/mlflow/mlflow:v3.17.2-full",
            "images/mlflow/Dockerfile",
            ("requirements/mlflow-server.txt", "requirements/bootstrap.txt", "images/mlflow"),
            official=True,
        ),
        Image(
            "postgresql",
            "docker.io/library/postgres:15",
            "images/postgresql/Dockerfile",
            ("images/postgresql",),
            official=True,
        ),
        Image(
            "minio",
            "quay.io/minio/minio:RELEASE.2025-09-07T16-13-09Z",
            "images/minio/Dockerfile",
            ("images/minio", "hack/cluster/parts/minio"),
            official=True,
            part="minio",
        ),
        Image("redis", "docker.io/library/redis:7.4", "images/redis/Dockerfile", ("images/redis",), official=True),
        Image(
            "versitygw",
            "ghcr.io/versity/versitygw:v1.8.0",
            "images/versitygw/Dockerfile",
            ("images/versitygw", "hack/cluster/parts/versitygw"),
            official=True,
            part="versitygw",
        ),
        Image(
            "kueue",
            "registry.k8s.io/kueue/kueue:v0.17.0",
            "images/kueue/Dockerfile",
            ("images/kueue", "hack/cluster/parts/kueue"),
            official=True,
            part="kueue",
        ),
    )
}


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(prog="hack/images", description="Build or pull the images of chart and tests.")
    parser.add_argument("command", choices=["build", "list"])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(CATALOGUE)}; all by default")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - CATALOGUE.keys()
    if unknown:
        parser.error(f"there is no image {', '.join(sorted(unknown))}; there are {', '.join(CATALOGUE)}")
    engine.forget_environment()
    with told("hack/images"):
        if arguments.command == "list":
            for image in CATALOGUE.values():
                print(f"{image.name:12}{image.reference}")
            return
        with locked():
            engine.ensure()
        build(CATALOGUE[name] for name in arguments.names or CATALOGUE)


def build(wanted: Iterable[Image]) -> None:
    """Make images that are not there or not up to date."""
    for image in wanted:
        digest, label = inputs_digest(image), _label(image)
        # An official image without our label was pulled by somebody: it is what is wanted.
        if label == digest or (image.official and label == ""):
            continue
        before = _id(image)
        if not (image.official and pulling.pull(image.reference)):
            if image.official:
                images.require_stand_ins(image.reference)
            with locked():
                images.ensure_python()
            with step(f"building {image.reference}"):
                _build(image, digest)
            _bound_cache()
        _drop_replaced(image, before)
    say("images are up to date")


def inputs_digest(image: Image) -> str:
    """What an image is made of, as a checksum."""
    digest = hashlib.sha256()
    for path in (ROOT / name for name in (image.dockerfile, *image.inputs)):
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            if "__pycache__" in file.parts or any(part.endswith(".egg-info") for part in file.parts):
                continue
            digest.update(f"{file.relative_to(ROOT)}\0".encode())
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _label(image: Image) -> str | None:
    return images.inspect(image.reference, images.label(INPUTS))


def _id(image: Image) -> str | None:
    return images.inspect(image.reference, "{{.Id}}")


def _drop_replaced(image: Image, before: str | None) -> None:
    """Remove the image that lost its name: a trainer that nobody can name any more holds 6 GB."""
    if before is not None and before != _id(image):
        read([engine.docker(), "image", "rm", before], env=engine.environment())


def _bound_cache() -> None:
    """Forget layers that no build has used for long: those of a trainer with other packages take 13 GB."""
    if env := engine.environment():  # in somebody's own engine they are theirs to keep
        keep = ["--keep-storage", f"{CACHE_KEPT_GB}GB"]
        read([engine.docker(), "builder", "prune", "--force", *keep], env=env, timeout_s=PRUNE_TIMEOUT_S)


def _build(image: Image, digest: str) -> None:
    options = ("--label", f"{INPUTS}={digest}", "--file", ROOT / image.dockerfile)
    if not image.part:
        images.build(image.reference, *options, ROOT)
        return
    with locked():
        parts.ensure([image.part])
    with tempfile.TemporaryDirectory() as name:
        for program in parts.CATALOGUE[image.part].binaries:
            shutil.copy(parts.path_of(image.part, program), name)
        images.build(image.reference, *options, name)


if __name__ == "__main__":
    main()
