"""What the chart renders, and what it refuses."""

from __future__ import annotations

import base64
import itertools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from heimdall_api.contract import GROUP, PLURAL
from tests.unit.chart.helm import CHART, NAMESPACE, Manifest, Rendered, flags, helm, refused, render

SPREAD = {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render()


# --- pods --------------------------------------------------------------------------------------------------------


def containers(spec: Manifest) -> list[Manifest]:
    found: list[Manifest] = [*spec.get("initContainers", []), *spec["containers"]]
    return found


def test_every_pod_is_restricted(rendered: Rendered) -> None:
    pods = rendered.pods()
    assert len(pods) == 7
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


def test_nothing_is_left_out_where_limits_of_processors_are_asked_for() -> None:
    wanted = {"requests": {"cpu": "10m", "memory": "100Mi"}, "limits": {"cpu": "7", "memory": "1Gi"}}
    roles = ("operator", "tracking", "database", "objectStore", "jobs")
    for name, spec in render({f"{role}.resources": wanted for role in roles}).pods().items():
        assert [container["resources"] for container in containers(spec)] == [wanted] * len(containers(spec)), name


def test_only_the_operator_has_a_service_account_token(rendered: Rendered) -> None:
    with_token = {name for name, spec in rendered.pods().items() if spec.get("automountServiceAccountToken", True)}
    assert with_token == {"Deployment/heimdall-operator"}


def test_what_serves_is_probed(rendered: Rendered) -> None:
    for name, spec in rendered.pods().items():
        if name.startswith(("Deployment/", "StatefulSet/")):
            for container in spec["containers"]:
                assert {"readinessProbe", "livenessProbe"} <= container.keys(), name


@pytest.mark.parametrize(
    ("code", "lives", "serves"), [(0, True, True), (1, True, False), (2, False, False)], ids=["in", "recovers", "gone"]
)
def test_a_database_that_recovers_from_a_crash_is_left_to_it(
    code: int, lives: bool, serves: bool, rendered: Rendered, tmp_path: Path
) -> None:
    """By what pg_isready ends with, as PostgreSQL documents it."""
    stub = tmp_path / "pg_isready"
    stub.write_text(f"#!/bin/sh\nexit {code}\n")
    stub.chmod(0o755)
    (container,) = rendered.pods()["StatefulSet/heimdall-database"]["containers"]
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin"}

    for probe, passes in (("startupProbe", lives), ("livenessProbe", lives), ("readinessProbe", serves)):
        done = subprocess.run(container[probe]["exec"]["command"], env=env, timeout=10, check=False)
        assert (done.returncode == 0) is passes, probe


def test_a_database_has_time_to_be_made_on_slow_storage(rendered: Rendered) -> None:
    """What is cut off before the roles are made is never taken up."""
    (container,) = rendered.pods()["StatefulSet/heimdall-database"]["containers"]
    probe = container["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 600


def test_a_database_trusts_nobody_who_comes_by_a_port_forward(rendered: Rendered) -> None:
    """By initdb's own rules, which the official image keeps, it trusts whoever comes from 127.0.0.1."""
    (container,) = rendered.pods()["StatefulSet/heimdall-database"]["containers"]
    assert {"name": "POSTGRES_INITDB_ARGS", "value": "--auth-host=scram-sha-256"} in container["env"]


def secret_values(rendered: Rendered) -> set[str]:
    keys = ("password", "secret-key", "PASSWORD")
    return {
        base64.b64decode(value).decode()
        for secret in rendered.of_kind("Secret")
        for key, value in secret["data"].items()
        if key.endswith(keys)
    }


def test_passwords_are_in_secrets_alone(rendered: Rendered) -> None:
    passwords = secret_values(rendered)
    assert len(passwords) == 12
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
            "topologySpreadConstraints": [SPREAD],
            "priorityClassName": f"{role.lower()}-priority",
        }.items()
    }
    rendered = render({**placed, "imagePullSecrets": [{"name": "registry"}]})
    for name, spec in rendered.pods().items():
        assert spec["imagePullSecrets"] == [{"name": "registry"}], name
        assert spec["nodeSelector"]["pool"] in name.replace("object-store", "objectStore").replace("test", "operator")
        assert spec["tolerations"], name
        assert "podAntiAffinity" in spec["affinity"], name
        assert spec["topologySpreadConstraints"] == [SPREAD], name
        assert spec["priorityClassName"] == f"{spec['nodeSelector']['pool'].lower()}-priority", name


def metadata_of_pods(rendered: Rendered) -> dict[str, Manifest]:
    """Labels and annotations of the pods of everything that makes pods."""
    found: dict[str, Manifest] = {}
    for kind in ("Deployment", "StatefulSet", "Job"):
        for item in rendered.of_kind(kind):
            found[item["metadata"]["name"]] = item["spec"]["template"]["metadata"]
    return found


def test_common_labels_are_on_everything_but_the_definition() -> None:
    rendered = render({"commonLabels": {"cost-center": "rf"}, "operator.podLabels": {"cost-center": "platform"}})
    for item in rendered.manifests:
        if item["kind"] != "CustomResourceDefinition":
            assert item["metadata"]["labels"]["cost-center"] == "rf", item["metadata"]["name"]
    for name, metadata in metadata_of_pods(rendered).items():
        assert metadata["labels"]["cost-center"] == ("platform" if "operator" in name else "rf"), name
    for kind in ("Deployment", "StatefulSet"):
        for item in rendered.of_kind(kind):
            chosen = item["spec"]["selector"]["matchLabels"]
            assert "cost-center" not in chosen, "a selector can't be changed"
            assert chosen.items() <= item["spec"]["template"]["metadata"]["labels"].items()


def test_labels_and_annotations_of_a_role_are_on_its_pods_alone() -> None:
    values = {
        f"{role}.{name}": {"example.com/role": role}
        for role in ("operator", "tracking", "database", "objectStore")
        for name in ("podLabels", "podAnnotations")
    }
    for name, metadata in metadata_of_pods(render(values)).items():
        role = metadata["labels"]["example.com/role"]
        assert metadata["annotations"]["example.com/role"] == role
        assert role in name.replace("object-store", "objectStore")


def test_without_labels_and_annotations_pods_are_what_they_were(rendered: Rendered) -> None:
    """An upgrade starts no database anew for something that nobody asked for."""
    for name, metadata in metadata_of_pods(rendered).items():
        assert set(metadata["labels"]) == {f"app.kubernetes.io/{label}" for label in ("name", "instance", "component")}
        assert set(metadata.get("annotations", {})) <= {"checksum/files"}, name


@pytest.mark.parametrize("value", ["commonLabels", "database.podLabels"])
def test_labels_that_the_chart_finds_its_own_by_are_refused(value: str) -> None:
    said = refused(*flags({value: {"app.kubernetes.io/component": "mine"}}))
    assert value.replace(".", "/") in said


def test_further_variables_reach_operator_and_mlflow() -> None:
    extra = [{"name": "HTTPS_PROXY", "value": "http://proxy:3128"}]
    rendered = render({"operator.extraEnv": extra, "tracking.extraEnv": extra})
    for name, spec in rendered.pods().items():
        for container in containers(spec):
            wanted = any(part in name for part in ("heimdall-operator", "tracking"))
            assert (extra[0] in container.get("env", [])) is wanted, f"{name}: {container['name']}"


# --- CRD and rights ----------------------------------------------------------------------------------------------


def test_the_crd_stays_on_uninstall_and_is_the_generated_one(rendered: Rendered) -> None:
    crd = rendered.one("CustomResourceDefinition", f"{PLURAL}.{GROUP}")
    assert crd["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
    generated = yaml.safe_load((CHART / "files/crd.yaml").read_text())
    generated["metadata"].pop("annotations", None)
    assert crd == generated
    assert not render({"crd.install": False}).of_kind("CustomResourceDefinition")


def test_passwords_stay_on_uninstall(rendered: Rendered) -> None:
    for name in ("heimdall-database", "heimdall-object-store", "heimdall-tracking"):
        assert rendered.one("Secret", name)["metadata"]["annotations"] == {"helm.sh/resource-policy": "keep"}


def test_the_operator_has_the_rights_it_needs_and_no_others(rendered: Rendered) -> None:
    rules = rendered.one("ClusterRole", f"{NAMESPACE}-heimdall-operator")["rules"]
    granted: dict[tuple[str, str], set[str]] = {}
    for rule in rules:
        assert rule.keys() == {"apiGroups", "resources", "verbs"}
        for kind in itertools.product(rule["apiGroups"], rule["resources"]):
            granted.setdefault(kind, set()).update(rule["verbs"])
    seen = {"get", "list", "watch"}
    assert granted == {
        (GROUP, "trainingruns"): {*seen, "patch"},
        (GROUP, "trainingruns/status"): {"patch"},
        (GROUP, "trainingruns/finalizers"): {"update"},  # to be named as an owner that a deletion waits for
        ("batch", "jobs"): {*seen, "create", "delete"},
        ("", "pods"): {"list", "watch"},
        ("", "pods/log"): {"get"},
        ("", "services"): {"get", "create"},
        ("", "events"): {"list"},
        ("events.k8s.io", "events"): {"create"},
    }


def test_with_a_list_of_namespaces_there_is_nothing_of_the_cluster() -> None:
    rendered = render({"operator.namespaces": ["team-a", "team-b"]})
    assert rendered.names("ClusterRole") == {f"{NAMESPACE}-heimdall-view", f"{NAMESPACE}-heimdall-edit"}
    assert not rendered.of_kind("ClusterRoleBinding"), "the two are for people"
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


def test_namespaces_that_are_watched_can_train() -> None:
    rendered = render({"operator.namespaces": ["team-b"]})
    where = {item["metadata"].get("namespace") for item in rendered.of_kind("Secret")}
    assert {NAMESPACE, "team-b"} <= where


def test_built_in_roles_take_up_rights_on_training_runs(rendered: Rendered) -> None:
    aggregated: dict[str, set[str]] = {}
    for role in rendered.of_kind("ClusterRole"):
        for label, value in role["metadata"]["labels"].items():
            if "aggregate-to-" in label:
                assert value == "true"
                (rule,) = role["rules"]
                # Nobody but the operator writes a status.
                assert (rule["apiGroups"], rule["resources"]) == ([GROUP], ["trainingruns"])
                aggregated.setdefault(label.rpartition("-")[2], set()).update(rule["verbs"])
    seen = {"get", "list", "watch"}
    changed = {"create", "update", "patch", "delete", "deletecollection"}
    assert aggregated == {"view": seen, "edit": seen | changed, "admin": seen | changed}


def test_rights_of_people_are_left_out_where_they_are_not_wanted() -> None:
    assert render({"crd.userRoles": False}).names("ClusterRole") == {f"{NAMESPACE}-heimdall-operator"}


def test_rights_of_people_are_each_releases_own() -> None:
    """So they stay when the release is removed that brought the definition, and no two releases make the same role."""
    beside = {"crd.install": False, "operator.namespaces": ["team"]}
    roles = {f"{NAMESPACE}-heimdall-view", f"{NAMESPACE}-heimdall-edit"}
    assert render(beside).names("ClusterRole") == roles
    done = helm("template", "heimdall", str(CHART), "--namespace", "other", *flags(beside))
    assert not any(role in done.stdout for role in roles)
    assert not render({**beside, "crd.userRoles": False}).names("ClusterRole"), "nothing of the cluster is left"


@pytest.mark.parametrize(
    ("release", "overrides"),
    [
        ("radio-localisation-production"[:30], {}),
        ("heimdall-" + 30 * "x", {}),
        ("r", {"fullnameOverride": 31 * "a" + "-" + 7 * "b"}),
        ("r", {"nameOverride": 37 * "a"}),
    ],
)
def test_long_names_are_no_longer_than_labels(release: str, overrides: dict[str, str]) -> None:
    done = helm("template", release, str(CHART), "--namespace", NAMESPACE, *flags(overrides))
    assert done.returncode == 0, done.stderr
    # At its 999th revision two digits are added.
    jobs = [item["metadata"]["name"] for item in yaml.safe_load_all(done.stdout) if item and item["kind"] == "Job"]
    assert len(jobs) == 2
    assert max(map(len, jobs)) + 2 <= 63
    assert not any("--" in job for job in jobs)


@pytest.mark.parametrize(
    ("release", "overrides", "said"),
    [
        ("radio-localisation-production-x", {}, "name radio-localisation-production-x is too long"),
        ("r", {"nameOverride": 38 * "a"}, f"may have 39 characters, and r-{38 * 'a'} has 40"),
        ("2nd", {}, "name 2nd can't be used: names of Services begin with a letter"),
        ("a.b", {}, "name a.b can't be used"),
        ("r", {"fullnameOverride": 40 * "a"}, "/fullnameOverride': maxLength: got 40, want 39"),
        ("r", {"fullnameOverride": "Upper"}, "/fullnameOverride': 'Upper' does not match pattern"),
    ],
)
def test_names_that_can_not_be_used_are_refused(release: str, overrides: dict[str, str], said: str) -> None:
    done = helm("template", release, str(CHART), "--namespace", NAMESPACE, *flags(overrides))
    assert done.returncode != 0
    assert said in done.stderr
    assert "fullnameOverride" in done.stderr


OF_TRAINING = {"heimdall-trainer", "heimdall-recordings-writer", f"{PLURAL}.{GROUP}"}
"""What has the same name whatever the release is called."""


@pytest.mark.parametrize(
    ("release", "overrides", "begin"),
    [
        ("2nd.go", {"fullnameOverride": "loc"}, "loc"),
        ("2nd.go", {"fullnameOverride": "loc", "nameOverride": "radio"}, "loc"),
        ("go", {"nameOverride": "radio"}, "go-radio"),
        ("radio-go", {"nameOverride": "radio"}, "radio-go"),
    ],
)
def test_everything_is_named_as_one_says(release: str, overrides: dict[str, str], begin: str) -> None:
    done = helm("template", release, str(CHART), "--namespace", NAMESPACE, *flags(overrides))
    assert done.returncode == 0, done.stderr
    rendered = Rendered([item for item in yaml.safe_load_all(done.stdout) if item])
    names = {item["metadata"]["name"] for item in rendered.manifests} - OF_TRAINING
    assert {name for name in names if not name.removeprefix(f"{NAMESPACE}-").startswith(begin)} == set()
    # Nothing looks for it under another name.
    assert re.findall(r"\S*heimdall-(?:tracking|database|object-store)\S*|2nd.go-\S*", done.stdout) == []
    labels = {item["metadata"].get("labels", {}).get("app.kubernetes.io/name") for item in rendered.manifests}
    assert labels - {None} == {overrides.get("nameOverride", "heimdall")}
    selectors = [item["spec"]["podSelector"]["matchLabels"] for item in rendered.of_kind("NetworkPolicy")]
    assert {each.get("app.kubernetes.io/name") for each in selectors} - {None} == labels - {None}
