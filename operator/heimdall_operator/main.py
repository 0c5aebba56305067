"""The operator's entry point."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Final

from pydantic import ValidationError

from heimdall_operator.mlflow_gateway import bound_http
from heimdall_operator.settings import OperatorSettings
from heimdall_tracking.redact import redact
from heimdall_tracking.settings import problems_of

if TYPE_CHECKING:
    from structlog.typing import EventDict


RECURSION_LIMIT: Final = 12_000
"""The API server takes JSON of 10,000 levels, and Python's parser counts them like calls: by its default of 1,000, one
TrainingRun of so many would keep all others from being listed. Parsing, comparing and printing as many takes less than
half of a stack of 8 MiB."""


def main() -> None:
    """Run the operator until it is told to end."""
    sys.setrecursionlimit(RECURSION_LIMIT)
    bound_http()
    settings = _read_settings()
    _configure_logging()
    import kopf

    from heimdall_operator.handlers import register

    registry = kopf.OperatorRegistry()
    register(registry, settings)
    kopf.run(
        registry=registry,
        # One replica, replaced before its successor starts; all state is in the API server and MLflow.
        standalone=True,
        clusterwide=not settings.namespace_list,
        namespaces=settings.namespace_list,
        liveness_endpoint=f"http://0.0.0.0:{settings.health_port}/healthz",
    )


def _read_settings() -> OperatorSettings:
    try:
        return OperatorSettings()
    except ValidationError as error:
        lines = [f"  {problem}" for problem in problems_of(error, OperatorSettings)]
        sys.exit("The operator's settings can't be used; correct these environment variables:\n" + "\n".join(lines))


def _configure_logging() -> None:
    """JSON lines, one format for the operator and its libraries."""
    import structlog

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
    ]
    structlog.configure(
        processors=[
            *shared,
            structlog.processors.format_exc_info,  # without local variables: they may hold secrets
            _redact_traceback,
            structlog.processors.JSONRenderer(),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.processors.format_exc_info, _redact_traceback],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    # The probe asks every few seconds.
    for chatty in ("kopf", "aiohttp.access"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _redact_traceback(_: object, __: str, event: EventDict) -> EventDict:
    """It ends with what the errors say, of a URL with its password perhaps."""
    return {**event, "exception": redact(event["exception"])} if "exception" in event else event


if __name__ == "__main__":
    main()
