"""The TrainingRun resource: spec and status as frozen pydantic models.

Descriptions become the CRD's (`kubectl explain trainingrun.spec`), constraints its structural schema, and rules its CEL
rules. `heimdall_api.crd` writes the CRD from these types.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any, Final, Literal

from pydantic import AliasChoices, ConfigDict, Field

from heimdall_api.base import Model
from heimdall_api.quantity import parse_quantity
from heimdall_api.rules import Rule, RuledModel, cel, immutable, transitions

DEFAULT_BACKBONE: Final = "convnext_tiny"
DEFAULT_EXPERIMENT: Final = "heimdall-localization"
NAME_LIMIT: Final = 52
"""Longest name of a TrainingRun: `NAME-a123` and a pod's suffix must stay within 63 characters."""


def _is_quantity(value: int | str) -> bool:
    try:
        parse_quantity(value)
    except ValueError:
        return False
    return True


def _matches(pattern: str) -> Callable[[str], bool]:
    whole = re.compile(pattern)
    return lambda value: whole.fullmatch(value) is not None


_IMPORT_PATH: Final = r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_]*"
_TAG_NAME: Final = r"[A-Za-z0-9_./: -]+"
_ALIAS: Final = r"[A-Za-z0-9_-]+"
_NAME: Final = r"[a-z]([a-z0-9-]*[a-z0-9])?"

Quantity = Annotated[
    int | str,
    Field(json_schema_extra={"x-kubernetes-int-or-string": True}),
    Rule(
        "type(self) == int ? self > 0 : isQuantity(self) && quantity(self).isGreaterThan(quantity('0'))",
        "must be a positive quantity such as 500m, 4 or 16Gi",
        _is_quantity,
    ),
]
ImportPath = Annotated[
    str,
    Field(max_length=253),
    Rule(
        f"self.matches('^{_IMPORT_PATH}$')",
        "must be an import path of the form package.module:ClassName",
        _matches(_IMPORT_PATH),
    ),
]
PodTemplate = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
Arguments = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]
ARGS_WITH_MODULE: Final = Rule(
    "has(self.module) || !has(self.args)",
    "args are the arguments of module: set module too, or remove args",
    lambda self: self.module is not None or self.args is None,
)
NAME_RULE: Final = Rule(
    f"self.metadata.name.size() <= {NAME_LIMIT} && self.metadata.name.matches('^{_NAME}$')",
    f"metadata.name becomes the name of Jobs and Pods: use at most {NAME_LIMIT} lower-case letters, digits and "
    "hyphens, beginning with a letter and ending with a letter or digit",
    lambda self: len(self.metadata.name) <= NAME_LIMIT and _matches(_NAME)(self.metadata.name),
)


class ModelSpec(RuledModel):
    """What is trained: the localizer on a backbone, or any LightningModule by import path."""

    model_config = ConfigDict(protected_namespaces=())
    rules = (
        Rule(
            "!(has(self.module) && has(self.backbone))",
            "set either backbone (the localizer on that backbone) or module (your own LightningModule), not both",
            lambda self: self.module is None or self.backbone is None,
        ),
        ARGS_WITH_MODULE,
    )

    backbone: str | None = Field(
        default=None,
        min_length=1,
        max_length=128,
        description="Backbone of the localizer, by its name in timm: convnext_tiny, resnet50, vit_base_patch16_224 … "
        "Without backbone and module it is convnext_tiny.",
    )
    pretrained: bool = Field(default=False, description="Start from the library's pretrained weights.")
    freeze_backbone: bool = Field(default=False, description="Train the heads alone.")
    module: ImportPath | None = Field(
        default=None, description="A LightningModule of your own, as package.module:ClassName, in your image."
    )
    args: Arguments | None = Field(default=None, description="Keyword arguments of module.")


class SessionSelection(Model):
    """Which recording sessions are used."""

    ids: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        default_factory=list,
        max_length=1000,
        description="IDs of approved recording sessions. Empty: every approved session.",
    )


class DataSpec(RuledModel):
    """What it is trained on: recording sessions, or any LightningDataModule by import path."""

    rules = (
        Rule(
            "double(self.validationFraction) + double(self.testFraction) < 1.0",
            "validationFraction and testFraction together must leave sessions to train on: keep their sum below 1",
            lambda self: self.validation_fraction + self.test_fraction < 1,
        ),
        ARGS_WITH_MODULE,
    )

    sessions: SessionSelection = Field(default_factory=SessionSelection, description="Recording sessions to use.")
    validation_fraction: float = Field(
        default=0.2,
        ge=0,
        lt=1,
        description="Share of the sessions kept for validation. Sessions are never divided.",
    )
    test_fraction: float = Field(default=0.1, ge=0, lt=1, description="Share of the sessions kept for the final test.")
    arrivals: bool = Field(
        default=False,
        description="Give the localizer times of arrival beside spectrograms: several times more accurate where the "
        "receivers start recording at one instant, wrong where they don't.",
    )
    module: ImportPath | None = Field(
        default=None,
        description="A LightningDataModule of your own, as package.module:ClassName, in your image.",
    )
    args: Arguments | None = Field(default=None, description="Keyword arguments of module.")


class EarlyStoppingSpec(Model):
    """When training stops before its last epoch."""

    monitor: str = Field(default="val/loss", min_length=1, max_length=250, description="Metric that is watched.")
    mode: Literal["min", "max"] = Field(default="min", description="Whether smaller or larger is better.")
    patience: int = Field(
        default=5,
        ge=0,
        le=100_000,
        description="Epochs without improvement before training stops. 0: never stop early.",
    )


CHECKPOINTS_LIMIT: Final = 20
"""Most of the best checkpoints that are kept: MLflow's tag that lists them holds 8,000 characters."""


class CheckpointSpec(Model):
    """Which checkpoints are kept, and how often they are made."""

    keep: int = Field(
        default=3,
        ge=1,
        # Older resources may hold more, which was never kept: the tag that lists checkpoints has no room for it.
        le=100,
        json_schema_extra={"maximum": CHECKPOINTS_LIMIT},
        description="How many of the best checkpoints are kept beside the last.",
    )
    every_minutes: float = Field(
        default=10,
        gt=0,
        le=1440,
        description="A checkpoint is made after this many minutes, and at every epoch's end.",
    )


class TrainingSpec(Model):
    """How it is trained."""

    epochs: int = Field(default=100, ge=1, le=1_000_000, description="Epochs to train.")
    batch_size: int = Field(default=32, ge=1, le=1_000_000, description="Samples in a batch, per device.")
    learning_rate: float = Field(default=1.0e-3, gt=0, le=10, description="Peak learning rate of AdamW.")
    weight_decay: float = Field(default=1.0e-5, ge=0, le=10, description="Weight decay of AdamW.")
    loss: Literal["gaussian", "huber", "quantile"] = Field(
        default="gaussian",
        description="Loss of the localizer: Gaussian negative log-likelihood, Huber or quantile.",
    )
    precision: Literal["auto", "32-true", "16-mixed", "bf16-mixed"] = Field(
        default="auto",
        description="Numeric precision. auto: bf16-mixed on a GPU that has it, 16-mixed on one with tensor cores for "
        "that alone (T4), 32-true otherwise.",
    )
    seed: int = Field(default=42, ge=0, le=4_294_967_295, description="Seed of every random number generator.")
    data_loader_workers: int = Field(default=2, ge=0, le=64, description="Processes that load data, per device.")
    early_stopping: EarlyStoppingSpec = Field(
        default_factory=EarlyStoppingSpec, description="When training stops before its last epoch."
    )
    checkpoints: CheckpointSpec = Field(
        default_factory=CheckpointSpec, description="Which checkpoints are kept, and how often they are made."
    )


class ResourcesSpec(Model):
    """What the training pods are given."""

    workers: int = Field(
        default=1,
        ge=1,
        le=1000,
        description="Training pods that train together (torchrun). One that fails ends the others too; the group goes "
        "on from the last checkpoint.",
    )
    gpus_per_worker: int = Field(default=1, ge=0, le=64, description="GPUs of a training pod. 0: train on the CPU.")
    cpu: Quantity = Field(
        default="4",
        description="CPU cores of a training pod; PyTorch computes with as many threads, shared among the pod's "
        "processes.",
    )
    memory: Quantity = Field(default="16Gi", description="Memory of a training pod.")
    shared_memory: Quantity = Field(default="1Gi", description="Size of /dev/shm, which data loaders share batches in.")


Tags = Annotated[
    dict[Annotated[str, Field(max_length=250)], Annotated[str, Field(max_length=5000)]],
    Rule(
        f"self.all(name, name.matches('^{_TAG_NAME}$'))",
        "names must be letters, digits, underscores, dots, slashes, colons, hyphens and spaces",
        lambda self: all(map(_matches(_TAG_NAME), self)),
    ),
]


class TrackingSpec(Model):
    """How the run appears in MLflow."""

    experiment: str = Field(
        default=DEFAULT_EXPERIMENT,
        min_length=1,
        max_length=250,
        description="MLflow experiment; made when missing.",
    )
    run_name: str = Field(
        default="",
        max_length=250,
        description="Name of the MLflow run. Empty: the TrainingRun's namespace and name.",
    )
    tags: Tags = Field(default_factory=dict, max_length=50, description="Tags of the MLflow run.")


Alias = Annotated[
    str,
    Field(min_length=1, max_length=100),
    Rule(
        f"self.matches('^{_ALIAS}$') && self != 'latest' && !self.matches('^[vV][0-9]+$')",
        "must be letters, digits, hyphens and underscores, and neither latest nor like v7 (MLflow's own)",
        lambda self: _matches(_ALIAS)(self) and self != "latest" and not _matches("[vV][0-9]+")(self),
    ),
]
ModelName = Annotated[
    str,
    Field(min_length=1, max_length=250),
    Rule(
        "!self.contains('/') && !self.contains(':')",
        "must not contain '/' or ':'",
        lambda self: "/" not in self and ":" not in self,
    ),
]


class PromotionSpec(Model):
    """When a new version becomes the one that is served."""

    alias: Alias = Field(default="champion", description="Alias that the better version gets.")
    metric: str = Field(min_length=1, max_length=250, description="Metric of the run that decides.")
    mode: Literal["min", "max"] = Field(default="min", description="Whether smaller or larger is better.")
    threshold: float | None = Field(
        default=None,
        description="Value that must be reached too. Without it, beating the present holder is enough.",
    )


class RegistrationSpec(Model):
    """What becomes of the trained model in MLflow's registry."""

    model: ModelName = Field(description="Registered model that a new version is made of; made when missing.")
    aliases: list[Alias] = Field(
        default_factory=list, max_length=20, description="Aliases that every new version takes over."
    )
    promotion: PromotionSpec | None = Field(
        default=None, description="An alias that a new version takes over only when it is better."
    )


class ExportSpec(Model):
    """In which other forms the trained model is given out."""

    onnx: bool = Field(
        default=False,
        description="Also export the trained model to ONNX, verified against PyTorch, as the run's artifact "
        "onnx/model.onnx and with the registered model. A module of your own needs an example_input_array.",
    )


class MemoryGrowthSpec(Model):
    """How the memory of the next attempt grows when one ran out of it."""

    factor: float = Field(default=1.5, gt=1, le=16, description="The next attempt has this many times the memory.")
    max: Quantity = Field(description="Most memory of an attempt.")


class RetriesSpec(Model):
    """When a failed attempt is followed by another."""

    limit: int = Field(
        default=3,
        ge=0,
        le=100,
        description="Further attempts after failures. Preemption and a lost node cost none; "
        "errors that would come back are not tried again.",
    )
    memory_growth: MemoryGrowthSpec | None = Field(
        default=None,
        description="An attempt that ran out of the pod's memory (OOMKilled) is followed by one with more. Without it, "
        "running out of memory is final.",
    )


class TrainingRunSpec(Model):
    """What is trained, on what, how, with which resources, and what becomes of the model."""

    model_config = ConfigDict(
        json_schema_extra=transitions(
            cel(
                "has(self.registration) == has(oldSelf.registration)",
                "registration can't be added or removed once the run exists: create a new TrainingRun instead",
            ),
            cel(
                "has(self.podTemplate) == has(oldSelf.podTemplate)",
                "podTemplate can't be added or removed once the run exists: create a new TrainingRun instead",
            ),
        )
    )

    suspend: bool = Field(
        default=False,
        description="Stop training and free the GPUs; training goes on from the last checkpoint when unset.",
    )
    image: str = Field(
        default="",
        max_length=1024,
        description="Image of the training pod. Empty: the trainer image that the operator was installed with.",
        json_schema_extra=transitions(immutable("image")),
    )
    model: ModelSpec = Field(
        default_factory=ModelSpec, description="What is trained.", json_schema_extra=transitions(immutable("model"))
    )
    data: DataSpec = Field(
        default_factory=DataSpec,
        description="What it is trained on.",
        json_schema_extra=transitions(immutable("data")),
    )
    training: TrainingSpec = Field(
        default_factory=TrainingSpec,
        description="How it is trained.",
        json_schema_extra=transitions(immutable("training")),
    )
    resources: ResourcesSpec = Field(
        default_factory=ResourcesSpec,
        description="What the training pod is given.",
        json_schema_extra=transitions(immutable("resources")),
    )
    tracking: TrackingSpec = Field(
        default_factory=TrackingSpec,
        description="How the run appears in MLflow.",
        json_schema_extra=transitions(immutable("tracking")),
    )
    registration: RegistrationSpec | None = Field(
        default=None,
        description="What becomes of the trained model in MLflow's registry. Without it nothing is registered.",
        json_schema_extra=transitions(immutable("registration")),
    )
    export: ExportSpec = Field(
        default_factory=ExportSpec,
        description="In which other forms the trained model is given out.",
        json_schema_extra=transitions(immutable("export")),
    )
    retries: RetriesSpec = Field(
        default_factory=RetriesSpec, description="When a failed attempt is followed by another."
    )
    pending_deadline_seconds: int = Field(
        default=3600,
        ge=1,
        le=31_536_000,
        description="How long a pod may wait for a node, its image or its start before the run fails and withdraws "
        "its request for GPUs; on its node for an image that the registry does not have or does not give out, 300 at "
        "most.",
    )
    active_deadline_seconds: int | None = Field(
        default=None,
        ge=1,
        le=315_360_000,
        description="How long the run may take in all, counted from when the operator takes it up; time in which it is "
        "suspended, waits in a queue or for a node, or pauses between attempts counts too.",
    )
    stall_timeout_seconds: int | None = Field(
        default=None,
        ge=0,
        le=31_536_000,
        description="A pod whose training has not moved for this long is taken for hung, and the attempt ended: no "
        "step, epoch or other activity (reading data, validation, test). 0 is never. Unset, it is 3600 where the image "
        "tells of its activity, as the project's own does, and otherwise never.",
    )
    ttl_seconds_after_finished: int | None = Field(
        default=604_800,
        ge=0,
        le=315_360_000,
        description="Jobs and pods of a finished run are deleted after this time; their logs and events stay with the "
        "MLflow run. The TrainingRun itself stays, and never trains again.",
    )
    pod_template: PodTemplate = Field(
        default_factory=dict,
        description="Merged over the training pod's template as Kubernetes merges patches (strategic merge): "
        "nodeSelector, tolerations, priorityClassName, volumes, environment, labels … The container is named trainer. "
        "What would break the pod's isolation is refused.",
        json_schema_extra=transitions(immutable("podTemplate")),
    )


class Condition(Model):
    """A condition by Kubernetes' conventions (metav1.Condition)."""

    type: str = Field(max_length=316)
    status: Literal["True", "False", "Unknown"]
    reason: str = Field(max_length=1024)
    message: str = Field(max_length=32768)
    last_transition_time: datetime
    observed_generation: int = Field(ge=0)


class Attempt(Model):
    """One attempt at training: one Job."""

    number: int = Field(ge=1, description="Number of the attempt, from 1.")
    job: str = Field(description="Name of its Job.")
    pod: str | None = Field(default=None, description="Name of its pod.")
    node: str | None = Field(default=None, description="Node that the pod ran on.")
    start_time: datetime | None = Field(default=None, description="When its Job was asked for.")
    running_time: datetime | None = Field(default=None, description="When its container started.")
    ending_time: datetime | None = Field(default=None, description="Since when it is being ended.")
    end_time: datetime | None = Field(default=None, description="When it ended.")
    reason: str | None = Field(default=None, description="Why it ended, from a fixed list.")
    exit_code: int | None = Field(default=None, description="Exit code of its container.")
    message: str | None = Field(default=None, description="The trainer's last words.")
    memory: str | None = Field(default=None, description="Memory of a pod, where it differs from the spec's.")
    logs: str | None = Field(default=None, description="Where its log and events are kept.")


class BestMetricStatus(Model):
    """The best value of the monitored metric so far."""

    name: str
    value: str = Field(description="The value as a decimal number (Kubernetes discourages floats in a status).")


class ProgressStatus(Model):
    """How far training is."""

    epoch: int = Field(description="Epochs finished.")
    epochs: int = Field(description="Epochs asked for.")
    step: int = Field(description="Optimizer steps done.")
    percent: int = Field(ge=0, le=100, description="Share of the training that is done.")
    time: datetime | None = Field(default=None, description="When the last step ended.")
    estimated_completion_time: datetime | None = Field(
        default=None, description="When training ends at the pace of this attempt."
    )


class CheckpointStatus(Model):
    """The checkpoint that a next attempt goes on from."""

    step: int
    uri: str
    time: datetime


Phase = Literal["Pending", "Suspended", "Running", "Succeeded", "Failed"]


class TrainingRunStatus(Model):
    """What became of the run so far."""

    model_config = ConfigDict(protected_namespaces=(), extra="ignore")

    observed_generation: int | None = Field(default=None, description="Generation that this status speaks of.")
    phase: Phase | None = Field(default=None, description="Pending, Suspended, Running, Succeeded or Failed.")
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Suspended, Admitted, Complete, Failed and ModelRegistered.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
    run_id: str | None = Field(
        default=None,
        alias="runID",
        validation_alias=AliasChoices("runID", "run_id"),
        description="ID of the MLflow run; there before a pod is.",
    )
    run_url: str | None = Field(
        default=None,
        alias="runURL",
        validation_alias=AliasChoices("runURL", "run_url"),
        description="Address of the run in MLflow's user interface.",
    )
    model_name: str | None = Field(default=None, description="Name of the registered model.")
    model_version: str | None = Field(default=None, description="Version that this run registered.")
    model_uri: str | None = Field(
        default=None,
        alias="modelURI",
        validation_alias=AliasChoices("modelURI", "model_uri"),
        description="URI that the model is loaded and served from.",
    )
    best_metric: BestMetricStatus | None = Field(default=None, description="Best value of the monitored metric so far.")
    progress: ProgressStatus | None = Field(default=None, description="How far training is.")
    last_checkpoint: CheckpointStatus | None = Field(
        default=None, description="The checkpoint that a next attempt goes on from."
    )
    attempts: list[Attempt] = Field(default_factory=list, description="The newest attempts, oldest first.")
    gpus: int | None = Field(default=None, description="GPUs of all workers together.")
    job_name: str | None = Field(default=None, description="Job of the newest attempt.")
    attempt: int = Field(default=0, description="Number of the newest attempt.")
    failures: int = Field(default=0, description="Attempts that ended in a failure that counts as a retry.")
    start_time: datetime | None = Field(default=None, description="When the operator took the run up.")
    completion_time: datetime | None = Field(default=None, description="When the run ended.")


class Metadata(Model):
    """The part of a resource's metadata that training needs."""

    model_config = ConfigDict(extra="ignore")

    name: str = Field(min_length=1, max_length=253)
    namespace: str = "default"
    uid: str = ""


class TrainingRun(RuledModel):
    """A TrainingRun as a file holds it and as a trainer is given it."""

    model_config = ConfigDict(extra="ignore")
    rules = (NAME_RULE,)

    api_version: Literal["training.heimdall.dev/v1alpha1"] = "training.heimdall.dev/v1alpha1"
    kind: Literal["TrainingRun"] = "TrainingRun"
    metadata: Metadata
    spec: TrainingRunSpec = Field(default_factory=TrainingRunSpec)
