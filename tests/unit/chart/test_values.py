"""Values: described, closed, and what is generated from them is up to date."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from tests.programs import hack
from tests.unit.chart.helm import CHART, flags, helm, refused, render


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return hack("chart/__main__.py", monkeypatch)


def test_lint_has_nothing_to_say() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


def test_readme_and_schema_are_up_to_date(tool: ModuleType) -> None:
    for path, text in tool.outputs().items():
        assert Path(path).read_text() == text, f"{path} is not up to date: make generate"


def test_every_object_of_the_schema_with_names_is_closed() -> None:
    def check(part: Any, path: str) -> None:
        if isinstance(part, dict):
            if "properties" in part and part.get("type") == "object":
                assert part.get("additionalProperties") is False, path
            for name, inner in part.items():
                check(inner, f"{path}/{name}")

    check(json.loads((CHART / "values.schema.json").read_text()), "")


def test_every_value_is_in_the_readme() -> None:
    readme = (CHART / "README.md").read_text()

    def check(values: dict[str, Any], path: str) -> None:
        for name, value in values.items():
            if f"`{path}{name}`" not in readme:
                assert isinstance(value, dict), f"{path}{name}"
                check(value, f"{path}{name}.")

    check(yaml.safe_load((CHART / "values.yaml").read_text()), "")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: 1\n", "a has no comment"),
        ("# -- What it is.\na: []\n", "a needs a `# @type NAME`"),
        ("# -- What it is.\n# @type nonsense\na: 1\n", "a needs a `# @type NAME`"),
        ("# -- A group.\na:\n  b: x\n", "a.b has no comment"),
    ],
)
def test_a_value_without_description_or_type_is_refused(tool: ModuleType, text: str, said: str) -> None:
    with pytest.raises(tool.ValuesError, match=said):
        tool.read_values(text)


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"operator.imgae": "x"}, "imgae"),
        ({"operator.image": "heimdall/operator:dev"}, "/operator/image"),
        ({"operator.image.digest": "sha256:abc"}, "digest"),
        ({"objectStorage.storage": "1Gi"}, "objectStorage"),
        ({"tracking.resources.request": {}}, "request"),
        ({"operator.image.pullPolicy": "Sometimes"}, "pullPolicy"),
        ({"database.storage": "much"}, "storage"),
        ({"tracking.workers": 0}, "workers"),
        ({"tracking.publicUrl": "mlflow.example.com"}, "publicUrl"),
        ({"tracking.auth.enable": True}, "enable"),
        ({"networkPolicies.tracking.from": [{"podSelecter": {}}]}, "podSelecter"),
        ({"networkPolicies.apiServer.cidrs": ["10.0.0.1"]}, "cidrs"),
        ({"operator.tolerations": [{"efect": "NoSchedule"}]}, "efect"),
        ({"monitoring.serviceMonitor.interval": "often"}, "interval"),
        ({"database.sslMode": "strict"}, "sslMode"),
        ({"database.external": True, "database.externalHost": "db.example.com:5432"}, "externalHost"),
    ],
)
def test_a_typing_error_is_refused_by_its_name(values: dict[str, Any], name: str) -> None:
    assert name in refused(*flags(values))


def test_a_value_that_an_older_release_does_not_have_is_named() -> None:
    """`--reuse-values` brings the values of the release before, which lack what is new."""
    assert "networkPolicies" in refused("--set", "networkPolicies=null")


def test_an_image_is_named_by_its_digest_where_it_has_one() -> None:
    digest = f"sha256:{'0' * 64}"
    roles = ("operator", "trainer", "tracking", "database", "objectStore")
    rendered = render({f"{role}.image.digest": digest for role in roles})
    images = {
        container["image"]
        for spec in rendered.pods().values()
        for container in [*spec.get("initContainers", []), *spec["containers"]]
    }
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    named = {role: f"{defaults[role]['image']['repository']}@{digest}" for role in roles}
    assert images == {image for role, image in named.items() if role != "trainer"}, "one by its tag is another tomorrow"
    env = rendered.one("Deployment", "heimdall-operator")["spec"]["template"]["spec"]["containers"][0]["env"]
    assert {"name": "HEIMDALL_OPERATOR_TRAINER_IMAGE", "value": named["trainer"]} in env
