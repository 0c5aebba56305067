"""No password is anywhere but in its Secret. Runs last: everything that the other cases left is looked through.

A password is looked for as it is and as base64 has it: so it is in a header of HTTP, and in a Secret that was printed.
"""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.e2e.cluster import Cluster, condition, port_forward
from tests.e2e.conftest import GPU_NODE, OTHER_NODE, Mlflow, contract_run
from tests.e2e.test_localizer import example

SNAPSHOTS = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs/snapshots"
LOGS = "/var/log/pods"
KINDS = "trainingruns,jobs,pods,configmaps,deployments,statefulsets,services,events.events.k8s.io"
GREP_NOTHING = 1
CONTROL_PLANE = "heimdall-control-plane"
NODES = (CONTROL_PLANE, OTHER_NODE, GPU_NODE)
TEXT_LIMIT = 2**20
"""Bytes. What is larger is a checkpoint or a model, unless it is a log."""
ETCD = "/var/lib/etcd"
"""Where the control plane keeps Secrets."""


@pytest.fixture(scope="module")
def passwords(release: Cluster, recordings: None, canaries: dict[str, str]) -> dict[str, str]:
    """The canaries, after a TrainingRun went its way, another failed, and a third could not use what it was given."""
    wrong = f"{beginning_of(canaries)}{secrets.token_hex(8)}"
    url = f"postgresql://heimdall_reader:{wrong}@heimdall-database:5432/heimdall"
    release.kubectl("create", "secret", "generic", "canary-wrong", f"--from-literal=HEIMDALL_DATABASE_URL={url}")
    run = example("canary-wrong", epochs=1)
    # Not PGPASSWORD, which is right: the address itself holds a password, and it is wrong.
    trainer = {"name": "trainer", "envFrom": [{"secretRef": {"name": "canary-wrong"}}]}
    run["spec"] |= {"podTemplate": {"spec": {"containers": [trainer]}}, "retries": {"limit": 0}}
    release.apply(run)
    others = {"canary-well": {"steps": 3}, "canary-ill": {"fail": "user"}}
    for name, args in others.items():
        release.apply(contract_run(name, **args))
    for name in others:
        release.wait_for_phase(name, "Succeeded", "Failed", timeout_s=120)
    status = release.wait_for_phase("canary-wrong", "Failed", "Succeeded", timeout_s=300)
    assert "heimdall-database" in condition(status, "Failed")["message"], "it says which database refused"
    return {**canaries, "a wrong one": wrong}


def beginning_of(passwords: dict[str, str]) -> str:
    """What all canaries of these tests begin with, and nothing else."""
    beginning = passwords["database/reader-password"][: len("canary") + 16]
    assert all(password.startswith(beginning) for password in passwords.values())
    return beginning


def forms(word: str) -> list[str]:
    """A word, and what base64 makes of it wherever in a text it is: it begins at one of three places in a group."""
    found = [word]
    for before in range(3):
        encoded = base64.b64encode(bytes(before) + word.encode()).decode()
        # The characters that are of this word alone, each of six bits.
        found.append(encoded[-(-8 * before // 6) : 8 * (before + len(word)) // 6])
    return found


def found_in(text: str, passwords: dict[str, str]) -> list[str]:
    return [name for name, password in passwords.items() if any(form in text for form in forms(password))]


@pytest.mark.parametrize("user", ["admin", "heimdall-operator", "heimdall-trainer"])
def test_a_password_is_found_in_a_header_and_in_a_secret(user: str) -> None:
    word, other = secrets.token_hex(8), secrets.token_hex(8)
    for said in (f"the password is {word}!", f"{user}:{word}more", f"{word}", f"postgresql://{user}:{word}@host"):
        for text in (said, base64.b64encode(said.encode()).decode()):
            assert found_in(text, {"mine": word, "another": other}) == ["mine"], said


def grep(release: Cluster, node: str, folder: str, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Look for words in the files of a node."""
    # Beyond what a container holds in its own data directory (an emptyDir is no layer), nothing is left out.
    command = ("docker", "exec", "-i", node, "grep", "-rlF", "-m1", "--devices=skip", "-f", "-", folder)
    return release.run(*command, text="\n".join(words), check=False)


def test_the_canaries_are_found_where_they_are(release: Cluster, passwords: dict[str, str]) -> None:
    """By the words that find them nowhere else."""
    assert grep(release, CONTROL_PLANE, ETCD, forms(beginning_of(passwords))).stdout.startswith(ETCD)


def test_the_canaries_are_the_passwords_in_use(release: Cluster, passwords: dict[str, str]) -> None:
    data = json.loads(release.kubectl("get", "secret", "heimdall-trainer", "-o", "json"))["data"]
    used = {base64.b64decode(value).decode() for value in data.values()}

    assert {passwords["database/reader-password"], passwords["object-store/reader-secret-key"]} <= used


def test_no_password_is_in_any_resource(release: Cluster, passwords: dict[str, str]) -> None:
    assert found_in(release.kubectl("get", KINDS, "-o", "yaml"), passwords) == []


@pytest.mark.parametrize("folder", [LOGS, SNAPSHOTS])
def test_no_password_is_in_a_log_or_an_image_layer(release: Cluster, passwords: dict[str, str], folder: str) -> None:
    """Logs of all pods that there were, and files of all images and containers, as they lie on each node."""
    words = forms(beginning_of(passwords))
    for node in NODES:
        # That nothing is found says nothing of a folder that is not there, or can't be read.
        found = release.run("docker", "exec", node, "grep", "-rlq", "-m1", "--devices=skip", "", folder, check=False)
        assert found.returncode == 0, f"there is nothing in {folder} of {node}: {found.stderr}"
    with ThreadPoolExecutor() as pool:
        looks = list(pool.map(lambda node: grep(release, node, folder, words), NODES))
    for done in looks:
        assert done.stdout.splitlines() == []
        # What a container that ended leaves may be cleared away meanwhile.
        troubles = [line for line in done.stderr.splitlines() if not line.endswith("No such file or directory")]
        assert troubles == []
        assert done.returncode == GREP_NOTHING or done.stderr


def test_no_password_is_in_what_mlflow_keeps(mlflow: Mlflow, passwords: dict[str, str]) -> None:
    from mlflow.entities import ViewType

    client = mlflow.client
    experiments = [item.experiment_id for item in client.search_experiments(view_type=ViewType.ALL)]
    runs: list[Any] = client.search_runs(experiments, run_view_type=ViewType.ALL, max_results=5000)
    assert len(runs) >= 2
    said = [{**run.data.params, **run.data.tags, "name": run.info.run_name} for run in runs]
    said += [experiment.tags for experiment in client.search_experiments(view_type=ViewType.ALL)]
    models, versions = client.search_registered_models(), client.search_model_versions()
    assert models
    assert versions
    said += [{**item.tags, "description": item.description} for item in (*models, *versions)]
    logged = logged_models(client, experiments)
    assert logged
    said += [{**model.params, **model.tags, "name": model.name} for model in logged]
    assert found_in(json.dumps(said), passwords) == []


def logged_models(client: Any, experiments: list[str]) -> list[Any]:
    """All that there are; a page has a few."""
    found: list[Any] = []
    token = None
    while True:
        page = client.search_logged_models(experiments, page_token=token)
        found += page
        token = page.token
        if not token:
            return found


def test_no_password_is_in_any_artifact_that_is_text(
    release: Cluster, canaries: dict[str, str], passwords: dict[str, str]
) -> None:
    """Logs and events of attempts, what models are made of, and whatever else lies in the bucket and is small."""
    import boto3

    with port_forward(release, "svc/heimdall-object-store", 9000) as port:
        store = boto3.client(
            "s3",
            endpoint_url=f"http://127.0.0.1:{port}",
            aws_access_key_id="heimdall-root",
            aws_secret_access_key=canaries["object-store/root-password"],
            region_name="us-east-1",
        )
        pages = store.get_paginator("list_objects_v2").paginate(Bucket="mlflow")
        there = [item for page in pages for item in page.get("Contents", ())]
        keys = [item["Key"] for item in there if item["Size"] <= TEXT_LIMIT or item["Key"].endswith(".log")]
        for name in (".log", "/MLmodel"):
            assert any(key.endswith(name) for key in keys), name
        for key in keys:
            text = store.get_object(Bucket="mlflow", Key=key)["Body"].read().decode(errors="replace")
            assert found_in(text, passwords) == [], key
