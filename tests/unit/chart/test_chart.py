"""What the chart renders, and what it refuses."""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import pytest
import yaml

from heimdall_api.contract import GROUP, PLURAL
from tests.unit.chart.helm import CHART, NAMESPACE, Manifest, Rendered, flags, helm, refused, render

EVERY_ROLE_EXTERNAL: dict[str, Any] = {
    "tracking.external": True,
    "tracking.externalUrl": "https://mlflow.example.com",
    "database.external": True,
    "database.externalHost": "db.example.com",
    "database.existingSecret": "db",
    "objectStore.external": True,
    "objectStore.externalUrl": "https://s3.example.com",
    "objectStore.existingSecret": "s3",
    "trainer.createSecrets": False,
}


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render()


def test_lint_has_nothing_to_say() -> None:
    done = helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout


# --- values ------------------------------------------------------------------------------------------------------


def leaves(values: dict[str, Any], schema: dict[str, Any], path: str = "") -> set[str]:
    """Dotted names of values; what the schema does not describe by name is one value."""
    found: set[str] = set()
    for name, value in values.items():
        inner = schema.get("properties", {}).get(name, {}).get("properties")
        if inner is None:
            found.add(f"{path}{name}")
        else:
            found |= leaves(value, {"properties": inner}, f"{path}{name}.")
    return found


def test_every_value_is_in_the_schema_and_has_a_default() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    described = {
        f"{role}.{name}"
        for role, part in schema["properties"].items()
        if "properties" in part
        for name in part["properties"]
    }
    assert leaves(values, schema) - {"imagePullSecrets"} == described


def test_every_object_of_the_schema_with_names_is_closed() -> None:
    def check(part: Any, path: str) -> None:
        if isinstance(part, dict):
            if "properties" in part and part.get("type") == "object":
                assert part.get("additionalProperties") is False, path
            for name, inner in part.items():
                check(inner, f"{path}/{name}")

    check(json.loads((CHART / "values.schema.json").read_text()), "")


def test_every_value_has_a_comment() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    roles = ("crd", "operator", "trainer", "tracking", "database", "objectStore")
    for number, line in enumerate(lines):
        name = re.match(r"(  )?(\w+):", line)
        if name is None or name.group(2) in roles:
            continue
        above = number - 1
        while above >= 0 and lines[above].lstrip().startswith("#") and "# --" not in lines[above]:
            above -= 1
        assert "# -- " in lines[above], f"{name.group(2)} has no comment"


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"operator.imgae": "x"}, "imgae"),
        ({"objectStorage.storage": "1Gi"}, "objectStorage"),
        ({"tracking.resources.request": {}}, "request"),
        ({"operator.imagePullPolicy": "Sometimes"}, "imagePullPolicy"),
        ({"database.storage": "much"}, "storage"),
        ({"tracking.workers": 0}, "workers"),
        ({"tracking.publicUrl": "mlflow.example.com"}, "publicUrl"),
    ],
)
def test_a_typing_error_is_refused_by_its_name(values: dict[str, Any], name: str) -> None:
    assert name in refused(*flags(values))


# --- pods --------------------------------------------------------------------------------------------------------


def containers(spec: Manifest) -> list[Manifest]:
    found: list[Manifest] = [*spec.get("initContainers", []), *spec["containers"]]
    return found


def test_every_pod_is_restricted(rendered: Rendered) -> None:
    pods = rendered.pods()
    assert len(pods) == 6
    for name, spec in pods.items():
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert spec["enableServiceLinks"] is False, name
        assert not any("hostPath" in volume for volume in spec["volumes"]), name
        for container in containers(spec):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "capabilities": {"drop": ["ALL"]},
                "readOnlyRootFilesystem": True,
            }, name
            assert container["resources"]["limits"]["memory"], name
            assert container["resources"]["requests"]["cpu"], name


def test_only_the_operator_has_a_service_account_token(rendered: Rendered) -> None:
    with_token = {name for name, spec in rendered.pods().items() if spec.get("automountServiceAccountToken", True)}
    assert with_token == {"Deployment/heimdall-operator"}


def test_what_serves_is_probed(rendered: Rendered) -> None:
    for name, spec in rendered.pods().items():
        if name.startswith(("Deployment/", "StatefulSet/")):
            for container in spec["containers"]:
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), name


def secret_values(rendered: Rendered) -> set[str]:
    keys = ("password", "secret-key")
    return {
        base64.b64decode(value).decode()
        for secret in rendered.of_kind("Secret")
        for key, value in secret["data"].items()
        if key.endswith(keys)
    }


def test_passwords_are_in_secrets_alone(rendered: Rendered) -> None:
    passwords = secret_values(rendered)
    assert len(passwords) == 8
    elsewhere = yaml.safe_dump_all(item for item in rendered.manifests if item["kind"] != "Secret")
    assert not [password for password in passwords if password in elsewhere]


def test_a_password_is_the_same_in_every_secret_that_holds_it(rendered: Rendered) -> None:
    database = rendered.one("Secret", "heimdall-database")["data"]
    store = rendered.one("Secret", "heimdall-object-store")["data"]
    for secret, who in (("heimdall-trainer", "reader"), ("heimdall-recordings-writer", "writer")):
        data = rendered.one("Secret", secret)["data"]
        assert data["PGPASSWORD"] == database[f"{who}-password"]
        assert data["HEIMDALL_S3_ACCESS_KEY"] == store[f"{who}-access-key"]
        assert data["HEIMDALL_S3_SECRET_KEY"] == store[f"{who}-secret-key"]
        assert base64.b64decode(data["HEIMDALL_RECORDINGS_URL"]) == b"s3://heimdall-recordings"


def test_scheduling_and_pull_secrets_reach_the_pods() -> None:
    placed = {
        f"{role}.{name}": value
        for role in ("operator", "tracking", "database", "objectStore")
        for name, value in {
            "nodeSelector": {"pool": role},
            "tolerations": [{"key": "dedicated", "operator": "Exists"}],
            "affinity": {"podAntiAffinity": {}},
        }.items()
    }
    rendered = render({**placed, "imagePullSecrets": [{"name": "registry"}]})
    for name, spec in rendered.pods().items():
        assert spec["imagePullSecrets"] == [{"name": "registry"}], name
        assert spec["nodeSelector"]["pool"] in name.replace("object-store", "objectStore").replace("test", "operator")
        assert spec["tolerations"], name
        assert "podAntiAffinity" in spec["affinity"], name


# --- CRD and rights ----------------------------------------------------------------------------------------------


def test_the_crd_stays_on_uninstall_and_is_the_generated_one(rendered: Rendered) -> None:
    crd = rendered.one("CustomResourceDefinition", f"{PLURAL}.{GROUP}")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    generated = yaml.safe_load((CHART / "files/crd.yaml").read_text())
    generated["metadata"].pop("annotations", None)
    assert crd == generated
    assert not render({"crd.install": False}).of_kind("CustomResourceDefinition")


def test_passwords_stay_on_uninstall(rendered: Rendered) -> None:
    for name in ("heimdall-database", "heimdall-object-store"):
        assert rendered.one("Secret", name)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_the_operator_has_the_rights_it_needs_and_no_others(rendered: Rendered) -> None:
    rules = rendered.of_kind("ClusterRole")[0]["rules"]
    granted: dict[str, set[str]] = {}
    for rule in rules:
        for resource in rule["resources"]:
            granted.setdefault(resource, set()).update(rule["verbs"])
    seen = {"get", "list", "watch"}
    assert granted == {
        "trainingruns": {*seen, "patch"},
        "trainingruns/status": {"patch"},
        "trainingruns/finalizers": {"update"},  # to be named as an owner that a deletion waits for
        "jobs": {*seen, "create", "delete"},
        "pods": {"list", "watch"},
        "pods/log": {"get"},
        "services": {"get", "create"},
        "events": {"list", "create"},
    }


def test_with_a_list_of_namespaces_there_is_nothing_of_the_cluster() -> None:
    rendered = render({"operator.namespaces": ["team-a", "team-b"]})
    assert not rendered.of_kind("ClusterRole")
    assert not rendered.of_kind("ClusterRoleBinding")
    assert {role["metadata"]["namespace"] for role in rendered.of_kind("Role")} == {"team-a", "team-b"}
    for binding in rendered.of_kind("RoleBinding"):
        assert binding["subjects"][0]["namespace"] == NAMESPACE
    operator = rendered.one("Deployment", "heimdall-operator")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "HEIMDALL_OPERATOR_NAMESPACES", "value": "team-a,team-b"} in operator["env"]


def test_training_namespaces_get_the_readers_secret_and_not_the_writers() -> None:
    rendered = render({"trainer.namespaces": ["team-a"]})
    where = {
        (item["metadata"]["name"], item["metadata"].get("namespace", NAMESPACE)) for item in rendered.of_kind("Secret")
    }
    assert {("heimdall-trainer", NAMESPACE), ("heimdall-trainer", "team-a")} <= where
    assert ("heimdall-recordings-writer", "team-a") not in where


# --- MLflow ------------------------------------------------------------------------------------------------------


def mlflow_arguments(rendered: Rendered) -> dict[str, str]:
    spec = rendered.one("Deployment", "heimdall-tracking")["spec"]["template"]["spec"]
    return dict(item.removeprefix("--").split("=", 1) for item in spec["containers"][0]["args"] if "=" in item)


def test_mlflow_may_be_asked_by_its_service_with_and_without_port(rendered: Rendered) -> None:
    hosts = mlflow_arguments(rendered)["allowed-hosts"].split(",")
    assert {f"heimdall-tracking.{NAMESPACE}.svc:5000", "heimdall-tracking:5000", "localhost:*"} <= set(hosts)
    assert "*" not in hosts
    assert "cors-allowed-origins" not in mlflow_arguments(rendered)


def test_mlflow_answers_under_its_public_address() -> None:
    arguments = mlflow_arguments(render({"tracking.publicUrl": "https://mlflow.example.com/"}))
    assert "mlflow.example.com" in arguments["allowed-hosts"].split(",")
    assert arguments["cors-allowed-origins"] == "https://mlflow.example.com"


# --- existing Secrets and external services ----------------------------------------------------------------------


@pytest.mark.parametrize("role", ["database", "objectStore"])
def test_an_existing_secret_that_can_not_be_read_is_refused_rather_than_invented(role: str) -> None:
    said = refused(*flags({f"{role}.existingSecret": "mine"}))
    assert "Secret mine" in said
    assert "trainer.createSecrets=false" in said


def test_with_existing_secrets_the_chart_renders_without_a_cluster_and_makes_none() -> None:
    values = {"database.existingSecret": "db", "objectStore.existingSecret": "s3", "trainer.createSecrets": False}
    rendered = render(values)
    assert not rendered.of_kind("Secret")
    used = set(re.findall(r"secretKeyRef:\s*\n\s*key: \S+\s*\n\s*name: (\S+)", yaml.safe_dump_all(rendered.manifests)))
    assert used == {"db", "s3"}
    assert render(values) == rendered


def test_with_everything_external_only_the_operator_is_installed() -> None:
    rendered = render(EVERY_ROLE_EXTERNAL)
    assert rendered.pods().keys() == {"Deployment/heimdall-operator", "Pod/heimdall-test"}
    assert not rendered.of_kind("Service")
    assert not rendered.of_kind("ConfigMap")
    operator = rendered.one("Deployment", "heimdall-operator")["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "HEIMDALL_OPERATOR_TRACKING_URI", "value": "https://mlflow.example.com"} in operator["env"]


def test_an_external_mlflows_credentials_reach_the_operator() -> None:
    rendered = render({**EVERY_ROLE_EXTERNAL, "tracking.existingSecret": "mlflow-login"})
    for name, spec in rendered.pods().items():
        assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "mlflow-login"}}], name


def test_an_external_database_and_store_are_what_mlflow_is_told() -> None:
    rendered = render({name: value for name, value in EVERY_ROLE_EXTERNAL.items() if not name.startswith("tracking")})
    assert "StatefulSet" not in {item["kind"] for item in rendered.manifests}
    spec = rendered.one("Deployment", "heimdall-tracking")["spec"]["template"]["spec"]
    env = {item["name"]: item.get("value") for item in spec["containers"][0]["env"]}
    assert env["BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow@db.example.com:5432/mlflow"
    assert env["MLFLOW_S3_ENDPOINT_URL"] == "https://s3.example.com"


@pytest.mark.parametrize(
    ("left_out", "role"),
    [
        ("tracking.externalUrl", "tracking"),
        ("database.externalHost", "database"),
        ("database.existingSecret", "database"),
        ("objectStore.externalUrl", "objectStore"),
        ("objectStore.existingSecret", "objectStore"),
    ],
)
def test_an_external_service_without_its_address_or_secret_is_refused(left_out: str, role: str) -> None:
    values = {
        name: value
        for name, value in EVERY_ROLE_EXTERNAL.items()
        if name != left_out and (name.startswith((role, "trainer")))
    }
    assert left_out in refused(*flags(values))
