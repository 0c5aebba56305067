"""LocalizationNet: what several receivers heard becomes a position and how sure it is."""

from __future__ import annotations

import difflib
from typing import Any, Final

import torch
from torch import nn

from heimdall_trainer.data.spectrogram import BANDS, CHANNELS, FRAMES
from heimdall_trainer.errors import ConfigurationError

SCALE_M: Final = 1000.0
"""Metres that the network counts as 1."""
SIGMA_MIN_M: Final = 1.0
SIGMA_MAX_M: Final = 10_000.0
WIDTH: Final = 128


class LocalizationNet(nn.Module):
    """A backbone shared between receivers, attention over them, a position head and an uncertainty head.

    The position is a mean of the receivers' positions, weighted by attention, plus a learned correction: so it moves
    with its receivers, however many there are.
    """

    def __init__(
        self, backbone: str = "convnext_tiny", *, pretrained: bool = False, freeze_backbone: bool = False
    ) -> None:
        """Build the network.

        Args:
            backbone: Name of a timm model.
            pretrained: Start from timm's pretrained weights.
            freeze_backbone: Train the heads alone.

        Raises:
            ConfigurationError: There is no such backbone, or its weights can't be had.
        """
        super().__init__()
        self.backbone = create_backbone(backbone, pretrained=pretrained)
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            self.backbone.requires_grad_(requires_grad=False)
        self.features = nn.LazyLinear(WIDTH)
        self.place = nn.Sequential(nn.Linear(4, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True)
        self.mix = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.attention = nn.Linear(WIDTH, 1)
        self.position_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.uncertainty_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.eval()
        with torch.no_grad():
            # The backbone's width is read off what it gives, never off a table.
            self.features(self.backbone(torch.zeros(1, CHANNELS, BANDS, FRAMES)))
        self.train()

    def train(self, mode: bool = True) -> LocalizationNet:
        """As torch's; a frozen backbone keeps evaluating, so that its batch statistics stay."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    def forward(
        self, spectrograms: torch.Tensor, receivers: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Locate transmissions.

        Args:
            spectrograms: Shape (B, R, 3, 128, 32), or (B, 3, 128, 32) for one receiver at the origin.
            receivers: Positions of the receivers in metres, shape (B, R, 2).
            mask: True where a receiver is, shape (B, R); all of them by default.

        Returns:
            Shape (B, 4): position east and north in metres, and its two standard deviations in metres.
        """
        if spectrograms.dim() == 4:  # noqa: PLR2004 - one receiver
            spectrograms = spectrograms.unsqueeze(1)
        count, heard = spectrograms.shape[:2]
        if receivers is None:
            receivers = spectrograms.new_zeros(count, heard, 2)
        if mask is None:
            mask = torch.ones(count, heard, dtype=torch.bool, device=spectrograms.device)
        places = receivers / SCALE_M
        features = self.features(self.backbone(spectrograms.flatten(0, 1))).unflatten(0, (count, heard))
        # How loud each receiver heard it, given as such: a backbone that normalises would have to find it again.
        level = spectrograms[:, :, 2].mean(dim=(-1, -2))
        about = torch.cat([places, level.unsqueeze(-1), spectrograms[:, :, 2].amax(dim=(-1, -2)).unsqueeze(-1)], dim=-1)
        mixed = self.mix(features + self.place(about), src_key_padding_mask=~mask)
        weights = self.attention(mixed).squeeze(-1).masked_fill(~mask, float("-inf")).softmax(dim=-1)
        pooled = (weights.unsqueeze(-1) * mixed).sum(dim=1)
        position = (weights.unsqueeze(-1) * places).sum(dim=1) + self.position_head(pooled)
        sigma = SIGMA_MIN_M + nn.functional.softplus(self.uncertainty_head(pooled) + 0.5) * SCALE_M
        return torch.cat([position * SCALE_M, sigma.clamp_max(SIGMA_MAX_M)], dim=-1)


def create_backbone(name: str, *, pretrained: bool) -> nn.Module:
    """A timm model without its classifier.

    Raises:
        ConfigurationError: There is no such model, or its weights can't be had.
    """
    import timm

    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() names those there are."
        raise ConfigurationError(f"spec.model.backbone {name!r} is no model of timm {timm.__version__}; {hint}")
    options: dict[str, Any] = {"pretrained": pretrained, "num_classes": 0, "in_chans": CHANNELS}
    try:
        return _create(timm, name, options)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ConfigurationError(
            f"the pretrained weights of {name} can't be had ({error}): set spec.model.pretrained to false, or let the "
            "pod reach the library's weights"
        ) from error


def _create(timm: Any, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        # Families with a fixed input size (ViT, Swin …) are told ours; the others don't know the option.
        model: nn.Module = timm.create_model(name, img_size=(BANDS, FRAMES), **options)
    except TypeError:
        model = timm.create_model(name, **options)
    return model
