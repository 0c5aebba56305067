"""The example, trained by the documents' commands with real MLflow, PostgreSQL and MinIO, and looked at as they say."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from heimdall_api.contract import ONNX_FILE, PLOTS_DIR
from heimdall_tracking.runs import find_model, read_facts
from tests import trainer_command
from tests.integration.conftest import Stack
from tests.unit.documents.documents import ROOT, looks_like, shown, typed_under

EXAMPLE = "manifests/examples/localizer.yaml"
MODEL = "heimdall-localizer"
RECEIVERS = 3
FEW = ("--transmissions", "3", "--receivers", str(RECEIVERS))
"""Beside what the documents type: a tenth of the recordings is enough."""
PROGRAM = "heimdall-train"
LAPTOP = ("docs/quickstart.md", "On a laptop, without a cluster")
SAME = (
    ("README.md", "Without a cluster"),
    ("docs/howto/local-services.md", "Servers on this machine, without a cluster"),
)
IN_ONE_PROCESS = """
import shlex, sys
from heimdall_trainer import cli
cli._configure_logging()
for command in sys.argv[1:]:
    print("$", command)
    arguments = cli._parser().parse_args(shlex.split(command)[1:])
    arguments.call(arguments)
"""
"""To start a process takes most of the time of commands that only look."""


@pytest.fixture
def env(stack: Stack, name: str, tmp_path: Path) -> Mapping[str, str]:
    """What the command line is told: a database and a bucket of the test's own."""
    place = f"{name[:30].strip('-')}-{secrets.token_hex(3)}"
    stack.postgres.create_database(place)
    stack.minio.s3.create_bucket(Bucket=place)
    return {
        **os.environ,
        "MLFLOW_TRACKING_URI": stack.mlflow.url,
        "HEIMDALL_DATABASE_URL": stack.postgres.url(place),
        "HEIMDALL_RECORDINGS_URL": f"s3://{place}",
        "HEIMDALL_S3_ENDPOINT_URL": stack.minio.url,
        "HEIMDALL_S3_ACCESS_KEY": stack.minio.access_key,
        "HEIMDALL_S3_SECRET_KEY": stack.minio.secret_key,
        "HEIMDALL_CACHE_DIR": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }


@pytest.fixture
def heimdall_train(env: Mapping[str, str], tmp_path: Path) -> Callable[..., str]:
    """The command line: what it prints."""
    return partial(trainer_command.heimdall_train, env=env, cwd=tmp_path)


def write_example(folder: Path) -> None:
    """The example at its place, made smaller: six epochs of a larger network are minutes."""
    example: dict[str, Any] = yaml.safe_load((ROOT / EXAMPLE).read_text())
    example["spec"]["model"] = {"backbone": "test_resnet"}
    example["spec"]["training"]["epochs"] = 1
    (folder / EXAMPLE).parent.mkdir(parents=True)
    (folder / EXAMPLE).write_text(yaml.safe_dump(example))


def look(commands: list[str], env: Mapping[str, str], folder: Path) -> str:
    """What commands print, each behind itself."""
    done = subprocess.run(
        [sys.executable, "-c", IN_ONE_PROCESS, *commands],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        timeout=trainer_command.TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def in_minio(stack: Stack, location: str, path: str) -> bytes:
    """The bytes of an artifact as they lie in the bucket."""
    key = f"{location.removeprefix('mlflow-artifacts:/').strip('/')}/{path}"
    content: bytes = stack.minio.s3.get_object(Bucket=stack.mlflow.bucket, Key=key)["Body"].read()
    return content


def test_the_example_is_trained_and_looked_at_as_the_documents_say(
    stack: Stack, env: Mapping[str, str], heimdall_train: Callable[..., str], tmp_path: Path
) -> None:
    import onnxruntime

    write_example(tmp_path)
    generate, run_it, plot = typed_under(*LAPTOP, PROGRAM)
    for place in SAME:
        assert typed_under(*place, PROGRAM) == [generate, run_it]

    heimdall_train(*generate[1:], *FEW)
    said = heimdall_train(*run_it[1:])

    assert said.endswith(f"model:   models:/{MODEL}/1\n")
    client = stack.client()
    version = client.get_model_version(MODEL, "1")
    assert version.run_id is not None
    run = client.get_run(version.run_id)
    facts = read_facts(client, version.run_id)
    assert facts is not None
    model_id = find_model(client, facts)
    assert model_id is not None
    assert model_id in client.get_model_version_download_uri(MODEL, "1")
    logged = client.get_logged_model(model_id)
    exported = in_minio(stack, run.info.artifact_uri, ONNX_FILE)
    assert in_minio(stack, logged.artifact_location, ONNX_FILE) == exported, "the version has it"
    session = onnxruntime.InferenceSession(exported, providers=["CPUExecutionProvider"])
    inputs = {
        "spectrograms": np.zeros((2, RECEIVERS + 1, 3, 128, 32), np.float32),
        "receivers": np.zeros((2, RECEIVERS + 1, 2), np.float32),
    }
    position, sigma = session.run(["position", "sigma"], inputs)
    assert (position.shape, sigma.shape) == ((2, 2), (2, 2))
    assert (sigma > 0).all()
    for picture in ("error_map.png", "calibration.png", "loss.png"):
        assert in_minio(stack, run.info.artifact_uri, f"{PLOTS_DIR}/{picture}").startswith(b"\x89PNG")

    looks = {" ".join(plot): "".join(f"plots/{name}.png\n" for name in ("error_map", "calibration", "loss"))}
    looks |= {command: text for command, text in shown("docs/trainer.md").items() if "--model" in command}
    evaluate, export = (next(item for item in looks if verb in item) for verb in (" evaluate ", " export "))
    printed, _, figures = look([*looks, f"{evaluate} --json"], env, tmp_path).rpartition("$ ")
    expected = "".join(f"$ {command}\n{text}" for command, text in looks.items())
    assert looks_like(expected).fullmatch(printed), printed
    figures = json.loads(figures.splitlines()[-1])
    assert figures["run"] == version.run_id
    for figure in ("position_error_median_m", "coverage_95"):
        assert figures[figure] == pytest.approx(run.data.metrics[f"test/{figure}"], rel=1e-3)
    again = onnxruntime.InferenceSession(tmp_path / export.split()[-1], providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(again.run(["position"], inputs)[0], position, atol=0.1)
