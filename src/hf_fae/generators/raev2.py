"""RAEv2's denoiser (arXiv 2605.18324): time and condition are tokens in the deep part, which has no modulation.

[x_t, time, condition] -> plain blocks -> image tokens
x_t -> head blocks at least as wide as the latents, each token modulated by its own image token -> prediction of x

A base head behind an early block predicts x as well: it guides the whole model without a second pass. Time is
diffusers', as in `lightning_dit.py`.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.nn import functional as F

from ..layers.blocks import TransformerBlock
from ..layers.embeddings import RandomFourierFeatures
from ..layers.norms import RMSNorm, normalization
from ..layers.positions import rotary_angles, token_grid
from .captions import caption_mask
from .class_table import ClassTableMixin
from .denoiser import DenoiserOutput, LatentDenoiser, denoiser_output, initialize_ends, patch_tokens
from .lightning_dit import LightningDiTBlock
from .prediction import check_prediction_type


__all__ = ["RAEv2Transformer2DModel"]

TIME_FREQUENCIES = 256


class ConditionTokens(nn.Module):
    """Embeddings (B, dim) -> `count` tokens each (B, count, dim): learned ones, to which the embedding is added."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(count, dim) * dim**-0.5)

    def forward(self, embedding: torch.Tensor) -> torch.Tensor:
        return self.tokens + embedding[:, None]


class RAEv2Transformer2DModel(ClassTableMixin, LatentDenoiser):
    """Class- or text-conditional denoiser of latents (B, in_channels, H, W).

    The defaults are the published model of DINOv3-L's 1024 channels, 875,216,500 parameters.

    Args:
        sample_size: latent side or [height, width] of training; other sizes are supported.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents, in and out.
        num_layers, num_attention_heads, attention_head_dim: depth and width of the deep part.
        head_num_layers, head_num_attention_heads, head_attention_head_dim: depth and width of the head. With depth 0
            there is none: the output layer, without modulation, reads the deep part. Between equal widths there is
            no map.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance. None for
            text.
        caption_channels: width of the text embeddings, whose tokens take the place of those of the class; None for
            classes.
        max_caption_length: text tokens of training, to which pipelines pad and truncate; other lengths are supported.
        num_time_tokens, num_class_tokens: tokens of the time and of the class.
        prediction_type: `"sample"` for the clean latents, or `"velocity"`.
        base_head_layer: number of deep blocks before the base head; None for none.
        use_meanflow: predict average velocities over an interval of times (MeanFlow, arXiv 2505.13447).

    Raises:
        ValueError: a head width that is no multiple of 4, a size that is no multiple of `patch_size`, both classes and
            text or neither, another `prediction_type`, or a `base_head_layer` out of range.
    """

    _no_split_modules = ["TransformerBlock", "LightningDiTBlock"]
    _repeated_blocks = ["TransformerBlock", "LightningDiTBlock"]
    _keep_in_fp32_modules = ["time_proj"]
    _skip_layerwise_casting_patterns = ["norm", "time_proj"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 1024,
        num_layers: int = 28,
        num_attention_heads: int = 20,
        attention_head_dim: int = 72,
        head_num_layers: int = 2,
        head_num_attention_heads: int = 16,
        head_attention_head_dim: int = 128,
        num_classes: int | None = 1000,
        caption_channels: int | None = None,
        max_caption_length: int = 256,
        num_time_tokens: int = 4,
        num_class_tokens: int = 8,
        prediction_type: str = "sample",
        base_head_layer: int | None = 8,
        use_meanflow: bool = False,
    ):
        super().__init__()
        check_prediction_type(prediction_type)
        token_grid(sample_size, patch_size)
        if (num_classes is None) == (caption_channels is None):
            raise ValueError(
                f"num_classes must be None exactly with caption_channels, got {num_classes} and {caption_channels}"
            )
        for name, width in (
            ("attention_head_dim", attention_head_dim),
            ("head_attention_head_dim", head_attention_head_dim),
        ):
            if width % 4:
                raise ValueError(f"{name} must be a multiple of 4 for rotary positions, got {width}")
        dim, rows = num_attention_heads * attention_head_dim, in_channels * patch_size**2
        has_head = head_num_layers > 0
        head_dim = head_num_attention_heads * head_attention_head_dim if has_head else dim
        self.proj_in = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.time_proj = RandomFourierFeatures(TIME_FREQUENCIES, counted=True)
        self.time_embedding = TimestepEmbedding(2 * TIME_FREQUENCIES, dim)
        self.time_tokens = ConditionTokens(num_time_tokens, dim)
        if caption_channels is None:
            self.class_embedding = nn.Embedding(num_classes + 1, dim)
            self.class_tokens = ConditionTokens(num_class_tokens, dim)
        else:
            self.norm_captions = RMSNorm(caption_channels, eps=1e-6)
            self.caption_projection = nn.Linear(caption_channels, dim)
        self.blocks = nn.ModuleList(
            TransformerBlock(dim, num_attention_heads, "rms_norm", ff_multiple_of=1, qk_norm=True)
            for _ in range(num_layers)
        )
        self.head_proj_in = nn.Conv2d(in_channels, head_dim, patch_size, stride=patch_size) if has_head else None
        self.head_condition = nn.Identity() if dim == head_dim else nn.Linear(dim, head_dim)
        self.head_blocks = nn.ModuleList(
            LightningDiTBlock(
                head_dim, head_num_attention_heads, head_attention_head_dim, "rms_norm", "swiglu", qk_norm=True
            )
            for _ in range(head_num_layers)
        )
        self.norm_out = normalization("rms_norm", head_dim)
        self.modulation_out = nn.Linear(head_dim, 2 * head_dim) if has_head else None
        self.proj_out = nn.Linear(head_dim, rows)
        self.base_head = self.make_base_head("rms_norm", dim, rows, modulated=has_head)
        self.interval_embedding = self.make_interval_embedding()
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for patches, 0.02 for embeddings, zero for modulations and outputs; else torch's defaults."""
        projections = [projection for projection in (self.proj_in, self.head_proj_in) if projection is not None]
        embeddings = [self.time_embedding.linear_1, self.time_embedding.linear_2]
        if self.config.num_classes is not None:
            embeddings.append(self.class_embedding)
        zeroed = [*(block.modulation for block in self.head_blocks), *self.output_maps()]
        initialize_ends(projections, embeddings, zeroed)
        self.initialize_interval()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
        output_base_sample: bool = False,
        timestep_r: torch.Tensor | None = None,
    ) -> DenoiserOutput | tuple:
        """Predict at x_t what `prediction_type` says: x itself, or the velocity eps - x.

        Args:
            hidden_states: noisy latents (B, in_channels, H, W); sides that are multiples of `patch_size`.
            timestep: (B,) or a scalar tensor, 1000 * t in [0, 1000].
            class_labels: (B,) long; `num_classes` is the null class. Of a model of classes.
            encoder_hidden_states: text embeddings (B, length, caption_channels), finite. Of a model of texts.
            encoder_attention_mask: (B, length) bool, true for text tokens; the others have no influence. None if all
                are text.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `DenoiserOutput` instead of a tuple.
            output_base_sample: also return the prediction of the base head.
            timestep_r: as in `LightningDiTTransformer2DModel`.
            timestep_r: with `use_meanflow`, (B,) or a scalar tensor, 1000 * r <= `timestep`: predict the average
                velocity from r to t, or the x that it leads to; None for r = t, the velocity at t.

        Returns:
            `.sample`, and maybe `.base_sample`: (B, in_channels, H, W).

        Raises:
            ValueError: latents, embeddings or a mask of another shape, a condition of the other kind, or there is no
                base head.
        """
        config, latents, base_sample = self.config, hidden_states, None
        grid, base_depth = self.patch_grid(latents), self.base_depth(output_base_sample)
        count = grid[0] * grid[1]
        for name, value, kind in (
            ("class_labels", class_labels, config.num_classes),
            ("encoder_hidden_states", encoder_hidden_states, config.caption_channels),
        ):
            if (value is None) != (kind is None):
                expected = "None for a model that was not made for it" if kind is None else "given"
                raise ValueError(f"{name} must be {expected}, got {type(value).__name__}")

        time = self.embed_time(timestep, timestep_r, latents)
        mask = None
        if class_labels is not None:
            condition = self.class_tokens(self.class_embedding(class_labels))
        else:
            channels, padding = config.caption_channels, (count + config.num_time_tokens, 0)
            mask = caption_mask(latents, encoder_hidden_states, encoder_attention_mask, channels, padding)
            condition = self.caption_projection(self.norm_captions(encoder_hidden_states.to(latents.dtype)))
        tokens = torch.cat([patch_tokens(self.proj_in, latents), self.time_tokens(time), condition], dim=1)
        cos, sin = rotary_angles(config.attention_head_dim, grid, tokens.device)
        behind = (0, 0, 0, tokens.shape[1] - count)  # time and condition are not rotated
        rotary_emb = F.pad(cos, behind, value=1.0), F.pad(sin, behind)
        for depth, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, rotary_emb, None, mask)
            if depth == base_depth:
                base_sample = self._predict_base(tokens[:, :count], time, grid)
        tokens = tokens[:, :count]

        if config.head_num_layers:
            condition = F.silu(self.head_condition(F.silu(time[:, None] + tokens)))  # one for each token
            tokens = patch_tokens(self.head_proj_in, latents)
            rotary_emb = rotary_angles(config.head_attention_head_dim, grid, tokens.device)
            for block in self.head_blocks:
                tokens = self.run_block(block, tokens, condition, rotary_emb)
        return denoiser_output(self.predict(tokens, condition, grid), base_sample, return_dict)

    def _predict_base(self, tokens, time, grid):
        """Where the base head is modulated, its tokens are their own condition."""
        if self.base_head.modulation_out is not None:
            tokens = F.silu(time[:, None] + tokens)
        return self.predict(tokens, F.silu(tokens), grid, self.base_head)
