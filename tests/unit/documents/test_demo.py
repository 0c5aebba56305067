"""What the README shows of `make demo` is what hack/demo prints, with the operator's words and the CRD's columns."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml

from heimdall_api import crd
from heimdall_api.types import TrainingRunSpec
from heimdall_operator import decide
from heimdall_tracking import registry
from heimdall_tracking.runs import RunFacts
from tests.programs import hack
from tests.unit.documents.documents import ROOT
from tests.unit.operator.builders import NOW, observed

LINE = re.compile(r"(\w+) · epoch (\d+)/(\d+), step (\d+), (\d+) % · best (\S+) (\S+)")
ROW = re.compile(r"^localizer .* (?P<run_id>[0-9a-f]{32}) +(?P<version>\d+) +(?P<age>[\dms]+)$", re.MULTILINE)
METRIC = re.compile(r"test/position_error_median_m (\S+)\)\.")

Resource = dict[str, Any]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """hack/demo, which waits for nothing."""
    module = hack("demo/__main__.py", monkeypatch)
    monkeypatch.setattr(module, "POLL_S", 0)
    return module


@pytest.fixture(scope="module")
def shown() -> str:
    """The block of the README."""
    (found,) = re.findall(
        r"^```\n(→ kubectl apply .*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL
    )
    return str(found)


def resources(shown: str, example: Resource) -> list[Resource]:
    """The TrainingRun at each line that is shown."""
    found = []
    for phase, epoch, epochs, step, percent, name, value in LINE.findall(shown):
        progress = {"epoch": int(epoch), "epochs": int(epochs), "step": int(step), "percent": int(percent)}
        status = {"phase": phase, "attempt": 1, "progress": progress, "bestMetric": {"name": name, "value": value}}
        found.append({**example, "status": status})
    row, value = ROW.search(shown), METRIC.search(shown)
    assert row is not None
    assert value is not None
    complete = {"type": "Complete", "message": said_at_the_end(example, row["version"], float(value[1]))}
    gpus = example["spec"]["resources"]["gpusPerWorker"]
    found[-1]["status"] |= {"gpus": gpus, "runID": row["run_id"], "modelVersion": row["version"]}
    found[-1]["status"]["conditions"] = [complete]
    return found


def said_at_the_end(example: Resource, version: str, value: float) -> str:
    """What the operator says of a run whose version was the first to be champion."""
    spec = TrainingRunSpec.model_validate(example["spec"])
    assert spec.registration is not None
    assert spec.registration.promotion is not None
    metrics = {spec.registration.promotion.metric: value}
    run = RunFacts(run_id="r1", experiment_id="1", status="FINISHED", attempt=1, metrics=metrics)
    client = MagicMock()
    client.search_model_versions.return_value = [MagicMock(version=version)]
    client.search_model_versions.return_value[0].name = spec.registration.model
    client.get_registered_model.return_value.aliases = {}
    done = registry.register(client, run, spec.registration)
    decision = decide._succeed(observed(spec=spec, run=run, registration=done), spec, NOW)
    assert decision.status is not None
    return next(item.message for item in decision.status.conditions if item.type == "Complete")


def table(resource: Resource, age: str) -> str:
    """What `kubectl get` prints: the columns that are not for `-o wide` alone."""
    cells = {"NAME": resource["metadata"]["name"]}
    for column in crd.COLUMNS:
        if not column.get("priority"):
            at: Any = resource | {"metadata": {"creationTimestamp": age}}
            for part in column["jsonPath"].strip(".").split("."):
                at = at[part]
            cells[column["name"].upper()] = str(at)
    return "\n".join("   ".join(row) for row in (cells, cells.values())) + "\n"


def test_the_readme_shows_what_the_demonstration_prints(
    demo: Any, shown: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    left = resources(shown, yaml.safe_load((ROOT / demo.EXAMPLE).read_text()))
    row = ROW.search(shown)
    assert row is not None
    last = table(left[-1], row["age"])

    def kubectl(*arguments: str, text: str | None = None) -> str:
        if arguments == ("get", "trainingrun", demo.RUN, "-o", "json"):
            return json.dumps(left.pop(0))
        return last if arguments == ("get", "trainingrun", demo.RUN) else ""

    monkeypatch.setattr(demo, "_kubectl", kubectl)
    demo._train()
    demo._show()

    said = capsys.readouterr()
    assert (said.err + said.out).split() == shown.split(), "only where a line is broken is the README's own affair"


def test_the_steps_that_are_shown_are_those_of_one_training(shown: str) -> None:
    lines = LINE.findall(shown)
    steps = [int(line[3]) for line in lines]

    assert steps == sorted(steps)
    assert [int(line[4]) for line in lines] == [100 * step // steps[-1] for step in steps]
    assert lines[-1][0] == "Succeeded"


@pytest.mark.parametrize("code", [0, 1])
def test_a_tool_that_is_interrupted_is_waited_for(demo: Any, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """And longer than that one waits for what it has called."""
    patience: list[float] = []

    def see_through(_: object, *, what: str, interrupt_timeout_s: float) -> int:
        assert what == "hack/cluster"
        patience.append(interrupt_timeout_s)
        return code

    monkeypatch.setattr(demo, "see_through", see_through)
    monkeypatch.setattr(demo.subprocess, "Popen", lambda command, **_: command)
    if code == 0:
        demo._hack("cluster", "up")
    else:
        assert complaint(demo, lambda: demo._hack("cluster", "up")) == "python3 hack/cluster up failed; see above"
    assert patience[0] > demo.INTERRUPT_TIMEOUT_S


# --- what an earlier call left ------------------------------------------------------------------------------------


def answering(demo: Any, patch: pytest.MonkeyPatch, *statuses: dict[str, Any], apply: str = "") -> None:
    """Have kubectl tell one status after the other, and refuse to apply in these words."""
    left = list(statuses)

    def kubectl(verb: str, *_: str, text: str | None = None) -> str:
        if verb == "apply" and apply:
            raise demo.ClusterError(f"kubectl apply failed: {apply}")
        return json.dumps({"status": left.pop(0)}) if verb == "get" else "{}"

    patch.setattr(demo, "_kubectl", kubectl)


def condition(kind: str, message: str) -> dict[str, Any]:
    return {"conditions": [{"type": kind, "status": "True", "message": message}]}


def advice(what: str) -> str:
    return f'Take it away, then call again:\n  eval "$(python3 hack/cluster env)"\n  kubectl -n heimdall delete {what}'


def complaint(demo: Any, call: Callable[[], None]) -> str:
    """With what a step ends."""
    with pytest.raises(demo.ClusterError) as caught:
        call()
    return str(caught.value)


def test_a_run_that_failed_is_told_with_what_to_do(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(demo, monkeypatch, {"phase": "Failed", **condition("Failed", "the loss became NaN")})

    said = complaint(demo, demo._train)

    assert said == f"the TrainingRun failed: the loss became NaN\n{advice('trainingrun/localizer')}"


def test_recordings_are_waited_for(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(demo, monkeypatch, {}, {"active": 1}, condition("Complete", "Reached expected number of succeeded pods"))

    demo._record()


def test_recordings_that_failed_are_told_at_once(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(demo, monkeypatch, {"active": 1}, condition("Failed", "Job has reached the specified backoff limit"))

    said = complaint(demo, demo._record)

    assert "failed: Job has reached the specified backoff limit" in said
    assert said.endswith(advice("job/generate-recordings"))


def test_recordings_that_take_too_long_are_looked_at(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "RECORDINGS_TIMEOUT_S", -1)
    answering(demo, monkeypatch, {"active": 1})

    assert "describe pods -l batch.kubernetes.io/job-name=generate-recordings" in complaint(demo, demo._record)


@pytest.mark.parametrize(
    ("step", "what", "words"),
    [
        ("_record", "job/generate-recordings", 'The Job "generate-recordings" is invalid: … field is immutable'),
        ("_train", "trainingrun/localizer", "spec.training: training can't be changed once the run exists: create …"),
    ],
)
def test_what_another_version_left_is_told_with_what_to_do(
    demo: Any, monkeypatch: pytest.MonkeyPatch, step: str, what: str, words: str
) -> None:
    answering(demo, monkeypatch, apply=words)

    assert complaint(demo, getattr(demo, step)) == f"{what} is there from another version of its file. {advice(what)}"


def test_what_is_refused_for_another_reason_is_told_as_it_was(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answering(demo, monkeypatch, apply="exceeded quota")

    assert complaint(demo, demo._train) == "kubectl apply failed: exceeded quota"


@pytest.mark.parametrize(
    ("status", "verb"),
    [("pending-install", "uninstall"), ("pending-upgrade", "rollback"), ("failed", None), ("", None)],
)
def test_a_release_that_helm_was_interrupted_at_is_told_with_what_to_do(
    demo: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: str, verb: str | None
) -> None:
    """Nothing is taken back unasked: another Helm may be at work on it. Nor are old words in the log this call's."""
    words = "Error: UPGRADE FAILED: another operation (install/upgrade/rollback) is in progress"
    said = json.dumps({"name": "heimdall", "info": {"status": status}}) if status else "Error: release: not found"
    helm = tmp_path / "helm"
    helm.write_text(f"#!/bin/sh\n[ $1 = status ] || {{ echo '{words}'; exit 1; }}\necho '{said}'\n[ '{status}' ]\n")
    helm.chmod(0o755)
    for name in ("BIN", "LOGS"):
        monkeypatch.setattr(demo, name, tmp_path)
    monkeypatch.setattr(demo.engine, "environment", dict)

    complained = complaint(demo, demo._install)

    if verb is None:
        assert words in complained
        return
    assert complained.startswith(f"the release heimdall is {status}: another Helm is at work on it, or")
    assert complained.endswith(f'call again:\n  eval "$(python3 hack/cluster env)"\n  helm -n heimdall {verb} heimdall')
