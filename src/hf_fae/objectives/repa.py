"""REPA: a block of a denoiser is to resemble the features of a frozen encoder (arXiv 2410.06940)."""

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional as F

from ..data.feature_cache import LatentFeatures
from ..data.latent_cache import CachedLatents
from ..data.protocol import TrainingData
from ..encoders import VisionEncoder
from ..generators.denoiser import LatentDenoiser
from .base import check_not_negative
from .generator import GeneratorObjective


__all__ = ["REPA", "REPAArguments", "add_repa", "repa_loss"]

PROJECTOR_WIDTH = 2048


@dataclass
class REPAArguments:
    """The alignment of a denoiser with a frozen encoder; none by default."""

    repa_encoder: str | None = field(
        default=None, metadata={"help": "REPA with this frozen encoder (Hub id or folder), for training on images."}
    )
    repa_features: str | None = field(
        default=None,
        metadata={"help": "REPA with features of the same images, cached with an identity FAE, for cached latents."},
    )
    repa_layer: int = field(default=8, metadata={"help": "Blocks before the projector, from 1."})
    repa_weight: float = field(default=0.5, metadata={"help": "Weight of the alignment."})


def repa_loss(projected: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Minus the mean cosine over all tokens, both (B, N, C); tokens of zeros count as 0."""
    return -(F.normalize(projected.float(), dim=-1) * F.normalize(features.float(), dim=-1)).sum(dim=-1).mean()


class REPA(nn.Module):
    """A projector behind a block of a denoiser, and the distance of its tokens from an encoder's features.

    It becomes part of the objective that it is added to, and is not saved with the denoiser.

    Args:
        objective: of a denoiser; its losses get the term "repa", which is added to "loss" in training.
        feature_dim: width of the features.
        encoder: of the images "pixel_values" of a batch; None for batches with "features" (B, C, h, w).
        layer: number of blocks before the projector (REPA: 8).
        weight: of the term (REPA: 0.5).

    Raises:
        ValueError: a generator of another kind, a `layer` that it does not have, or a negative weight.
    """

    def __init__(
        self,
        objective: GeneratorObjective,
        feature_dim: int,
        encoder: VisionEncoder | None = None,
        layer: int = 8,
        weight: float = 0.5,
    ):
        super().__init__()
        check_not_negative(repa_weight=weight)
        model = objective.model
        if not isinstance(model, LatentDenoiser):
            raise ValueError(f"repa requires a denoiser, got a {type(model).__name__}")
        if not 1 <= layer <= len(model.blocks):
            raise ValueError(f"repa_layer must be from 1 to the number of blocks {len(model.blocks)}, got {layer}")
        self.encoder, self.weight = encoder, weight
        width = model.config.num_attention_heads * model.config.attention_head_dim
        self.projector = nn.Sequential(
            nn.Linear(width, PROJECTOR_WIDTH),
            nn.SiLU(),
            nn.Linear(PROJECTOR_WIDTH, PROJECTOR_WIDTH),
            nn.SiLU(),
            nn.Linear(PROJECTOR_WIDTH, feature_dim),
        )
        self._grid = self._tokens = None
        model.register_forward_pre_hook(self._note_grid, with_kwargs=True)
        model.blocks[layer - 1].register_forward_hook(self._keep_tokens)
        objective.repa = self
        objective.register_forward_hook(self._add_loss)

    def features(self, batch: dict[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
        """Features (B, rows * columns, C) of the images of a batch, on the grid of the denoiser's tokens."""
        if self.encoder is not None:
            return self.encoder(batch["pixel_values"], grid).last_hidden_state
        maps = batch["features"]
        if tuple(maps.shape[2:]) != grid:
            maps = F.interpolate(maps, grid, mode="bilinear", align_corners=False)
        return maps.flatten(2).transpose(1, 2)

    def _note_grid(self, model, args, kwargs):
        hidden_states = args[0] if args else kwargs["hidden_states"]
        self._grid = model.patch_grid(hidden_states)

    def _keep_tokens(self, block, args, output):
        if torch.is_grad_enabled():
            self._tokens = output[0] if isinstance(output, tuple) else output  # MMDiT's are followed by those of texts

    def _add_loss(self, objective, args, losses):
        if not torch.is_grad_enabled():
            return losses
        tokens, self._tokens = self._tokens, None
        count = self._grid[0] * self._grid[1]  # RAEv2's denoiser has further tokens
        projected = self.projector(tokens[:, :count].float())  # a hook is outside of autocast
        loss = repa_loss(projected, self.features(args[0], self._grid))
        return {**losses, "loss": losses["loss"] + self.weight * loss, "repa": loss}


def add_repa(
    objective: GeneratorObjective, args: REPAArguments, data: TrainingData, latents: TrainingData
) -> TrainingData:
    """Add REPA to an objective if the arguments ask for it.

    Args:
        data: what the objective is trained on.
        latents: what `data` has been made of, which shows whether they are images or cached latents.

    Returns:
        `data`, with features where latents are cached.

    Raises:
        ValueError: an encoder for cached latents, features for images, or as `REPA` and `LatentFeatures`.
    """
    is_cached = isinstance(latents, CachedLatents)
    for name, value, fits in (
        ("repa_encoder", args.repa_encoder, not is_cached),
        ("repa_features", args.repa_features, is_cached),
    ):
        if value is not None and not fits:
            kind = "cached latents: name repa_features" if is_cached else "images: name repa_encoder"
            raise ValueError(f"{name} must be None for {kind}, got {value!r}")
    options = {"layer": args.repa_layer, "weight": args.repa_weight}
    if args.repa_encoder is not None:
        encoder = VisionEncoder.from_pretrained(args.repa_encoder)
        REPA(objective, encoder.hidden_size, encoder, **options)
    elif args.repa_features is not None:
        data = LatentFeatures(data, args.repa_features, latents)
        REPA(objective, len(data.mean), **options)
    return data
