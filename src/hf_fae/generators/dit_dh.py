"""DiT^DH (RAE, arXiv 2510.11690): a denoiser of wide latents, whose deep backbone conditions a wide and shallow head.

x_t -> backbone blocks, conditioned on time and class -> tokens
x_t -> head blocks at least as wide as the latents, each token conditioned on its own backbone token -> velocity

A network narrower than its tokens cannot denoise them (section 4 of the paper): the head is wide so that the backbone
need not be. Time is diffusers', as in `lightning_dit.py`.
"""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding
from diffusers.utils import apply_lora_scale
from torch import nn
from torch.nn import functional as F

from ..layers.embeddings import RandomFourierFeatures
from ..layers.norms import normalization
from ..layers.positions import SinCosPositions, rotary_angles, token_grid
from .class_table import ClassTableMixin
from .denoiser import DenoiserOutput, LatentDenoiser, denoiser_output, initialize_ends, patch_tokens
from .lightning_dit import LightningDiTBlock
from .prediction import check_prediction_type


__all__ = ["DiTDHTransformer2DModel"]

TIME_FREQUENCIES = 256  # a sine and a cosine each: the 512 features behind the published parameter counts


class DiTDHTransformer2DModel(ClassTableMixin, LatentDenoiser):
    """Class-conditional denoiser of latents (B, in_channels, H, W).

    The defaults are DiT^DH-XL on DINOv2-B's 768 channels, the paper's 839 M (838.38 M counted).

    Args:
        sample_size: latent side or [height, width] of training; other sizes are supported.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents, in and out.
        num_layers, num_attention_heads, attention_head_dim: depth and width of the backbone.
        head_num_layers, head_num_attention_heads, head_attention_head_dim: depth and width of the head. The map
            between the two widths is the identity where they are equal.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        qk_norm: RMSNorm on queries and keys.
        prediction_type: `"velocity"`, or `"sample"` for the clean latents.
        base_head_layer: number of blocks of the backbone before a second output layer, for internal guidance.
        use_meanflow: predict average velocities over an interval of times (MeanFlow, arXiv 2505.13447).

    Raises:
        ValueError: a head width that is no multiple of 4, a size that is no multiple of `patch_size`, another
            `prediction_type`, or a `base_head_layer` out of range.
    """

    _no_split_modules = ["LightningDiTBlock"]
    _repeated_blocks = ["LightningDiTBlock"]
    _keep_in_fp32_modules = ["time_proj"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "time_proj"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 768,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        head_num_layers: int = 2,
        head_num_attention_heads: int = 16,
        head_attention_head_dim: int = 128,
        num_classes: int = 1000,
        qk_norm: bool = False,
        prediction_type: str = "velocity",
        base_head_layer: int | None = None,
        use_meanflow: bool = False,
    ):
        super().__init__()
        check_prediction_type(prediction_type)
        for name, width in (
            ("attention_head_dim", attention_head_dim),
            ("head_attention_head_dim", head_attention_head_dim),
        ):
            if width % 4:
                raise ValueError(f"{name} must be a multiple of 4 for rotary positions, got {width}")
        dim, head_dim = (
            num_attention_heads * attention_head_dim,
            head_num_attention_heads * head_attention_head_dim,
        )
        grid = token_grid(sample_size, patch_size)
        self.proj_in = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = SinCosPositions(dim, grid, counted=False)
        self.time_proj = RandomFourierFeatures(TIME_FREQUENCIES)
        self.time_embedding = TimestepEmbedding(2 * TIME_FREQUENCIES, dim)
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(dim, num_attention_heads, attention_head_dim, "rms_norm", "swiglu", qk_norm=qk_norm)
            for _ in range(num_layers)
        )
        self.head_proj_in = nn.Conv2d(in_channels, head_dim, kernel_size=patch_size, stride=patch_size)
        self.head_condition = nn.Identity() if dim == head_dim else nn.Linear(dim, head_dim)
        self.head_blocks = nn.ModuleList(
            LightningDiTBlock(
                head_dim, head_num_attention_heads, head_attention_head_dim, "rms_norm", "swiglu", qk_norm=qk_norm
            )
            for _ in range(head_num_layers)
        )
        self.norm_out = normalization("rms_norm", head_dim)
        self.modulation_out = nn.Linear(head_dim, 2 * head_dim)
        self.proj_out = nn.Linear(head_dim, in_channels * patch_size**2)
        self.base_head = self.make_base_head("rms_norm", dim, in_channels * patch_size**2)
        self.interval_embedding = self.make_interval_embedding()
        self.gradient_checkpointing = False
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """Xavier for patches, 0.02 for embeddings, zero for modulations and outputs; else torch's defaults."""
        blocks = (*self.blocks, *self.head_blocks)
        initialize_ends(
            [self.proj_in, self.head_proj_in],
            [self.class_embedding, self.time_embedding.linear_1, self.time_embedding.linear_2],
            [*(block.modulation for block in blocks), *self.output_maps()],
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
        """Predict the velocity eps - x or x at x_t; arguments, result and errors as in
        `LightningDiTTransformer2DModel`."""
        config, latents = self.config, hidden_states
        grid, base_depth, base_sample = self.patch_grid(latents), self.base_depth(output_base_sample), None
        time = self.embed_time(timestep, timestep_r, latents)
        # As in RAE's code, a SiLU makes each condition, and another one stands before the modulations.
        condition = F.silu(F.silu(time + self.class_embedding(class_labels)))[:, None]

        tokens = self.embed_patches(latents, grid)
        rotary_emb = rotary_angles(config.attention_head_dim, grid, tokens.device)
        for depth, block in enumerate(self.blocks, start=1):
            tokens = self.run_block(block, tokens, condition, rotary_emb)
            if depth == base_depth:
                base_sample = self.predict(tokens, condition, grid, self.base_head)

        condition = F.silu(self.head_condition(F.silu(time[:, None] + tokens)))  # one for each token
        tokens = patch_tokens(self.head_proj_in, latents)
        rotary_emb = rotary_angles(config.head_attention_head_dim, grid, tokens.device)
        for block in self.head_blocks:
            tokens = self.run_block(block, tokens, condition, rotary_emb)
        return denoiser_output(self.predict(tokens, condition, grid), base_sample, return_dict)
