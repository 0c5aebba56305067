"""Lists that the documents repeat are the code's own: reasons and their policies, exit codes, phases."""

from __future__ import annotations

import argparse
import itertools
import os
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import AliasChoices

from heimdall_api.contract import ExitCode, Reason
from heimdall_api.types import Phase
from heimdall_operator.failures import FINAL, FREE
from heimdall_operator.manifests import CA_VARIABLES
from heimdall_operator.settings import OperatorSettings
from heimdall_tracking.settings import TrackingSettings, load_settings
from heimdall_trainer.cli import _parser
from heimdall_trainer.settings import load_data_settings
from tests.unit.documents.documents import ROOT, blocks

QUICK = (ROOT / "docs/quick-reference.md").read_text()


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def reasons(row: str) -> set[str]:
    """Reasons of the row that begins so."""
    found = re.search(rf"^\| {re.escape(row)}[^|]*\|(.*)\|$", section(QUICK, "Why an attempt ends"), re.MULTILINE)
    assert found is not None
    return set(re.findall(r"`(\w+)`", found[1]))


def version(file: str, pattern: str) -> str:
    """The version that a file of the repository names."""
    found = re.search(pattern, (ROOT / file).read_text())
    assert found is not None
    return found[1]


def test_versions_that_are_called_tested_are_those_of_the_tests() -> None:
    kubernetes = version("hack/cluster/heimdall_cluster/parts.py", r'KUBERNETES_VERSION.*"v([\d.]+)"')
    helm = version("hack/cluster/parts/helm/go.mod", r"helm.sh/helm/v4 v([\d.]+)")
    least = version("charts/heimdall/Chart.yaml", r">=(\d+\.\d+)")
    text = section((ROOT / "docs/quickstart.md").read_text(), "On a cluster that you have")

    assert f"Each change is tested with Kubernetes {kubernetes} and Helm {helm}" in text
    assert f"The oldest Kubernetes that the chart takes, {least}," in text


def test_what_follows_a_reason_is_the_operators_policy() -> None:
    grows, fenced = {Reason.HOST_OUT_OF_MEMORY.value}, {Reason.FENCED.value}
    counted = {item.value for item in set(Reason) - FREE - FINAL - {Reason.COMPLETED}}

    assert reasons("Failed") == {item.value for item in FINAL} - grows
    assert reasons("next attempt, costs no retry") == {item.value for item in FREE} - fenced
    assert reasons("next attempt, costs a retry") == counted
    assert (reasons("next attempt with more memory"), reasons("nothing")) == (grows, fenced)


def test_every_reason_is_explained() -> None:
    told = section((ROOT / "docs/operating.md").read_text(), "Why an attempt ended")

    assert [item.value for item in Reason if f"`{item.value}`" not in told] == []


@pytest.mark.parametrize(
    ("page", "heading"), [("quick-reference", "Exit codes of a trainer"), ("contract", "How it ends")]
)
def test_exit_codes_are_the_contracts(page: str, heading: str) -> None:
    rows = re.findall(r"^\| (\d+)", section((ROOT / f"docs/{page}.md").read_text(), heading), re.MULTILINE)

    assert sorted(map(int, rows)) == sorted(code.value for code in ExitCode)


def test_the_contract_names_every_variable_that_the_secret_and_the_bundle_bring() -> None:
    given = section((ROOT / "docs/contract.md").read_text(), "What a pod is given")
    manifests = [item for block in blocks("yaml") for item in yaml.safe_load_all(block.text)]
    (keys,) = [set(item["stringData"]) for item in manifests if named(item) == ("Secret", "heimdall-trainer")]

    assert "PGPASSWORD" in keys
    assert {name for name in keys | set(CA_VARIABLES) if f"{name}`" not in given} == set()


def named(manifest: dict[str, Any]) -> tuple[str, str]:
    return manifest.get("kind", ""), manifest.get("metadata", {}).get("name", "")


def options(parser: argparse.ArgumentParser, command: str = "") -> set[str]:
    """Commands and flags of a parser, those of its commands too."""
    found = {command.strip()}
    for action in parser._actions:
        found |= {flag for flag in action.option_strings if flag.startswith("--") and not flag.startswith("--no-")}
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*(options(below, f"{command} {name}") for name, below in action.choices.items()))
    return found - {"", "data", "--help"}


def test_every_command_and_flag_of_the_trainer_is_told() -> None:
    page = (ROOT / "docs/trainer.md").read_text().partition("\n## ")[0]
    spelled = {"--file": "-f ", "--output": "-o "}

    assert {"deliver", "data inspect", "--freeze-backbone"} < options(_parser())
    assert {name for name in options(_parser()) if spelled.get(name, name) not in page} == set()


def test_every_setting_of_the_operator_is_told_with_its_default() -> None:
    told = {}
    for row in section((ROOT / "docs/settings.md").read_text(), "Operator").splitlines():
        names, defaults, *_ = [re.findall(r"`([^`]+)`", cell) for cell in row.strip("| ").split("|")] + [[], []]
        told |= dict(itertools.zip_longest(names, defaults, fillvalue="")) if "HEIMDALL_OPERATOR_" in row else {}

    settings = OperatorSettings.model_fields.items()
    wanted = {
        f"HEIMDALL_OPERATOR_{name.upper()}": "" if field.is_required() else str(field.default)
        for name, field in settings
    }
    assert told == wanted


def test_every_setting_of_tracking_is_told_with_its_key() -> None:
    told: dict[str, str] = {}
    for row in section((ROOT / "docs/settings.md").read_text(), "Tracking").splitlines():
        variables, keys, *_ = [re.findall(r"`([^`]+)`", cell) for cell in row.strip("| ").split("|")] + [[], []]
        told |= dict(zip(keys, variables, strict=False))

    aliases = {name: field.validation_alias for name, field in TrackingSettings.model_fields.items()}
    assert told == {
        name: alias.choices[0] if isinstance(alias, AliasChoices) else alias for name, alias in aliases.items()
    }


def test_the_settings_file_that_is_shown_is_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("HEIMDALL_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    (shown,) = blocks("toml")
    Path("heimdall.toml").write_text(shown.text)

    assert load_settings().experiment_name == "campus"
    assert load_data_settings().cache_limit_gib == 200


def test_phases_are_the_resources() -> None:
    states = section((ROOT / "docs/architecture.md").read_text(), "The life of a TrainingRun")
    drawn = set(re.findall(r"^  (?:\[\*]|(\w+)) --> (\w+)", states, re.MULTILINE))
    rows = re.findall(r"^\| (\w+) \|", section(QUICK, "Phases and conditions"), re.MULTILINE)

    assert {name for pair in drawn for name in pair if name} == set(get_args(Phase))
    assert set(rows) - {"phase"} == set(get_args(Phase))
