"""compose.yaml is what Compose takes, sets up what the chart sets up, and has one .env with heimdall-train.

`compose-spec.json` is the specification's own schema (compose-go 2.16.2, Apache-2.0).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from dotenv import dotenv_values
from jsonschema import Draft202012Validator
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from heimdall_tracking import load_settings
from heimdall_tracking.settings import TrackingSettings
from heimdall_trainer.settings import DataSettings, load_data_settings

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / ".env.example"
TEMPLATES = ROOT / "charts/heimdall/templates"
VARIABLE = re.compile(r"\$(?:(\$)|\{(\w+)(?::\?[^}]*)?\})")
ROLES = {
    "database": "database",
    "object-store": "objectStore",
    "object-store-setup": "objectStore",
    "tracking-migrate": "tracking",
    "tracking": "tracking",
}
"""Services that the chart has too, with their role among its values."""


def environment() -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(EXAMPLE).items()}


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """compose.yaml with the example's values filled in, as Compose fills them in."""
    values = environment()
    text = (ROOT / "compose.yaml").read_text()
    return dict(yaml.safe_load(VARIABLE.sub(lambda found: found[1] or values[found[2]], text)))


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    return dict(yaml.safe_load((ROOT / "charts/heimdall/values.yaml").read_text()))


def test_it_keeps_to_the_specification(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())

    assert [error.message for error in Draft202012Validator(schema).iter_errors(compose)] == []


def test_a_typing_error_would_be_seen(compose: dict[str, Any]) -> None:
    schema = json.loads((Path(__file__).parent / "compose-spec.json").read_text())
    broken = {**compose, "services": {"database": {**compose["services"]["database"], "healtcheck": {}}}}

    assert list(Draft202012Validator(schema).iter_errors(broken)) != []


def test_what_is_named_is_there(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        assert {item["source"] for item in service.get("configs", [])} <= set(compose["configs"]), name
        assert service.get("network_mode", "").removeprefix("service:") in {"", *services}, name
        for source in (volume.partition(":")[0] for volume in service.get("volumes", [])):
            assert (ROOT / source).is_file() if source.startswith(".") else source in compose["volumes"], source


def test_images_are_the_charts(compose: dict[str, Any], values: dict[str, Any]) -> None:
    images = {name: values[role]["image"] for name, role in ROLES.items()}

    assert {name: compose["services"][name]["image"] for name in ROLES} == {
        name: f"{image['repository']}:{image['tag']}" for name, image in images.items()
    }


def test_the_database_is_made_as_the_charts_is(compose: dict[str, Any]) -> None:
    assert compose["configs"]["database-init"]["content"] == script("database.yaml", r"  init\.sql: \|\n(.*?)\n---")
    said = dict(re.findall(r"- \{name: (\w+), value: (\S+)}", (TEMPLATES / "database.yaml").read_text()))
    del said["PGDATA"]
    assert said.items() <= compose["services"]["database"]["environment"].items()
    assert said


def test_buckets_and_their_users_are_made_as_the_charts_are(compose: dict[str, Any], values: dict[str, Any]) -> None:
    made = script("object-store.yaml", r'define "heimdall\.objectStoreSetup" -}}\n(.*?)\n\{\{- end }}')
    made = made.replace('{{ include "heimdall.objectStoreUrl" . }}', environment()["HEIMDALL_S3_ENDPOINT_URL"])
    for bucket in ("artifactsBucket", "recordingsBucket"):
        made = made.replace(f"{{{{ .Values.objectStore.{bucket} }}}}", values["objectStore"][bucket])

    assert compose["configs"]["object-store-setup"]["content"] == made


def test_mlflow_is_told_what_the_chart_tells_it(compose: dict[str, Any], values: dict[str, Any]) -> None:
    service = compose["services"]["tracking"]
    server = (TEMPLATES / "tracking.yaml").read_text().partition("name: mlflow\n")[2].partition("\n{{- if gt")[0]
    shared = (TEMPLATES / "_tracking.tpl").read_text()
    common = "".join(
        shared.partition(f'define "heimdall.{name}"')[2].partition("{{- define")[0]
        for name in ("trackingServerEnv", "noTelemetry")
    )
    for_private_servers = {"PGSSLMODE", "PGSSLROOTCERT", "AWS_CA_BUNDLE"}

    flags = re.findall(r"--[a-z-]+", service["command"][0])
    variables = set(re.findall(r"- \{name: (\w+)", server + common)) - for_private_servers

    assert set(flags) == set(re.findall(r"^ +- (--[a-z-]+)", server, re.MULTILINE)) - {"--cors-allowed-origins"}
    assert set(service["environment"]) == variables | {"BACKEND_STORE_URI"}
    assert f"--workers={values['tracking']['workers']} " in service["command"][0]
    assert f"--artifacts-destination=s3://{values['objectStore']['artifactsBucket']} " in service["command"][0]
    assert f'--allowed-hosts="{",".join(values["tracking"]["extraAllowedHosts"])}"' in service["command"][0]
    for name in re.findall(r'- \{name: (\w+), value: "(?:true|false)"}', common):
        assert f'{name}, value: "{service["environment"][name]}"' in common


def script(template: str, pattern: str) -> str:
    """A script of the chart."""
    found = re.search(pattern, (TEMPLATES / template).read_text(), re.DOTALL)
    assert found is not None
    lines = found[1].splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "".join(f"{line[indent:]}\n" for line in lines)


def test_nobody_else_on_the_network_is_let_in(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]

    assert len(ports) >= 5
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def names_of(settings: type[BaseSettings]) -> set[str]:
    """Variables that settings are read from."""
    found: set[str] = set()
    for name, field in settings.model_fields.items():
        alias = field.validation_alias
        chosen = alias.choices if isinstance(alias, AliasChoices) else [alias or f"HEIMDALL_{name.upper()}"]
        found |= {str(item) for item in chosen}
    return found


def test_every_variable_of_the_example_is_asked_for() -> None:
    asked = {name for _, name in VARIABLE.findall((ROOT / "compose.yaml").read_text()) if name}
    read = names_of(TrackingSettings) | names_of(DataSettings)

    assert asked - set(environment()) == set()
    assert set(environment()) - asked - read == set()


def test_the_trainer_reaches_the_servers_by_the_same_file(
    compose: dict[str, Any], values: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names_of(TrackingSettings) | names_of(DataSettings) | set(environment()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text(EXAMPLE.read_text())
    services = compose["services"]
    published = {port.split(":")[1] for service in services.values() for port in service.get("ports", [])}
    migrate = services["tracking-migrate"]["environment"]

    tracking, data = load_settings(), load_data_settings()

    assert (tracking.username, tracking.password.get_secret_value()) == ("admin", migrate["ADMIN_PASSWORD"])
    database = urlsplit(data.database_url.get_secret_value())
    assert database.password == services["database"]["environment"]["WRITER_PASSWORD"]
    setup = services["object-store-setup"]["environment"]
    assert data.s3_access_key is not None
    assert data.s3_secret_key is not None
    keys = (data.s3_access_key.get_secret_value(), data.s3_secret_key.get_secret_value())
    assert keys == (setup["WRITER_ACCESS_KEY"], setup["WRITER_SECRET_KEY"])
    assert data.recordings_url == f"s3://{values['objectStore']['recordingsBucket']}"
    assert data.redis_url is not None
    addresses = [tracking.tracking_uri, database.geturl(), str(data.s3_endpoint_url), data.redis_url.get_secret_value()]
    for address in addresses:
        assert urlsplit(address).hostname == "localhost"
        assert str(urlsplit(address).port) in published


def test_mlflow_takes_the_passwords() -> None:
    """It refuses shorter ones."""
    assert all(len(environment()[f"{name}_PASSWORD"]) >= 12 for name in ("ADMIN", "OPERATOR", "TRAINER"))
