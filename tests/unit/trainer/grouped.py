"""Trains as one process of a group; the second one is told to end at a step, if there is one for that.

Called as `python -m tests.unit.trainer.grouped RUN_FILE OUTPUT_FOLDER [STEP]`, with torchrun's variables.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from heimdall_trainer import cli
from heimdall_trainer.model.module import LocalizationModule


def stop_at(step: int) -> None:
    """Have this process told to end at a step."""
    whole = LocalizationModule.training_step

    def told_to_end(module: LocalizationModule, *arguments: Any) -> Any:
        if module.global_step == step:
            signal.raise_signal(signal.SIGTERM)
        return whole(module, *arguments)

    LocalizationModule.training_step = told_to_end  # type: ignore[method-assign]


if __name__ == "__main__":
    file, folder, *steps = sys.argv[1:]
    if steps and os.environ["RANK"] == "1":
        stop_at(int(steps[0]))
    sys.argv[1:] = ["run", "-f", file, "--output-dir", folder]
    cli.main()
