"""How good a localizer is on recording sessions: predictions, and the figures that they come to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from heimdall_api.types import DataSpec
from heimdall_trainer.data.dataset import HeimdallDataset, collate
from heimdall_trainer.data.geo import to_geographic
from heimdall_trainer.data.sessions import SessionStore
from heimdall_trainer.data.split import divide
from heimdall_trainer.model.metrics import PositionMetrics
from heimdall_trainer.settings import DataSettings

BATCH_SIZE: Final = 32

Side = Literal["train", "validation", "test"]
Metres = NDArray[np.float64]
Degrees = NDArray[np.float64]


@dataclass(frozen=True)
class Predictions:
    """What a localizer says of N transmissions, and what is true, in metres around each session's origin."""

    position: Metres
    """Shape (N, 2): east and north."""
    sigma: Metres
    """Standard deviations, shape (N, 2)."""
    truth: Metres
    """Shape (N, 2)."""
    receivers: tuple[Metres, ...]
    """Of each transmission, shape (R, 2)."""
    sessions: tuple[str, ...]
    """The session of each transmission."""
    transmissions: tuple[str, ...]
    """Their IDs."""
    origins: Degrees
    """Latitude and longitude of the sessions' origins, shape (N, 2)."""

    @property
    def geographic(self) -> Degrees:
        """Predicted places as latitude and longitude in degrees, shape (N, 2)."""
        found = [to_geographic(place, origin) for place, origin in zip(self.position, self.origins, strict=True)]
        return np.stack(found)

    @property
    def errors_m(self) -> Metres:
        """Distances between predicted and true places, shape (N,)."""
        distance: Metres = np.linalg.norm(self.position - self.truth, axis=1)
        return distance

    @property
    def squares(self) -> Metres:
        """Squared errors in standard deviations, shape (N,); see squared_mahalanobis."""
        square: Metres = (((self.position - self.truth) / self.sigma) ** 2).sum(1)
        return square

    def figures(self) -> dict[str, float]:
        """Median and 90th percentile of the error, coverage of 68 and 95 %: named and computed as in training."""
        metrics = PositionMetrics()
        said = np.concatenate([self.position, self.sigma], axis=1)
        metrics.update(torch.from_numpy(said), torch.from_numpy(self.truth))
        return {name: float(value) for name, value in metrics.compute().items()}


def predict(net: torch.nn.Module, dataset: HeimdallDataset) -> Predictions:
    """Have a network locate every transmission of a dataset.

    Args:
        net: A LocalizationNet. It is left in evaluation, on the GPU where there is one.
        dataset: Transmissions, without augmentation.

    Returns:
        The predictions, in the dataset's order.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = net.eval().to(device)
    said, truths, receivers = [], [], []
    with torch.inference_mode():
        for batch in DataLoader(dataset, batch_size=BATCH_SIZE, collate_fn=collate):
            inputs = (batch[name].to(device) for name in ("spectrograms", "receivers", "mask"))
            said.append(net(*inputs).cpu())
            truths.append(batch["position"])
            receivers += [
                places[heard, :2].double().numpy()
                for places, heard in zip(batch["receivers"], batch["mask"], strict=True)
            ]
    together: Any = torch.cat(said).double().numpy()
    return Predictions(
        position=together[:, :2],
        sigma=together[:, 2:],
        truth=torch.cat(truths).double().numpy(),
        receivers=tuple(receivers),
        sessions=tuple(item.session_id for item in dataset.transmissions),
        transmissions=tuple(item.id for item in dataset.transmissions),
        origins=np.array([item.origin for item in dataset.transmissions]),
    )


def sessions_of(settings: DataSettings, data: DataSpec, seed: int, side: Side) -> Sequence[str]:
    """The sessions that a training of this data and seed has on one of its sides.

    Raises:
        ConfigurationError: Sessions are missing, not approved, or too few.
        DataError: There is no approved session.
        ConnectionError: The database does not answer.
    """
    with closing(SessionStore.open(settings)) as database:
        return tuple(getattr(divide(database, data, seed), side))
