"""Manifests: from a TrainingRun to the Job of one attempt. Pure; whole manifests are compared with golden files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from heimdall_api.contract import (
    ANNOTATION_RUN_FILE,
    API_VERSION,
    ENV_ATTEMPT,
    ENV_GRACE_PERIOD,
    ENV_MLFLOW_RUN_ID,
    ENV_RUN_FILE,
    ENV_TERMINATION_MESSAGE,
    ENV_TRACKING_URI,
    KIND,
    LABEL_ATTEMPT,
    LABEL_MANAGED_BY,
    LABEL_QUEUE,
    LABEL_RUN,
    LABEL_UID,
    MANAGED_BY,
    RUN_FILE,
    SCRATCH_DIR,
    TERMINATION_MESSAGE_FILE,
)
from heimdall_api.quantity import parse_quantity
from heimdall_api.types import TrainingRunSpec
from heimdall_operator.decide import job_name
from heimdall_operator.observe import COMPLETION_INDEX, CONTAINER
from heimdall_operator.overrides import overridden
from heimdall_operator.own import CA_VOLUME, GPU_RESOURCE, MOUNTS, RUN_FILE_VOLUME, SCRATCH_VOLUME, SHARED_MEMORY_VOLUME

RENDEZVOUS_PORT: Final = 29400


YOUNGER_FIELDS: Final = (("export",), ("data", "arrivals"))
"""Fields of the spec that a trainer image of an earlier release refuses: it is not told of them unless somebody asked.

An image of somebody's own must not fail because the operator was upgraded."""
DEFAULTS: Final = TrainingRunSpec().model_dump(mode="json", exclude_none=True)
CA_FILE: Final = f"{MOUNTS[CA_VOLUME]}/ca.crt"
CA_VARIABLES: Final = (
    "MLFLOW_TRACKING_SERVER_CERT_PATH",
    "REQUESTS_CA_BUNDLE",
    "AWS_CA_BUNDLE",
    "HEIMDALL_S3_CA_BUNDLE",
    "PGSSLROOTCERT",
)
"""Where MLflow's client, requests (addresses that MLflow signs), boto3, the trainer and libpq look for authorities."""


@dataclass(frozen=True, kw_only=True)
class CABundle:
    """Certificate authorities of private servers: a ConfigMap or a Secret that every training namespace has."""

    name: str
    key: str
    is_secret: bool

    def volume(self) -> dict[str, Any]:
        """The volume that holds them as one file."""
        items = [{"key": self.key, "path": CA_FILE.rsplit("/", 1)[1]}]
        if self.is_secret:
            return {"name": CA_VOLUME, "secret": {"secretName": self.name, "items": items}}
        return {"name": CA_VOLUME, "configMap": {"name": self.name, "items": items}}


@dataclass(frozen=True, kw_only=True)
class TrainerDefaults:
    """What the operator was installed with."""

    image: str
    image_pull_policy: str
    secret: str
    tracking_uri: str
    grace_period_s: int = 60
    """Time a trainer has after SIGTERM to make and deliver a checkpoint."""
    ca: CABundle | None = None
    """What private servers are trusted by."""


@dataclass(frozen=True, kw_only=True)
class AttemptPlan:
    """All that the Job of one attempt is made of."""

    name: str
    """Name of the TrainingRun; namespace and uid are its own too."""
    namespace: str
    uid: str
    spec: TrainingRunSpec
    attempt: int
    """Number of the attempt, from 1."""
    run_id: str
    """ID of the MLflow run."""
    memory: str | None = None
    """Memory of a pod, where it differs from the spec's."""
    queue_labels: tuple[tuple[str, str], ...] = ()
    """Kueue's labels; with them the Job waits until its queue lets it go."""

    @property
    def job(self) -> str:
        """Name of the Job."""
        return job_name(self.name, self.attempt)

    @property
    def workers(self) -> int:
        """Pods that train together."""
        return self.spec.resources.workers


def build_job(plan: AttemptPlan, defaults: TrainerDefaults) -> dict[str, Any]:
    """The Job of one attempt.

    Args:
        plan: What is to be run.
        defaults: What the operator was installed with.

    Returns:
        A batch/v1 Job as the API server takes it.
    """
    labels = {
        LABEL_RUN: plan.name,
        LABEL_UID: plan.uid,
        LABEL_ATTEMPT: str(plan.attempt),
        LABEL_MANAGED_BY: MANAGED_BY,
    }
    template = {
        "metadata": {"labels": labels, "annotations": {ANNOTATION_RUN_FILE: run_file(plan)}},
        "spec": _pod_spec(plan, defaults),
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": plan.job,
            "namespace": plan.namespace,
            "labels": {**labels, **dict(plan.queue_labels)},
            "ownerReferences": [_owner(plan.name, plan.uid)],
        },
        "spec": {
            # The operator alone decides whether there is another attempt: a Job's own retries know no causes.
            "backoffLimit": 0,
            "podReplacementPolicy": "Failed",
            **_group(plan.workers),
            # A queue lets the Job go when there is room; from then on this field is the queue's.
            **({"suspend": True} if LABEL_QUEUE in dict(plan.queue_labels) else {}),
            "template": overridden(template, plan.spec.pod_template),
        },
    }


def build_service(*, name: str, namespace: str, uid: str) -> dict[str, Any]:
    """The headless Service by which workers of a group find each other.

    Args:
        name: Name of the TrainingRun.
        namespace: Its namespace.
        uid: Its UID: it owns the Service.

    Returns:
        A Service as the API server takes it.
    """
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": service_name(name),
            "namespace": namespace,
            "labels": {LABEL_RUN: name, LABEL_MANAGED_BY: MANAGED_BY},
            "ownerReferences": [_owner(name, uid)],
        },
        "spec": {
            "clusterIP": "None",
            # The rendezvous happens before anybody is ready.
            "publishNotReadyAddresses": True,
            "selector": {LABEL_UID: uid},
            "ports": [{"name": "rendezvous", "port": RENDEZVOUS_PORT}],
        },
    }


def service_name(name: str) -> str:
    """Name of a group's Service."""
    return f"{name}-workers"


def _owner(name: str, uid: str) -> dict[str, Any]:
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "name": name,
        "uid": uid,
        "controller": True,
        "blockOwnerDeletion": True,
    }


def _group(workers: int) -> dict[str, Any]:
    if workers == 1:
        return {}
    return {"completionMode": "Indexed", "completions": workers, "parallelism": workers}


def run_file(plan: AttemptPlan) -> str:
    """The TrainingRun as the trainer is given it: JSON, with all defaults but those of YOUNGER_FIELDS."""
    spec = plan.spec.model_dump(mode="json", exclude_none=True)
    for *parents, name in YOUNGER_FIELDS:
        part, default = spec, DEFAULTS
        for parent in parents:
            part, default = part[parent], default[parent]
        if part.get(name) == default.get(name):
            part.pop(name, None)
    document = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": plan.name, "namespace": plan.namespace, "uid": plan.uid},
        "spec": spec,
    }
    return json.dumps(document, sort_keys=True, separators=(",", ":"))


def _pod_spec(plan: AttemptPlan, defaults: TrainerDefaults) -> dict[str, Any]:
    return {
        **({"subdomain": service_name(plan.name)} if plan.workers > 1 else {}),
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": _grace_period_s(plan, defaults),
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": CONTAINER,
                "image": plan.spec.image or defaults.image,
                "imagePullPolicy": defaults.image_pull_policy,
                "env": [*_environment(plan, defaults), *_rendezvous(plan)],
                "envFrom": [{"secretRef": {"name": defaults.secret}}],
                "resources": _resources(plan),
                "securityContext": {"readOnlyRootFilesystem": True},
                "terminationMessagePath": TERMINATION_MESSAGE_FILE,
                "terminationMessagePolicy": "FallbackToLogsOnError",
                "volumeMounts": [
                    _mount(RUN_FILE_VOLUME, readOnly=True),
                    _mount(SCRATCH_VOLUME),
                    _mount(SHARED_MEMORY_VOLUME),
                    *([_mount(CA_VOLUME, readOnly=True)] if defaults.ca else []),
                ],
            }
        ],
        "volumes": [
            {
                # An annotation mounted as a file needs no ConfigMap: one write less, and nothing to clean up.
                "name": RUN_FILE_VOLUME,
                "downwardAPI": {
                    "items": [
                        {
                            "path": RUN_FILE.rsplit("/", 1)[1],
                            "fieldRef": {"fieldPath": f"metadata.annotations['{ANNOTATION_RUN_FILE}']"},
                        }
                    ]
                },
            },
            {"name": SCRATCH_VOLUME, "emptyDir": {}},
            {
                "name": SHARED_MEMORY_VOLUME,
                "emptyDir": {"medium": "Memory", "sizeLimit": str(plan.spec.resources.shared_memory)},
            },
            *([defaults.ca.volume()] if defaults.ca else []),
        ],
    }


def _mount(volume: str, **more: bool) -> dict[str, Any]:
    return {"name": volume, "mountPath": MOUNTS[volume], **more}


def _environment(plan: AttemptPlan, defaults: TrainerDefaults) -> list[dict[str, str]]:
    values = {
        ENV_TRACKING_URI: defaults.tracking_uri,
        ENV_MLFLOW_RUN_ID: plan.run_id,
        ENV_ATTEMPT: str(plan.attempt),
        ENV_GRACE_PERIOD: str(_grace_period_s(plan, defaults)),
        ENV_RUN_FILE: RUN_FILE,
        ENV_TERMINATION_MESSAGE: TERMINATION_MESSAGE_FILE,
        "HOME": SCRATCH_DIR,
        "USER": CONTAINER,  # libraries ask who they are, and the image may not know its user
        "TMPDIR": SCRATCH_DIR,
        "OMP_NUM_THREADS": str(_threads(plan)),
        **dict.fromkeys(("MLFLOW_DISABLE_TELEMETRY", "DO_NOT_TRACK"), "true"),
        **(dict.fromkeys(CA_VARIABLES, CA_FILE) if defaults.ca else {}),
    }
    return [{"name": name, "value": value} for name, value in values.items()]


def _grace_period_s(plan: AttemptPlan, defaults: TrainerDefaults) -> int:
    """Seconds that the pod has to end in: the user's, of whom the trainer must know."""
    own = (plan.spec.pod_template.get("spec") or {}).get("terminationGracePeriodSeconds")
    return defaults.grace_period_s if own is None else own


def _processes(plan: AttemptPlan) -> int:
    """How many processes train in a pod: one for each of its GPUs."""
    return max(1, plan.spec.resources.gpus_per_worker)


def _threads(plan: AttemptPlan) -> int:
    """Threads that a process computes with: its share of what the pod asks for.

    PyTorch counts the node's cores, which the pod has a part of: threads that wait for each other there burn that part.
    """
    return max(1, int(parse_quantity(plan.spec.resources.cpu) / _processes(plan)))


def _rendezvous(plan: AttemptPlan) -> list[dict[str, Any]]:
    """What torchrun reads: PET_… are its own variables, one for each of its options."""
    processes = _processes(plan)
    if plan.workers == 1:
        return [{"name": "PET_NPROC_PER_NODE", "value": str(processes)}] if processes > 1 else []
    values = {
        "PET_NNODES": str(plan.workers),
        "PET_NPROC_PER_NODE": str(processes),
        "PET_MASTER_ADDR": f"{plan.job}-0.{service_name(plan.name)}",
        "PET_MASTER_PORT": str(RENDEZVOUS_PORT),
    }
    # A Job gives each pod its index; torchrun calls it the rank of the node.
    index = {"fieldRef": {"fieldPath": f"metadata.annotations['{COMPLETION_INDEX}']"}}
    listed: list[dict[str, Any]] = [{"name": name, "value": value} for name, value in values.items()]
    return [*listed, {"name": "PET_NODE_RANK", "valueFrom": index}]


def _resources(plan: AttemptPlan) -> dict[str, dict[str, str]]:
    wanted = plan.spec.resources
    memory = plan.memory or str(wanted.memory)
    gpus = {GPU_RESOURCE: str(wanted.gpus_per_worker)} if wanted.gpus_per_worker else {}
    # Memory beyond the limit ends the pod, so it is asked for whole; CPU beyond the request is only shared.
    return {
        "requests": {"cpu": str(wanted.cpu), "memory": memory, **gpus},
        "limits": {"memory": memory, **gpus},
    }
