"""Pretrained weights of a backbone from a folder or a bucket of one's own: no library's hub needed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from heimdall_trainer.data.recordings import open_objects, write_whole
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.settings import DataSettings

SUFFIXES: Final = (".safetensors", ".pth")


def find_weights(settings: DataSettings, backbone: str) -> Path | None:
    """The file with a backbone's weights, fetched into the cache.

    Args:
        settings: `weights_url`, and access to it.
        backbone: Name of the model in timm.

    Returns:
        The file; None where no `HEIMDALL_WEIGHTS_URL` is set, so that the library's own weights are used.

    Raises:
        ConfigurationError: The folder or bucket holds none for this backbone, or the variable names neither.
        ConnectionError: The bucket does not answer.
    """
    if not settings.weights_url:
        return None
    try:
        objects = open_objects(settings, settings.weights_url)
    except ConfigurationError as error:
        raise ConfigurationError(f"HEIMDALL_WEIGHTS_URL: {error}") from None
    name = backbone.replace("/", "_")
    for suffix in SUFFIXES:
        if objects.has(f"{name}{suffix}"):
            content = objects.get(f"{name}{suffix}")
            digest = hashlib.sha256(content).hexdigest()
            file = settings.cache_dir / "weights" / digest[:16] / f"{name}{suffix}"
            if not file.is_file() or file.read_bytes() != content:
                write_whole(file, content)
            return file
    raise ConfigurationError(
        f"spec.model.pretrained: HEIMDALL_WEIGHTS_URL ({settings.weights_url}) holds neither "
        f"{' nor '.join(name + suffix for suffix in SUFFIXES)}: put one there, or set pretrained to false"
    )
