"""Lists that the documents make of what the code says in many places: conditions, events, metrics, tags, figures."""

from __future__ import annotations

import inspect
import re
from datetime import UTC, datetime

import pytest
import yaml

from heimdall_api.contract import TAG_NAME, TAG_NAMESPACE, TAG_UID, Reason
from heimdall_api.types import Attempt, Condition, TrainingRunStatus
from heimdall_operator import controller, decide, statuses
from heimdall_operator.events import events_of
from heimdall_operator.manifests import YOUNGER_FIELDS
from tests.unit.documents.documents import ROOT
from tests.unit.documents.test_facts import QUICK, section, version

CONTRACT = (ROOT / "docs/contract.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
OPERATING = (ROOT / "docs/operating.md").read_text()
SET = re.compile(r'(\w+)"?\]?(?:=| = |: )\((True|False), "(\w+)"')
"""A condition that the operator's code sets: its type, whether it holds, its reason."""
WAITS = re.compile(r'waiting\(.*?, observed, "(\w+)"')
"""The reason of a `Complete` that does not hold yet."""
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def rows(heading: str) -> list[tuple[set[str], str]]:
    """Names in the first cell of a table's rows, and the second cell."""
    found = [line.split(" | ") for line in section(OPERATING, heading).splitlines() if line.startswith("| `")]
    return [(set(re.findall(r"`(\w+)`", names)), second) for names, second, *_ in found]


def conditions() -> set[tuple[str, str, str]]:
    """Type, status and reason of every condition that a decision sets, but for the reasons of attempts."""
    source = inspect.getsource(decide)
    found = {(kind if kind != "value" else "Admitted", holds, reason) for kind, holds, reason in SET.findall(source)}
    found |= {("Complete", "False", reason) for reason in WAITS.findall(source)}
    back = re.search(r'value or \(False, "(\w+)"', inspect.getsource(statuses))
    assert back is not None
    return found | {("Suspended", "False", back[1])}


def reasons(kind: str) -> set[str]:
    """Of a condition that does not hold."""
    return {reason for of, holds, reason in conditions() if (of, holds) == (kind, "False")}


def test_every_reason_to_wait_is_told() -> None:
    pods = {Reason[name].value for name in re.findall(r"Reason\.(\w+), ", inspect.getsource(decide._waiting_for))}
    queues = reasons("Admitted") - {"Released"}  # by then it is suspended

    told = {name for names, _ in rows("What a run waits for") for name in names}

    assert {"Retrying", "Ending", "JobSuspended"} < reasons("Complete")
    assert told == reasons("Complete") | queues | pods


def test_every_event_is_told() -> None:
    now = datetime.now(UTC)
    ended = [
        Attempt(number=number, job="j", running_time=now, end_time=now, reason=reason.value)
        for number, reason in enumerate(Reason, start=1)
    ]
    common = {"message": "", "last_transition_time": now, "observed_generation": 1}
    held = [
        Condition.model_validate({"type": kind, "status": holds, "reason": reason, **common})
        for kind, holds, reason in conditions() | {("Failed", "True", "UserError")}
    ]
    made = events_of(TrainingRunStatus(run_id="r", attempts=ended, conditions=held))
    kinds = {event.reason: event.kind for event in made}
    kinds |= dict.fromkeys(re.findall(r'Event\("Warning", "(\w+)"', inspect.getsource(controller)), "Warning")

    told = {name: kind for names, kind in rows("Events") for name in names}

    others = {name for name, kind in kinds.items() if name.startswith("Attempt") and kind == "Warning"}
    assert others & told.keys() == {"AttemptKilled"}, "as an example"
    assert told.pop("Attempt") == "Warning", "and any other reason"
    assert told == {name: kind for name, kind in kinds.items() if name not in others or name in told}


def test_every_metric_of_the_localizer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from heimdall_trainer.model.module import LOSS_OF_STEP, LocalizationModule

    module, logged = LocalizationModule("test_resnet"), [LOSS_OF_STEP]
    monkeypatch.setattr(module, "log", lambda name, value, **more: logged.append(name))
    monkeypatch.setattr(module, "log_dict", lambda values, **more: logged.extend(values))
    module.training_loss.update(1.0, 1)
    for metrics, loss in (
        (module.validation_metrics, module.validation_loss),
        (module.test_metrics, module.test_loss),
    ):
        metrics.update(torch.ones(1, 4), torch.zeros(1, 2))
        loss.update(1.0)
    module.on_train_epoch_end()
    module.on_validation_epoch_end()
    module.on_test_epoch_end()

    told = section((ROOT / "docs/trainer.md").read_text(), "Metrics of the localizer")

    assert set(re.findall(r"`((?:train|val|test)/\w+)`", told)) == set(logged)


def test_the_contract_names_what_the_run_file_may_lack() -> None:
    given = section(CONTRACT, "What a pod is given")

    assert [field for field in YOUNGER_FIELDS if f"`spec.{'.'.join(field)}`" not in given] == []


def test_the_contract_says_which_user_a_pod_runs_as() -> None:
    """The image's, by number: Kubernetes can't tell whether a name is root."""
    given = section(CONTRACT, "What a pod is given")
    job = yaml.safe_load((ROOT / "tests/unit/operator/golden/own-image-without-gpu.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]

    assert pod["securityContext"]["runAsNonRoot"] is True
    assert "runAsUser" not in {**pod["securityContext"], **container["securityContext"]}
    assert "sets `runAsNonRoot` and no `runAsUser`" in given
    assert re.search(r"^USER \d+", (ROOT / "images/contract/Dockerfile").read_text(), re.MULTILINE)


def test_a_run_is_searched_for_by_the_tags_that_the_operator_sets() -> None:
    from mlflow.utils.search_utils import SearchUtils

    (search,) = re.findall(r"`(tags\..* AND .*)`", QUICK)
    found = SearchUtils.parse_search_filter(search)  # type: ignore[no-untyped-call]

    assert [item["key"] for item in found] == [TAG_NAME, TAG_NAMESPACE]
    assert f"`{TAG_UID}`" in QUICK


def test_what_a_run_takes_of_the_operators_memory_is_what_was_measured() -> None:
    table = (ROOT / "docs/benchmarks.md").read_text()
    measured = re.findall(r"memory with (\d+) (\w+) runs +([\d.]+) MiB", table)
    alone = float(version("docs/benchmarks.md", r"Without any run the operator takes about (\d+) MiB"))
    kib = {kind: round((float(mib) - alone) * 1024 / int(runs)) for runs, kind, mib in measured}

    for page in ("operating", "runbooks/HeimdallOperatorDown"):
        text = (ROOT / f"docs/{page}.md").read_text()
        assert f"{kib['finished']} KiB for each finished" in text, page
        assert f"{kib['active']} KiB for each active" in text, page


def test_every_command_of_the_clusters_tool_is_told() -> None:
    commands = re.findall(r'\badd\("(\w+)"', (ROOT / "hack/cluster/heimdall_cluster/cli.py").read_text())
    (told,) = re.findall(r"^- `python3 hack/cluster`.*?(?=^- )", CONTRIBUTING, re.MULTILINE | re.DOTALL)

    assert len(commands) > 5
    assert [name for name in commands if f"`{name}" not in told] == []


def test_chaos_walks_as_many_lives_as_are_told() -> None:
    found = re.search(r"HEIMDALL_CHAOS_LIVES=(\d+)", (ROOT / "Makefile").read_text())

    assert found is not None
    assert f"writes of {NUMBERS[int(found[1])]} lives" in CONTRIBUTING


def test_a_redis_keeps_features_for_as_long_as_is_told() -> None:
    from heimdall_trainer.data.cache import REDIS_KEEP_S

    assert (
        f"keeps features for several machines, for {REDIS_KEEP_S // 86400} days"
        in (ROOT / "docs/settings.md").read_text()
    )
