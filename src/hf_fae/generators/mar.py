"""MAR (arXiv 2406.11838): masked autoregression, in random order and many tokens at a time.

known tokens and the class -> encoder; these and a mask token in every hole -> decoder -> conditions of the holes, from
each of which the diffusion head draws its token.

Encoder and decoder are those of a masked autoencoder, and see all tokens that there are.
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

    The defaults are MAR-B with the head that l-DeTok (arXiv 2507.15856) trains it with for 800 epochs, 207.9 M.

    Args:
        sample_size: latent side or [height, width].
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        encoder_num_layers, decoder_num_layers, num_attention_heads, attention_head_dim: depth and width.
        num_buffer_tokens: tokens of the class before those of the image.
        head_num_layers, head_hidden_size: of the `DiffusionHead`.
        num_classes: number of classes; label `num_classes` is the null class of classifier-free guidance.
        dropout: of attention weights and of attention's output, in training; the feed-forward has none.
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
        dim, places = num_attention_heads * attention_head_dim, num_buffer_tokens + self.num_tokens
        self.class_embedding = nn.Embedding(num_classes + 1, dim)
        self.proj_in = nn.Linear(self.token_dim, dim)
        self.encoder_position = nn.Embedding(places, dim)
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
        self.decoder_position = nn.Embedding(places, dim)
        self.decoder_norm = normalization("layer_norm", dim)
        self.condition_position = nn.Embedding(self.num_tokens, dim)
        self.init_tokens(dim, head_hidden_size, head_num_layers)
        self.initialize_tokens()

    def tokens_per_step(self, count: int, num_steps: int | None = None) -> list[int]:
        """By the cosine law: after step k of n the share cos(pi/2 k/n) of `count` is still unknown.

        Each step draws a token at least, so there are no more steps than tokens.

        Raises:
            ValueError: `num_steps` is no positive whole number.
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

    def predict_conditions(self, tokens, order, known, count, class_labels, cache=None):
        """As in the base. The model sees the first `known` tokens of the order, and nothing of the others."""
        buffer, visible = self.config.num_buffer_tokens, order[:, :known]
        buffer_places = torch.arange(buffer, device=order.device).expand(len(order), -1)
        places = torch.cat([buffer_places, buffer + visible], dim=1)
        classes = self.class_embedding(class_labels)[:, None]
        seen = self.proj_in(gather_tokens(tokens, visible).to(classes.dtype))
        hidden_states = torch.cat([classes.expand(-1, buffer, -1), seen], dim=1) + self.encoder_position(places)
        hidden_states = self._run(self.encoder_blocks, self.norm_in(hidden_states))
        hidden_states = self.decoder_proj(self.encoder_norm(hidden_states))

        everywhere = torch.arange(buffer + self.num_tokens, device=order.device)
        masked = self.mask_token(torch.zeros_like(everywhere)).expand(len(order), -1, -1)
        hidden_states = scatter_tokens(masked, places, hidden_states) + self.decoder_position(everywhere)
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
