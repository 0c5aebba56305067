"""The operator's conversation with MLflow: what is refused for good, and promotions that wait for each other."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST

from heimdall_operator import mlflow_gateway
from heimdall_operator.mlflow_gateway import MlflowGateway, MlflowSilentError
from heimdall_tracking import registry, runs
from heimdall_tracking.registry import Registration
from tests.unit.operator.builders import UID, observed, run, spec
from tests.unit.operator.fakes import KEY, World, controller


@pytest.fixture
def most_at_once(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[int]]:
    """Lets each registration wait so long for another one to begin; the list's last one is the most there were."""
    most = [0]
    under_way = 0
    changed = threading.Condition()

    def wait_for_another(patience_s: float) -> list[int]:
        def register(client: Any, facts: Any, wanted: Any) -> Registration:
            nonlocal under_way
            with changed:
                under_way += 1
                most.append(max(most[-1], under_way))
                changed.notify_all()
                changed.wait_for(lambda: most[-1] > 1, patience_s)
                under_way -= 1
            return Registration(name=wanted.model, version="1", message="Registered.")

        monkeypatch.setattr(registry, "register", register)
        return most

    monkeypatch.setattr(runs, "read_facts", lambda client, run_id: run())
    return wait_for_another


async def register_at_once(*models: str) -> None:
    gateway = MlflowGateway("http://127.0.0.1:9")
    try:
        await asyncio.gather(
            *(gateway.register(observed(spec=spec(registration={"model": model}), run=run())) for model in models)
        )
    finally:
        gateway.close()


def test_registrations_of_one_model_wait_for_each_other(most_at_once: Callable[[float], list[int]]) -> None:
    most = most_at_once(0.05)
    asyncio.run(register_at_once("localizer", "localizer", "localizer"))

    assert most == [0, 1, 1, 1]


def test_registrations_of_different_models_do_not(most_at_once: Callable[[float], list[int]]) -> None:
    most = most_at_once(30)
    asyncio.run(register_at_once("one", "other"))

    assert most[-1] == 2


def test_a_server_that_hangs_is_asked_by_one_look_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were all looks to wait for it, no other run would be looked after."""
    now, asked = 100.0, 0
    hangs = True
    monkeypatch.setattr(mlflow_gateway, "time", SimpleNamespace(monotonic=lambda: now))

    def read_facts(client: Any, run_id: str) -> Any:
        nonlocal now, asked
        asked += 1
        if hangs:
            now += mlflow_gateway.SILENT_AFTER_S
            raise ConnectionError("timed out")
        return run()

    monkeypatch.setattr(runs, "read_facts", read_facts)
    gateway = MlflowGateway("http://127.0.0.1:9")

    async def scenario() -> None:
        nonlocal now, hangs
        with pytest.raises(ConnectionError):
            await gateway._read("r1")
        for _ in range(5):
            with pytest.raises(MlflowSilentError):
                await gateway._read("r1")
        assert asked == 1

        now += mlflow_gateway.PAUSE_S
        answers = await asyncio.gather(*(gateway._read("r1") for _ in range(5)), return_exceptions=True)
        assert sorted(type(each).__name__ for each in answers) == ["ConnectionError", *["MlflowSilentError"] * 4]

        now += mlflow_gateway.PAUSE_S
        hangs = False
        await gateway._read("r1")
        await asyncio.gather(*(gateway._read("r1") for _ in range(5)))

    try:
        asyncio.run(scenario())
    finally:
        gateway.close()


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own use
def test_only_a_run_that_runs_is_ended(tmp_path: Path) -> None:
    gateway = MlflowGateway(f"sqlite:///{tmp_path}/mlflow.db")
    orphan = observed(spec=spec())

    async def scenario() -> tuple[str, str]:
        await gateway.end_running(orphan, "KILLED")  # none was made
        made = await gateway.ensure_run(orphan)
        await gateway.end_running(orphan, "KILLED")
        killed = (await gateway._read(made.run_id)).status
        gateway._connect().set_terminated(made.run_id, "FINISHED")
        await gateway.end_running(orphan, "KILLED")
        return killed, (await gateway._read(made.run_id)).status

    try:
        assert asyncio.run(scenario()) == ("KILLED", "FINISHED")
    finally:
        gateway.close()


def test_a_run_that_mlflow_refuses_for_good_fails_with_its_words() -> None:
    world = World()
    world.apply({"tracking": {"tags": {"team": "rf"}}})

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()

        async def refuse(observed: Any) -> Any:
            raise MlflowException("Invalid value for tag 'team'", INVALID_PARAMETER_VALUE)

        operator._mlflow.ensure_run = refuse  # type: ignore[method-assign]
        await operator.look(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    failed = next(item for item in world.run["status"]["conditions"] if item["type"] == "Failed")
    assert (failed["status"], failed["reason"]) == ("True", "InvalidConfiguration")
    assert "Invalid value for tag 'team'" in failed["message"]
    assert UID not in world.mlflow_runs


def test_what_may_come_right_is_no_refusal() -> None:
    """As when somebody deletes the experiment in the same moment: the next look makes it anew."""
    world = World()
    world.apply({})

    async def scenario() -> None:
        operator = controller(world)
        await operator.refresh()
        original = operator._mlflow.ensure_run

        async def gone(observed: Any) -> Any:
            raise MlflowException("No such experiment", RESOURCE_DOES_NOT_EXIST)

        operator._mlflow.ensure_run = gone  # type: ignore[method-assign]
        with pytest.raises(MlflowException):
            await operator.look(KEY)
        operator._mlflow.ensure_run = original  # type: ignore[method-assign]
        await operator.look(KEY)

    asyncio.run(scenario())

    assert world.run is not None
    assert world.run["status"]["runID"] == "r1"
