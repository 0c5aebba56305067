"""The parts that are built beside Kubernetes: they share what Go has compiled for it."""

from __future__ import annotations

import re

import pytest

from heimdall_cluster.parts import CATALOGUE
from heimdall_cluster.paths import PARTS_SOURCE

SHARING = ("helm", "buildx", "etcd", "coredns", "local-path-provisioner", "kube-router")
NEWER = {"github.com/coredns/caddy", "github.com/go-errors/errors", "otelgrpc"}
"""What a part needs newer than Kubernetes; nothing else hangs on these."""


def versions(part: str) -> dict[str, str]:
    """The version of every module that a part's go.mod names, by its path."""
    lines = (PARTS_SOURCE / part / "go.mod").read_text().splitlines()
    pattern = re.compile(r"\t?(?:require |replace )?(\S+)(?: => \S+)? (v\S+)(?: // indirect)?")
    return {each[1]: each[2] for each in map(pattern.fullmatch, lines) if each}


@pytest.mark.parametrize("part", SHARING)
def test_a_part_shares_kubernetes_module_versions(part: str) -> None:
    wanted, own = versions("kubernetes"), versions(part)
    both = own.keys() & wanted.keys()

    assert len(both) > 40
    others = {module: (own[module], wanted[module]) for module in both if own[module] != wanted[module]}
    assert {module for module in others if not module.endswith(tuple(NEWER))} == set(), others


def test_every_part_has_its_modules() -> None:
    assert {folder.name for folder in PARTS_SOURCE.iterdir()} == CATALOGUE.keys()
