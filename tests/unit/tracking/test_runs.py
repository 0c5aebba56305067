"""Experiments and runs on a real store: found again, never made twice, ended once."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from heimdall_api.contract import TAG_ACTIVITY, TAG_ATTEMPT, TAG_BEST, TAG_CHECKPOINTS, TAG_PROGRESS, TAG_UID
from heimdall_tracking import runs
from heimdall_tracking.errors import OvertakenError
from heimdall_tracking.experiments import ensure_experiment
from tests.unit.tracking.conftest import NewRun

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

CHECKPOINT = {"step": 5, "path": "checkpoints/5.ckpt", "sha256": "00", "size": 1, "time": "2026-01-01T00:00:00Z"}


def on(client: MlflowClient, method: str, before: Callable[[], object]) -> MlflowClient:
    """The client, where another process is faster: something happens right before a call, once."""

    class Overtaken:
        def __getattr__(self, name: str) -> Any:
            real = getattr(client, name)
            if name != method:
                return real

            def call(*args: Any, **more: Any) -> Any:
                before()
                return real(*args, **more)

            return call

    return Overtaken()  # type: ignore[return-value]


def test_an_experiment_is_made_once_and_then_found(client: MlflowClient, name: str) -> None:
    made = ensure_experiment(client, name)

    assert ensure_experiment(client, name) == made


def test_an_experiment_that_another_process_makes_meanwhile_is_taken(client: MlflowClient, name: str) -> None:
    overtaken = on(client, "create_experiment", lambda: client.create_experiment(name))

    made = ensure_experiment(overtaken, name)

    found = client.get_experiment_by_name(name)
    assert found is not None
    assert found.experiment_id == made


def test_a_deleted_experiment_is_restored_with_its_id(client: MlflowClient, name: str) -> None:
    made = ensure_experiment(client, name)
    client.delete_experiment(made)

    assert ensure_experiment(client, name) == made
    assert client.get_experiment(made).lifecycle_stage == "active"


def test_an_experiment_that_another_process_restores_meanwhile_is_taken(client: MlflowClient, name: str) -> None:
    made = ensure_experiment(client, name)
    client.delete_experiment(made)
    overtaken = on(client, "restore_experiment", lambda: client.restore_experiment(made))

    assert ensure_experiment(overtaken, name) == made


def test_an_experiment_that_can_not_be_restored_is_an_error(client: MlflowClient, name: str) -> None:
    client.delete_experiment(ensure_experiment(client, name))

    def refuse() -> None:
        raise MlflowException("no")

    with pytest.raises(MlflowException, match="no"):
        ensure_experiment(on(client, "restore_experiment", refuse), name)


def test_a_run_is_made_once_for_a_uid(client: MlflowClient, name: str) -> None:
    first = runs.ensure_run(client, uid="u1", experiment=name, name="n", tags={"team": "rf", TAG_UID: "not this"})
    again = runs.ensure_run(client, uid="u1", experiment=name, name="n")
    other = runs.ensure_run(client, uid="u2", experiment=name, name="n")

    assert again.run_id == first.run_id != other.run_id
    assert (first.status, first.attempt, first.checkpoints) == ("RUNNING", 0, ())
    tags = client.get_run(first.run_id).data.tags
    assert (tags[TAG_UID], tags["team"]) == ("u1", "rf")


def test_a_run_that_ended_is_found_by_its_uid_too(client: MlflowClient, name: str) -> None:
    first = runs.ensure_run(client, uid="u1", experiment=name, name="n")
    runs.end_run(client, first.run_id, "FAILED")

    again = runs.ensure_run(client, uid="u1", experiment=name, name="n")

    assert (again.run_id, again.status) == (first.run_id, "FAILED")


def test_a_run_that_was_made_beside_another_is_taken_back(client: MlflowClient, name: str) -> None:
    first = runs.ensure_run(client, uid="u1", experiment=name, name="run")
    again = client.create_run(first.experiment_id, tags={TAG_UID: "u1"}).info.run_id
    facts = runs.read_active_facts(client, [first.experiment_id])
    assert {item.run_id: item.uid for item in facts.values()} == {first.run_id: "u1", again: "u1"}

    for _ in range(2):
        runs.discard_run(client, again)

    assert runs.read_facts(client, again) is None
    assert client.get_run(again).info.status == "KILLED"
    assert list(runs.read_active_facts(client, [first.experiment_id])) == [first.run_id]


def test_find_run_makes_nothing(client: MlflowClient, name: str) -> None:
    assert runs.find_run(client, uid="u1", experiment=name) is None
    assert client.get_experiment_by_name(name) is None

    made = runs.ensure_run(client, uid="u1", experiment=name, name="n")

    assert runs.find_run(client, uid="u1", experiment=name) == made
    assert runs.find_run(client, uid="u2", experiment=name) is None


def test_an_attempt_makes_the_run_running_and_is_its_newest(client: MlflowClient, name: str) -> None:
    facts = runs.ensure_run(client, uid="u1", experiment=name, name="n")
    runs.end_run(client, facts.run_id, "KILLED")

    runs.open_attempt(client, read(client, facts.run_id), 2)

    facts = read(client, facts.run_id)
    assert (facts.attempt, facts.status) == (2, "RUNNING")


def test_an_older_attempt_does_not_take_the_place_of_a_newer_one(client: MlflowClient, name: str) -> None:
    facts = runs.ensure_run(client, uid="u1", experiment=name, name="n", tags={TAG_ATTEMPT: "10"})

    runs.open_attempt(client, facts, 9)

    assert read(client, facts.run_id).attempt == 10


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_a_run_is_ended_once(client: MlflowClient, new_run: NewRun, status: runs.FinalStatus) -> None:
    run_id = new_run(status="RUNNING")
    runs.end_run(client, run_id, status)
    ended = client.get_run(run_id).info.end_time

    runs.end_run(client, run_id, status)

    info = client.get_run(run_id).info
    assert (info.status, info.end_time) == (status, ended)


def test_an_attempt_that_nobody_saw_end_says_nothing_to_a_run_that_was_ended(client: MlflowClient, name: str) -> None:
    run_id = runs.ensure_run(client, uid="u1", experiment=name, name="n", tags={TAG_ATTEMPT: "2"}).run_id

    runs.end_run(client, run_id, "FAILED")
    runs.check_attempt(client.get_run(run_id), 2)
    for _ in range(2):
        runs.end_run(client, run_id, "FAILED", past=2)

    facts = read(client, run_id)
    assert (facts.attempt, facts.status) == (3, "FAILED")
    with pytest.raises(OvertakenError):
        runs.check_attempt(client.get_run(run_id), 2)


def test_another_end_replaces_the_first(client: MlflowClient, new_run: NewRun) -> None:
    run_id = new_run(status="FINISHED")

    runs.end_run(client, run_id, "FAILED")

    assert read(client, run_id).status == "FAILED"


def test_ending_a_run_that_somebody_deleted_is_no_error(client: MlflowClient, new_run: NewRun) -> None:
    run_id = new_run(status="RUNNING")
    client.delete_run(run_id)

    runs.end_run(client, run_id, "KILLED")
    runs.end_run(client, "0" * 32, "KILLED")


def test_a_run_that_is_not_there_has_no_facts(client: MlflowClient) -> None:
    assert runs.read_facts(client, "0" * 32) is None


def test_a_parked_run_is_scheduled_until_its_next_attempt(client: MlflowClient, new_run: NewRun) -> None:
    run_id = new_run(status="RUNNING")
    runs.park(client, read(client, run_id))
    assert read(client, run_id).status == "SCHEDULED"

    runs.open_attempt(client, read(client, run_id), 2)
    assert read(client, run_id).status == "RUNNING"

    runs.end_run(client, run_id, "FINISHED")
    runs.park(client, read(client, run_id))
    assert read(client, run_id).status == "FINISHED"


def test_facts_tell_what_a_trainer_wrote(client: MlflowClient, new_run: NewRun) -> None:
    run_id = new_run(status="RUNNING", loss=0.5)
    checkpoints = [{**CHECKPOINT, "last": True}, {**CHECKPOINT, "step": 9}]
    client.set_tag(run_id, TAG_PROGRESS, '{"epoch": 1, "epochs": 3, "step": 7}')
    client.set_tag(run_id, TAG_ACTIVITY, "12")
    client.set_tag(run_id, TAG_BEST, '{"name": "loss", "value": 0.5, "step": 7}')
    client.set_tag(run_id, TAG_CHECKPOINTS, json.dumps(checkpoints))
    client.set_tag(run_id, TAG_ATTEMPT, "3")

    facts = read(client, run_id)

    assert facts.progress is not None
    assert facts.best is not None
    assert facts.last_checkpoint is not None
    assert (facts.progress.step, facts.best.value, facts.attempt) == (7, 0.5, 3)
    assert [item.step for item in facts.checkpoints] == [5, 9]
    assert facts.last_checkpoint.step == 5, "the one marked as last, not the newest"
    assert facts.metrics == {"loss": 0.5}
    assert facts.activity == "12"


UNREADABLE = ["", "{", "[]", "null", "7", "²", '{"step": -1}', '[{"step": 1}]']
TOO_MUCH = [
    "[" * 4000,
    "9" * 5000,
    json.dumps({"epoch": 0, "epochs": 1, "step": 2**63, "name": "loss", "value": 1.0}),
    json.dumps([{**CHECKPOINT, "step": 2**63}]),
]


@pytest.mark.parametrize("text", [*UNREADABLE, *TOO_MUCH], ids=lambda text: text[:12])
def test_tags_that_can_not_be_read_count_as_absent(client: MlflowClient, new_run: NewRun, text: str) -> None:
    run_id = new_run(status="RUNNING")
    for tag in (TAG_PROGRESS, TAG_BEST, TAG_CHECKPOINTS, TAG_ATTEMPT):
        client.set_tag(run_id, tag, text)

    facts = read(client, run_id)

    assert (facts.progress, facts.best, facts.checkpoints, facts.last_checkpoint) == (None, None, (), None)
    assert facts.attempt in (0, 7)


def test_active_facts_are_those_of_running_runs_that_belong_to_a_resource(
    client: MlflowClient, name: str, new_run: NewRun, experiment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = runs.ensure_run(client, uid="u0", experiment=f"{name}-other", name="n")
    running = [runs.ensure_run(client, uid=f"u{index}", experiment=name, name="n").run_id for index in range(1, 6)]
    ended = runs.ensure_run(client, uid="u9", experiment=name, name="n").run_id
    runs.end_run(client, ended, "FINISHED")
    new_run(status="RUNNING")  # nobody's
    monkeypatch.setattr(runs, "SEARCH_LIMIT", 2)

    found = runs.read_active_facts(client, [experiment, other.experiment_id])

    assert found.keys() == {other.run_id, *running}
    assert found[running[0]] == read(client, running[0])
    assert runs.read_active_facts(client, [experiment]).keys() == set(running)
    assert runs.read_active_facts(client, []) == {}


def test_the_newest_ready_model_is_the_runs_model(client: MlflowClient, experiment: str, new_run: NewRun) -> None:
    run_id = new_run(model=False)
    assert runs.find_model(client, read(client, run_id)) is None

    ready = [client.create_logged_model(experiment, name="model", source_run_id=run_id).model_id for _ in range(2)]
    for model_id in ready:
        client.finalize_logged_model(model_id, "READY")
    client.create_logged_model(experiment, name="model", source_run_id=run_id)  # its upload was cut off
    client.create_logged_model(experiment, name="other", source_run_id=run_id)
    new_run()

    assert runs.find_model(client, read(client, run_id)) in ready


def read(client: MlflowClient, run_id: str) -> runs.RunFacts:
    facts = runs.read_facts(client, run_id)
    assert facts is not None
    return facts
