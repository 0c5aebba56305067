"""What of a training pod is the operator's own: made by `manifests`, and kept from pod templates by `overrides`."""

from __future__ import annotations

from typing import Final

from heimdall_api.contract import (
    ENV_ATTEMPT,
    ENV_GRACE_PERIOD,
    ENV_MLFLOW_RUN_ID,
    ENV_RUN_FILE,
    ENV_TERMINATION_MESSAGE,
    RUN_FILE,
    SCRATCH_DIR,
)

RUN_FILE_VOLUME: Final = "run-file"
SCRATCH_VOLUME: Final = "scratch"
SHARED_MEMORY_VOLUME: Final = "shared-memory"
CA_VOLUME: Final = "heimdall-ca"
"""Not merely `ca`: a volume of a user's that is called so has to find no other of its name."""
MOUNTS: Final = {
    RUN_FILE_VOLUME: RUN_FILE.rsplit("/", 1)[0],
    SCRATCH_VOLUME: SCRATCH_DIR,
    SHARED_MEMORY_VOLUME: "/dev/shm",  # noqa: S108 - the pod's own
    CA_VOLUME: "/etc/heimdall-ca",
}
"""Every volume, and where it lies in the container."""
GPU_RESOURCE: Final = "nvidia.com/gpu"
RESOURCES: Final = ("cpu", "memory", GPU_RESOURCE)
VARIABLES: Final = frozenset({ENV_RUN_FILE, ENV_ATTEMPT, ENV_GRACE_PERIOD, ENV_TERMINATION_MESSAGE, ENV_MLFLOW_RUN_ID})
"""Those that say what is so: whoever sets others, OMP_NUM_THREADS say, has reasons."""
