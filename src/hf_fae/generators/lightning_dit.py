"""DiT, SiT and LightningDiT: one denoiser, whose config values tell them apart (SiT and LightningDiT: FAE's Table 6).

Time is diffusers': `timestep` = 1000 * t with t = 1 noise and t = 0 data, x_t = (1 - t) * x + t * eps; the model
predicts the velocity eps - x. DiT is a DDPM: its times are the whole numbers from 0 to 999, and it predicts eps and a
variance.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.nn import functional as F

from ..layers.attention import SelfAttention
from ..layers.blocks import feed_forward
from ..layers.norms import normalization
from ..layers.positions import position_table, rotary_angles, token_grid
from .class_table import ClassTableMixin
from .denoiser import DenoiserOutput, LatentDenoiser, denoiser_output, initialize_ends, xavier_linear_maps
from .prediction import check_prediction_type


__all__ = ["LightningDiTTransformer2DModel"]


class LightningDiTBlock(nn.Module):
    """Attention and feed-forward, each modulated and gated by the condition (B, 1 or N, C) (adaLN-zero)."""

    def __init__(
        self,
        dim: int,
        heads: int,
        head_dim: int,
        norm_type: str,
        ff_type: str,
        qk_norm: bool = False,
        is_causal: bool = False,
    ):
        super().__init__()
        self.norm1 = normalization(norm_type, dim, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, head_dim, qk_norm=qk_norm, is_causal=is_causal)
        self.norm2 = normalization(norm_type, dim, elementwise_affine=False)
        self.ff = feed_forward(ff_type, dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, hidden_states, condition, rotary_emb=None, cache=None):
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = self.modulation(condition).chunk(6, dim=-1)
        attended = self.attn(self.norm1(hidden_states, shift_attn, scale_attn), rotary_emb, cache)
        hidden_states = torch.addcmul(hidden_states, gate_attn, attended)
        mixed = self.ff(self.norm2(hidden_states, shift_ff, scale_ff))
        return torch.addcmul(hidden_states, gate_ff, mixed)


class LightningDiTTransformer2DModel(ClassTableMixin, LatentDenoiser):
    """Class-conditional denoiser of latents (B, in_channels, H, W).

    The defaults are LightningDiT-XL/1 on 32 channels, the 675.26 M of FAE's appendix D. SiT is
    `norm_type="layer_norm", ff_type="gelu", use_rope=False`; DiT is that with `prediction_type="epsilon"`.

    Args:
        sample_size: latent side or [height, width] of training; others are supported unless positions are learned.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        num_layers, num_attention_heads, attention_head_dim: depth and width.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        norm_type: `"rms_norm"` or `"layer_norm"`.
        ff_type: `"swiglu"`, `"gelu"` (its tanh approximation) or `"exact_gelu"` (l-DeTok's DiT and SiT).
        use_rope: 2-D rotary positions in addition to `pos_embed`.
        qk_norm: RMSNorm on queries and keys.
        prediction_type: `"velocity"`, `"sample"` for the clean latents, or `"epsilon"` for the noise followed by the
            value v of each element that sets the variance of the reverse step (arXiv 2102.09672).
        pos_embed_type: the table that is added to the tokens: `"sincos"`, fixed, of rows and columns; `"sincos_1d"`,
            fixed, of the number of a token (MAETok's SiT); `"learned"` (l-DeTok's LightningDiT).
        base_head_layer: number of blocks before a second output layer, for internal guidance (arXiv 2512.24176).
        use_meanflow: predict average velocities over an interval of times (MeanFlow, arXiv 2505.13447).

    Raises:
        ValueError: another `norm_type`, `ff_type`, `prediction_type` or `pos_embed_type`; with `use_rope` a head width
            that is no multiple of 4; a size that is no multiple of `patch_size`; a `base_head_layer` out of range;
            `use_meanflow` of a model of the noise.
    """

    _no_split_modules = ["LightningDiTBlock"]
    _repeated_blocks = ["LightningDiTBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        num_classes: int = 1000,
        norm_type: str = "rms_norm",
        ff_type: str = "swiglu",
        use_rope: bool = True,
        qk_norm: bool = False,
        prediction_type: str = "velocity",
        pos_embed_type: str = "sincos",
        base_head_layer: int | None = None,
        use_meanflow: bool = False,
    ):
        super().__init__()
        dim = num_attention_heads * attention_head_dim
        check_prediction_type(prediction_type, "epsilon")
        out_channels = in_channels * (2 if prediction_type == "epsilon" else 1)
        if use_rope and attention_head_dim % 4:
            raise ValueError(f"attention_head_dim must be a multiple of 4 for use_rope, got {attention_head_dim}")
        grid = token_grid(sample_size, patch_size)
        self.proj_in = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = position_table(pos_embed_type, dim, grid)
        self.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(256, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(dim, num_attention_heads, attention_head_dim, norm_type, ff_type, qk_norm=qk_norm)
            for _ in range(num_layers)
        )
        self.norm_out = normalization(norm_type, dim, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.proj_out = nn.Linear(dim, out_channels * patch_size**2)
        self.base_head = self.make_base_head(norm_type, dim, out_channels * patch_size**2)
        self.interval_embedding = self.make_interval_embedding()
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """As DiT: Xavier for linear maps, 0.02 for embeddings, zero for modulations and outputs."""
        xavier_linear_maps(self)
        initialize_ends(
            [self.proj_in],
            [self.class_embedding, self.time_embedding.linear_1, self.time_embedding.linear_2],
            [*(block.modulation for block in self.blocks), *self.output_maps()],
        )
        self.initialize_interval()

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
        output_base_sample: bool = False,
        timestep_r: torch.Tensor | None = None,
    ) -> DenoiserOutput | tuple:
        """Predict at x_t what `prediction_type` says: the velocity eps - x, x itself, or the noise and its variance.

        Args:
            hidden_states: noisy latents (B, in_channels, H, W); sides that are multiples of `patch_size`.
            timestep: (B,) or a scalar tensor, 1000 * t in [0, 1000]; for the noise, whole numbers below 1000.
            class_labels: (B,) long; `num_classes` is the null class.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `DenoiserOutput` instead of a tuple.
            output_base_sample: also return the prediction of the base head.
            timestep_r: with `use_meanflow`, (B,) or a scalar tensor, 1000 * r <= `timestep`: predict the average
                velocity from r to t, or the x that it leads to; None for r = t, the velocity at t.

        Returns:
            `.sample`, and maybe `.base_sample`: (B, in_channels, H, W), or twice the channels.

        Raises:
            ValueError: latents of another shape, or of another grid than the learned positions, or there is no base
                head.
        """
        grid, base_depth = self.patch_grid(hidden_states), self.base_depth(output_base_sample)

        # The sinusoids are of t in [0, 1] in SiT and LightningDiT, of DDPM's step number in DiT.
        unit = 1 if self.config.prediction_type == "epsilon" else 1000
        time = self.embed_time(timestep, timestep_r, hidden_states, unit)
        condition = F.silu(time + self.class_embedding(class_labels))[:, None]

        tokens = self.embed_patches(hidden_states, grid)
        rotary_emb = (
            rotary_angles(self.config.attention_head_dim, grid, tokens.device) if self.config.use_rope else None
        )
        base_sample = None
        for depth, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, condition, rotary_emb)
            if depth == base_depth:
                base_sample = self.predict(tokens, condition, grid, self.base_head)
        return denoiser_output(self.predict(tokens, condition, grid), base_sample, return_dict)
