"""The operator dies after each of its actions, and while a pod works: one run, one Job, one version."""

from __future__ import annotations

from typing import get_args

from heimdall_operator.actions import Action
from tests.e2e.cluster import Cluster, wait_for
from tests.e2e.conftest import DyingOperator, Mlflow, contract_run, kill_operator, wait_for_step
from tests.e2e.test_life_cycle import LIFE_S, check_whole


def test_an_operator_that_dies_after_everything_that_it_does(
    release: Cluster, mlflow: Mlflow, dying: DyingOperator, name: str
) -> None:
    """One life with a lost attempt and a suspension: the operator is killed between every two of its actions."""
    dying.arm(name)
    release.apply(contract_run(name, steps=20, stepSeconds=0.9, fail="crash", failAt=3, failAttempt=1))
    second = wait_for(
        lambda: (status := release.status(name)).get("attempt") == 2 and status["phase"] == "Running" and status,
        what="the second attempt",
        timeout_s=LIFE_S,
        tell=lambda: release.explain(name),
    )
    wait_for_step(release, mlflow, second["runID"], 5, LIFE_S)
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": true}}')
    release.wait_for_phase(name, "Suspended", timeout_s=LIFE_S)
    release.kubectl("patch", "trainingrun", name, "--type=merge", "-p", '{"spec": {"suspend": false}}')

    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)

    status = check_whole(release, mlflow, name, attempts=2)
    assert [item["reason"] for item in status["attempts"]] == ["Unknown", "Suspended", "Completed"]
    deaths = dying.deaths()
    print(f"{len(deaths)} deaths: {'; '.join(deaths)}")
    actions = {kind.__name__ for kind in get_args(Action)}
    assert {death.split("(")[0] for death in deaths if not death.startswith("status")} == actions


def test_an_operator_killed_while_the_pod_works(release: Cluster, mlflow: Mlflow, name: str) -> None:
    release.apply(contract_run(name, steps=20, stepSeconds=0.9))
    release.wait_for_phase(name, "Running", timeout_s=LIFE_S)

    kill_operator(release)

    release.wait_for_phase(name, "Succeeded", timeout_s=LIFE_S)
    check_whole(release, mlflow, name)
