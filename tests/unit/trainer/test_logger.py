"""What Lightning's logger hands on to the tracker."""

from __future__ import annotations

from argparse import Namespace
from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest

from heimdall_trainer.logger import make_logger


@pytest.mark.parametrize("kind", [dict, "AttributeDict", Namespace])
def test_hyperparameters_of_every_kind_are_logged(kind: Any) -> None:
    pl = import_module("pytorch_lightning")
    make = import_module("pytorch_lightning.utilities").AttributeDict if kind == "AttributeDict" else kind
    logged: list[dict[str, Any]] = []
    make_logger(pl, SimpleNamespace(log_params=logged.append)).log_hyperparams(make(width=3, lr=0.1))  # type: ignore[arg-type]
    assert logged == [{"module": {"width": 3, "lr": 0.1}}]
