"""Manifests: from a TrainingRun to the Job of one attempt. Pure; whole manifests are compared with golden files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from heimdall_api.contract import (
    ANNOTATION_RUN_FILE,
    API_VERSION,
    ENV_ATTEMPT,
    ENV_MLFLOW_RUN_ID,
    ENV_RUN_FILE,
    ENV_TERMINATION_MESSAGE,
    ENV_TRACKING_URI,
    KIND,
    LABEL_ATTEMPT,
    LABEL_MANAGED_BY,
    LABEL_RUN,
    MANAGED_BY,
    RUN_FILE,
    SCRATCH_DIR,
    TERMINATION_MESSAGE_FILE,
)
from heimdall_api.types import TrainingRunSpec
from heimdall_operator.decide import job_name

GPU_RESOURCE: Final = "nvidia.com/gpu"
CONTAINER: Final = "trainer"
GRACE_PERIOD_S: Final = 60
"""Time a trainer has after SIGTERM to make and deliver a checkpoint."""


@dataclass(frozen=True, kw_only=True)
class TrainerDefaults:
    """What the operator was installed with."""

    image: str
    image_pull_policy: str
    secret: str
    tracking_uri: str


def build_job(
    *,
    name: str,
    namespace: str,
    uid: str,
    spec: TrainingRunSpec,
    attempt: int,
    run_id: str,
    defaults: TrainerDefaults,
) -> dict[str, Any]:
    """The Job of one attempt.

    Args:
        name: Name of the TrainingRun.
        namespace: Its namespace.
        uid: Its UID: it owns the Job.
        spec: Its spec.
        attempt: Number of the attempt, from 1.
        run_id: ID of the MLflow run.
        defaults: What the operator was installed with.

    Returns:
        A batch/v1 Job as the API server takes it.
    """
    labels = {LABEL_RUN: name, LABEL_ATTEMPT: str(attempt), LABEL_MANAGED_BY: MANAGED_BY}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(name, attempt),
            "namespace": namespace,
            "labels": labels,
            "ownerReferences": [
                {
                    "apiVersion": API_VERSION,
                    "kind": KIND,
                    "name": name,
                    "uid": uid,
                    "controller": True,
                    "blockOwnerDeletion": True,
                }
            ],
        },
        "spec": {
            # The operator alone decides whether there is another attempt: a Job's own retries know no causes.
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {
                    "labels": labels,
                    "annotations": {ANNOTATION_RUN_FILE: run_file(name, namespace, uid, spec)},
                },
                "spec": _pod_spec(spec, attempt, run_id, defaults),
            },
        },
    }


def run_file(name: str, namespace: str, uid: str, spec: TrainingRunSpec) -> str:
    """The TrainingRun as the trainer is given it: JSON, with all defaults."""
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace, "uid": uid},
        "spec": spec.model_dump(mode="json", exclude_none=True),
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _pod_spec(spec: TrainingRunSpec, attempt: int, run_id: str, defaults: TrainerDefaults) -> dict[str, Any]:
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE_PERIOD_S,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": CONTAINER,
                "image": spec.image or defaults.image,
                "imagePullPolicy": defaults.image_pull_policy,
                "env": _environment(attempt, run_id, defaults),
                "envFrom": [{"secretRef": {"name": defaults.secret, "optional": True}}],
                "resources": _resources(spec),
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "capabilities": {"drop": ["ALL"]},
                    "readOnlyRootFilesystem": True,
                },
                "terminationMessagePath": TERMINATION_MESSAGE_FILE,
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    {"name": "run-file", "mountPath": RUN_FILE.rsplit("/", 1)[0], "readOnly": True},
                    {"name": "scratch", "mountPath": SCRATCH_DIR},
                    {"name": "shared-memory", "mountPath": "/dev/shm"},  # noqa: S108 - a volume of the pod's own
                ],
            }
        ],
        "volumes": [
            {
                # An annotation mounted as a file needs no ConfigMap: one write less, and nothing to clean up.
                "name": "run-file",
                "downwardAPI": {
                    "items": [
                        {
                            "path": RUN_FILE.rsplit("/", 1)[1],
                            "fieldRef": {"fieldPath": f"metadata.annotations['{ANNOTATION_RUN_FILE}']"},
                        }
                    ]
                },
            },
            {"name": "scratch", "emptyDir": {}},
            {
                "name": "shared-memory",
                "emptyDir": {"medium": "Memory", "sizeLimit": str(spec.resources.shared_memory)},
            },
        ],
    }


def _environment(attempt: int, run_id: str, defaults: TrainerDefaults) -> list[dict[str, str]]:
    values = {
        ENV_TRACKING_URI: defaults.tracking_uri,
        ENV_MLFLOW_RUN_ID: run_id,
        ENV_ATTEMPT: str(attempt),
        ENV_RUN_FILE: RUN_FILE,
        ENV_TERMINATION_MESSAGE: TERMINATION_MESSAGE_FILE,
        "HOME": SCRATCH_DIR,
        "USER": CONTAINER,  # libraries ask who they are, and the image may not know its user
        "TMPDIR": SCRATCH_DIR,
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _resources(spec: TrainingRunSpec) -> dict[str, dict[str, str]]:
    memory = str(spec.resources.memory)
    gpus = {GPU_RESOURCE: str(spec.resources.gpus_per_worker)} if spec.resources.gpus_per_worker else {}
    # Memory beyond the limit ends the pod, so it is asked for whole; CPU beyond the request is only shared.
    return {
        "requests": {"cpu": str(spec.resources.cpu), "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
