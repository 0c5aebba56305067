"""Classes of the user's own, by import path, and the Lightning package that they belong to."""

from __future__ import annotations

import importlib
import inspect
import sys
from typing import Any

from heimdall_trainer.errors import ConfigurationError


def load_class(path: str, field: str) -> type[Any]:
    """Import a class.

    Args:
        path: `package.module:ClassName`.
        field: The field of the spec that names it, for messages.

    Returns:
        The class.

    Raises:
        ConfigurationError: It can't be imported; the message says why.
    """
    module_name, _, class_name = path.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a module beside the file that one works on
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # a script that reads a command line of its own ends the process
        raise ConfigurationError(
            f"{field} {path!r} can't be imported: {type(error).__name__}: {error}. "
            "Is it in the image, and are its dependencies?"
        ) from error
    found = getattr(module, class_name, None)
    if not inspect.isclass(found):
        raise ConfigurationError(f"{field} {path!r}: {module_name} has no class {class_name}")
    return found


def construct(found: type[Any], arguments: dict[str, Any], field: str) -> Any:
    """Make an object, with its arguments checked against its signature first.

    Raises:
        ConfigurationError: An argument is unknown or missing.
    """
    try:
        inspect.signature(found).bind(**arguments)
    except TypeError as error:
        raise ConfigurationError(f"{field} does not fit {found.__name__}{inspect.signature(found)}: {error}") from None
    return found(**arguments)


def lightning_of(module: Any, field: str = "spec.model.module", kind: str = "LightningModule") -> Any:
    """The Lightning package that a module belongs to: `lightning.pytorch` or `pytorch_lightning`.

    They are two copies of one library: the Trainer of one refuses the modules of the other.

    Args:
        module: A LightningModule, or a LightningDataModule.
        field: The field of the spec that names it, for messages.
        kind: The class that it must be of.

    Raises:
        ConfigurationError: It is none of either package.
    """
    for parent in type(module).__mro__:
        for package in ("lightning.pytorch", "pytorch_lightning"):
            if parent.__name__ == kind and parent.__module__.startswith(f"{package}.core"):
                return importlib.import_module(package)
    raise ConfigurationError(f"{field} {type(module).__name__} is no {kind}")


def check_data(module: Any, data: Any) -> None:
    """Make sure that a user's data can be trained on with a module.

    Raises:
        ConfigurationError: It is no LightningDataModule, or is one of the other Lightning package.
    """
    wanted = lightning_of(module)
    found = lightning_of(data, "spec.data.module", "LightningDataModule")
    if found is not wanted:
        raise ConfigurationError(
            f"spec.data.module {type(data).__name__} is made for {found.__name__}, spec.model.module "
            f"{type(module).__name__} for {wanted.__name__}: have both import the same package"
        )
