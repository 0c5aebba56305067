"""Registration on a real store: once per run, and promotion of the better one."""

from __future__ import annotations

import math
from typing import Literal

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from heimdall_api.types import PromotionSpec, RegistrationSpec
from heimdall_tracking import registry
from heimdall_tracking.params import clean_name
from heimdall_tracking.points import storable
from heimdall_tracking.registry import ModelMissingError, Registration, register
from tests.unit.tracking.conftest import NewRun
from tests.unit.tracking.test_runs import read

# MLflow's own use of SQLAlchemy, not ours.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

Mode = Literal["min", "max"]


def spec(model: str, *aliases: str, mode: Mode = "min", threshold: float | None = None) -> RegistrationSpec:
    promotion = PromotionSpec(metric="loss", mode=mode, threshold=threshold)
    return RegistrationSpec(model=model, aliases=list(aliases), promotion=promotion)


def register_run(client: MlflowClient, run_id: str, wanted: RegistrationSpec) -> Registration:
    return register(client, read(client, run_id), wanted)


def aliases(client: MlflowClient, model: str) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model(model).aliases.items()}


def versions(client: MlflowClient, model: str) -> list[str]:
    return sorted(str(item.version) for item in client.search_model_versions(f"name = '{model}'"))


def test_a_runs_model_becomes_a_version_that_knows_its_run(client: MlflowClient, new_run: NewRun, name: str) -> None:
    run_id = new_run()

    done = register_run(client, run_id, RegistrationSpec(model=name))

    assert (done.name, done.version, done.uri) == (name, "1", f"models:/{name}/1")
    assert done.message == f"Registered as version 1 of {name}."
    version = client.get_model_version(name, "1")
    assert (version.run_id, version.status) == (run_id, "READY")
    assert aliases(client, name) == {}


def test_registering_again_makes_no_second_version(client: MlflowClient, new_run: NewRun, name: str) -> None:
    run_id = new_run(loss=1.0)

    first = register_run(client, run_id, spec(name, "candidate"))
    again = register_run(client, run_id, spec(name, "candidate"))

    assert again.version == first.version
    assert versions(client, name) == ["1"]
    assert aliases(client, name) == {"candidate": "1", "champion": "1"}


def test_registering_goes_on_where_a_crash_had_cut_it_off(client: MlflowClient, new_run: NewRun, name: str) -> None:
    run_id = new_run(loss=1.0)
    register_run(client, run_id, RegistrationSpec(model=name))  # and then it died, before the aliases

    register_run(client, run_id, spec(name, "candidate"))

    assert versions(client, name) == ["1"]
    assert aliases(client, name) == {"candidate": "1", "champion": "1"}


def test_each_run_gets_a_version_and_aliases_go_with_the_newest(
    client: MlflowClient, new_run: NewRun, name: str
) -> None:
    first, second = new_run(), new_run()
    for run_id in (first, second):
        done = register_run(client, run_id, RegistrationSpec(model=name, aliases=["candidate", "nightly"]))

    assert done.message == f"Registered as version 2 of {name} with alias candidate, nightly."
    assert aliases(client, name) == {"candidate": "2", "nightly": "2"}
    assert registry.find_version(client, name, first) == "1"
    assert registry.find_version(client, name, second) == "2"


def test_what_is_finished_late_takes_no_alias_back(client: MlflowClient, new_run: NewRun, name: str) -> None:
    wanted = RegistrationSpec(model=name, aliases=["candidate", "nightly"])
    first, second = new_run(), new_run()
    register_run(client, first, RegistrationSpec(model=name))  # and then its operator died
    register_run(client, second, RegistrationSpec(model=name, aliases=["candidate"]))

    register_run(client, first, wanted)

    assert aliases(client, name) == {"candidate": "2", "nightly": "1"}


def test_a_run_without_a_model_is_a_clear_error_and_registers_nothing(
    client: MlflowClient, new_run: NewRun, name: str
) -> None:
    with pytest.raises(ModelMissingError, match=r"no logged model.*remove spec\.registration"):
        register_run(client, new_run(model=False), RegistrationSpec(model=name))

    assert versions(client, name) == []


def test_a_model_whose_name_holds_a_quote_can_be_registered(client: MlflowClient, new_run: NewRun, name: str) -> None:
    run_id = new_run()
    quoted = f"{name} o'neill"

    assert register_run(client, run_id, RegistrationSpec(model=quoted)).version == "1"
    assert register_run(client, run_id, RegistrationSpec(model=quoted)).version == "1"


def test_the_first_is_promoted_where_nobody_is_champion(client: MlflowClient, new_run: NewRun, name: str) -> None:
    done = register_run(client, new_run(loss=0.5), spec(name))

    assert done.message.endswith("; promoted to champion, which had no holder (loss 0.5).")
    assert aliases(client, name) == {"champion": "1"}


@pytest.mark.parametrize(
    ("mode", "holder", "value", "promoted"),
    [
        ("min", 0.5, 0.4, True),
        ("min", 0.5, 0.6, False),
        ("min", 0.5, 0.5, False),
        ("max", 0.5, 0.6, True),
        ("max", 0.5, 0.4, False),
        ("max", 0.5, 0.5, False),
        ("min", math.nan, 9.0, True),
        ("max", math.nan, -9.0, True),
    ],
)
def test_only_a_better_one_takes_over(
    client: MlflowClient, new_run: NewRun, name: str, *, mode: Mode, holder: float, value: float, promoted: bool
) -> None:
    first = new_run(loss=holder)
    register_run(client, first, RegistrationSpec(model=name))
    client.set_registered_model_alias(name, "champion", "1")

    done = register_run(client, new_run(loss=value), spec(name, mode=mode))

    assert aliases(client, name) == {"champion": "2" if promoted else "1"}
    assert ("; promoted to champion over version 1" in done.message) is promoted
    assert ("does not beat version 1's 0.5" in done.message) is not promoted


@pytest.mark.parametrize(
    ("mode", "value", "reached"),
    [("min", 1.0, True), ("min", 1.1, False), ("max", 1.0, True), ("max", 0.9, False)],
)
def test_the_threshold_must_be_reached_too(
    client: MlflowClient, new_run: NewRun, name: str, *, mode: Mode, value: float, reached: bool
) -> None:
    done = register_run(client, new_run(loss=value), spec(name, mode=mode, threshold=1.0))

    assert aliases(client, name) == ({"champion": "1"} if reached else {})
    assert ("does not reach the threshold 1" in done.message) is not reached


def test_beating_the_champion_does_not_replace_the_threshold(client: MlflowClient, new_run: NewRun, name: str) -> None:
    register_run(client, new_run(loss=5.0), spec(name))
    register_run(client, new_run(loss=3.0), spec(name, threshold=1.0))

    assert aliases(client, name) == {"champion": "1"}


def test_a_value_that_is_no_number_promotes_nothing(client: MlflowClient, new_run: NewRun, name: str) -> None:
    done = register_run(client, new_run(loss=math.nan), spec(name))

    assert done.message.endswith("not promoted to champion: its loss is nan.")
    assert aliases(client, name) == {}


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinity_promotes_nothing_and_gives_way(
    client: MlflowClient, new_run: NewRun, name: str, value: float
) -> None:
    mode: Mode = "max" if value > 0 else "min"
    kept = new_run(loss=storable(value))
    assert "not promoted to champion: its loss is" in register_run(client, kept, spec(name, mode=mode)).message

    client.set_registered_model_alias(name, "champion", "1")
    register_run(client, new_run(loss=1.0), spec(name, mode=mode))
    assert aliases(client, name) == {"champion": "2"}


def test_a_metric_is_found_by_the_name_it_was_logged_under(client: MlflowClient, new_run: NewRun, name: str) -> None:
    logged = "test/recall@10"
    wanted = RegistrationSpec(model=name, promotion=PromotionSpec(metric=logged, mode="max"))
    for value in (0.5, 0.6, 0.4):
        done = register_run(client, new_run(**{clean_name(logged): value}), wanted)

    assert done.message.endswith("; not promoted to champion: test/recall@10 0.4 does not beat version 2's 0.6.")
    assert aliases(client, name) == {"champion": "2"}


def test_the_alias_of_a_promotion_has_to_be_won(client: MlflowClient, new_run: NewRun, name: str) -> None:
    done = register_run(client, new_run(loss=5.0), spec(name, "champion", "candidate", threshold=1.0))

    assert done.message.startswith(f"Registered as version 1 of {name} with alias candidate; not promoted")
    assert aliases(client, name) == {"candidate": "1"}


def test_a_version_that_was_made_twice_is_the_first_one(
    client: MlflowClient, new_run: NewRun, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    create = client.create_model_version

    def repeated(*args: object, **how: object) -> object:
        create(*args, **how)  # type: ignore[arg-type]
        return create(*args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(client, "create_model_version", repeated)

    assert register_run(client, new_run(), RegistrationSpec(model=name, aliases=["candidate"])).version == "1"
    assert aliases(client, name) == {"candidate": "1"}


def test_a_version_that_may_not_be_deleted_keeps_nothing_up(
    client: MlflowClient, new_run: NewRun, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may edit a model may not delete of it: the run would never be complete."""
    run_id = new_run(loss=1.0)
    register_run(client, run_id, RegistrationSpec(model=name))
    client.create_model_version(name, client.get_model_version(name, "1").source, run_id)

    def refuse(*_: object) -> None:
        raise MlflowException("Permission denied", PERMISSION_DENIED)

    monkeypatch.setattr(client, "delete_model_version", refuse)
    assert register_run(client, run_id, RegistrationSpec(model=name, aliases=["candidate"])).version == "1"
    assert aliases(client, name) == {"candidate": "1"}


@pytest.mark.parametrize("theirs", ["", "alias", "tag", "words", "another model"])
def test_a_version_that_came_late_is_taken_back_unless_it_is_somebodys(
    client: MlflowClient, new_run: NewRun, name: str, theirs: str
) -> None:
    run_id = new_run(loss=1.0)
    register_run(client, run_id, RegistrationSpec(model=name))
    source = client.get_model_version(name, "1").source if theirs != "another model" else "file:///another"
    client.create_model_version(name, source, run_id)
    match theirs:
        case "alias":
            client.set_registered_model_alias(name, "mine", "2")
        case "tag":
            client.set_model_version_tag(name, "2", "mine", "yes")
        case "words":
            client.update_model_version(name, "2", "mine")

    assert register_run(client, run_id, spec(name)).version == "1"
    assert versions(client, name) == (["1", "2"] if theirs else ["1"])


def test_a_missing_metric_promotes_nothing(client: MlflowClient, new_run: NewRun, name: str) -> None:
    done = register_run(client, new_run(accuracy=1.0), spec(name))

    assert done.message.endswith("not promoted to champion: its loss is missing.")
    assert done.version == "1"


def test_a_champion_without_the_metric_gives_way(client: MlflowClient, new_run: NewRun, name: str) -> None:
    register_run(client, new_run(), RegistrationSpec(model=name))
    client.set_registered_model_alias(name, "champion", "1")

    done = register_run(client, new_run(loss=9.0), spec(name))

    assert done.message.endswith("promoted to champion over version 1 (loss 9 against unknown).")
    assert aliases(client, name) == {"champion": "2"}


def test_a_champion_of_no_run_gives_way(client: MlflowClient, new_run: NewRun, name: str) -> None:
    client.create_registered_model(name)
    client.create_model_version(name, "file:///somewhere")
    client.set_registered_model_alias(name, "champion", "1")

    register_run(client, new_run(loss=9.0), spec(name))

    assert aliases(client, name) == {"champion": "2"}


def test_the_champion_registered_again_stays_champion(client: MlflowClient, new_run: NewRun, name: str) -> None:
    run_id = new_run(loss=0.5)
    register_run(client, run_id, spec(name))

    done = register_run(client, run_id, spec(name))

    assert done.message.endswith("; promoted to champion (loss 0.5).")
    assert aliases(client, name) == {"champion": "1"}


def test_a_loser_registered_again_does_not_win_later(client: MlflowClient, new_run: NewRun, name: str) -> None:
    register_run(client, new_run(loss=0.1), spec(name))
    loser = new_run(loss=0.5)
    register_run(client, loser, spec(name))
    register_run(client, loser, spec(name))

    assert aliases(client, name) == {"champion": "1"}
    assert versions(client, name) == ["1", "2"]
