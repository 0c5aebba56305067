"""Pulling: each image is asked for by itself, since a mirror has some and not others; what none gives is built."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Final

from heimdall_cluster import engine
from heimdall_cluster.paths import LOGS
from heimdall_cluster.steps import held, say, step

ANSWER_TIMEOUT_S: Final = 20
"""How long a registry may take to say that it has an image: one that a firewall hides never does."""
NEXT_ANSWER_TIMEOUT_S: Final = 5
"""The same of a registry that kept silent before: a mirror of it may have another image."""
PULL_TIMEOUT_S: Final = 1800
REASON_CHARS: Final = 200

silent: set[str] = set()
"""Registries that gave no answer in time."""


class _NotPulledError(Exception):
    """An image can't be pulled; the message says why."""


def pull(image: str) -> bool:
    """Pull an image, and say why where that can't be done.

    Args:
        image: Its name.

    Returns:
        Whether the engine has it now.
    """
    try:
        with step(f"pulling {image}"):
            _pull(image)
    except _NotPulledError as error:
        say(f"  {image} can't be pulled: {error}")
        return False
    return True


def whole_name(name: str) -> str:
    """An image's name with its registry: Docker leaves its own out."""
    first = name.split("/", 1)[0]
    return name if "." in first or ":" in first or first == "localhost" else f"docker.io/{name}"


def _pull(image: str) -> None:
    registry = whole_name(image).split("/", 1)[0]
    patience_s = NEXT_ANSWER_TIMEOUT_S if registry in silent else ANSWER_TIMEOUT_S
    with subprocess.Popen(
        [engine.docker(), "pull", image],
        env={**os.environ, **engine.environment()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=held,
    ) as client:
        assert client.stdout is not None
        # The first line comes when a registry has told what the image is made of; what follows takes its time.
        with _killed_after(client, patience_s):
            answer = client.stdout.readline()
        with _killed_after(client, PULL_TIMEOUT_S):
            said, errors = client.communicate()
    LOGS.mkdir(parents=True, exist_ok=True)
    with (LOGS / "images.log").open("a") as log:
        log.write(f"$ docker pull {image}\n{answer}{said}{errors}")
    if client.returncode == 0:
        return
    if client.returncode < 0 and not answer:
        silent.add(registry)
        raise _NotPulledError(f"no registry answered within {patience_s} s")
    if client.returncode < 0:
        raise _NotPulledError(f"it took longer than {PULL_TIMEOUT_S} s")
    reason = (errors.strip() or "docker pull failed").splitlines()[-1]
    raise _NotPulledError(reason.removeprefix("Error response from daemon: ")[:REASON_CHARS])


@contextmanager
def _killed_after(client: subprocess.Popen[str], timeout_s: float) -> Iterator[None]:
    """Kill a client that is not done in time; the engine gives up what it does for it."""
    timer = Timer(timeout_s, client.kill)
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
