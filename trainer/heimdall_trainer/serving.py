"""The localizer as MLflow serves it."""

from __future__ import annotations

from typing import Any

import torch
from mlflow.pyfunc import PythonModel


class Localizer(PythonModel):  # type: ignore[misc]
    """Predicts where transmissions came from, and how sure it is."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> dict[str, Any]:
        """Locate transmissions.

        Args:
            context: MLflow's; not used.
            model_input: `spectrograms` (B, R, 3, 128, 32) and `receivers` (B, R, 2) in metres, as arrays.
            params: Not used.

        Returns:
            `position` and `sigma`, each (B, 2) in the metres that the receivers are given in.
        """
        del context, params
        with torch.no_grad():
            out = self.net(
                torch.as_tensor(model_input["spectrograms"], dtype=torch.float32),
                torch.as_tensor(model_input["receivers"], dtype=torch.float32),
            )
        return {"position": out[:, :2].numpy(), "sigma": out[:, 2:].numpy()}
