"""What all denoisers share: latents to tokens, tokens to predictions, and initial weights."""

from dataclasses import dataclass

import torch
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F

from ..layers.norms import normalization
from ..modeling import StrictModelMixin
from .prediction import check_prediction_type


__all__ = [
    "BaseHead",
    "DenoiserOutput",
    "LatentDenoiser",
    "denoiser_output",
    "initialize_ends",
    "patch_tokens",
    "xavier_linear_maps",
]


@dataclass
class DenoiserOutput(BaseOutput):
    """The prediction (B, channels, H, W) of a denoiser and, on request, that of its base head; None without."""

    sample: torch.Tensor | None = None
    base_sample: torch.Tensor | None = None


class BaseHead(nn.Module):
    """An output layer behind an earlier block, for internal guidance (arXiv 2512.24176; RAEv2, arXiv 2605.18324).

    It has the parts of the output layer of a model, which `LatentDenoiser.predict` applies.

    Args:
        norm_type: as in `normalization`.
        dim: width of the tokens.
        rows: numbers of a patch.
        modulated: whether the condition shifts and scales the tokens.
    """

    def __init__(self, norm_type: str, dim: int, rows: int, modulated: bool = True):
        super().__init__()
        self.norm_out = normalization(norm_type, dim, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim) if modulated else None
        self.proj_out = nn.Linear(dim, rows)


class LatentDenoiser(StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """Base of denoisers of latents (B, in_channels, H, W) with `config.patch_size`.

    They have `proj_in`, `time_proj`, `time_embedding`, maybe `pos_embed`, `norm_out`, `modulation_out` and `proj_out`,
    with `config.base_head_layer` a `base_head` behind that many of their `blocks`, and with `config.use_meanflow` an
    `interval_embedding`: they then predict average velocities (MeanFlow, arXiv 2505.13447).
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["pos_embed", "norm"]

    def patch_grid(self, hidden_states: torch.Tensor) -> tuple[int, int]:
        """Rows and columns of the patches of latents.

        Raises:
            ValueError: latents of another shape.
        """
        in_channels, patch_size = self.config.in_channels, self.config.patch_size
        if hidden_states.ndim != 4 or hidden_states.shape[1] != in_channels:
            raise ValueError(
                f"hidden_states must have shape (batch, {in_channels}, height, width), "
                f"got {tuple(hidden_states.shape)}"
            )
        height, width = hidden_states.shape[2:]
        if height % patch_size or width % patch_size or height * width == 0:
            raise ValueError(f"hidden_states must have sides that are multiples of {patch_size}, got {height}x{width}")
        return height // patch_size, width // patch_size

    def embed_patches(self, hidden_states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Tokens (B, rows * columns, dim) of latents, with their positions added."""
        tokens = patch_tokens(self.proj_in, hidden_states)
        return tokens + self.pos_embed(grid, tokens.device).to(tokens.dtype)

    def make_interval_embedding(self) -> TimestepEmbedding | None:
        """The embedding of t - r, as that of t; None without `use_meanflow`.

        Raises:
            ValueError: the model predicts no velocities, or has a base head, for which there is no average.
        """
        if not self.config.use_meanflow:
            return None
        check_prediction_type(self.config.prediction_type)
        if self.config.base_head_layer is not None:
            raise ValueError(f"base_head_layer must be None with use_meanflow, got {self.config.base_head_layer}")
        linear = self.time_embedding.linear_1
        return TimestepEmbedding(linear.in_features, linear.out_features)

    def initialize_interval(self) -> None:
        """At first t - r has no influence: the average velocity is that at t."""
        if self.interval_embedding is not None:
            nn.init.normal_(self.interval_embedding.linear_1.weight, std=0.02)
            nn.init.zeros_(self.interval_embedding.linear_2.weight)
            for linear in (self.interval_embedding.linear_1, self.interval_embedding.linear_2):
                nn.init.zeros_(linear.bias)

    def enable_meanflow(self) -> None:
        """Make a trained model of velocities one of average velocities, which are the same until it is trained again.

        A base head is dropped.

        Raises:
            ValueError: the model predicts no velocities.
        """
        if self.config.use_meanflow:
            return
        check_prediction_type(self.config.prediction_type)
        self.register_to_config(use_meanflow=True, base_head_layer=None)
        self.base_head = None
        self.interval_embedding = self.make_interval_embedding().to(self.device, self.dtype)
        self.initialize_interval()

    def embed_time(
        self, timestep: torch.Tensor, timestep_r: torch.Tensor | None, hidden_states: torch.Tensor, unit: int = 1000
    ) -> torch.Tensor:
        """The embedding (B, dim) of the noise time and, with `use_meanflow`, of the length of the interval.

        Args:
            timestep, timestep_r: as in `forward`.
            hidden_states: what determines B and the dtype.
            unit: of `timestep`; the features are those of `timestep / unit`, in fp32.

        Raises:
            ValueError: a `timestep_r` without `use_meanflow`.
        """
        if timestep_r is not None and self.interval_embedding is None:
            raise ValueError("timestep_r must be None for a model without use_meanflow, got a tensor")
        count, dtype = len(hidden_states), hidden_states.dtype
        time = self.time_embedding(self.time_proj(timestep.expand(count) / unit).to(dtype))
        if self.interval_embedding is None:
            return time
        interval = (timestep - (timestep if timestep_r is None else timestep_r)).expand(count) / unit
        return time + self.interval_embedding(self.time_proj(interval).to(dtype))

    def make_base_head(self, norm_type: str, dim: int, rows: int, modulated: bool = True) -> BaseHead | None:
        """The base head of the config, None without `base_head_layer`; arguments as of `BaseHead`.

        Raises:
            ValueError: a `base_head_layer` that is no number of a block.
        """
        layer, count = self.config.base_head_layer, self.config.num_layers
        if layer is not None and not 1 <= layer <= count:
            raise ValueError(f"base_head_layer must be None or from 1 to num_layers {count}, got {layer}")
        return None if layer is None else BaseHead(norm_type, dim, rows, modulated)

    def output_maps(self) -> list[nn.Linear]:
        """The linear maps of all output layers, which start at zero."""
        heads = [self] if self.base_head is None else [self, self.base_head]
        return [part for head in heads for part in (head.modulation_out, head.proj_out) if part is not None]

    def base_depth(self, output_base_sample: bool) -> int | None:
        """The number of blocks before the base head, None if it is not asked for.

        Raises:
            ValueError: it is, and there is none.
        """
        if output_base_sample and self.base_head is None:
            raise ValueError("output_base_sample must be False for a model without base_head_layer, got True")
        return self.config.base_head_layer if output_base_sample else None

    def predict(
        self,
        tokens: torch.Tensor,
        condition: torch.Tensor | None,
        grid: tuple[int, int],
        head: BaseHead | None = None,
    ) -> torch.Tensor:
        """The prediction (B, channels, H, W) of tokens (B, rows * columns, dim), modulated by a condition of shape
        (B, 1 or tokens, dim); by the output layer of the model, or by another head."""
        head = self if head is None else head
        modulation = () if head.modulation_out is None else head.modulation_out(condition).chunk(2, dim=-1)
        patches = head.proj_out(head.norm_out(tokens, *modulation))
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, grid), self.config.patch_size)

    def run_block(self, block: nn.Module, *inputs):
        """`block(*inputs)`, without storing its activations under gradient checkpointing."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            return self._gradient_checkpointing_func(block, *inputs)
        return block(*inputs)


def patch_tokens(projection: nn.Conv2d, hidden_states: torch.Tensor) -> torch.Tensor:
    """Tokens (B, rows * columns, dim) of latents (B, C, H, W), by a convolution."""
    # Element-wise results inherit the layout: without this copy every layer would compute on channel-major tokens.
    return projection(hidden_states).flatten(2).transpose(1, 2).contiguous()


def xavier_linear_maps(model: nn.Module) -> None:
    """Xavier for all linear maps of `model`, with biases of zero."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def initialize_ends(patch_projections: list[nn.Conv2d], embeddings: list[nn.Module], zeroed: list[nn.Linear]) -> None:
    """As DiT: Xavier for the projections of patches, 0.02 for embeddings, zero for modulations and outputs."""
    for projection in patch_projections:
        nn.init.xavier_uniform_(projection.weight.view(projection.weight.shape[0], -1))
        nn.init.zeros_(projection.bias)
    for embedding in embeddings:
        nn.init.normal_(embedding.weight, std=0.02)
    for module in zeroed:
        nn.init.zeros_(module.weight)
        nn.init.zeros_(module.bias)


def denoiser_output(
    sample: torch.Tensor, base_sample: torch.Tensor | None, return_dict: bool
) -> DenoiserOutput | tuple[torch.Tensor, ...]:
    """Both predictions as a `DenoiserOutput`, or as a tuple of those that there are."""
    if return_dict:
        return DenoiserOutput(sample=sample, base_sample=base_sample)
    return (sample,) if base_sample is None else (sample, base_sample)
