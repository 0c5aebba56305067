"""Values that between them make the chart render everything that it can."""

from __future__ import annotations

from typing import Any

from tests.unit.chart.helm import EVERY_ROLE_EXTERNAL, STORES_EXTERNAL
from tests.unit.chart.test_services import EXISTING_SECRETS, PEM

NOT_KUBERNETES = {"ServiceMonitor", "PrometheusRule"}
"""Kinds of the Prometheus operator, which the cluster of the tests does not have; test_kubernetes_schemas.py does."""
DIGEST = f"sha256:{'0' * 64}"
ROLES = ("operator", "tracking", "database", "objectStore")
EVERYWHERE: dict[str, Any] = {
    "nodeSelector": {"pool": "infra"},
    "tolerations": [{"key": "dedicated", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "priorityClassName": "system-cluster-critical",
    "image.digest": DIGEST,
    "podLabels": {"tier": "ml"},
    "podAnnotations": {"example.com/scrape": "true"},
}
PEER = {"ipBlock": {"cidr": "192.0.2.7/32"}}
VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "everything": {
        **{f"{role}.{name}": value for role in ROLES for name, value in EVERYWHERE.items()},
        "tracking.replicas": 3,
        "commonLabels": {"cost-center": "rf"},
        **{f"{role}.extraEnv": [{"name": "NO_PROXY", "value": ".svc"}] for role in ("operator", "tracking")},
        "tracking.publicUrl": "https://mlflow.example.com",
        "tracking.ingress": {
            "enabled": True,
            "className": "nginx",
            "annotations": {"nginx.ingress.kubernetes.io/proxy-body-size": "0"},
            "tlsSecretName": "mlflow-tls",
        },
        "database.storageClassName": "fast",
        "objectStore.storageClassName": "large",
        "caBundle.certificates": PEM,
        "imagePullSecrets": [{"name": "registry"}],
        "trainer.namespaces": ["team"],
        "operator.namespaces": ["team"],
        "monitoring.serviceMonitor.enabled": True,
        "monitoring.rules.enabled": True,
        "monitoring.dashboard.enabled": True,
        "networkPolicies.apiServer.cidrs": ["10.0.0.0/8"],
        "networkPolicies.trainer.egress": [{"ports": [{"port": 443}]}],
        **{f"networkPolicies.{role}.from": [{"podSelector": {}}] for role in ROLES if role != "operator"},
    },
    "everything external": EVERY_ROLE_EXTERNAL,
    "everything external, narrowed, with a login": {
        **EVERY_ROLE_EXTERNAL,
        "tracking.existingSecret": "mlflow-login",
        **{f"networkPolicies.{role}.to": [PEER] for role in ROLES if role != "operator"},
        **{f"networkPolicies.{role}.ports": [15432] for role in ROLES if role != "operator"},
    },
    "external database and object store": {
        **STORES_EXTERNAL,
        "database.sslMode": "verify-full",
        "caBundle.existingConfigMap": "trusted",
    },
    "existing secrets": {**EXISTING_SECRETS, "caBundle.existingSecret": "trusted"},
    "open": {"tracking.auth.enabled": False, "networkPolicies.enabled": False, "crd.install": False},
}
