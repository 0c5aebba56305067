"""From a file and flags to a TrainingRun: a flag beats the file, the file beats the default."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from heimdall_api.base import explain
from heimdall_api.contract import API_VERSION, KIND
from heimdall_api.types import NAME_LIMIT, TrainingRun, TrainingRunSpec
from heimdall_trainer.errors import ConfigurationError


def load_training_config(path: str | Path) -> TrainingRun:
    """Read a TrainingRun from YAML or JSON; a bare spec, or the bare `training` part of one, will do.

    Args:
        path: The file.

    Returns:
        The TrainingRun, checked, with all defaults.

    Raises:
        ConfigurationError: The file is missing, no YAML, or not valid; the message names each field.
    """
    file = Path(path)
    return parse(_read(file), name=_name_of(file))


def check_file(path: str | Path) -> str:
    """Check a TrainingRun as the API server does; a bare spec, or a part of one, is one for this trainer alone.

    Args:
        path: The file.

    Returns:
        What it is, for people.

    Raises:
        ConfigurationError: It is missing, no YAML, or not valid; the message names each field.
    """
    file = Path(path)
    document = _read(file)
    run = parse(document, name=_name_of(file))
    if not RUN_FIELDS & set(document):
        part = "spec" if set(document) & SPEC_FIELDS else "spec.training"
        return f"a bare {part}, valid for heimdall-train; kubectl takes a whole TrainingRun alone"
    missing = [f"{name}: {value}" for name, value in HEAD.items() if name not in document]
    if missing:
        raise ConfigurationError(f"{file} lacks {' and '.join(missing)}: the API server refuses a TrainingRun without")
    return f"{run.metadata.name} is valid"


def _read(file: Path) -> dict[str, Any]:
    import yaml

    try:
        document = _document(file.read_text())
    except OSError as error:
        raise ConfigurationError(f"{file} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"{file} is no text, so neither YAML nor JSON") from None
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{file} is neither YAML nor JSON: {error}") from None
    if not isinstance(document, dict):
        raise ConfigurationError(f"{file} holds no TrainingRun")
    return document


def _name_of(file: Path) -> str:
    """A name that a TrainingRun may have, after the file that names none."""
    return re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).lstrip("-0123456789")[:NAME_LIMIT].rstrip("-") or "run"


def _document(text: str) -> Any:
    import yaml

    try:
        return json.loads(text)  # not all JSON is YAML: tabs, for one
    except ValueError:
        return yaml.safe_load(text)


def parse(document: dict[str, Any], name: str = "run") -> TrainingRun:
    """Check a document; see load_training_config."""
    if not RUN_FIELDS & set(document):
        spec = document if set(document) & SPEC_FIELDS else {"training": document}
        document = {"metadata": {"name": name}, "spec": spec}
    try:
        return TrainingRun.model_validate(document)
    except ValidationError as error:
        raise ConfigurationError(explain(error)) from None


HEAD: Final = {"apiVersion": API_VERSION, "kind": KIND}
RUN_FIELDS: Final = {*HEAD, "metadata", "spec"}
SPEC_FIELDS: Final = {field.alias or name for name, field in TrainingRunSpec.model_fields.items()}


def override(run: TrainingRun, flags: dict[str, Any]) -> TrainingRun:
    """Lay flags over a TrainingRun.

    Args:
        run: What file and defaults say.
        flags: Values by their path in the spec, such as `training.epochs`; None is left out.

    Returns:
        The TrainingRun, checked again.

    Raises:
        ConfigurationError: A flag's value can't be used.
    """
    document = json.loads(run.model_dump_json(exclude_none=True, exclude_unset=True))
    for path, value in flags.items():
        if value is None:
            continue
        *parents, leaf = path.split(".")
        target = document.setdefault("spec", {})
        for parent in parents:
            target = target.setdefault(parent, {})
        target[leaf] = value
    return parse(document)
