"""The network: where a transmission came from, and how sure that is, from what several receivers heard."""

from __future__ import annotations

import difflib
import hashlib
import math
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from heimdall_trainer.data.arrivals import ARRIVAL_VALUES
from heimdall_trainer.data.spectrogram import BANDS, CHANNELS, FRAMES
from heimdall_trainer.errors import ConfigurationError
from heimdall_trainer.model.hub import is_away
from heimdall_trainer.model.hyperbolas import Heard, solve

POSITION_SCALE_M: Final = 1000.0
"""Metres that are 1 inside the network."""
SIGMA_BOUNDS_M: Final = (1.0, 100_000.0)
"""Least and largest standard deviation."""
SCALE_BOUNDS: Final = (0.1, 10.0)
"""Least and largest factor that standard deviations are corrected by."""
TYPICAL_SIGMA_M: Final = 500.0
"""Standard deviation before anything is learned."""
SUGGESTIONS: Final = 5
PLACE_VALUES: Final = 2
"""East and north."""
LEVEL_VALUES: Final = 2
"""Mean and peak of a spectrogram."""
LEAST_SIGMA_M: Final = 0.1
"""Standard deviation of an arrival below which nothing more is gained, and the least of a place that is known by it."""
FIX_VALUES: Final = 7
"""What is known of how well arrivals fit: deviations with them and without, correlation, misfit, way from the guess."""
CORRECTIONS: Final = 4
"""Of a place, and of how sure it is."""
MISFIT_BY_CHANCE: Final = 30.0
"""Far more than this, and arrivals contradict each other: the place is as unsure as they are wrong."""
LARGEST_CORRECTION: Final = 8.0
"""Of the logarithm of a standard deviation: from 0.1 m on, any place that receivers can hear."""
LOADED_SHARE: Final = 0.5
"""Least share of a backbone's weights that a file must hold; position embeddings, for one, are resized."""


class LocalizationNet(nn.Module):
    """A backbone shared between receivers, attention over receivers, and heads for position and uncertainty.

    Positions are taken relative to the receivers' mean place, so moving the origin moves the answer and changes nothing
    else; the order of receivers does not matter either.
    """

    def __init__(
        self,
        backbone: str = "convnext_tiny",
        pretrained: bool = False,
        freeze_backbone: bool = False,
        *,
        weights: str | Path | None = None,
        arrivals: bool = False,
        width: int = 128,
        attention_heads: int = 4,
        layers: int = 2,
        dropout: float = 0.0,
    ) -> None:
        """Make the network.

        Args:
            backbone: Name of a model of timm.
            pretrained: Start from trained weights: the library's, or the file's.
            freeze_backbone: Leave the backbone as it is: neither weights nor running statistics change.
            weights: File with weights of the backbone (.safetensors or .pth), instead of the library's.
            arrivals: Locate by times of arrival too, which spectrograms don't hold.
            width: Features of a receiver after the backbone.
            attention_heads: Heads of each attention; a divisor of width.
            layers: Attention layers between receivers.
            dropout: Share of features that are dropped in training.

        Raises:
            ConfigurationError: The backbone is unknown, has no pretrained weights, or can't take spectrograms.
        """
        super().__init__()
        self.backbone = make_backbone(backbone, pretrained=pretrained, weights=weights)
        self.frozen = freeze_backbone
        given = feature_width(self.backbone)
        self.project = nn.Sequential(nn.LayerNorm(given), nn.Linear(given, width))
        self.arrivals = arrivals
        self.least_sigma_m = LEAST_SIGMA_M if arrivals else SIGMA_BOUNDS_M[0]
        self.receiver_values = PLACE_VALUES + (ARRIVAL_VALUES if arrivals else 0)
        """Last axis of what `forward` takes of receivers."""
        self.place = nn.Sequential(
            nn.Linear(LEVEL_VALUES + self.receiver_values, width), nn.GELU(), nn.Linear(width, width)
        )
        self.layers = nn.ModuleList(ReceiverAttention(width, attention_heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.score = nn.Linear(width, 1)
        self.position_head = _head(width, dropout)
        self.uncertainty_head = _head(width, dropout)
        low, high = (math.log(bound) for bound in SIGMA_BOUNDS_M)
        share = (math.log(TYPICAL_SIGMA_M) - low) / (high - low)
        nn.init.constant_(_last_bias(self.uncertainty_head), math.log(share / (1 - share)))
        if arrivals:
            self.correction_head = _head(width + FIX_VALUES, dropout, CORRECTIONS)
        self.sigma_scale: Tensor
        self.register_buffer("sigma_scale", torch.ones(()))
        self.register_load_state_dict_pre_hook(_add_scale)  # type: ignore[no-untyped-call]
        if freeze_backbone:
            self.backbone.requires_grad_(requires_grad=False)
            self.backbone.eval()

    def train(self, mode: bool = True) -> LocalizationNet:
        """Switch to training or evaluation; a frozen backbone stays in evaluation, its statistics too."""
        super().train(mode)
        if self.frozen:
            self.backbone.eval()
        return self

    def set_sigma_scale(self, scale: Tensor | float) -> None:
        """Have standard deviations multiplied by a number in evaluation, fitted to data that was not trained on.

        Args:
            scale: The number; kept within SCALE_BOUNDS.
        """
        self.sigma_scale.copy_(torch.as_tensor(scale).clamp(*SCALE_BOUNDS))

    def forward(self, spectrograms: Tensor, receivers: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Locate transmissions.

        Args:
            spectrograms: Shape (B, R, 3, 128, 32), or (B, 3, 128, 32) for one receiver.
            receivers: Metres east and north, shape (B, R, 2), or (B, 2) for one receiver. The origin if None. With
                arrivals, (B, R, 4) or (B, 4): also how many metres later it arrived there than at any one of the
                receivers, and the standard deviation of that in metres.
            mask: Which receivers are there, shape (B, R), bool. All if None. A sample needs at least one.

        Returns:
            Shape (B, 4): metres east and north, and their standard deviations in metres.
        """
        if spectrograms.dim() == 4:  # noqa: PLR2004 - no axis of receivers
            spectrograms = spectrograms.unsqueeze(1)
        if receivers is None:
            receivers = spectrograms.new_zeros(*spectrograms.shape[:2], self.receiver_values)
        elif receivers.dim() == 2:  # noqa: PLR2004 - no axis of receivers
            receivers = receivers.unsqueeze(1)
        features = self._features(spectrograms, mask)
        device = features.device.type
        if torch.is_autocast_enabled(device):
            # Half precision would round kilometres to several metres.
            with torch.autocast(device, enabled=False):
                return self._locate(features.float(), _levels(spectrograms).float(), receivers.float(), mask)
        return self._locate(features, _levels(spectrograms), receivers, mask)

    def _features(self, spectrograms: Tensor, mask: Tensor | None) -> Tensor:
        flat = spectrograms.flatten(0, 1)
        if mask is None or not self.training:
            return self._project(flat).reshape(*spectrograms.shape[:2], -1)
        # In training, padding would spoil the statistics of batch normalisation.
        chosen = mask.flatten().nonzero().squeeze(1)
        present = self._project(flat[chosen])
        features = present.new_zeros(flat.shape[0], present.shape[-1]).index_copy(0, chosen, present)
        return features.reshape(*spectrograms.shape[:2], -1)

    def _project(self, images: Tensor) -> Tensor:
        features: Tensor = self.project(self.backbone(images))
        return features

    def _locate(self, features: Tensor, levels: Tensor, receivers: Tensor, mask: Tensor | None) -> Tensor:
        present = torch.ones_like(features[..., :1]) if mask is None else mask.unsqueeze(-1).to(features)
        given = receivers[..., :PLACE_VALUES]
        center = (given * present).sum(1) / present.sum(1)
        places = (given - center.unsqueeze(1)) / POSITION_SCALE_M * present
        known = [places, levels]
        if self.arrivals:
            known.append(_arrivals(receivers[..., PLACE_VALUES:], present))
        bias = (1.0 - present.squeeze(-1)) * torch.finfo(features.dtype).min
        tokens = features + self.place(torch.cat(known, dim=-1))
        for layer in self.layers:
            tokens = layer(tokens, bias)
        tokens = self.norm(tokens)
        shares = torch.softmax(self.score(tokens).squeeze(-1) + bias, dim=-1).unsqueeze(-1)
        pooled = (tokens * shares).sum(1)
        # The weighted mean of the receivers' places is a good first guess; the head corrects it.
        guess = (places * shares).sum(1) + self.position_head(pooled)
        low, high = (math.log(bound) for bound in SIGMA_BOUNDS_M)
        sigma = torch.exp(low + (high - low) * torch.sigmoid(self.uncertainty_head(pooled)))
        if self.arrivals:
            late, late_sigma = _counted(receivers[..., PLACE_VALUES:], present)
            heard = Heard(places, late / POSITION_SCALE_M, late_sigma / POSITION_SCALE_M, present)
            guess, sigma = self._correct(heard, guess, sigma / POSITION_SCALE_M, pooled)
        if not self.training:
            sigma = (sigma * self.sigma_scale).clamp(self.least_sigma_m, SIGMA_BOUNDS_M[1])
        return torch.cat([center + POSITION_SCALE_M * guess, sigma], dim=-1)

    def _correct(self, heard: Heard, guess: Tensor, sigma: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
        # Join a guess with what arrivals tell, and correct the outcome in units of its own standard deviations.
        fix = solve(heard, guess, sigma)
        moved = ((fix.place - guess) / sigma).square().sum(-1, keepdim=True)
        known = [fix.deviation.log(), sigma.log(), fix.correlation, fix.misfit.log1p(), moved.log1p()]
        change = self.correction_head(torch.cat([pooled, *known], dim=-1))
        unit = fix.deviation * (1 + fix.misfit / MISFIT_BY_CHANCE).sqrt()
        factor = change[:, PLACE_VALUES:].clamp(-LARGEST_CORRECTION, LARGEST_CORRECTION).exp()
        sigma = (POSITION_SCALE_M * unit * factor).clamp(LEAST_SIGMA_M, SIGMA_BOUNDS_M[1])
        return fix.place + unit * change[:, :PLACE_VALUES], sigma


def _levels(spectrograms: Tensor) -> Tensor:
    # How loud each receiver heard it, shape (B, R, 2): a backbone that normalises would have to find it again.
    magnitude = spectrograms[:, :, 2]
    return torch.stack([magnitude.mean((-2, -1)), magnitude.amax((-2, -1))], dim=-1)


def _arrivals(arrivals: Tensor, present: Tensor) -> Tensor:
    # In units of the places, and how sure: shape (B, R, 2).
    late, sigma = _counted(arrivals, present)
    return torch.cat([late / POSITION_SCALE_M, sigma.log10()], dim=-1) * present


def _counted(arrivals: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
    # How many metres later than on average (that of sending is unknown), and how sure: shape (B, R, 1) each.
    late, sigma = arrivals[..., :1], arrivals[..., 1:].clamp(min=LEAST_SIGMA_M)
    weights = present / sigma.square()
    return late - (late * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True), sigma


class ReceiverAttention(nn.Module):
    """A transformer layer between receivers (Vaswani et al. 2017, normalised before: Xiong et al. 2020)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        """Make the layer.

        Args:
            width: Features.
            heads: Heads; a divisor of width.
            dropout: Share that is dropped in training.
        """
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.inputs = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mix = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, tokens: Tensor, bias: Tensor) -> Tensor:
        """Let receivers see each other.

        Args:
            tokens: Shape (B, R, width).
            bias: What is added to attention towards each receiver, shape (B, R): 0, or very low for padding.

        Returns:
            Shape (B, R, width).
        """
        batch, count, width = tokens.shape
        inputs = self.inputs(self.norm(tokens)).reshape(batch, count, 3, self.heads, width // self.heads)
        query, key, value = inputs.permute(2, 0, 3, 1, 4).unbind(0)
        scores = query @ key.transpose(-2, -1) / math.sqrt(width // self.heads) + bias[:, None, None, :]
        seen = (torch.softmax(scores, dim=-1) @ value).transpose(1, 2).reshape(batch, count, width)
        tokens = tokens + self.output(seen)
        return tokens + self.mix(tokens)  # type: ignore[no-any-return]


def make_backbone(name: str, *, pretrained: bool, weights: str | Path | None = None) -> nn.Module:
    """A model of timm without its classifier, for images of shape (3, 128, 32).

    Args:
        name: Its name in timm.
        pretrained: Whether it starts from trained weights.
        weights: File with them, instead of the library's.

    Raises:
        ConfigurationError: It is unknown, its weights can't be had, or it can't take such images.
        ConnectionError: The server that has its weights did not answer.
    """
    import timm

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=SUGGESTIONS, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else "see timm.list_models()"
        raise ConfigurationError(f"spec.model.backbone names {name!r}, which timm does not have: {hint}")
    options: dict[str, Any] = {"pretrained": pretrained, "in_chans": CHANNELS, "num_classes": 0}
    if pretrained and weights is not None:
        options["pretrained_cfg_overlay"] = {"file": str(weights)}
    elif pretrained and not timm.is_model_pretrained(name):
        raise ConfigurationError(f"spec.model.pretrained: timm has no trained weights for {name!r}; set it to false")
    try:
        model: nn.Module = _create(name, options)
        feature_width(model)
        if pretrained and weights is not None:
            _check_weights(model, weights)
    except Exception as error:
        if pretrained and weights is None and is_away(error):
            raise ConnectionError(
                f"spec.model.pretrained: the weights of {name!r} could not be fetched ({type(error).__name__}: {error}"
                "); where there is no Internet, let HEIMDALL_WEIGHTS_URL name a folder that has them"
            ) from error
        if isinstance(error, OSError):
            raise ConfigurationError(
                f"spec.model.pretrained: the weights of {name!r} can't be had ({type(error).__name__}: {error}); "
                "set it to false, or let HEIMDALL_WEIGHTS_URL name a folder that has them"
            ) from error
        if weights is not None and _can_be_made(name, options):
            raise ConfigurationError(
                f"spec.model.pretrained: {weights} holds no weights of {name!r} ({_first_line(error)}); put those of "
                "this backbone in its place, or set it to false"
            ) from error
        if not isinstance(error, RuntimeError | ValueError | AssertionError | TypeError):
            raise
        raise ConfigurationError(
            f"spec.model.backbone {name!r} can't be made for images of {BANDS} x {FRAMES}: {error}"
        ) from error
    return model


def _check_weights(model: nn.Module, file: str | Path) -> None:
    """Make sure that a model has a file's weights: timm leaves out what does not fit, with a warning.

    Compared by value, as timm knows many names and layouts of one weight, and resizes some.
    """
    from timm.models import load_state_dict

    held = {_digest(each) for each in load_state_dict(str(file)).values() if isinstance(each, Tensor)}
    loaded = sum(each.numel() for each in model.parameters() if _digest(each) in held)
    share = loaded / sum(each.numel() for each in model.parameters())
    if share < LOADED_SHARE:
        raise ValueError(f"only {share:.0%} of its weights are in it")


def _digest(weight: Tensor) -> bytes:
    return hashlib.sha256(weight.detach().float().contiguous().numpy().tobytes()).digest()


def _can_be_made(name: str, options: dict[str, Any]) -> bool:
    """Whether a backbone works without weights, so that it was they who did not fit."""
    try:
        feature_width(_create(name, {**options, "pretrained": False}))
    except Exception:  # noqa: BLE001 - whatever it is, it is not about weights
        return False
    return True


def _first_line(error: Exception) -> str:
    """What an error says, without the list of every tensor."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])[:200]}" if lines else type(error).__name__


def _create(name: str, options: dict[str, Any]) -> nn.Module:
    import timm

    try:
        # Families with a fixed image size (vision transformers) are told ours; others don't know the argument.
        model: nn.Module = timm.create_model(name, img_size=(BANDS, FRAMES), **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **options)
    return model


def feature_width(backbone: nn.Module) -> int:
    """How many features a backbone gives, found by running it: `num_features` is not it for some families."""
    parameter = next(backbone.parameters())
    training = backbone.training
    with torch.no_grad():
        shape = backbone.eval()(parameter.new_zeros(1, CHANNELS, BANDS, FRAMES)).shape
    backbone.train(training)
    if len(shape) != 2:  # noqa: PLR2004 - batch and features
        raise ValueError(f"it gives features of shape {tuple(shape)} instead of one vector for an image")
    return int(shape[-1])


def _head(width: int, dropout: float, values: int = 2) -> nn.Sequential:
    head = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, values))
    last = head[-1]
    nn.init.zeros_(_last_bias(head))
    assert isinstance(last, nn.Linear)  # noqa: S101 - tells the type checker
    nn.init.normal_(last.weight, std=0.01)
    return head


def _last_bias(head: nn.Sequential) -> Tensor:
    bias = head[-1].bias
    assert isinstance(bias, Tensor)  # noqa: S101 - tells the type checker
    return bias


def _add_scale(net: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Checkpoints of the first release know no `sigma_scale`: a run that began with it goes on after an upgrade."""
    state.setdefault(f"{prefix}sigma_scale", net.sigma_scale)
