"""Hyperbolic location by the network: exact, as sure as it may be, and never without an answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heimdall_trainer.data.arrivals import Arrivals
from heimdall_trainer.data.physics import SPEED_OF_LIGHT_M_S
from heimdall_trainer.model.hyperbolas import Fix, Heard, solve
from tests.bench import baselines

BATCH = 500
VAGUE = 0.3
"""Standard deviation of the guess in these scenes, in kilometres."""


def scene(receivers: int, sigma: float, *, seed: int = 1, noisy: bool = True) -> dict[str, torch.Tensor]:
    """Transmitters among receivers on a ring of 1.5 km, heard with noise, and a guess some hundred metres off."""
    draw = torch.Generator().manual_seed(seed)
    angles = 2 * torch.pi * torch.rand(BATCH, receivers, generator=draw)
    places = 1.5 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    truth = 0.6 * torch.randn(BATCH, 2, generator=draw)
    sigmas = sigma * (0.5 + torch.rand(BATCH, receivers, 1, generator=draw))
    late = (truth.unsqueeze(1) - places).norm(dim=-1, keepdim=True)
    if noisy:
        late = late + sigmas * torch.randn(late.shape, generator=draw)
    return {
        "late": late - late[:, :1],
        "sigma": sigmas,
        "places": places,
        "present": torch.ones(BATCH, receivers, 1),
        "guess": truth + VAGUE * torch.randn(BATCH, 2, generator=draw),
        "deviation": torch.full((BATCH, 2), VAGUE),
        "truth": truth,
    }


def solved(given: dict[str, torch.Tensor]) -> Fix:
    heard = Heard(**{name: given[name] for name in ("places", "late", "sigma", "present")})
    return solve(heard, given["guess"], given["deviation"])


def off(fix: Fix, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return (fix.place - given["truth"]).norm(dim=-1)


def test_exact_arrivals_give_the_exact_place() -> None:
    given = scene(6, 1e-4, noisy=False)
    fix = solved(given)
    # Of ambiguous ones among them, where all receivers happen to stand on one side, some stay.
    assert off(fix, given).quantile(0.95) < 1e-3
    assert fix.misfit.median() < 0.1


def test_a_few_arrivals_that_are_very_sure_do_not_pull_it_into_a_valley_of_theirs() -> None:
    wrong = []
    for seed in range(8):
        given = scene(7, 1.0, seed=seed, noisy=False)
        draw = torch.Generator().manual_seed(seed)
        given["sigma"] = 10 ** (-4 + 1.5 * torch.rand(given["sigma"].shape, generator=draw))
        given["late"] = given["late"] + given["sigma"] * torch.randn(given["late"].shape, generator=draw)
        fix = solved(given)
        wrong.append(((fix.place - given["truth"]) / fix.deviation).square().sum(-1) > 100)
    assert torch.cat(wrong).float().mean() < 0.002  # 0.0005; with all of them sharp from the first step on 0.005


def test_it_is_what_least_squares_finds() -> None:
    given = scene(6, 0.003)
    fix = solved(given)
    differences = []
    for index in range(30):
        places, late, sigma = (given[name][index].double().numpy() for name in ("places", "late", "sigma"))
        arrivals = Arrivals(
            times_s=late[:, 0] * 1000 / SPEED_OF_LIGHT_M_S,
            sigma_s=sigma[:, 0] * 1000 / SPEED_OF_LIGHT_M_S,
            snr=np.ones(len(late)),
            bandwidth_rad_s=1.0,
        )
        found = baselines.time_difference(1000 * places, arrivals, 2000.0)
        differences.append(np.linalg.norm(found - 1000 * fix.place[index].numpy()))
    assert np.median(differences) < 0.2  # of some metres; the guess, which counts a little, makes them differ


def test_it_is_as_sure_as_it_is_right() -> None:
    given = scene(8, 0.01)
    fix = solved(given)
    error = (fix.place - given["truth"]) / fix.deviation
    assert (error.abs() < 1).float().mean() == pytest.approx(0.683, abs=0.04)
    crossed = (error[:, :1] * error[:, 1:]).mean()
    assert crossed == pytest.approx(float(fix.correlation.mean()), abs=0.1)
    # As many squares as receivers, less three that were fitted.
    assert fix.misfit.median() == pytest.approx(8 - 3 - 2 / 3, abs=0.5)


def test_the_correlation_has_the_sign_of_the_errors() -> None:
    given = scene(3, 0.02)
    fix = solved(given)
    error = (fix.place - given["truth"]) / fix.deviation
    for side in (1, -1):
        chosen = (side * fix.correlation > 0.7)[:, 0]
        assert chosen.sum() > 20
        assert side * (error[chosen, 0] * error[chosen, 1]).median() > 0


@pytest.mark.parametrize("receivers", [1, 2, 3])
@pytest.mark.parametrize("sigma", [1e-4, 0.1])
def test_what_arrivals_leave_open_is_left_to_the_guess(receivers: int, sigma: float) -> None:
    given = scene(receivers, sigma)
    fix = solved(given)
    assert all(value.isfinite().all() for value in (fix.place, fix.deviation, fix.correlation, fix.misfit))
    assert (fix.deviation <= VAGUE * 1.001).all()
    if receivers == 1:
        assert torch.allclose(fix.place, given["guess"], atol=1e-5)
        assert torch.allclose(fix.deviation, given["deviation"])
    else:
        assert off(fix, given).median() < off(solved(scene(1, sigma)), scene(1, sigma)).median()


def test_padding_and_the_instant_that_is_counted_from_change_nothing() -> None:
    given = scene(4, 0.01)
    fix = solved(given)
    padded = given | {
        name: torch.cat([given[name], torch.full_like(given[name][:, :1], value)], dim=1)
        for name, value in {"late": 9.0, "sigma": 0.1, "places": 77.0, "present": 0.0}.items()
    }
    padded["late"] = padded["late"] + 5.0
    other = solved(padded)
    assert torch.allclose(other.place, fix.place, atol=1e-3)
    assert torch.allclose(other.deviation, fix.deviation, rtol=1e-2)


def test_gradients_reach_the_guess_and_how_sure_it_is() -> None:
    given = scene(2, 0.01)
    guess, deviation = given["guess"].requires_grad_(), given["deviation"].requires_grad_()
    fix = solved(given)
    (fix.place.sum() + fix.deviation.log().sum()).backward()
    for each in (guess, deviation):
        assert each.grad is not None
        assert each.grad.isfinite().all()
        assert (each.grad.abs().sum(-1) > 1e-4).all()
