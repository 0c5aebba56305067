"""MLflow, existing Secrets and external services, certificate authorities."""

from __future__ import annotations

import base64
import configparser
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.unit.chart.helm import (
    CHART,
    EVERY_ROLE_EXTERNAL,
    NAMESPACE,
    ROOT,
    STORES_EXTERNAL,
    Manifest,
    Rendered,
    flags,
    refused,
    render,
)

EXISTING_SECRETS: dict[str, Any] = {
    "database.existingSecret": "db",
    "objectStore.existingSecret": "s3",
    "tracking.auth.existingSecret": "logins",
    "trainer.createSecrets": False,
}
PEERS = [{"podSelector": {}}]
PEM = "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render()


def server(rendered: Rendered) -> Manifest:
    spec = rendered.one("Deployment", "heimdall-tracking")["spec"]["template"]["spec"]
    container: Manifest = spec["containers"][0]
    return container


def environment(container: Manifest) -> dict[str, Any]:
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in container["env"]}


def job(rendered: Rendered, part: str) -> Manifest:
    found = [item for item in rendered.of_kind("Job") if part in item["metadata"]["name"]]
    assert len(found) == 1
    return found[0]


# --- MLflow ------------------------------------------------------------------------------------------------------


def arguments(rendered: Rendered) -> dict[str, str]:
    return dict(item.removeprefix("--").split("=", 1) for item in server(rendered)["args"] if "=" in item)


def test_mlflow_may_be_asked_by_its_service_with_and_without_port(rendered: Rendered) -> None:
    hosts = arguments(rendered)["allowed-hosts"].split(",")
    assert {f"heimdall-tracking.{NAMESPACE}.svc:5000", "heimdall-tracking:5000", "localhost:*"} <= set(hosts)
    assert "*" not in hosts
    assert "cors-allowed-origins" not in arguments(rendered)


def test_mlflow_answers_under_its_public_address() -> None:
    said = arguments(render({"tracking.publicUrl": "https://mlflow.example.com/"}))
    assert "mlflow.example.com" in said["allowed-hosts"].split(",")
    assert said["cors-allowed-origins"] == "https://mlflow.example.com"


@pytest.mark.parametrize(
    ("url", "tls"),
    [
        ("https://mlflow.example.com:8443", [{"hosts": ["mlflow.example.com"], "secretName": "mlflow-tls"}]),
        ("http://mlflow.example.com/", None),
    ],
)
def test_an_ingress_leads_from_the_public_host_to_mlflow(url: str, tls: Any) -> None:
    ingress = {"enabled": True, "className": "nginx", "annotations": {"a/b": "0"}, "tlsSecretName": "mlflow-tls"}
    made = render({"tracking.publicUrl": url, "tracking.ingress": ingress})
    found = made.one("Ingress", "heimdall-tracking")
    assert found["metadata"]["annotations"] == {"a/b": "0"}
    assert found["spec"].get("tls") == tls
    assert found["spec"]["ingressClassName"] == "nginx"
    (rule,) = found["spec"]["rules"]
    assert rule["host"] == "mlflow.example.com"
    (path,) = rule["http"]["paths"]
    service = made.one("Service", path["backend"]["service"]["name"])
    assert path["backend"]["service"]["port"]["name"] in {port["name"] for port in service["spec"]["ports"]}
    assert not render({"tracking.publicUrl": url}).of_kind("Ingress")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "tracking.publicUrl is needed with tracking.ingress.enabled"),
        ({"tracking.publicUrl": "https://example.com/mlflow"}, "give it a host of its own"),
    ],
)
def test_an_ingress_that_could_not_work_is_refused(values: dict[str, Any], words: str) -> None:
    assert words in refused(*flags({"tracking.ingress.enabled": True, **values}))


def test_everything_of_mlflow_is_quiet(rendered: Rendered) -> None:
    pods = [spec for name, spec in rendered.pods().items() if "tracking" in name]
    assert len(pods) == 2
    operator = next(spec for name, spec in rendered.pods().items() if name.endswith("operator"))
    assert {"MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"} <= environment(operator["containers"][0]).keys()
    for container in (item for spec in pods for item in [*spec.get("initContainers", []), *spec["containers"]]):
        said = environment(container)
        assert said["MLFLOW_DISABLE_TELEMETRY"] == said["DO_NOT_TRACK"] == "true"
        assert said["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


@pytest.mark.parametrize("part", ["-migrate-", "-setup-"])
def test_a_job_outlives_a_pull_secret_that_is_mended_late(part: str, rendered: Rendered) -> None:
    """The release looks well without it, and nothing else does what it does."""
    assert job(rendered, part)["spec"]["activeDeadlineSeconds"] >= 3600


def test_one_job_migrates_and_the_server_waits_for_it(rendered: Rendered) -> None:
    migration = job(rendered, "-migrate-")
    assert "annotations" not in migration["metadata"], "a hook would not run with every tool"
    assert migration["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "migrate"
    spec = rendered.one("Deployment", "heimdall-tracking")["spec"]["template"]["spec"]
    assert [item["command"][-1] for item in spec["initContainers"]] == ["wait"]


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("-migrate-", [{"tracking.image.tag": "v3.18.0-full"}, {"tracking.auth.enabled": False}]),
        ("-setup-", [{"objectStore.image.tag": "RELEASE"}, {"objectStore.artifactsBucket": "other"}]),
    ],
)
def test_a_job_is_another_when_anything_of_it_changes(part: str, changes: list[dict[str, Any]]) -> None:
    values = [{}, {}, *changes, {"jobs.resources.limits.memory": "2Gi"}, {"commonLabels": {"team": "radio"}}]
    names = [job(render(each), part)["metadata"]["name"] for each in values]
    assert names[0] == names[1]
    assert len(set(names)) == len(names) - 1


def test_several_servers_are_replaced_one_by_one_and_drained_one_at_a_time(rendered: Rendered) -> None:
    assert not rendered.of_kind("PodDisruptionBudget"), "a budget of a single pod holds drains up for ever, or nothing"
    assert rendered.one("Deployment", "heimdall-tracking")["spec"]["strategy"] == {"type": "Recreate"}
    several = render({"tracking.replicas": 2})
    deployment = several.one("Deployment", "heimdall-tracking")["spec"]
    assert deployment["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
    budget = several.one("PodDisruptionBudget", "heimdall-tracking")["spec"]
    assert budget["maxUnavailable"] == 1
    assert budget["selector"] == deployment["selector"]


# --- authentication ----------------------------------------------------------------------------------------------


def test_mlflow_asks_for_a_password_by_default(rendered: Rendered) -> None:
    assert arguments(rendered)["app-name"] == "basic-auth"
    said = environment(server(rendered))
    assert said["MLFLOW_FLASK_SERVER_SECRET_KEY"] == {
        "secretKeyRef": {"name": "heimdall-tracking", "key": "flask-secret-key"}
    }
    files = rendered.one("ConfigMap", "heimdall-tracking")["data"]
    ini = configparser.ConfigParser()
    ini.read_string(files["basic_auth.ini"])
    assert ini["mlflow"]["database_uri"] == said["BACKEND_STORE_URI"]
    assert ini["mlflow"]["default_permission"] == "READ"


def test_operator_and_test_log_in_as_the_operator_and_training_pods_as_the_trainer(rendered: Rendered) -> None:
    for name in ("Deployment/heimdall-operator", "Pod/heimdall-test"):
        said = environment(rendered.pods()[name]["containers"][0])
        assert said["MLFLOW_TRACKING_USERNAME"] == "heimdall-operator", name
        assert said["MLFLOW_TRACKING_PASSWORD"]["secretKeyRef"]["key"] == "operator-password", name
    logins = rendered.one("Secret", "heimdall-tracking")["data"]
    trainer = rendered.one("Secret", "heimdall-trainer")["data"]
    assert trainer["MLFLOW_TRACKING_PASSWORD"] == logins["trainer-password"]
    assert len(set(logins.values())) == 4
    assert logins["operator-password"] not in trainer.values()
    assert "MLFLOW_TRACKING_PASSWORD" not in rendered.one("Secret", "heimdall-recordings-writer")["data"]


@pytest.mark.parametrize("direct", [True, False])
def test_training_pods_send_what_is_large_to_the_object_store_themselves(direct: bool) -> None:
    secret = render({"tracking.presignedTransfers": direct}).one("Secret", "heimdall-trainer")["data"]
    said = {key: base64.b64decode(value).decode() for key, value in secret.items()}
    assert said["MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD"] == str(direct).lower()
    # MLflow's own limit is 500 MiB: more than the checkpoints of most models have.
    assert said["MLFLOW_MULTIPART_UPLOAD_MINIMUM_FILE_SIZE"] == str(64 * 2**20)


def test_without_authentication_there_are_no_logins() -> None:
    rendered = render({"tracking.auth.enabled": False})
    assert "heimdall-tracking" not in rendered.names("Secret")
    assert "MLFLOW_TRACKING_USERNAME" not in rendered.one("Secret", "heimdall-trainer")["data"]
    assert "app-name" not in arguments(rendered)
    for spec in rendered.pods().values():
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            assert not {"MLFLOW_TRACKING_USERNAME", "MLFLOW_AUTH_CONFIG_PATH"} & {
                item["name"] for item in container.get("env", [])
            }


# --- existing Secrets and external services ----------------------------------------------------------------------


def test_the_trainer_s_secrets_that_the_documents_show_are_the_charts(rendered: Rendered) -> None:
    (block,) = re.findall(
        r"```yaml\n(apiVersion: v1\nkind: Secret\n.*?)```", (ROOT / "docs/chart.md").read_text(), re.DOTALL
    )
    for shown in yaml.safe_load_all(block.replace(".heimdall.svc", f".{NAMESPACE}.svc")):
        made = rendered.one("Secret", shown["metadata"]["name"])["data"]
        said = {key: base64.b64decode(value).decode() for key, value in made.items()}
        assert shown["stringData"].keys() == said.keys()
        for key, value in shown["stringData"].items():
            assert value in {said[key], "…"}, key


@pytest.mark.parametrize(
    "value", ["database.existingSecret", "objectStore.existingSecret", "tracking.auth.existingSecret"]
)
def test_an_existing_secret_that_can_not_be_read_is_refused_rather_than_invented(value: str) -> None:
    said = refused(*flags({value: "mine"}))
    assert "Secret mine" in said
    assert "trainer.createSecrets=false" in said


@pytest.mark.parametrize(
    ("left_out", "remedies"),
    [
        (
            "tracking.auth.existingSecret",
            ("trainer-password", "named heimdall-tracking", "tracking.auth.enabled=false"),
        ),
        ("database.existingSecret", ("reader-password", "named heimdall-database")),
        ("objectStore.existingSecret", ("reader-access-key", "named heimdall-object-store")),
    ],
)
def test_passwords_that_nobody_could_give_to_training_pods_are_refused(left_out: str, remedies: tuple[str]) -> None:
    values = {name: value for name, value in EXISTING_SECRETS.items() if name != left_out}
    said = refused(*flags({**values, "trainer.secretName": "ours"}))
    assert f"{left_out} is needed with trainer.createSecrets=false" in said
    for remedy in ("Secret ours", *remedies):
        assert remedy in said, remedy


@pytest.mark.parametrize(
    "value",
    [
        {"tracking.auth.existingSecret": "logins"},
        {"tracking.auth.enabled": False},
        {"tracking.external": True, "tracking.externalUrl": "https://mlflow.example.com"},
    ],
    ids=",".join,
)
def test_where_logins_are_known_or_not_asked_for_no_secret_is_made_for_training_pods(value: dict[str, Any]) -> None:
    values = {name: each for name, each in EXISTING_SECRETS.items() if name != "tracking.auth.existingSecret"}
    assert not render({**values, **value}).of_kind("Secret")


def test_with_existing_secrets_the_chart_renders_without_a_cluster_and_makes_none() -> None:
    rendered = render(EXISTING_SECRETS)
    assert not rendered.of_kind("Secret")
    used = set(re.findall(r"secretKeyRef:\s*\n\s*key: \S+\s*\n\s*name: (\S+)", yaml.safe_dump_all(rendered.manifests)))
    assert used == {"db", "s3", "logins"}
    assert render(EXISTING_SECRETS) == rendered


def test_with_everything_external_only_the_operator_is_installed() -> None:
    rendered = render(EVERY_ROLE_EXTERNAL)
    assert rendered.pods().keys() == {"Deployment/heimdall-operator", "Pod/heimdall-test"}
    for kind in ("Service", "ConfigMap", "Secret"):
        assert not rendered.of_kind(kind)
    operator = environment(rendered.pods()["Deployment/heimdall-operator"]["containers"][0])
    assert operator["HEIMDALL_OPERATOR_TRACKING_URI"] == "https://mlflow.example.com"
    assert "MLFLOW_TRACKING_USERNAME" not in operator


def test_an_external_mlflows_credentials_reach_the_operator() -> None:
    rendered = render({**EVERY_ROLE_EXTERNAL, "tracking.existingSecret": "mlflow-login"})
    for name, spec in rendered.pods().items():
        assert spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "mlflow-login"}}], name


def test_an_external_database_and_store_are_what_mlflow_is_told() -> None:
    secured = {"database.sslMode": "verify-full", "caBundle.existingConfigMap": "trusted"}
    rendered = render({**STORES_EXTERNAL, **secured, "objectStore.region": "eu-central-1"})
    assert "StatefulSet" not in {item["kind"] for item in rendered.manifests}
    said = environment(server(rendered))
    assert said["BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow@db.example.com:5432/mlflow"
    assert said["PGSSLMODE"] == "verify-full"
    assert said["MLFLOW_S3_ENDPOINT_URL"] == "https://s3.example.com"
    assert said["AWS_DEFAULT_REGION"] == "eu-central-1"
    migration = environment(job(rendered, "-migrate-")["spec"]["template"]["spec"]["containers"][0])
    assert migration["PGSSLMODE"] == "verify-full"


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
    of_role = {name: value for name, value in EVERY_ROLE_EXTERNAL.items() if name.startswith(role)}
    values = EXISTING_SECRETS | of_role
    del values[left_out]
    assert f"{left_out} is needed" in refused(*flags(values))


@pytest.mark.parametrize("mode", ["verify-ca", "verify-full"])
def test_a_certificate_that_can_not_be_checked_is_refused(mode: str) -> None:
    said = refused(*flags({**STORES_EXTERNAL, "database.sslMode": mode}))
    assert f"caBundle is needed with database.sslMode={mode}" in said


def test_an_external_database_is_spoken_to_by_tls() -> None:
    assert environment(server(render(STORES_EXTERNAL)))["PGSSLMODE"] == "require"


def test_an_external_database_may_be_an_ipv6_address() -> None:
    rendered = render({**STORES_EXTERNAL, "database.externalHost": "fd00::1"})
    uri = environment(server(rendered))["BACKEND_STORE_URI"]
    assert uri == "postgresql+psycopg2://mlflow@[fd00::1]:5432/mlflow"
    assert uri in rendered.one("ConfigMap", "heimdall-tracking")["data"]["basic_auth.ini"]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"database.externalHost": "db.example.com"},
            "database.externalHost does nothing without database.external=true",
        ),
        (
            {"objectStore.externalUrl": "https://s3"},
            "objectStore.externalUrl does nothing without objectStore.external",
        ),
        (
            {"tracking.externalUrl": "https://mlflow"},
            "tracking.externalUrl does nothing without tracking.external=true",
        ),
        ({"tracking.existingSecret": "mine"}, "chart's own are in tracking.auth.existingSecret"),
        (
            {**EVERY_ROLE_EXTERNAL, "tracking.ingress.enabled": True},
            "tracking.ingress.enabled does nothing with tracking.external=true",
        ),
        (
            {**EXISTING_SECRETS, "tracking.presignedTransfers": False},
            "into the Secret heimdall-trainer, which is yours then. Put MLFLOW_ENABLE_PROXY_MULTIPART_UPLOAD",
        ),
        ({"database.sslMode": "prefer"}, "database.sslMode=prefer does nothing without database.external=true"),
        (
            {"networkPolicies.database.to": PEERS},
            "networkPolicies.database.to does nothing with database.external=false",
        ),
        (
            {"networkPolicies.objectStore.ports": [7480]},
            "networkPolicies.objectStore.ports does nothing with objectStore.external=false",
        ),
        (
            {**EVERY_ROLE_EXTERNAL, "networkPolicies.tracking.from": PEERS},
            "networkPolicies.tracking.from does nothing with tracking.external=true",
        ),
        (
            {"operator.namespaces": ["team-a"], "trainer.namespaces": ["team-a", "team-b"]},
            "trainer.namespaces names team-b, where nobody would look at a TrainingRun",
        ),
    ],
    ids=lambda it: "" if isinstance(it, str) else list(it)[-1],
)
def test_a_value_that_would_do_nothing_is_refused(values: dict[str, Any], words: str) -> None:
    assert words in refused(*flags(values))


EXTERNAL_MLFLOW: dict[str, Any] = {"tracking.external": True, "tracking.externalUrl": "https://mlflow.example.com"}


def test_addresses_that_training_pods_could_not_follow_are_refused() -> None:
    said = refused(*flags(EXTERNAL_MLFLOW))
    assert "tracking.presignedTransfers can't work with tracking.external=true" in said
    assert "Set tracking.presignedTransfers=false, or open the way (networkPolicies.trainer.egress)" in said


@pytest.mark.parametrize(
    "values",
    [
        {"tracking.presignedTransfers": False},
        {"networkPolicies.trainer.egress": [{"ports": [{"port": 9000}]}]},
        {"networkPolicies.enabled": False},
        EXISTING_SECRETS,
    ],
    ids=",".join,
)
def test_an_external_mlflow_is_taken_where_its_bucket_may_be_reached(values: dict[str, Any]) -> None:
    assert "Deployment/heimdall-tracking" not in render({**EXTERNAL_MLFLOW, **values}).pods()


# --- certificate authorities -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "source", "variable"),
    [
        (
            {"caBundle.existingConfigMap": "trusted", "caBundle.key": "root.pem"},
            {"configMap": {"name": "trusted", "items": [{"key": "root.pem", "path": "ca.crt"}]}},
            ("HEIMDALL_OPERATOR_CA_CONFIG_MAP", "trusted"),
        ),
        (
            {"caBundle.existingSecret": "trusted", "caBundle.key": "root.pem"},
            {"secret": {"secretName": "trusted", "items": [{"key": "root.pem", "path": "ca.crt"}]}},
            ("HEIMDALL_OPERATOR_CA_SECRET", "trusted"),
        ),
        (
            {"caBundle.certificates": PEM},
            {"configMap": {"name": "heimdall-ca", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            ("HEIMDALL_OPERATOR_CA_CONFIG_MAP", "heimdall-ca"),
        ),
    ],
)
def test_private_authorities_reach_operator_mlflow_test_and_training_pods(
    values: dict[str, Any], source: dict[str, Any], variable: tuple[str, str]
) -> None:
    rendered = render(values)
    for name, spec in rendered.pods().items():
        if any(part in name for part in ("operator", "tracking", "test")):
            assert {"name": "ca", **source} in spec["volumes"], name
            for container in [*spec.get("initContainers", []), *spec["containers"]]:
                assert "/etc/heimdall-ca" in {mount["mountPath"] for mount in container["volumeMounts"]}, name
    operator = environment(rendered.pods()["Deployment/heimdall-operator"]["containers"][0])
    assert operator[variable[0]] == variable[1]
    assert operator["HEIMDALL_OPERATOR_CA_KEY"] == source.get("configMap", source.get("secret"))["items"][0]["key"]
    assert operator["MLFLOW_TRACKING_SERVER_CERT_PATH"] == "/etc/heimdall-ca/ca.crt"
    assert environment(server(rendered))["AWS_CA_BUNDLE"] == "/etc/heimdall-ca/ca.crt"


CA_FILE = base64.b64encode(b"/etc/heimdall-ca/ca.crt").decode()
KEYS = {
    "database.existingSecret": [f"{who}-password" for who in ("postgres", "mlflow", "writer", "reader")],
    "objectStore.existingSecret": [
        *("root-user", "root-password"),
        *(f"{who}-{what}-key" for who in ("mlflow", "writer", "reader") for what in ("access", "secret")),
    ],
    "tracking.auth.existingSecret": [
        *("admin-password", "operator-password", "trainer-password", "flask-secret-key"),
    ],
    "tracking.existingSecret": ["MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"],
}
"""Of each value that names a Secret, the keys."""


def among(folder: Path, *left_out: str) -> Path:
    """The chart in a namespace where each Secret that it looks up is there, which takes a cluster otherwise.

    Args:
        folder: Where to put it.
        left_out: Keys that none of them has.
    """
    data = " ".join(f'"{key}" "eA=="' for keys in KEYS.values() for key in keys if key not in left_out)
    chart = folder / "heimdall"
    shutil.copytree(CHART, chart)
    helpers = chart / "templates/_helpers.tpl"
    text, count = re.subn(r'lookup "v1" "Secret" \S+ \S+', f'(dict "data" (dict {data}))', helpers.read_text())
    assert count == 3
    helpers.write_text(text)
    return chart


@pytest.fixture(scope="module")
def among_secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return among(tmp_path_factory.mktemp("among-secrets"))


NAMED = {name: value for name, value in EXISTING_SECRETS.items() if name.endswith(".existingSecret")}
WITH_LOGIN = {**EXTERNAL_MLFLOW, "tracking.existingSecret": "mlflow", "tracking.presignedTransfers": False}


@pytest.mark.parametrize("copied", [True, False])
@pytest.mark.parametrize(
    ("value", "key"), [(value, key) for value in NAMED for key in KEYS[value]], ids=lambda it: it.rpartition(".")[2]
)
def test_a_key_that_an_existing_secret_lacks_is_named(value: str, key: str, copied: bool, tmp_path: Path) -> None:
    """Pods would wait for it for ever, or be refused with what was made up in its place."""
    values = {**NAMED, "trainer.createSecrets": copied}
    assert f"Secret {NAMED[value]} has no key {key}" in refused(*flags(values), chart=among(tmp_path, key))


@pytest.mark.parametrize("key", KEYS["tracking.existingSecret"])
def test_a_login_that_training_pods_would_lack_is_named(key: str, tmp_path: Path) -> None:
    assert f"Secret mlflow has no key {key}" in refused(*flags(WITH_LOGIN), chart=among(tmp_path, key))


def test_training_pods_get_the_login_of_an_external_mlflow(among_secrets: Path) -> None:
    data = render(WITH_LOGIN, chart=among_secrets).one("Secret", "heimdall-trainer")["data"]
    assert {key: data[key] for key in KEYS["tracking.existingSecret"]} == dict.fromkeys(
        KEYS["tracking.existingSecret"], "eA=="
    )


@pytest.mark.parametrize(
    ("values", "unused"),
    [
        (STORES_EXTERNAL, ("postgres-password", "root-user", "root-password", "writer-password", "reader-access-key")),
        ({**STORES_EXTERNAL, "trainer.createSecrets": True}, ("postgres-password", "root-user", "root-password")),
        ({**NAMED, "tracking.auth.enabled": False}, KEYS["tracking.auth.existingSecret"]),
        (EVERY_ROLE_EXTERNAL, [key for keys in KEYS.values() for key in keys]),
        (
            {**EVERY_ROLE_EXTERNAL, "trainer.createSecrets": True},
            ("mlflow-password", "mlflow-access-key", "mlflow-secret-key", "flask-secret-key"),
        ),
    ],
    ids=["stores external", "and copied", "no logins", "all external", "all external and copied"],
)
def test_a_key_that_nobody_uses_may_be_left_out(values: dict[str, Any], unused: list[str], tmp_path: Path) -> None:
    assert render(values, chart=among(tmp_path, *unused)).manifests


@pytest.mark.parametrize(
    ("left_out", "told"),
    [
        ("", {"PGSSLROOTCERT", "HEIMDALL_S3_CA_BUNDLE"}),
        ("database", {"HEIMDALL_S3_CA_BUNDLE"}),
        ("objectStore", {"PGSSLROOTCERT"}),
        ("caBundle", set()),
    ],
)
def test_what_adds_recordings_is_told_where_the_authorities_of_external_servers_lie(
    left_out: str, told: set[str], among_secrets: Path
) -> None:
    values = {**EVERY_ROLE_EXTERNAL, "trainer.createSecrets": True, "caBundle.existingConfigMap": "trusted"}
    values["tracking.presignedTransfers"] = False  # the chart's own object store is not what that server signs for
    kept = {name: value for name, value in values.items() if not left_out or not name.startswith(left_out)}
    data = render(kept, chart=among_secrets).one("Secret", "heimdall-recordings-writer")["data"]
    assert {name for name, value in data.items() if value == CA_FILE} == told
    manifest = yaml.safe_load((ROOT / "manifests/examples/recordings.yaml").read_text())
    (container,) = manifest["spec"]["template"]["spec"]["containers"]
    assert "/etc/heimdall-ca" in {mount["mountPath"] for mount in container["volumeMounts"]}


@pytest.mark.parametrize("value", ["trainer.namespaces", "operator.namespaces"])
def test_given_certificates_are_put_into_every_training_namespace(value: str) -> None:
    rendered = render({"caBundle.certificates": PEM, value: ["team-a", "team-b"]})
    maps = [item for item in rendered.of_kind("ConfigMap") if item["metadata"]["name"] == "heimdall-ca"]
    assert {item["metadata"]["namespace"] for item in maps} == {NAMESPACE, "team-a", "team-b"}
    assert all(item["data"] == {"ca.crt": PEM} for item in maps)


def test_two_sources_of_authorities_are_refused_by_their_names() -> None:
    said = refused(*flags({"caBundle.certificates": PEM, "caBundle.existingSecret": "trusted"}))
    assert "caBundle.certificates and caBundle.existingSecret are set" in said
