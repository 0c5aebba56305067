"""What is told to the server behind training, as data: it can be made again, put away on disk, and made another day.

Always `synchronous`: with MLFLOW_ENABLE_ASYNC_LOGGING MLflow's client would only take a note, and what it can't deliver
would be lost.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import structlog
from pydantic import BaseModel, ConfigDict, Field

from heimdall_tracking.errors import is_refusal
from heimdall_tracking.redact import redact

if TYPE_CHECKING:
    from mlflow import MlflowClient

log = structlog.get_logger()


class SetTag(BaseModel):
    """Set a tag of the run."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["tag"] = "tag"
    name: str
    value: str

    @property
    def key(self) -> str:
        """What it is: of two calls that wait with one key, the newer counts."""
        return f"tag {self.name}"

    def make(self, client: MlflowClient, run_id: str) -> None:
        """Make the call.

        Raises:
            MlflowException: The server is away or refuses.
        """
        client.set_tag(run_id, self.name, self.value, synchronous=True)


class LogParams(BaseModel):
    """Log parameters, no more than MLflow takes in one call."""

    model_config = ConfigDict(frozen=True)

    kind: Literal["params"] = "params"
    number: int
    """Which of its run's calls it is."""
    params: dict[str, str]

    @property
    def key(self) -> str:
        """What it is; no other has it."""
        return f"params {self.number}"

    def make(self, client: MlflowClient, run_id: str) -> None:
        """Make the call; a parameter that has another value already is warned about and left as it is.

        Raises:
            MlflowException: The server is away.
        """
        _send_params(client, run_id, self.params)


Call = Annotated[SetTag | LogParams, Field(discriminator="kind")]


def _send_params(client: MlflowClient, run_id: str, params: dict[str, str]) -> None:
    from mlflow.entities import Param
    from mlflow.exceptions import MlflowException

    try:
        client.log_batch(run_id, params=[Param(name, value) for name, value in params.items()], synchronous=True)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        if len(params) == 1:
            log.warning("a parameter was not logged", name=next(iter(params)), error=redact(error))
            return
        # One that can't change took the others along: each by itself.
        for name, value in params.items():
            _send_params(client, run_id, {name: value})
