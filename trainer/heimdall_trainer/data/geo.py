"""Local metres around an origin, and back to latitude and longitude."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import ArrayLike, NDArray

EARTH_RADIUS_M: Final = 6_371_008.8
"""Mean radius of the Earth (IUGG 1980)."""


def to_local(position: ArrayLike, origin: ArrayLike) -> NDArray[np.float64]:
    """Project onto the plane that touches the Earth at an origin (equirectangular; errs by under 1 m within 10 km).

    Args:
        position: Latitude and longitude in degrees, shape (..., 2).
        origin: Latitude and longitude of the origin in degrees, shape (2,).

    Returns:
        Metres east and north of the origin, shape (..., 2).
    """
    degrees = np.asarray(position, dtype=np.float64) - np.asarray(origin, dtype=np.float64)
    radians = np.radians(degrees)
    east = radians[..., 1] * np.cos(np.radians(np.asarray(origin)[0])) * EARTH_RADIUS_M
    return np.stack([east, radians[..., 0] * EARTH_RADIUS_M], axis=-1)


def to_geographic(local: ArrayLike, origin: ArrayLike) -> NDArray[np.float64]:
    """The inverse of to_local: metres east and north, shape (..., 2), to latitude and longitude in degrees."""
    metres = np.asarray(local, dtype=np.float64)
    start = np.asarray(origin, dtype=np.float64)
    latitude = start[0] + np.degrees(metres[..., 1] / EARTH_RADIUS_M)
    longitude = start[1] + np.degrees(metres[..., 0] / (EARTH_RADIUS_M * np.cos(np.radians(start[0]))))
    return np.stack([latitude, longitude], axis=-1)
