"""What the chart renders is what this cluster's own schemas know: strictly, and without being applied."""

from __future__ import annotations

import pytest

from tests.e2e.cluster import Cluster

OPTIONS = {
    "defaults": (),
    "everything": (
        *("--set", "tracking.replicas=2,monitoring.dashboard.enabled=true,caBundle.certificates=none"),
        *("--set", "operator.priorityClassName=system-cluster-critical"),
        *("--set-json", 'networkPolicies.trainer.egress=[{"ports": [{"port": 443}]}]'),
        *("--set-json", 'operator.tolerations=[{"key": "dedicated", "operator": "Exists"}]'),
    ),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_the_api_server_takes_every_manifest(release: Cluster, case: str) -> None:
    options = ("--set", "crd.install=false", *OPTIONS[case])
    rendered = release.helm("template", "dry", "charts/heimdall", *options)
    said = release.kubectl("apply", "--dry-run=server", "--validate=strict", "-f", "-", text=rendered)
    assert "deployment.apps/dry-heimdall-tracking created (server dry run)" in said
    assert "networkpolicy.networking.k8s.io/dry-heimdall-deny created (server dry run)" in said
