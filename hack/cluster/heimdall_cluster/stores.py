"""Image stores: what the workers' containerd holds, kept over clusters, so that a new one isn't given gigabytes anew.

Only under our own engine and with a node image of our own: elsewhere the nodes' files are not ours to lay out. To
containerd a new cluster is its machine started again; what pods of the last one left is removed by the kubelet.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Final

from heimdall_cluster import engine, images
from heimdall_cluster.paths import ENGINE, LOGS
from heimdall_cluster.steps import run, step

STORES: Final = ENGINE / "stores"
CONTAINERD: Final = "/var/lib/containerd"
SEED_TIMEOUT_S: Final = 300


def ensure(node_image: str, nodes: tuple[str, ...]) -> dict[str, Path]:
    """Make sure that each node has a store that fits its image.

    Args:
        node_image: The image of kind's nodes; a store that began from another one is dropped.
        nodes: Names of the nodes.

    Returns:
        The folder of each node's store.
    """
    image_id = images.inspect(node_image, "{{.Id}}") or ""
    stores = {node: STORES / node for node in nodes}
    for node, folder in stores.items():
        seed = folder.with_suffix(".seed")
        if seed.exists() and seed.read_text() == image_id:
            continue
        with step(f"beginning the image store of {node}"):
            seed.unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)  # a copy that goes on after its call was killed makes it anew
            # The mount hides what the node image brings along: the store begins with it.
            copy = ("--entrypoint", "cp", node_image, "-a", f"{CONTAINERD}/.", "/store/")
            command = [engine.docker(), "run", "--rm", "--network", "none", "--volume", f"{folder}:/store", *copy]
            run(command, log=LOGS / "kind.log", env=engine.environment(), timeout_s=SEED_TIMEOUT_S)
            seed.write_text(image_id)
    return stores


def exist() -> bool:
    """Whether anything is kept."""
    return STORES.exists()


def drop() -> None:
    """Keep nothing: the next cluster begins anew."""
    with step("dropping the image stores of earlier clusters"):
        shutil.rmtree(STORES, ignore_errors=True)
