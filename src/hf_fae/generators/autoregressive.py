"""RasterAR and RandomAR of l-DeTok (arXiv 2507.15856): causal transformers that generate one token after another.

The input at each step is the previous token in the order (a start token at first) with the embeddings of its own
position and of the next one; so one model can follow any order. The class and the number of the step modulate every
block (adaLN-zero). The diffusion head samples the next token from the output.
"""

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn
from torch.nn import functional as F

from ..layers.kv_cache import KVCache
from ..layers.norms import normalization
from .lightning_dit import LightningDiTBlock
from .token_generator import TokenGenerator, gather_tokens


__all__ = ["AutoregressiveTransformer2DModel"]


class AutoregressiveTransformer2DModel(TokenGenerator):
    """Causal model of latents (B, in_channels, H, W), token by token.

    The defaults are the base size with the head of l-DeTok's 100-epoch runs, 150.1 M parameters.

    Args:
        sample_size: latent side or [height, width].
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        num_layers, num_attention_heads, attention_head_dim: depth and width.
        head_num_layers, head_hidden_size: of the `DiffusionHead`.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        order: `"raster"`, row by row (RasterAR), or `"random"`, a permutation for each image (RandomAR).

    Raises:
        ValueError: another `order`.
    """

    _no_split_modules = ["LightningDiTBlock", "DiffusionHeadBlock"]
    _repeated_blocks = ["LightningDiTBlock", "DiffusionHeadBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 16,
        num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        head_num_layers: int = 3,
        head_hidden_size: int = 1024,
        num_classes: int = 1000,
        order: str = "raster",
    ):
        super().__init__()
        if order not in ("raster", "random"):
            raise ValueError(f"order must be 'raster' or 'random', got {order!r}")
        dim = num_attention_heads * attention_head_dim
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.step_embedding = nn.Embedding(self.num_tokens, dim)
        self.start_token = nn.Embedding(1, dim)
        self.proj_in = nn.Linear(self.token_dim, dim)
        self.position = nn.Embedding(self.num_tokens, dim)
        self.next_position = nn.Embedding(self.num_tokens, dim)
        self.norm_in = normalization("layer_norm", dim)
        self.blocks = nn.ModuleList(
            LightningDiTBlock(
                dim,
                num_attention_heads,
                attention_head_dim,
                norm_type="layer_norm",
                ff_type="exact_gelu",
                is_causal=True,
            )
            for _ in range(num_layers)
        )
        self.norm_out = normalization("layer_norm", dim, elementwise_affine=False)
        self.modulation_out = nn.Linear(dim, 2 * dim)
        self.init_tokens(dim, head_hidden_size, head_num_layers)
        self.initialize_tokens()
        for zeroed in (*(block.modulation for block in self.blocks), self.modulation_out):
            nn.init.zeros_(zeroed.weight)

    def sample_order(self, scores: torch.Tensor) -> torch.Tensor:
        """As in the base; in raster order it is the same for all images, whatever the numbers."""
        if self.config.order == "random":
            return super().sample_order(scores)
        return torch.arange(self.num_tokens, device=scores.device).expand(len(scores), -1)

    def tokens_per_step(self, count: int, num_steps: int | None = None) -> list[int]:
        """One token a step.

        Raises:
            ValueError: `num_steps` is not None.
        """
        if num_steps is not None:
            raise ValueError(
                f"num_inference_steps must be None for {type(self).__name__}, which generates one token a step, "
                f"got {num_steps}"
            )
        return [1] * count

    def make_cache(self, batch_size: int, device: torch.device) -> KVCache:
        """An empty cache of keys and values."""
        return KVCache(
            num_layers=len(self.blocks),
            batch_size=batch_size,
            places=self.num_tokens,
            heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            device=device,
            dtype=self.dtype,
            # Whether `compile_repeated_blocks` has compiled them.
            static=any(block._compiled_call_impl is not None for block in self.blocks),
        )

    def predict_conditions(self, tokens, order, known, count, class_labels, cache=None):
        """As in the base. A condition depends on all tokens before its own in the order, known or not."""
        first, end = 0 if cache is None else cache.length, known + count
        classes = self.class_embedding(class_labels)[:, None]
        before = order[:, max(first - 1, 0) : end - 1]
        hidden_states = self.proj_in(gather_tokens(tokens, before).to(classes.dtype)) + self.position(before)
        if first == 0:
            start = self.start_token(torch.zeros_like(order[:, :1]))
            hidden_states = torch.cat([start, hidden_states], dim=1)
        hidden_states = self.norm_in(hidden_states + self.next_position(order[:, first:end]))
        condition = F.silu(classes + self.step_embedding(torch.arange(first, end, device=order.device)))
        caches = [None] * len(self.blocks) if cache is None else cache.extend(end - first)
        for block, layer_cache in zip(self.blocks, caches, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states, condition)
            else:
                hidden_states = block(hidden_states, condition, cache=layer_cache)
        # The last modulation depends on the class alone, as in the reference code.
        shift, scale = self.modulation_out(F.silu(classes)).chunk(2, dim=-1)
        return self.norm_out(hidden_states[:, -count:], shift, scale)
