"""ServiceMonitor, alerts and dashboard: only where they are asked for, and of metrics that there are."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from heimdall_api.contract import Reason
from heimdall_operator import metrics
from tests.programs import program
from tests.unit.chart.helm import NAMESPACE, ROOT, Rendered, render

TIMEOUT_S = 60
ENABLED = {
    "monitoring.serviceMonitor.enabled": True,
    "monitoring.serviceMonitor.labels": {"release": "prometheus"},
    "monitoring.rules.enabled": True,
    "monitoring.rules.labels": {"release": "prometheus"},
    "monitoring.dashboard.enabled": True,
}
DECIDE = ROOT / "operator/heimdall_operator/decide.py"
"""Where it is written what a run waits for."""


@pytest.fixture(scope="module")
def rendered() -> Rendered:
    return render(ENABLED)


def exported() -> set[str]:
    """Names of all series that the operator has."""
    found = {"heimdall_trainingruns", "heimdall_queue_depth", "heimdall_queue_oldest_seconds"}
    for metric in metrics.REGISTRY.collect():
        suffixes = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("_total",)}[metric.type]
        found |= {f"{metric.name}{suffix}" for suffix in suffixes}
    return found


def used(text: str) -> set[str]:
    return set(re.findall(r"heimdall_[a-z_]+", text))


def test_nothing_of_it_is_there_unless_it_is_asked_for() -> None:
    kinds = {item["kind"] for item in render().manifests}
    assert not kinds & {"ServiceMonitor", "PrometheusRule"}


def test_the_service_monitor_finds_the_operators_metrics(rendered: Rendered) -> None:
    monitor = rendered.one("ServiceMonitor", "heimdall-operator")
    service = rendered.one("Service", "heimdall-operator")
    assert monitor["metadata"]["labels"]["release"] == "prometheus"
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert [item["port"] for item in monitor["spec"]["endpoints"]] == [
        item["name"] for item in service["spec"]["ports"]
    ]
    pod = rendered.one("Deployment", "heimdall-operator")["spec"]["template"]
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    ports = {item["name"]: item["containerPort"] for item in pod["spec"]["containers"][0]["ports"]}
    assert ports[service["spec"]["ports"][0]["targetPort"]] == 8081


def test_alerts_are_of_metrics_and_reasons_that_there_are_and_lead_to_a_runbook(rendered: Rendered) -> None:
    rule = rendered.one("PrometheusRule", "heimdall")
    assert rule["metadata"]["labels"]["release"] == "prometheus"
    alerts = [item for group in rule["spec"]["groups"] for item in group["rules"]]
    assert len(alerts) == 7
    for alert in alerts:
        assert used(alert["expr"]) <= exported(), alert["alert"]
        assert f'namespace="{NAMESPACE}"' in alert["expr"]
        for reasons in re.findall(r'reason=~"([^"]+)"', alert["expr"]):
            waits = {reason for reason in reasons.split("|") if f'observed, "{reason}"' in DECIDE.read_text()}
            assert set(reasons.split("|")) <= (waits if "heimdall_trainingruns" in alert["expr"] else set(Reason))
        runbook = ROOT / alert["annotations"]["runbook_url"]
        assert runbook.name == f"{alert['alert']}.md", "the chart's README says so"
        assert runbook.read_text().startswith(f"# {alert['alert']}\n"), runbook
    runbooks = {path.stem for path in (ROOT / "docs/runbooks").glob("Heimdall*.md")}
    assert runbooks == {alert["alert"] for alert in alerts}


def test_alerts_of_two_releases_are_two(rendered: Rendered) -> None:
    """What sums up leaves the series' labels out: Alertmanager would take both for one."""
    rule = rendered.one("PrometheusRule", "heimdall")
    for alert in (item for group in rule["spec"]["groups"] for item in group["rules"]):
        assert alert["labels"]["namespace"] == NAMESPACE, alert["alert"]
        assert re.search(rf"\b{NAMESPACE}\b", alert["annotations"]["summary"]), alert["alert"]


def test_the_alert_on_volumes_is_of_the_releases_own() -> None:
    values = {**ENABLED, "fullnameOverride": "radio"}
    rendered = render(values)
    (alert,) = [
        item
        for group in rendered.one("PrometheusRule", "radio")["spec"]["groups"]
        for item in group["rules"]
        if item["alert"] == "HeimdallVolumeFull"
    ]
    (chosen,) = re.findall(r'persistentvolumeclaim=~"([^"]+)"', alert["expr"])
    claims = [
        f"{claim['metadata']['name']}-{item['metadata']['name']}-0"
        for item in rendered.manifests
        if item["kind"] == "StatefulSet"
        for claim in item["spec"]["volumeClaimTemplates"]
    ]
    assert len(claims) == 2
    assert [claim for claim in claims if not re.fullmatch(chosen, claim)] == []
    assert not re.fullmatch(chosen, "data-another-database-0")


def test_alerts_lead_to_the_pages_of_a_site() -> None:
    values = {**ENABLED, "monitoring.runbookUrl": "https://x.example.md/runbooks/", "monitoring.runbookSuffix": ".html"}
    rule = render(values).one("PrometheusRule", "heimdall")
    found = {item["annotations"]["runbook_url"] for group in rule["spec"]["groups"] for item in group["rules"]}
    assert "https://x.example.md/runbooks/HeimdallErrors.html" in found
    assert all(url.startswith("https://x.example.md/runbooks/") and url.endswith(".html") for url in found)


def test_each_alert_fires_when_it_should(rendered: Rendered, tmp_path: Path) -> None:
    promtool = program("promtool", part="prometheus")
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(rendered.one("PrometheusRule", "heimdall")["spec"]))
    shutil.copy(Path(__file__).with_name("alerts_test.yaml"), tmp_path)
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_the_dashboard_asks_for_metrics_that_there_are_and_shows_each(rendered: Rendered) -> None:
    config = rendered.one("ConfigMap", "heimdall-dashboard")
    assert config["metadata"]["labels"]["grafana_dashboard"] == "1"
    dashboard = json.loads(config["data"]["heimdall.json"])
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    assert used("\n".join(asked)) <= exported()
    families = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in exported()}
    assert {re.sub(r"_(bucket|total)$", "", name) for name in used("\n".join(asked))} == families
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))
