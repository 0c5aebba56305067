"""Registration: a run's model becomes a version exactly once, and is promoted only when it is better.

Creating a version is not idempotent in MLflow, so it is looked up by run ID first. The operator alone registers
(locally: the one process that trains), so two promotions of one model by it never race.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import structlog

from heimdall_tracking.errors import TrackingError
from heimdall_tracking.params import clean_name
from heimdall_tracking.points import is_number
from heimdall_tracking.redact import redact
from heimdall_tracking.runs import RunFacts, find_model

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from heimdall_api.types import PromotionSpec, RegistrationSpec

log = structlog.get_logger()
READY_POLL_S: Final = 1.0
READY_TIMEOUT_S: Final = 30
"""How long a new version may take to become ready before the next look asks again."""


class ModelMissingError(Exception):
    """The run ended well, but holds no model to register."""


@dataclass(frozen=True)
class Registration:
    """A registered version."""

    name: str
    version: str
    message: str
    """What was done, as a sentence for people."""

    @property
    def uri(self) -> str:
        """The URI that the model is loaded and served from."""
        return f"models:/{self.name}/{self.version}"


def register(client: MlflowClient, facts: RunFacts, spec: RegistrationSpec) -> Registration:
    """Register a run's model: again after a crash, it finds what it did and goes on from there.

    Args:
        client: Client of tracking server and registry.
        facts: The run's facts.
        spec: What was asked for.

    Returns:
        The version, and what became of its aliases.

    Raises:
        ModelMissingError: The run logged no model.
        MlflowException: The server is away or refuses.
    """
    known = _versions(client, spec.model, facts.run_id)
    found = str(known[0].version) if known else None
    _drop_repeats(client, spec.model, known)
    version = found or _register_model(client, facts, spec.model)
    # The alias of a promotion has to be won, whoever names it here too.
    aliases = [alias for alias in spec.aliases if spec.promotion is None or alias != spec.promotion.alias]
    if found is not None:
        # What was begun earlier may be finished late: by then a newer version may have taken the alias over.
        aliases = [alias for alias in aliases if not _is_newer(_holder(client, spec.model, alias), found)]
    for alias in aliases:
        client.set_registered_model_alias(spec.model, alias, version)
    message = f"Registered as version {version} of {spec.model}"
    if aliases:
        message += f" with alias {', '.join(aliases)}"
    if spec.promotion is not None:
        message += f"; {promote(client, facts, spec.model, version, spec.promotion)}"
    return Registration(name=spec.model, version=version, message=f"{message}.")


def find_version(client: MlflowClient, name: str, run_id: str) -> str | None:
    """The version of a model that a run registered, or None.

    Raises:
        MlflowException: The server is away or refuses.
    """
    found = _versions(client, name, run_id)
    return str(found[0].version) if found else None


def _versions(client: MlflowClient, name: str, run_id: str) -> list[ModelVersion]:
    """The versions of a model that came from a run, the first one first."""
    # Not searched for by name: MLflow's filters know no way to write a quote, and a run has few versions.
    found = client.search_model_versions(f"run_id = '{run_id}'")
    return sorted((item for item in found if item.name == name), key=lambda item: int(item.version))


def _drop_repeats(client: MlflowClient, name: str, versions: list[ModelVersion]) -> None:
    """Delete versions that are the first one once more: a server may carry out what nobody waits for any more.

    Whatever somebody has given one of them (an alias, a tag, a word) makes it theirs.
    """
    from mlflow.exceptions import MlflowException

    if len(versions) < 2:  # noqa: PLR2004 - one and its repeats
        return
    held = {str(version) for version in client.get_registered_model(name).aliases.values()}
    first, *others = versions
    for item in others:
        if item.source == first.source and not (item.tags or item.description or str(item.version) in held):
            try:
                client.delete_model_version(name, str(item.version))
            except MlflowException as error:  # a courtesy: who may register may not always delete
                log.warning(
                    "MLflow has made a version twice, and would not delete one",
                    model=name,
                    version=str(item.version),
                    error=redact(error),
                )


def promote(client: MlflowClient, facts: RunFacts, name: str, version: str, spec: PromotionSpec) -> str:
    """Give a version the promotion's alias if it is better than the alias's present holder.

    Args:
        client: Client of tracking server and registry.
        facts: Facts of the run that the version came from.
        name: The registered model.
        version: The new version.
        spec: Alias, metric, direction and threshold.

    Returns:
        What was done and why, as part of a sentence.

    Raises:
        MlflowException: The server is away or refuses.
    """
    value = facts.metrics.get(clean_name(spec.metric))
    if value is None or not is_number(value):
        state = "is missing" if value is None else f"is {value:.6g}"
        return f"not promoted to {spec.alias}: its {spec.metric} {state}"
    if spec.threshold is not None and not _reaches(value, spec.threshold, spec.mode):
        return (
            f"not promoted to {spec.alias}: {spec.metric} {value:.6g} does not reach the threshold {spec.threshold:.6g}"
        )
    holder = _holder(client, name, spec.alias)
    if holder is None:
        client.set_registered_model_alias(name, spec.alias, version)
        return f"promoted to {spec.alias}, which had no holder ({spec.metric} {value:.6g})"
    if holder == version:
        return f"promoted to {spec.alias} ({spec.metric} {value:.6g})"
    best = _metric_of(client, name, holder, spec.metric)
    if best is not None and is_number(best) and not _better(value, best, spec.mode):
        return f"not promoted to {spec.alias}: {spec.metric} {value:.6g} does not beat version {holder}'s {best:.6g}"
    client.set_registered_model_alias(name, spec.alias, version)
    known = "unknown" if best is None else f"{best:.6g}"
    return f"promoted to {spec.alias} over version {holder} ({spec.metric} {value:.6g} against {known})"


def wait_until_ready(client: MlflowClient, name: str, version: str, timeout_s: float) -> None:
    """Wait until a version is ready: a registry may copy its files first.

    Args:
        client: Client of the registry.
        name: The registered model.
        version: Its version.
        timeout_s: How long to wait at most.

    Raises:
        TrackingError: It is not ready in time, or never will be.
        MlflowException: The server is away.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = client.get_model_version(name, version)
        status, left_s = str(found.status), deadline - time.monotonic()
        if status == "READY":
            return
        if status != "PENDING_REGISTRATION":
            raise TrackingError(f"version {version} of {name} can't be used: {status}, {found.status_message}")
        if left_s <= 0:
            raise TrackingError(
                f"version {version} of {name} is still {status} after {timeout_s:g} s; call again to wait for longer"
            )
        time.sleep(min(READY_POLL_S, left_s))


def _register_model(client: MlflowClient, facts: RunFacts, name: str) -> str:
    model_id = find_model(client, facts)
    if model_id is None:
        raise ModelMissingError(
            "training succeeded, but its MLflow run holds no logged model named 'model': "
            "have the trainer log one, or remove spec.registration"
        )
    source = source_of(client, model_id)
    return create_version(client, name, source, run_id=facts.run_id, model_id=model_id, timeout_s=READY_TIMEOUT_S)


def create_version(
    client: MlflowClient, name: str, source: str, *, run_id: str, model_id: str | None, timeout_s: int
) -> str:
    """Make a version of a registered model, and the model where it is missing.

    Args:
        client: Client of the registry.
        name: The registered model.
        source: Where its files lie.
        run_id: The run that it comes from.
        model_id: ID of the logged model that it is, if it is one.
        timeout_s: How long to wait until it is ready; 0 not to wait.

    Returns:
        Its number; of two versions of the run, the first one's.

    Raises:
        MlflowException: The server is away or refuses.
    """
    _ensure_registered_model(client, name)
    version = client.create_model_version(name, source, run_id, model_id=model_id, await_creation_for=timeout_s)
    # A client that repeats what it got no answer to may have made two: the first is the one that is found from now on.
    return find_version(client, name, run_id) or str(version.version)


def source_of(client: MlflowClient, model_id: str) -> str:
    """Where a logged model lies, for a new version of it.

    A server looks the model up by its ID. A database that this process opens itself would look it up in MLflow's global
    tracking URI, which may be another: it is told the place.

    Raises:
        MlflowException: The server is away, or there is no such model.
    """
    if client.tracking_uri.startswith(("http://", "https://")):
        return f"models:/{model_id}"
    return str(client.get_logged_model(model_id).artifact_location)


def _ensure_registered_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _holder(client: MlflowClient, name: str, alias: str) -> str | None:
    """The version that holds an alias, or None."""
    aliases: dict[str, str] = client.get_registered_model(name).aliases
    return str(aliases[alias]) if alias in aliases else None


def _is_newer(version: str | None, other: str) -> bool:
    return version is not None and int(version) > int(other)


def _metric_of(client: MlflowClient, name: str, version: str, metric: str) -> float | None:
    from mlflow.exceptions import MlflowException

    run_id = client.get_model_version(name, version).run_id
    try:
        return client.get_run(run_id).data.metrics.get(clean_name(metric)) if run_id else None
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None  # its run was deleted: nothing to compare with
        raise


def _better(value: float, other: float, mode: str) -> bool:
    return value < other if mode == "min" else value > other


def _reaches(value: float, threshold: float, mode: str) -> bool:
    return value <= threshold if mode == "min" else value >= threshold
