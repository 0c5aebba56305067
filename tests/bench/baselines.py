"""What the localizer is compared with: classical estimators of a place, and the bound that none can be better than.

All are pure. Places are metres, shape (R, 2) for R receivers; an estimate is shape (2,). None is told the truth; those
"with the known physics" are told the law of the path loss, the shadowing's deviation, the bounds of the radiated power
and the area, which a network has to learn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from scipy.special import ndtr

from heimdall_trainer.data.arrivals import LARGEST_OFFSET_HZ, Arrivals, Signal, pair_delay
from heimdall_trainer.data.physics import SPEED_OF_LIGHT_M_S, log_distance_loss_db

Points = NDArray[np.float64]
Reals = NDArray[np.float64]

GRID_STEP_M: Final = 50.0
GRID_BLUR_M: Final = 50.0
"""Added to the deviations for the search on the grid, whose steps would miss a narrow valley otherwise; power's grow by
what it changes within so many metres."""
STARTS: Final = 6
STARTS_APART_M: Final = 100.0
LEAST_DISTANCE_M: Final = 1.0
DB_PER_NEPER: Final = 10 / np.log(10)


@dataclass(frozen=True, kw_only=True)
class Physics:
    """What is known of the world."""

    frequency_hz: float
    exponent: float
    shadowing_db: float
    power_dbm: tuple[float, float]
    """Bounds of the radiated power, which is drawn evenly from between."""
    radius_m: float
    """Transmitters lie within this distance of the origin, evenly over the area."""

    def heard_dbm(self, distances_m: Reals) -> Reals:
        """Mean power at distances, for 0 dBm radiated."""
        reference = log_distance_loss_db(LEAST_DISTANCE_M, self.frequency_hz, self.exponent)
        heard: Reals = -reference - 10 * self.exponent * np.log10(np.maximum(distances_m, LEAST_DISTANCE_M))
        return heard


def weighted_centroid(places_m: Points, power_dbm: Reals) -> Points:
    """Mean of the receivers' places, weighted by received power in milliwatts.

    Blumenthal et al. 2007; their degree g, by which weights fall with distance, is the path-loss exponent here.
    """
    weights = 10 ** ((power_dbm - power_dbm.max()) / 10)
    centroid: Points = weights @ places_m / weights.sum()
    return centroid


def gcc_phat(signal: Signal, reference: Signal, *, largest_delay: float, finer: int = 16) -> float:
    """Delay in samples at the peak of the cross-correlation whose spectrum has magnitude 1 (Knapp and Carter 1976).

    Args:
        signal: Samples, shape (samples,), at the reference's carrier.
        reference: What it is compared with, shape (samples,).
        largest_delay: Bound of the delay, in samples.
        finer: Steps of the search in a sample; between them a parabola is laid.
    """
    cross = np.fft.fft(signal) * np.conj(np.fft.fft(reference))
    phase = cross / np.maximum(np.abs(cross), np.finfo(float).tiny)
    delays = np.arange(-np.ceil(largest_delay * finer), np.ceil(largest_delay * finer) + 1) / finer
    values = np.abs(np.exp(2j * np.pi * np.outer(delays, np.fft.fftfreq(signal.size))) @ phase)
    peak = int(np.argmax(values))
    if not 0 < peak < delays.size - 1:
        return float(delays[peak])
    left, middle, right = values[peak - 1 : peak + 2]
    return float(delays[peak] + 0.5 * (left - right) / (left - 2 * middle + right) / finer)


def phat_arrivals(
    signals: Sequence[Signal], places_m: Points, arrivals: Arrivals, *, sample_rate_hz: float
) -> Arrivals:
    """Arrivals by the phase transform, after the carriers' offsets were taken out; their deviations are taken over.

    Args:
        signals: What R receivers recorded, each of shape (samples,).
        places_m: Receivers, shape (R, 2).
        arrivals: The better estimate, whose deviations tell how good the signals are.
        sample_rate_hz: Sampling rate in hertz.
    """
    reference = int(np.argmax(arrivals.snr))
    times = np.zeros(len(signals))
    for index, signal in enumerate(signals):
        if index == reference:
            continue
        farthest_m = float(np.linalg.norm(places_m[index] - places_m[reference]))
        largest = farthest_m / SPEED_OF_LIGHT_M_S * sample_rate_hz + 0.5
        offset = pair_delay(
            signal, signals[reference], largest_delay=largest, largest_offset=LARGEST_OFFSET_HZ / sample_rate_hz
        ).offset
        tuned = signal * np.exp(-2j * np.pi * offset * np.arange(signal.size))
        times[index] = gcc_phat(tuned, signals[reference], largest_delay=largest) / sample_rate_hz
    return replace(arrivals, times_s=times)


def time_difference(places_m: Points, arrivals: Arrivals, radius_m: float) -> Points:
    """Least squares of arrival times with an unknown time of sending: hyperbolic location (Torrieri 1984).

    Args:
        places_m: Receivers, shape (R, 2).
        arrivals: Times and their deviations.
        radius_m: Bounds the search for the start.
    """
    return _fit(places_m, None, None, arrivals, _disc(1.2 * radius_m))[1]


def most_likely(places_m: Points, power_dbm: Reals, physics: Physics, arrivals: Arrivals | None = None) -> Points:
    """Maximum likelihood with the known physics: log-normal shadowing, and arrivals where they are given.

    The maximum is looked for within the area, on a grid where it would lie outside.

    Args:
        places_m: Receivers, shape (R, 2).
        power_dbm: Received power without noise, shape (R,).
        physics: What is known.
        arrivals: Times and their deviations; power alone if None.
    """
    start, found = _fit(places_m, power_dbm, physics, arrivals, _disc(physics.radius_m))
    return found if np.linalg.norm(found) <= physics.radius_m else start


def posterior_mean(places_m: Points, power_dbm: Reals, physics: Physics) -> Points:
    """Mean of the place given received power and all that is known: no estimator has a smaller mean squared error.

    The radiated power, even between its bounds, is integrated out in closed form.
    """
    grid = _disc(physics.radius_m)
    residual = power_dbm - physics.heard_dbm(_distances(grid, places_m))
    mean, count, sigma = residual.mean(axis=1), len(places_m), physics.shadowing_db
    spread = ((residual - mean[:, None]) ** 2).sum(axis=1)
    low, high = ((bound - mean) * np.sqrt(count) / sigma for bound in physics.power_dbm)
    likelihood = np.exp(-(spread - spread.min()) / (2 * sigma**2)) * (ndtr(high) - ndtr(low))
    if likelihood.sum() == 0:  # power beyond all that is possible
        likelihood = np.exp(-(spread - spread.min()) / (2 * sigma**2))
    estimate: Points = likelihood @ grid / likelihood.sum()
    return estimate


def information(
    place_m: Points, places_m: Points, *, physics: Physics | None = None, sigma_s: Reals | None = None
) -> NDArray[np.float64]:
    """Fisher information of a place, in 1/m², shape (2, 2).

    Power: log-normal shadowing, radiated power unknown (Patwari et al. 2003; Gezici 2008). Arrivals: independent
    errors, time of sending unknown (Torrieri 1984; the deviations are those of arrival_sigma_s). What is unknown is
    eliminated by a Schur complement, which leaves differences between receivers. The two add up, being independent.

    Args:
        place_m: Where the transmitter is, shape (2,).
        places_m: Receivers, shape (R, 2).
        physics: Law of the power; its information is left out if None.
        sigma_s: Deviations of the arrivals in seconds, shape (R,); their information is left out if None.
    """
    away = place_m - places_m
    distances = np.maximum(np.linalg.norm(away, axis=1), LEAST_DISTANCE_M)
    total = np.zeros((2, 2))
    if physics is not None:
        slopes = -DB_PER_NEPER * physics.exponent * away / distances[:, None] ** 2
        total += _differences(slopes, np.full(len(away), physics.shadowing_db**-2))
    if sigma_s is not None:
        total += _differences(away / distances[:, None], (sigma_s * SPEED_OF_LIGHT_M_S) ** -2)
    return total


def bound_errors_m(informations: list[NDArray[np.float64]], rng: np.random.Generator, draws: int = 200) -> Reals:
    """Distances that an efficient, normal estimator would be off: its covariance is the inverse of the information.

    Returns:
        Metres, shape (transmissions · draws,): percentiles of it are what those of an estimator's errors compare with.
    """
    errors = []
    for each in informations:
        root = np.linalg.cholesky(np.linalg.inv(each))
        errors.append(np.linalg.norm(rng.standard_normal((draws, 2)) @ root.T, axis=1))
    return np.concatenate(errors)


def _differences(slopes: Points, weights: Reals) -> NDArray[np.float64]:
    # Information of slopes with an unknown constant added to all measurements.
    common = weights @ slopes
    left: NDArray[np.float64] = slopes.T @ (weights[:, None] * slopes) - np.outer(common, common) / weights.sum()
    return left


def _fit(
    places_m: Points, power_dbm: Reals | None, physics: Physics | None, arrivals: Arrivals | None, grid: Points
) -> tuple[Points, Points]:
    # The best point of a grid, and where Gauss and Newton's steps lead from there.
    def residuals(distances: Reals, blur_m: float) -> Reals:
        parts = []
        if power_dbm is not None and physics is not None:
            left = power_dbm - physics.heard_dbm(distances)
            blur_db = DB_PER_NEPER * physics.exponent * blur_m / np.maximum(distances, max(blur_m, LEAST_DISTANCE_M))
            sigma_db = np.hypot(physics.shadowing_db, blur_db)
            mean = np.average(left, axis=-1, weights=sigma_db**-2, keepdims=True)
            parts.append((left - np.clip(mean, *physics.power_dbm)) / sigma_db)
        if arrivals is not None:
            sigma_m = np.hypot(arrivals.sigma_s * SPEED_OF_LIGHT_M_S, blur_m)
            left = arrivals.times_s * SPEED_OF_LIGHT_M_S - distances
            weights = sigma_m**-2 / np.sum(sigma_m**-2)
            parts.append((left - (left @ weights)[..., None]) / sigma_m)
        return np.concatenate(parts, axis=-1)

    costs = (residuals(_distances(grid, places_m), GRID_BLUR_M) ** 2).sum(axis=-1)
    starts = _apart(grid, costs)
    tries = [
        least_squares(lambda place: residuals(_distances(place, places_m), 0.0), start, x_scale=100.0, xtol=1e-12)
        for start in starts
    ]
    return starts[0], np.asarray(min(tries, key=lambda each: each.cost).x)


def _apart(grid: Points, costs: Reals) -> list[Points]:
    # The best few points, of which none is near another: there may be several valleys.
    chosen: list[Points] = []
    for point in grid[np.argsort(costs)]:
        if all(np.linalg.norm(point - other) > STARTS_APART_M for other in chosen):
            chosen.append(point)
        if len(chosen) == STARTS:
            break
    return chosen


@lru_cache(maxsize=4)
def _disc(radius_m: float) -> Points:
    axis = np.arange(-radius_m, radius_m + GRID_STEP_M, GRID_STEP_M)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    return grid[np.linalg.norm(grid, axis=1) <= radius_m]


def _distances(points: Points, places_m: Points) -> Reals:
    # Shape (..., R) of points of shape (..., 2).
    return np.maximum(np.linalg.norm(points[..., None, :] - places_m, axis=-1), LEAST_DISTANCE_M)
