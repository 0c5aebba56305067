"""An operator of a list of namespaces, come to by an upgrade and left by a rollback, while a run trains."""

from __future__ import annotations

import pytest

from tests.e2e.chart.test_rights import can_i
from tests.e2e.cluster import Cluster
from tests.e2e.conftest import Mlflow, contract_run, namespace

pytestmark = pytest.mark.beside
LIFE_S = 240.0


def test_an_upgrade_to_a_list_of_namespaces_and_back(release: Cluster, mlflow: Mlflow, name: str) -> None:
    with namespace(release, "team") as team, namespace(release, "stranger") as stranger:
        release.apply(contract_run(name, steps=60, stepSeconds=1))
        before = release.wait_for_phase(name, "Running", timeout_s=LIFE_S)

        listed = f"operator.namespaces={{{release.namespace},{team.namespace}}}"
        secrets = f"trainer.namespaces={{{team.namespace}}}"
        chart = ("upgrade", "heimdall", "charts/heimdall", "--reuse-values", "--wait", "--timeout", "180s")
        release.helm(*chart, "--set", listed, "--set", secrets)

        assert can_i(team, "create", "jobs", account_of=release) == "yes"
        assert can_i(stranger, "create", "jobs", account_of=release) == "no"
        stranger.apply(contract_run("unseen", steps=3))
        team.apply(contract_run("seen", steps=3))
        team.wait_for_phase("seen", "Succeeded", timeout_s=LIFE_S)
        assert stranger.status("unseen") == {}, "nobody looks at what is in no namespace of the list"

        release.helm("rollback", "heimdall", "--wait", "--timeout", "180s")

        assert can_i(stranger, "create", "jobs", account_of=release) == "yes"
        stranger.wait_for_phase("unseen", "Pending", "Running", "Failed", timeout_s=LIFE_S)
        after = release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
        assert (after["runID"], after["attempt"]) == (before["runID"], 1), "who trained went on training"
        assert len(mlflow.runs_of(release.training_run(name)["metadata"]["uid"])) == 1
