"""A Lightning logger that tracks through MLflowTracker.

Lightning's own MLFlowLogger cuts parameters, lets an outage of MLflow end the training, and ends runs that are not its
own; here metrics go through the queue, and the run's owner ends it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from heimdall_trainer.group import is_first

if TYPE_CHECKING:
    from heimdall_tracking import MLflowTracker


def make_logger(pl: Any, tracker: MLflowTracker) -> Any:
    """A logger for a Lightning package.

    Args:
        pl: `pytorch_lightning` or `lightning.pytorch`.
        tracker: The run.

    Returns:
        A logger that the package's Trainer takes.
    """

    class TrackerLogger(pl.loggers.logger.Logger):  # type: ignore[misc]
        """Logs to the tracker's run."""

        @property
        def name(self) -> str:
            return "mlflow"

        @property
        def version(self) -> str:
            return tracker.run_id

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            if not is_first():
                return
            # Lightning's epoch counter is no metric of the training.
            tracker.log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step or 0)

        def log_hyperparams(self, params: Any, *_: Any, **__: Any) -> None:
            if not is_first():
                return
            tracker.log_params({"module": dict(params) if isinstance(params, Mapping) else vars(params)})

    return TrackerLogger()
