"""The base of models that generate an image token by token: tokens, their order, the head and the sampling loop."""

import math
from collections.abc import Callable

import torch
from diffusers import DDPMScheduler
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..guidance import TokenGuidance
from ..layers.kv_cache import KVCache
from ..layers.positions import grid_size, token_grid
from ..modeling import StrictModelMixin
from .class_table import ClassTableMixin
from .diffusion_head import DiffusionHead


__all__ = ["TokenGenerator", "gather_tokens"]


def gather_tokens(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """The tokens (B, n, C) at positions (B, n) of tokens (B, N, C)."""
    return tokens.gather(1, positions[..., None].expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: torch.Tensor, positions: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, C) with values (B, n, C) at positions (B, n), in the dtype of the tokens."""
    return tokens.scatter(1, positions[..., None].expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


class TokenGenerator(ClassTableMixin, StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """Base of class-conditional models that generate the tokens of latents (B, in_channels, H, W) in some order.

    A subclass has `config.sample_size`, `patch_size`, `in_channels` and `num_classes`, and `predict_conditions`. Its
    position embeddings are learned, so all latents have the size of training. An order (B, N) lists the positions of
    an image's N tokens, known tokens first.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["position", "norm"]
    _skip_keys = ["cache"]

    @property
    def _group_offload_block_modules(self) -> list[str]:
        """All parts: `generate` does not run through `forward`, so each part must load its own weights."""
        return [name for name, part in self.named_children() if not isinstance(part, nn.ModuleList)]

    def init_tokens(self, dim: int, head_hidden_size: int, head_num_layers: int) -> None:
        """Build the head for conditions (B, n, dim)."""
        self.diffusion_head = DiffusionHead(self.token_dim, dim, head_hidden_size, head_num_layers)
        self.gradient_checkpointing = False

    def initialize_tokens(self) -> None:
        """Xavier for linear maps, a standard deviation of 0.02 for embeddings, the head by its own rules."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        self.diffusion_head.initialize_weights()

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return token_grid(self.config.sample_size, self.config.patch_size)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.grid)

    @property
    def token_dim(self) -> int:
        """Width of a token."""
        return self.config.in_channels * self.config.patch_size**2

    def to_tokens(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens (B, N, token_dim) of latents (B, in_channels, H, W), in raster order.

        Raises:
            ValueError: latents of another shape.
        """
        shape = (self.config.in_channels, *grid_size(self.config.sample_size))
        if latents.ndim != 4 or latents.shape[1:] != shape:
            raise ValueError(
                f"hidden_states must have shape (batch, {shape[0]}, {shape[1]}, {shape[2]}), "
                f"got {tuple(latents.shape)}"
            )
        return F.pixel_unshuffle(latents, self.config.patch_size).flatten(2).transpose(1, 2)

    def to_latents(self, tokens: torch.Tensor) -> torch.Tensor:
        """The inverse of `to_tokens`."""
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, self.grid), self.config.patch_size)

    def sample_order(self, scores: torch.Tensor) -> torch.Tensor:
        """Orders (B, N) from random numbers (B, N) without ties: all permutations are equally likely."""
        return scores.argsort(dim=1)

    def guided_share(self, known: int, count: int) -> float:
        """The share of known tokens that sets the scale of guidance, in a step from `known` to `known + count`."""
        return known / self.num_tokens

    def tokens_per_step(self, count: int, num_steps: int | None = None) -> list[int]:
        """How many of `count` unknown tokens each step generates.

        Args:
            num_steps: by default one token a step.

        Raises:
            ValueError: a number of steps that this model does not support.
        """
        raise NotImplementedError

    def predict_conditions(
        self,
        tokens: torch.Tensor,
        order: torch.Tensor,
        known: int,
        count: int,
        class_labels: torch.Tensor,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Conditions (B, count, dim) on which the head samples tokens `order[:, known : known + count]`.

        Args:
            tokens: (B, N, token_dim); the model reads known tokens alone.
            order: (B, N) long.
            class_labels: (B,) long, `num_classes` for none.
            cache: from `make_cache`, extended by the tokens that are read.
        """
        raise NotImplementedError

    def make_cache(self, batch_size: int, device: torch.device) -> KVCache | None:
        """An empty cache for `predict_conditions`, or None from a model that uses none."""
        return None

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        noisy_tokens: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        order: torch.Tensor,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple:
        """Denoise the last M tokens of an order, D noisy copies of each, given the tokens before them.

        Args:
            hidden_states: clean latents (B, in_channels, H, W), of the size of training.
            noisy_tokens: (B, D, M, token_dim), the last M tokens of the order, with D independent samples of noise.
            timestep: (B, D, M), whole numbers from 0 (nearly data) to 999 (noise).
            class_labels: (B,) long; `num_classes` for none.
            order: (B, N) long, a permutation of the positions of the tokens.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `.sample`: (B, D, M, 2 * token_dim), the noise, then the numbers that set the variance.

        Raises:
            ValueError: latents or noisy tokens of another shape.
        """
        tokens = self.to_tokens(hidden_states)
        if noisy_tokens.ndim != 4 or not 0 < noisy_tokens.shape[2] <= self.num_tokens:
            raise ValueError(
                f"noisy_tokens must have shape (batch, samples, 1 to {self.num_tokens}, {self.token_dim}), "
                f"got {tuple(noisy_tokens.shape)}"
            )
        count = noisy_tokens.shape[2]
        conditions = self.predict_conditions(tokens, order, self.num_tokens - count, count, class_labels)
        sample = self.diffusion_head(noisy_tokens, timestep, conditions[:, None])
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    @torch.no_grad()
    @apply_lora_scale("attention_kwargs")
    def generate(
        self,
        hidden_states: torch.Tensor,
        noise: torch.Tensor,
        order: torch.Tensor,
        class_labels: torch.Tensor,
        scheduler: DDPMScheduler,
        num_known: int = 0,
        num_inference_steps: int | None = None,
        num_diffusion_steps: int = 100,
        temperature: float = 1.0,
        guidance: TokenGuidance = TokenGuidance(),  # noqa: B008 - a frozen value
        negative_class_labels: torch.Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        on_step: Callable[[int, torch.Tensor], tuple[torch.Tensor, bool]] | None = None,
        attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """Generate latents.

        Args:
            hidden_states: latents (B, in_channels, H, W), whose known tokens are read and kept.
            noise: (B, in_channels, H, W), from which the head starts at each token.
            order: (B, N) long; its first `num_known` positions are known.
            class_labels: (B,) long.
            scheduler: with the betas of training.
            num_inference_steps: as in `tokens_per_step`.
            num_diffusion_steps, temperature: as in `DiffusionHead.sample_tokens`.
            guidance: see `TokenGuidance`; at scale 1 the unconditional pass is skipped, unless a cache requires it.
            negative_class_labels: (B,), classes to guide away from, by default the null class.
            generator: of the noise that the head adds; a list has one for each image, which makes images independent
                of their batch.
            on_step: called with the index of a step and the latents after it, zero at unknown tokens; returns the
                latents to continue with, and whether to stop. With a cache only the newest token is read again.
            attention_kwargs: `{"scale": s}` scales LoRA layers.

        Returns:
            Latents (B, in_channels, H, W) in fp32.

        Raises:
            ValueError: latents of another shape, or a number of steps that the model does not support.
        """
        unknown, noise = order[:, num_known:], self.to_tokens(noise.float())
        tokens = self.to_tokens(hidden_states.float())
        tokens = scatter_tokens(tokens, unknown, torch.zeros_like(gather_tokens(tokens, unknown)))
        cache = self.make_cache((1 + guidance.is_active) * len(tokens), tokens.device)
        known = num_known
        if negative_class_labels is None:
            negative_class_labels = torch.full_like(class_labels, self.config.num_classes)
        for step, count in enumerate(self.tokens_per_step(unknown.shape[1], num_inference_steps)):
            scale = guidance.scale_at(self.guided_share(known, count))
            # A cache must see all tokens of both halves, guided or not.
            halves = 1 + (guidance.is_active if cache is not None else scale != 1)
            labels = class_labels if halves == 1 else torch.cat([class_labels, negative_class_labels])
            inputs = [value.repeat(halves, *[1] * (value.ndim - 1)) for value in (tokens, order)]
            conditions = self.predict_conditions(*inputs, known, count, labels, cache=cache)
            positions = order[:, known : known + count]
            sampled = self.diffusion_head.sample_tokens(
                conditions[: len(tokens)],
                gather_tokens(noise, positions),
                scheduler,
                num_steps=num_diffusion_steps,
                temperature=temperature,
                negative_condition=conditions[len(tokens) :] if scale != 1 else None,
                guidance=guidance,
                scale=scale,
                generator=generator,
            )
            tokens, known = scatter_tokens(tokens, positions, sampled), known + count
            if on_step is not None:
                latents, is_last = on_step(step, self.to_latents(tokens))
                tokens = self.to_tokens(latents.float())
                if is_last:
                    break
        return self.to_latents(tokens)
