"""MMDiT: a text-conditional denoiser (arXiv 2403.03206) in the sizes of FAE's appendix D (arXiv 2512.07829).

Image tokens and text tokens are two streams. Each has its own modulation, projections and feed-forward, and both
attend to all tokens of both. Time is diffusers', as in `lightning_dit.py`, and conditions the blocks through
modulation alone: there is no pooled text embedding.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.nn import functional as F

from ..layers.blocks import feed_forward
from ..layers.norms import RMSNorm, normalization
from ..layers.positions import SinCosPositions, apply_rotary, rotary_angles, token_grid
from .captions import caption_mask
from .denoiser import DenoiserOutput, LatentDenoiser, denoiser_output, initialize_ends, xavier_linear_maps
from .prediction import check_prediction_type


__all__ = ["MMDiTTransformer2DModel"]


class JointAttentionProcessor:
    """q, k, v of both streams -> optional q/k norm -> rotary positions of the image -> attention -> two outputs."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "JointAttention", hidden_states, encoder_hidden_states, rotary_emb, attention_mask=None):
        """The tokens are concatenated as [text, image]; `attention_mask` is (B, 1, 1, tokens) bool over these."""
        if attn.fused_projections:
            image = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            image = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        if attn.add_q_proj is None:
            text = attn.add_k_proj(encoder_hidden_states), attn.add_v_proj(encoder_hidden_states)
        elif attn.fused_projections:
            text = attn.to_added_qkv(encoder_hidden_states).chunk(3, dim=-1)
        else:
            text = (proj(encoder_hidden_states) for proj in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
        query, key, value = (x.unflatten(-1, (attn.heads, attn.head_dim)) for x in image)
        *text_query, text_key, text_value = (x.unflatten(-1, (attn.heads, attn.head_dim)) for x in text)
        if attn.norm_q is not None:
            query, key = attn.norm_q(query).to(value.dtype), attn.norm_k(key).to(value.dtype)
            text_query = [attn.norm_added_q(x).to(value.dtype) for x in text_query]
            text_key = attn.norm_added_k(text_key).to(value.dtype)
        query, key = apply_rotary(query, *rotary_emb), apply_rotary(key, *rotary_emb)
        hidden_states = dispatch_attention_fn(
            torch.cat([*text_query, query], dim=1),
            torch.cat([text_key, key], dim=1),
            torch.cat([text_value, value], dim=1),
            attn_mask=attention_mask,
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        ).flatten(2)
        if attn.add_q_proj is None:
            return attn.to_out[0](hidden_states), None
        length = encoder_hidden_states.shape[1]
        return attn.to_out[0](hidden_states[:, length:]), attn.to_add_out(hidden_states[:, :length])


class JointAttention(nn.Module, AttentionModuleMixin):
    """Multi-head attention of image tokens (B, N, dim) and text tokens (B, L, dim) to all of them.

    Args:
        dim: width of both.
        heads, head_dim: their product is the inner width.
        qk_norm: RMSNorm on the queries and keys of each head.
        text_out: with `False` text tokens are keys and values only, without an output of their own.
    """

    _default_processor_cls = JointAttentionProcessor
    _available_processors = [JointAttentionProcessor]

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: bool = False, text_out: bool = True):
        super().__init__()
        self.heads, self.head_dim = heads, head_dim
        self.use_bias = self.added_proj_bias = True
        inner = heads * head_dim
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner) for _ in range(3))
        self.add_q_proj = nn.Linear(dim, inner) if text_out else None
        self.add_k_proj, self.add_v_proj = (nn.Linear(dim, inner) for _ in range(2))
        self.norm_q = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.norm_added_q = RMSNorm(head_dim, eps=1e-6) if qk_norm and text_out else None
        self.norm_added_k = RMSNorm(head_dim, eps=1e-6) if qk_norm else None
        self.to_out = nn.ModuleList([nn.Linear(inner, dim)])
        self.to_add_out = nn.Linear(inner, dim) if text_out else None
        self.set_processor(self._default_processor_cls())

    def forward(self, hidden_states, encoder_hidden_states, rotary_emb, attention_mask=None):
        return self.processor(self, hidden_states, encoder_hidden_states, rotary_emb, attention_mask)


class MMDiTBlock(nn.Module):
    """Joint attention, then a feed-forward for each stream; all modulated and gated by time (B, 1, dim) (adaLN-zero).

    With `text_out=False` (the last block) the text stream ends here: it is only attended to.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, qk_norm: bool = False, text_out: bool = True):
        super().__init__()
        self.norm1 = normalization("layer_norm", dim, elementwise_affine=False)
        self.norm1_context = normalization("layer_norm", dim, elementwise_affine=False)
        self.attn = JointAttention(dim, heads, head_dim, qk_norm, text_out)
        self.norm2 = normalization("layer_norm", dim, elementwise_affine=False)
        self.ff = feed_forward("swiglu", dim, multiple_of=256, bias=False)
        self.modulation = nn.Linear(dim, 6 * dim)
        self.modulation_context = nn.Linear(dim, (6 if text_out else 2) * dim)
        self.norm2_context = normalization("layer_norm", dim, elementwise_affine=False) if text_out else None
        self.ff_context = feed_forward("swiglu", dim, multiple_of=256, bias=False) if text_out else None

    def forward(self, hidden_states, encoder_hidden_states, condition, rotary_emb, attention_mask=None):
        shift_attn, scale_attn, *image = self.modulation(condition).chunk(6, dim=-1)
        text_shift_attn, text_scale_attn, *text = self.modulation_context(condition).split(condition.shape[-1], dim=-1)
        attended, text_attended = self.attn(
            self.norm1(hidden_states, shift_attn, scale_attn),
            self.norm1_context(encoder_hidden_states, text_shift_attn, text_scale_attn),
            rotary_emb,
            attention_mask,
        )
        hidden_states = _update(hidden_states, attended, self.norm2, self.ff, *image)
        if self.ff_context is None:
            return hidden_states, None
        return hidden_states, _update(encoder_hidden_states, text_attended, self.norm2_context, self.ff_context, *text)


def _update(hidden_states, attended, norm, ff, gate_attn, shift_ff, scale_ff, gate_ff):
    hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
    return torch.addcmul(hidden_states, gate_ff, ff(norm(hidden_states, shift_ff, scale_ff)))


class MMDiTTransformer2DModel(LatentDenoiser):
    """Text-conditional denoiser of latents (B, in_channels, H, W).

    The defaults are FAE's text-to-image model on 32 channels and Flan-T5-XL: 603.59 M, of which the paper counts
    603.46 M. Its architecture is not published; this one is closest to both of the paper's sizes for that text encoder
    (see docs/models/mmdit.md).

    Args:
        sample_size: latent side or [height, width] of training; other sizes are supported.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        num_layers, num_attention_heads, attention_head_dim: depth and width.
        caption_channels: width of the text embeddings.
        max_caption_length: text tokens of training, to which pipelines pad and truncate; other lengths are supported.
        qk_norm: RMSNorm on queries and keys.
        prediction_type: `"velocity"`, or `"sample"` for the clean latents.
        base_head_layer: number of blocks before a second output layer, for internal guidance (arXiv 2512.24176).
        use_meanflow: predict average velocities over an interval of times (MeanFlow, arXiv 2505.13447).

    Raises:
        ValueError: a head width that is no multiple of 4, a number below 1, a size that is no multiple of
            `patch_size`, another `prediction_type`, or a `base_head_layer` out of range.
    """

    _no_split_modules = ["MMDiTBlock"]
    _repeated_blocks = ["MMDiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: int = 16,
        num_attention_heads: int = 16,
        attention_head_dim: int = 64,
        caption_channels: int = 2048,
        max_caption_length: int = 128,
        qk_norm: bool = False,
        prediction_type: str = "velocity",
        base_head_layer: int | None = None,
        use_meanflow: bool = False,
    ):
        super().__init__()
        check_prediction_type(prediction_type)
        if attention_head_dim % 4:
            raise ValueError(f"attention_head_dim must be a multiple of 4, got {attention_head_dim}")
        for name, number in (
            ("num_layers", num_layers),
            ("caption_channels", caption_channels),
            ("max_caption_length", max_caption_length),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        dim = num_attention_heads * attention_head_dim
        self.proj_in = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = SinCosPositions(dim, token_grid(sample_size, patch_size))
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.caption_projection = nn.Linear(caption_channels, dim)
        self.blocks = nn.ModuleList(
            MMDiTBlock(dim, num_attention_heads, attention_head_dim, qk_norm, text_out=index < num_layers - 1)
            for index in range(num_layers)
        )
        self.norm_out = normalization("layer_norm", dim, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, in_channels * patch_size**2)
        self.base_head = self.make_base_head("layer_norm", dim, in_channels * patch_size**2)
        self.interval_embedding = self.make_interval_embedding()
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As DiT: Xavier for linear maps, 0.02 for embeddings, zero for modulations and outputs."""
        xavier_linear_maps(self)
        modulations = [layer for block in self.blocks for layer in (block.modulation, block.modulation_context)]
        initialize_ends(
            [self.proj_in],
            [self.time_embedding.linear_1, self.time_embedding.linear_2],
            [*modulations, *self.output_maps()],
        )
        self.initialize_interval()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        encoder_attention_mask: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
        output_base_sample: bool = False,
        timestep_r: torch.Tensor | None = None,
    ) -> DenoiserOutput | tuple:
        """Predict at x_t what `prediction_type` says: the velocity eps - x, or x itself.

        Args:
            hidden_states: noisy latents (B, in_channels, H, W); sides that are multiples of `patch_size`.
            timestep: (B,) or a scalar tensor, 1000 * t in [0, 1000].
            encoder_hidden_states: text embeddings (B, length, caption_channels), finite.
            encoder_attention_mask: (B, length) bool, true for text tokens; the others have no influence. None if all
                are text.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `DenoiserOutput` instead of a tuple.
            output_base_sample: also return the prediction of the base head.
            timestep_r: with `use_meanflow`, (B,) or a scalar tensor, 1000 * r <= `timestep`: predict the average
                velocity from r to t, or the x that it leads to; None for r = t, the velocity at t.

        Returns:
            `.sample`, and maybe `.base_sample`: (B, in_channels, H, W).

        Raises:
            ValueError: latents, embeddings or a mask of another shape, a mask that is not bool, or there is no base
                head.
        """
        grid, base_depth, base_sample = self.patch_grid(hidden_states), self.base_depth(output_base_sample), None
        channels, padding = self.config.caption_channels, (0, grid[0] * grid[1])  # [text, image]
        mask = caption_mask(hidden_states, encoder_hidden_states, encoder_attention_mask, channels, padding)
        condition = F.silu(self.embed_time(timestep, timestep_r, hidden_states))[:, None]
        text = self.caption_projection(encoder_hidden_states.to(hidden_states.dtype))
        tokens = self.embed_patches(hidden_states, grid)
        rotary_emb = rotary_angles(self.config.attention_head_dim, grid, tokens.device)
        shared = condition, rotary_emb, mask
        for depth, block in enumerate(self.blocks, start=1):
            tokens, text = self.run_block(block, tokens, text, *shared)
            if depth == base_depth:
                base_sample = self.predict(tokens, condition, grid, self.base_head)
        return denoiser_output(self.predict(tokens, condition, grid), base_sample, return_dict)
