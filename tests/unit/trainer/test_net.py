"""The network: what it must not depend on, and every family of backbones."""

from __future__ import annotations

import http.client
import math
import socket
import ssl
import urllib.error
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as L  # noqa: N812 - the name its users know
import timm
import torch
from huggingface_hub import errors as hub_errors

from heimdall_api.contract import ExitCode, Reason
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.losses import gaussian_nll
from heimdall_trainer.model.module import LocalizationModule, schedule_share
from heimdall_trainer.model.net import SCALE_BOUNDS, SIGMA_BOUNDS_M, LocalizationNet, feature_width
from heimdall_trainer.termination import judge

SMALL = "test_resnet"
"""timm's smallest ResNet, made for tests."""
FAMILIES = [
    "convnext_tiny",
    "convnext_small",
    "convnext_base",
    "convnext_large",
    "resnet50",
    "resnet101",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
    "efficientnet_b3",
    "efficientnet_b4",
]
SMALLEST = ["test_convnext", "test_resnet", "test_vit", "test_efficientnet"]
REAL = ["convnext_tiny", "resnet50", "vit_base_patch16_224", "efficientnet_b3"]
"""Of the size that people train: weights and graph as they are, not a toy's."""


def scene(batch: int = 2, receivers: int = 4, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    spectrograms = torch.randn(batch, receivers, 3, 128, 32, generator=generator)
    return spectrograms, 1000 * torch.randn(batch, receivers, 2, generator=generator)


@pytest.fixture(scope="module")
def net() -> LocalizationNet:
    """To be left in evaluation, and as it is."""
    torch.manual_seed(1)
    made = LocalizationNet(SMALL)
    # Heads that say something: they start near zero.
    for head in (made.position_head, made.uncertainty_head):
        torch.nn.init.normal_(head[-1].weight)
    return made.eval()


def located(net: LocalizationNet, *inputs: torch.Tensor | None) -> torch.Tensor:
    with torch.no_grad():
        return net(*inputs)


@pytest.mark.parametrize(("batch", "receivers"), [(1, 1), (2, 4), (3, 2)])
def test_any_batch_and_any_number_of_receivers_give_position_and_sigma(
    net: LocalizationNet, batch: int, receivers: int
) -> None:
    out = located(net, *scene(batch, receivers))
    assert tuple(out.shape) == (batch, 4)
    assert out.isfinite().all()


def test_one_receiver_needs_no_axis_of_receivers(net: LocalizationNet) -> None:
    spectrograms, receivers = scene(3, 1)
    plain = located(net, spectrograms[:, 0], receivers[:, 0])
    assert torch.equal(plain, located(net, spectrograms, receivers))


def test_without_places_all_receivers_are_at_the_origin(net: LocalizationNet) -> None:
    spectrograms, receivers = scene()
    assert torch.equal(located(net, spectrograms), located(net, spectrograms, torch.zeros_like(receivers)))


def test_the_order_of_receivers_does_not_matter(net: LocalizationNet) -> None:
    spectrograms, receivers = scene()
    order = torch.tensor([2, 0, 3, 1])
    shuffled = located(net, spectrograms[:, order], receivers[:, order])
    assert torch.allclose(shuffled, located(net, spectrograms, receivers), rtol=1e-4, atol=1e-2)


def test_but_what_each_receiver_heard_does(net: LocalizationNet) -> None:
    spectrograms, receivers = scene()
    exchanged = located(net, spectrograms[:, [1, 0, 2, 3]], receivers)
    assert not torch.allclose(exchanged, located(net, spectrograms, receivers), rtol=1e-4, atol=1.0)


def test_moving_the_origin_moves_the_answer_and_changes_nothing_else(net: LocalizationNet) -> None:
    spectrograms, receivers = scene()
    move = torch.tensor([700.0, -3000.0])
    moved = located(net, spectrograms, receivers + move) - torch.cat([move, torch.zeros(2)])
    assert torch.allclose(moved, located(net, spectrograms, receivers), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("training", [False, True])
def test_padding_does_not_change_the_answer(net: LocalizationNet, training: bool) -> None:
    spectrograms, receivers = scene(2, 3)
    # In training, batch normalisation looks at the batch: without padding that is these receivers alone.
    net.train(training)
    try:
        plain = located(net, spectrograms, receivers)
        mask = torch.tensor([[True, True, True, False, False]] * 2)
        padded = located(
            net,
            torch.cat([spectrograms, torch.full((2, 2, 3, 128, 32), 7.0)], dim=1),
            torch.cat([receivers, torch.full((2, 2, 2), 1e6)], dim=1),
            mask,
        )
    finally:
        net.eval()
    assert torch.allclose(padded, plain, rtol=1e-4, atol=1e-2)


@pytest.fixture(scope="module")
def timed() -> LocalizationNet:
    """A network that takes arrivals; to be left as it is."""
    torch.manual_seed(1)
    made = LocalizationNet(SMALL, arrivals=True)
    for head in (made.position_head, made.uncertainty_head):
        torch.nn.init.normal_(head[-1].weight)
    return made.eval()


def timed_scene(batch: int = 2, receivers: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    spectrograms, places = scene(batch, receivers)
    generator = torch.Generator().manual_seed(2)
    late = 1000 * torch.randn(batch, receivers, 1, generator=generator)
    sigma = 1 + 50 * torch.rand(batch, receivers, 1, generator=generator)
    return spectrograms, torch.cat([places, late, sigma], dim=-1)


def test_arrivals_matter_but_not_what_they_are_counted_from(timed: LocalizationNet) -> None:
    spectrograms, receivers = timed_scene()
    answer = located(timed, spectrograms, receivers)
    counted = located(timed, spectrograms, receivers + torch.tensor([0.0, 0.0, 800.0, 0.0]))
    assert torch.allclose(counted, answer, rtol=1e-4, atol=1e-2)
    later = receivers.clone()
    later[:, 1, 2] += 300.0
    assert not torch.allclose(located(timed, spectrograms, later), answer, rtol=1e-4, atol=1.0)
    less_sure = receivers * torch.tensor([1.0, 1.0, 1.0, 30.0])
    assert not torch.allclose(located(timed, spectrograms, less_sure), answer, rtol=1e-4, atol=1.0)


def test_arrivals_of_padding_do_not_count(timed: LocalizationNet) -> None:
    spectrograms, receivers = timed_scene()
    padded = (
        torch.cat([spectrograms, torch.zeros(2, 1, 3, 128, 32)], 1),
        torch.cat([receivers, torch.zeros(2, 1, 4)], 1),
    )
    mask = torch.tensor([[True] * 4 + [False]] * 2)
    assert torch.allclose(located(timed, *padded, mask), located(timed, spectrograms, receivers), rtol=1e-4, atol=1e-2)


def test_an_arrival_that_is_not_known_moves_no_other(timed: LocalizationNet) -> None:
    spectrograms, receivers = timed_scene()
    unknown = receivers.clone()
    unknown[:, 3, 3] = 300_000.0
    answers = []
    for late in (0.0, 3.0):
        unknown[:, 3, 2] = late
        answers.append(located(timed, spectrograms, unknown))
    # What is left is its own value; the others are still counted from where they were.
    assert torch.allclose(*answers, rtol=0.05, atol=20.0)


def heard_scene(batch: int = 64, receivers: int = 6) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Receivers around transmitters, arrivals to a metre, and where the transmitters were."""
    spectrograms, _ = scene(batch, receivers)
    generator = torch.Generator().manual_seed(3)
    angles = torch.linspace(0, 2 * torch.pi, receivers + 1)[:-1] + torch.rand(batch, 1, generator=generator)
    places = 1500 * torch.stack([angles.cos(), angles.sin()], dim=-1)
    truth = 500 * torch.randn(batch, 2, generator=generator)
    late = (truth.unsqueeze(1) - places).norm(dim=-1, keepdim=True) + torch.randn(batch, receivers, 1)
    return spectrograms, torch.cat([places, late, torch.ones(batch, receivers, 1)], dim=-1), truth


def test_an_untrained_network_locates_by_arrivals_and_knows_how_well() -> None:
    torch.manual_seed(1)
    spectrograms, receivers, truth = heard_scene()
    out = located(LocalizationNet(SMALL, arrivals=True).eval(), spectrograms, receivers)
    error = (out[:, :2] - truth) / out[:, 2:]
    assert (out[:, :2] - truth).norm(dim=1).median() < 2.0
    assert error.square().mean().sqrt() == pytest.approx(1.0, abs=0.3)


def test_arrivals_that_contradict_each_other_make_it_unsure() -> None:
    torch.manual_seed(1)
    net = LocalizationNet(SMALL, arrivals=True).eval()
    spectrograms, receivers, _ = heard_scene()
    sure = located(net, spectrograms, receivers)[:, 2:]
    receivers[:, 0, 2] += 300.0
    assert (located(net, spectrograms, receivers)[:, 2:] > 5 * sure).all()


@pytest.mark.filterwarnings("ignore:[\\s\\S]*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:[\\s\\S]*does not have many workers")
@pytest.mark.parametrize("arrivals", [False, True])
def test_one_contradiction_of_arrivals_has_a_bounded_effect_on_weights(arrivals: bool, tmp_path: Path) -> None:
    torch.manual_seed(1)
    module = LocalizationModule(SMALL, arrivals=arrivals)
    spectrograms, receivers, truth = heard_scene(4)
    batch = {
        "spectrograms": spectrograms,
        "receivers": receivers if arrivals else receivers[..., :2],
        "position": truth + 50_000,
    }
    norms = []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        weights = [each for group in optimizer.param_groups for each in group["params"]]
        norms.append(float(torch.stack([each.grad.norm() for each in weights if each.grad is not None]).norm()))

    class Looks(L.Callback):
        def on_train_start(self, trainer: L.Trainer, _: L.LightningModule) -> None:
            trainer.optimizers[0].register_step_post_hook(look)

    loader = torch.utils.data.DataLoader([batch], batch_size=None)  # type: ignore[arg-type]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    options = {"max_steps": 1, "accelerator": "cpu", "default_root_dir": tmp_path, "callbacks": [Looks()], **quiet}
    L.Trainer(**options).fit(module, loader, loader)  # type: ignore[arg-type]
    assert (norms[0] <= 1.001) is arrivals


def test_a_network_with_arrivals_takes_one_receiver_and_none_known(timed: LocalizationNet) -> None:
    spectrograms, receivers = timed_scene(3, 1)
    assert torch.equal(located(timed, spectrograms[:, 0], receivers[:, 0]), located(timed, spectrograms, receivers))
    assert located(timed, spectrograms).isfinite().all()


def test_each_sample_is_located_by_itself(net: LocalizationNet) -> None:
    spectrograms, receivers = scene(3, 4)
    mask = torch.tensor([[True] * 4, [True, False, True, False], [True, True, True, False]])
    together = located(net, spectrograms, receivers, mask)
    alone = [
        located(net, spectrograms[index : index + 1, mask[index]], receivers[index : index + 1, mask[index]])
        for index in range(3)
    ]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("drive", [-1e6, 0.0, 1e6])
def test_sigma_is_positive_and_bounded_whatever_the_head_says(net: LocalizationNet, drive: float) -> None:
    bias = net.uncertainty_head[-1].bias
    before = bias.detach().clone()
    with torch.no_grad():
        bias += drive
    try:
        sigma = located(net, *scene())[:, 2:]
    finally:
        with torch.no_grad():
            bias.copy_(before)
    low, high = SIGMA_BOUNDS_M
    assert (sigma >= low * 0.999).all()
    assert (sigma <= high * 1.001).all()


def test_a_new_network_starts_near_the_receivers_and_unsure() -> None:
    torch.manual_seed(1)
    spectrograms, receivers = scene()
    out = located(LocalizationNet(SMALL).eval(), spectrograms, receivers)
    assert (out[:, :2] - receivers.mean(1)).norm(dim=1).max() < receivers.norm(dim=-1).max()
    assert out[:, 2:] == pytest.approx(torch.full((2, 2), 500.0), rel=0.5)


def test_half_precision_in_the_backbone_costs_no_metres(net: LocalizationNet) -> None:
    spectrograms, receivers = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near, far = (located(net, spectrograms, receivers + offset) for offset in (0.0, 50_000.0))
    assert far.dtype == torch.float32
    # Of 50 km, bfloat16 itself would lose some 200 m.
    assert (far[:, :2] - 50_000 - near[:, :2]).abs().max() < 0.1


def test_half_precision_on_the_cpu_sees_no_foreign_memory() -> None:
    """Of a stage that leaves one frame: some processors' kernels read beyond the image."""
    convolution = torch.nn.Conv2d(192, 256, 3, stride=2, padding=1, bias=False)
    image = torch.randn(8, 192, 8, 2, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        exact = convolution(image)
        for _ in range(20):
            # Memory that was used is what such a kernel reads.
            left = [torch.full((4, 256, 256), float("nan"), dtype=torch.bfloat16) for _ in range(8)]
            del left
            with torch.autocast("cpu", dtype=torch.bfloat16):
                half = convolution(image)
            assert (half - exact).abs().max() < 0.05


def step(net: LocalizationNet) -> None:
    """One optimizer step."""
    net.train()
    optimizer = torch.optim.SGD([each for each in net.parameters() if each.requires_grad], lr=0.01)
    out = net(*(timed_scene(2, 2) if net.arrivals else scene(2, 2)))
    (out[:, :2] / 1000).square().mean().add(out[:, 2:].log().mean()).backward()
    optimizer.step()


def test_a_frozen_backbone_stays_as_it_is_with_its_statistics() -> None:
    net = LocalizationNet(SMALL, freeze_backbone=True)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in before)
    assert {name.split(".")[0] for name in changed} >= {"project", "position_head", "uncertainty_head"}
    assert not any(name.startswith("backbone.") for name in changed)


def test_an_unfrozen_backbone_learns_weights_and_statistics() -> None:
    net = LocalizationNet(SMALL)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    step(net)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert any(name.startswith("backbone.") and name.endswith("weight") for name in changed)
    assert any(name.startswith("backbone.") and name.endswith("running_mean") for name in changed)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", FAMILIES)
def test_every_family_takes_spectrograms_and_gives_gradients(backbone: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # On the device without memory: shapes and graph are real, numbers are not; it has no autocast to ask for.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    with torch.device("meta"):
        net = LocalizationNet(backbone)
        out = net(torch.empty(1, 2, 3, 128, 32), torch.empty(1, 2, 2))
        out.sum().backward()
    assert tuple(out.shape) == (1, 4)
    assert all(each.grad is not None for each in net.parameters())
    assert net.project[0].normalized_shape == (feature_width(net.backbone),)


@pytest.mark.parametrize("backbone", SMALLEST)
def test_the_smallest_of_every_family_trains_a_step(backbone: str) -> None:
    torch.manual_seed(1)
    net = LocalizationNet(backbone)
    before = [each.detach().clone() for each in net.parameters()]
    step(net)
    after = list(net.parameters())
    assert all(each.isfinite().all() for each in after)
    changed = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    # Residual branches that begin at zero keep the gradient from what lies within them.
    assert changed[0]
    assert sum(changed) > 0.7 * len(changed)


@pytest.mark.parametrize(
    ("name", "hint"),
    [("resnet5O", r"did you mean .*resnet50"), ("convnext-tiny", "convnext_tiny"), ("#", "list_models")],
)
def test_an_unknown_backbone_is_refused_with_names_that_are_near(name: str, hint: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"spec\.model\.backbone names '{name}'.*{hint}"):
        LocalizationNet(name)


def test_a_backbone_without_trained_weights_is_told_before_anything_is_loaded() -> None:
    with pytest.raises(
        ConfigurationError, match=r"spec\.model\.pretrained: timm has no trained weights for 'resnet200'"
    ):
        LocalizationNet("resnet200", pretrained=True)


URL = "https://hub.example/model.safetensors"
HTTP: Any = import_module(hub_errors.HTTPError.__module__.partition(".")[0])
"""The library that the hub's own asks with."""


def answer(kind: type[Exception], status: int) -> Exception:
    """An error of the hub's library about an answer."""
    return kind(f"{status} of {URL}", response=HTTP.Response(status, request=HTTP.Request("GET", URL)))  # type: ignore[call-arg]


def not_found_locally(cause: Exception) -> Exception:
    """What the hub's library says where it could not ask, and has no copy."""
    error = hub_errors.LocalEntryNotFoundError("we cannot find the requested files in the local cache")
    error.__cause__ = cause
    return error


def by_urllib(status: int) -> Exception:
    return urllib.error.HTTPError(URL, status, "", http.client.HTTPMessage(), None)


AWAY: dict[str, Callable[[], Exception]] = {
    "no connection": lambda: not_found_locally(HTTP.ConnectError("no route")),
    "no answer in time": lambda: not_found_locally(HTTP.ReadTimeout("timed out")),
    "an answer that breaks off": lambda: HTTP.RemoteProtocolError("peer closed connection"),
    "a hub that is ill": lambda: not_found_locally(answer(hub_errors.HfHubHTTPError, 503)),
    "a hub that is asked too often": lambda: answer(hub_errors.HfHubHTTPError, 429),
    "a host that is ill": lambda: by_urllib(502),
    "a host without an address": lambda: urllib.error.URLError(socket.gaierror(-3, "try again")),
    "a host that cuts it off": lambda: http.client.IncompleteRead(b""),
    "a connection that is reset": ConnectionResetError,
}
NEVER: dict[str, Callable[[], Exception]] = {
    "no such file": lambda: answer(hub_errors.RemoteEntryNotFoundError, 404),
    "no such repository": lambda: answer(hub_errors.RepositoryNotFoundError, 404),
    "no right to it": lambda: not_found_locally(answer(hub_errors.HfHubHTTPError, 403)),
    "no such URL": lambda: by_urllib(404),
    "a hub that was not to be asked": lambda: not_found_locally(hub_errors.OfflineModeIsEnabled("offline")),
    "a host that is not trusted": lambda: urllib.error.URLError(ssl.SSLCertVerificationError("self-signed")),
    "a folder that can't be written to": lambda: PermissionError(13, "Permission denied"),
}


@pytest.mark.parametrize("failure", AWAY.values(), ids=AWAY.keys())
def test_weights_whose_server_does_not_answer_may_be_had_by_another_attempt(
    failure: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise failure()

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(
        ConnectionError, match=rf"the weights of '{SMALL}' could not be .*HEIMDALL_WEIGHTS_URL"
    ) as caught:
        LocalizationNet(SMALL, pretrained=True)
    assert judge(caught.value)[:2] == (ExitCode.ERROR, Reason.UNKNOWN)


@pytest.mark.parametrize("failure", NEVER.values(), ids=NEVER.keys())
def test_weights_that_there_are_not_are_an_error_of_the_configuration(
    failure: Callable[[], Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def create(*_: Any, **__: Any) -> None:
        raise failure()

    monkeypatch.setattr(timm, "create_model", create)
    with pytest.raises(ConfigurationError, match=rf"the weights of '{SMALL}' can't be had .*HEIMDALL_WEIGHTS_URL"):
        LocalizationNet(SMALL, pretrained=True)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_trained_weights_come_from_a_file(suffix: str, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source, file = LocalizationNet(SMALL).backbone, tmp_path / f"{SMALL}.{suffix}"
    state = {name: value.contiguous() for name, value in source.state_dict().items()}
    if suffix == "pth":
        torch.save(state, file)
    else:
        save_file(state, file)
    loaded = LocalizationNet(SMALL, pretrained=True, weights=file).backbone.state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


def test_a_file_of_weights_that_is_missing_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"spec\.model\.pretrained: the weights of 'test_resnet' can't be had"):
        LocalizationNet(SMALL, pretrained=True, weights=tmp_path / "nowhere.pth")


def test_a_checkpoint_of_the_module_loads_without_fetching_weights(tmp_path: Path) -> None:
    checkpoint = {"hyper_parameters": {"backbone": SMALL, "pretrained": True, "weights": "s3://somewhere"}}
    LocalizationModule(SMALL).on_save_checkpoint(checkpoint)
    assert checkpoint["hyper_parameters"] == {"backbone": SMALL, "pretrained": False, "weights": None}


def validated(module: LocalizationModule, batches: int = 4) -> float:
    """Validate on transmissions from some kilometre off, and say what sigma is multiplied with since."""
    for seed in range(batches):
        spectrograms, receivers = scene(8, 3, seed)
        position = 3000.0 * torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
        batch = {"spectrograms": spectrograms, "receivers": receivers, "position": position}
        with torch.no_grad():
            module.validation_step(batch, 0)  # type: ignore[arg-type]
    module.on_validation_epoch_end()
    return float(module.net.sigma_scale)


@pytest.fixture
def quiet_module(monkeypatch: pytest.MonkeyPatch) -> LocalizationModule:
    """A module that logs nothing, as it has no trainer."""
    torch.manual_seed(1)
    module = LocalizationModule(SMALL).eval()
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    monkeypatch.setattr(module, "log_dict", lambda *_, **__: None)
    return module


def test_a_loss_that_is_no_number_is_seen_and_leaves_sigma_as_it_is(quiet_module: LocalizationModule) -> None:
    logged: dict[str, float] = {}
    quiet_module.log = lambda name, value, **_: logged.update({name: float(value)})  # type: ignore[method-assign]
    spectrograms, receivers = scene(8, 3, 1)
    truth = torch.zeros(8, 2)
    with torch.no_grad():
        for target in (truth, truth * torch.nan):
            batch = {"spectrograms": spectrograms, "receivers": receivers, "position": target}
            quiet_module.validation_step(batch, 0)  # type: ignore[arg-type]
        quiet_module.on_validation_epoch_end()
    assert logged["val/loss"] == math.inf, "early stopping and the choice of the best look at it"
    assert math.isfinite(quiet_module.net.sigma_scale)


@pytest.mark.parametrize("real", [8, 5, 0])
def test_what_is_repeated_for_another_process_is_not_judged(quiet_module: LocalizationModule, real: int) -> None:
    spectrograms, receivers = scene(8, 3, 1)
    batch = {"spectrograms": spectrograms, "receivers": receivers, "position": torch.zeros(8, 2)}
    with torch.no_grad():
        prediction = quiet_module(spectrograms[:real], receivers[:real]) if real else None
        quiet_module.test_step({**batch, "counted": torch.arange(8) < real}, 0)  # type: ignore[arg-type]
    expected = 0.0 if prediction is None else real * float(gaussian_nll(prediction, torch.zeros(real, 2)))
    assert float(quiet_module.test_loss.mean_value) == pytest.approx(expected, rel=1e-4)
    assert float(quiet_module.test_loss.weight) == real
    assert len(quiet_module.test_metrics.errors[0]) == real


def test_validation_makes_sigma_as_large_as_errors_are(quiet_module: LocalizationModule) -> None:
    inputs = scene()
    before = located(quiet_module.net, *inputs)
    scale = validated(quiet_module)
    assert scale > 2
    after = located(quiet_module.net, *inputs)
    assert torch.equal(after[:, :2], before[:, :2])
    assert torch.allclose(after[:, 2:], scale * before[:, 2:])


def test_validating_again_finds_the_same_scale_and_training_knows_none(quiet_module: LocalizationModule) -> None:
    first = validated(quiet_module)
    assert validated(quiet_module) == pytest.approx(first, rel=1e-4)
    net, inputs = quiet_module.net, scene()
    net.backbone.eval()
    trained = [net.train()(*inputs)]
    net.set_sigma_scale(1.0)
    trained.append(net(*inputs))
    assert torch.allclose(trained[0][:, 2:], trained[1][:, 2:], rtol=1e-3)


def test_the_scale_is_bounded_and_part_of_the_weights() -> None:
    made = LocalizationNet(SMALL)
    made.set_sigma_scale(1e9)
    assert float(made.sigma_scale) == SCALE_BOUNDS[1]
    other = LocalizationNet(SMALL)
    other.load_state_dict(made.state_dict())
    assert float(other.sigma_scale) == SCALE_BOUNDS[1]


def test_the_learning_rate_rises_to_its_peak_and_falls_as_a_cosine() -> None:
    shares = [schedule_share(each, 100) for each in range(101)]
    assert shares[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert shares[5:] == sorted(shares[5:], reverse=True)
    assert shares[52] == pytest.approx(0.505, abs=0.01)
    assert shares[-1] == pytest.approx(0.01)
    assert schedule_share(0, 1) == 1.0


def test_biases_and_normalisations_have_no_weight_decay() -> None:
    module = LocalizationModule(SMALL, weight_decay=0.1, freeze_backbone=True)
    module._trainer = type("Steps", (), {"estimated_stepping_batches": 10})()  # type: ignore[assignment]
    decayed, plain = module.configure_optimizers()["optimizer"].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert all(each.dim() > 1 for each in decayed["params"])
    assert all(each.dim() <= 1 for each in plain["params"])
    trained = sum(1 for each in module.parameters() if each.requires_grad)
    assert len(decayed["params"]) + len(plain["params"]) == trained


def test_a_checkpoint_of_the_first_release_can_be_gone_on_from() -> None:
    net = LocalizationNet(SMALLEST[0])
    state = {name: value for name, value in net.state_dict().items() if name != "sigma_scale"}

    assert net.load_state_dict(state).missing_keys == []
    assert float(net.sigma_scale) == 1
