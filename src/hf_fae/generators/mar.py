"""MAR (arXiv 2406.11838): masked autoregression, in random order and many tokens at a time.

class and known tokens -> encoder; its output and mask tokens for the unknown ones -> decoder -> conditions, on each of
which the diffusion head samples a token.

Encoder and decoder are those of a masked autoencoder: bidirectional.
"""

import math

import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from ..layers.blocks import TransformerBlock
from ..layers.norms import normalization
from .token_generator import TokenGenerator, gather_tokens, scatter_tokens


__all__ = ["MARTransformer2DModel"]


class MARTransformer2DModel(TokenGenerator):
    """Masked autoregressive model of latents (B, in_channels, H, W).

    The defaults are MAR-B with the head of l-DeTok's 800-epoch runs (arXiv 2507.15856), 207.9 M parameters.

    Args:
        sample_size: latent side or [height, width].
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        encoder_num_layers, decoder_num_layers, num_attention_heads, attention_head_dim: depth and width.
        num_buffer_tokens: number of copies of the class embedding before the image tokens.
        head_num_layers, head_hidden_size: of the `DiffusionHead`.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        dropout: of attention weights and of attention's output, in training; the feed-forward has none.

    Raises:
        ValueError: no buffer tokens, or a `dropout` outside [0, 1).
    """

    _no_split_modules = ["TransformerBlock", "DiffusionHeadBlock"]
    _repeated_blocks = ["TransformerBlock", "DiffusionHeadBlock"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 16,
        encoder_num_layers: int = 12,
        decoder_num_layers: int = 12,
        num_attention_heads: int = 12,
        attention_head_dim: int = 64,
        num_buffer_tokens: int = 64,
        head_num_layers: int = 6,
        head_hidden_size: int = 1024,
        num_classes: int = 1000,
        dropout: float = 0.1,
    ):
        super().__init__()
        if num_buffer_tokens < 1:
            raise ValueError(f"num_buffer_tokens must be at least 1, got {num_buffer_tokens}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        dim, num_positions = num_attention_heads * attention_head_dim, num_buffer_tokens + self.num_tokens
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.proj_in = nn.Linear(self.token_dim, dim)
        self.encoder_position = nn.Embedding(num_positions, dim)
        self.norm_in = normalization("layer_norm", dim)
        self.encoder_blocks, self.decoder_blocks = (
            nn.ModuleList(
                TransformerBlock(dim, num_attention_heads, "layer_norm", "exact_gelu", dropout=dropout)
                for _ in range(num_layers)
            )
            for num_layers in (encoder_num_layers, decoder_num_layers)
        )
        self.encoder_norm = normalization("layer_norm", dim)
        self.decoder_proj = nn.Linear(dim, dim)
        self.mask_token = nn.Embedding(1, dim)
        self.decoder_position = nn.Embedding(num_positions, dim)
        self.decoder_norm = normalization("layer_norm", dim)
        self.condition_position = nn.Embedding(self.num_tokens, dim)
        self.init_tokens(dim, head_hidden_size, head_num_layers)
        self.initialize_tokens()

    def tokens_per_step(self, count: int, num_steps: int | None = None) -> list[int]:
        """The cosine schedule: after step k of n a share cos(pi/2 k/n) of `count` is still unknown.

        Each step generates at least one token, so there are no more steps than tokens.

        Raises:
            ValueError: `num_steps` is not a positive whole number.
        """
        if num_steps is not None and (not isinstance(num_steps, int) or num_steps < 1):
            raise ValueError(f"num_inference_steps must be a positive whole number, got {num_steps!r}")
        num_steps = count if num_steps is None else min(num_steps, count)
        unknown, counts = count, []
        for step in range(1, num_steps + 1):
            left = math.floor(count * math.cos(math.pi / 2 * step / num_steps))
            left = min(max(left, num_steps - step), unknown - 1)
            counts.append(unknown - left)
            unknown = left
        return counts

    def guided_share(self, known: int, count: int) -> float:
        """The share that is known after the step, below 1 also in the last one (the code of MAR and l-DeTok)."""
        return min(known + count, self.num_tokens - 1) / self.num_tokens

    def predict_conditions(self, tokens, order, known, count, class_labels, cache=None):
        """As in the base. The model sees the first `known` tokens of the order alone."""
        buffer, visible = self.config.num_buffer_tokens, order[:, :known]
        buffer_positions = torch.arange(buffer, device=order.device).expand(len(order), -1)
        positions = torch.cat([buffer_positions, buffer + visible], dim=1)
        classes = self.class_embedding(class_labels)[:, None]
        seen = self.proj_in(gather_tokens(tokens, visible).to(classes.dtype))
        hidden_states = torch.cat([classes.expand(-1, buffer, -1), seen], dim=1) + self.encoder_position(positions)
        hidden_states = self._run(self.encoder_blocks, self.norm_in(hidden_states))
        hidden_states = self.decoder_proj(self.encoder_norm(hidden_states))

        all_positions = torch.arange(buffer + self.num_tokens, device=order.device)
        masked = self.mask_token(torch.zeros_like(all_positions)).expand(len(order), -1, -1)
        hidden_states = scatter_tokens(masked, positions, hidden_states) + self.decoder_position(all_positions)
        hidden_states = self.decoder_norm(self._run(self.decoder_blocks, hidden_states))
        wanted = order[:, known : known + count]
        return gather_tokens(hidden_states[:, buffer:], wanted) + self.condition_position(wanted)

    def _run(self, blocks, hidden_states):
        for block in blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(block, hidden_states)
            else:
                hidden_states = block(hidden_states)
        return hidden_states
