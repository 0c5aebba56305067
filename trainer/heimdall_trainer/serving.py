"""The localizer as MLflow serves it."""

from __future__ import annotations

import torch
from mlflow.pyfunc.model import PythonModel


class Localizer(PythonModel):
    """Predicts where transmissions came from, and how sure it is."""

    def __init__(self, net: torch.nn.Module) -> None:
        self.net = net

    # Without type hints: MLflow would take them for a schema, which the signature is already.
    def predict(self, context, model_input, params=None):  # type: ignore[no-untyped-def]
        """Locate transmissions.

        Args:
            context: MLflow's; not used.
            model_input: `spectrograms` (B, R, 3, 128, 32) and `receivers` (B, R, 2 or, with arrivals, 4) in metres, as
                arrays.
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
