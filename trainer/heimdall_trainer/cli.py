"""`heimdall-train`: train a TrainingRun, on a cluster or without one; look at what was trained; make recordings."""

from __future__ import annotations

import argparse
import os
import sys
from contextlib import suppress
from typing import Any, NoReturn

from heimdall_trainer.commands import data, models, training


def main() -> None:
    """Do what the command line asks for, and end as the contract says."""
    arguments = _parser().parse_args()
    # Late: `--help` needs nothing of it.
    from heimdall_trainer.termination import EXIT_BY_HAND, run_to_exit_code

    _configure_logging()
    try:
        code = run_to_exit_code(lambda: arguments.call(arguments))
    except KeyboardInterrupt:  # of a command that has nothing to save
        print("Ended by Ctrl-C.", file=sys.stderr)
        code = EXIT_BY_HAND
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, OSError, ValueError):  # a module may have closed it: that changes no exit code
            stream.flush()
    # Background threads may hang in a call to a server that is away: they must not hold the end up.
    os._exit(code)


class _Parser(argparse.ArgumentParser):
    """Ends as the contract says where an option can't be used: in another attempt it could not be used either."""

    def error(self, message: str) -> NoReturn:
        from heimdall_api.contract import ExitCode, Reason
        from heimdall_tracking.redact import redact
        from heimdall_trainer.termination import leave_last_words

        self.print_usage(sys.stderr)
        leave_last_words(Reason.INVALID_CONFIGURATION, f"{redact(message)}; see {self.prog} --help")
        sys.exit(ExitCode.CONFIGURATION)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="heimdall-train", description="Train the model of a TrainingRun.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for each in (training, models, data):
        each.add(commands)
    return parser


def _configure_logging() -> None:
    """Lines for people on a terminal, JSON elsewhere."""
    import logging
    import warnings

    import structlog

    renderer: Any = structlog.dev.ConsoleRenderer() if sys.stderr.isatty() else structlog.processors.JSONRenderer()
    structlog.configure(
        processors=[
            structlog.stdlib.add_log_level,
            structlog.processors.TimeStamper(fmt="iso"),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    # Advice for people who write trainers, not for people who run them.
    for advice in (
        "does not have many workers",
        "`isinstance\\(treespec, LeafSpec\\)` is deprecated",
        "Add type hints to the `predict` method",
        "It is recommended to use `self.log\\(.*sync_dist=True",
    ):
        warnings.filterwarnings("ignore", message=f"[\\s\\S]*{advice}")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        # A filter, not a level: Lightning sets its own level when it is imported.
        logging.getLogger(f"{name}.utilities.rank_zero").addFilter(lambda record: record.levelno >= logging.WARNING)
    logging.getLogger("mlflow").setLevel(logging.ERROR)


if __name__ == "__main__":
    main()
