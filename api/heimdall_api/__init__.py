"""The TrainingRun resource: its types, the contract with a trainer pod, and the generator of the CRD."""

from heimdall_api.types import TrainingRun, TrainingRunSpec, TrainingRunStatus

__all__ = ["TrainingRun", "TrainingRunSpec", "TrainingRunStatus"]
