"""What models that draw an image token by token share: tokens and their order, the head, and the loop that draws."""

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


def gather_tokens(tokens: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """The tokens (B, n, C) of tokens (B, N, C) at places (B, n)."""
    return tokens.gather(1, places[..., None].expand(-1, -1, tokens.shape[-1]))


def scatter_tokens(tokens: torch.Tensor, places: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Tokens (B, N, C) with values (B, n, C) at places (B, n), in the dtype of the tokens."""
    return tokens.scatter(1, places[..., None].expand(-1, -1, tokens.shape[-1]), values.to(tokens.dtype))


class TokenGenerator(ClassTableMixin, StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """Base of class-conditional models that draw the tokens of latents (B, in_channels, H, W) in some order.

    A subclass has `config.sample_size`, `patch_size`, `in_channels` and `num_classes`, and `predict_conditions`. Its
    positions are learned, so all latents have the size of training. An order (B, N) lists the places of an image's N
    tokens; those that are known come first.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _skip_layerwise_casting_patterns = ["position", "norm"]
    _skip_keys = ["cache"]

    @property
    def _group_offload_block_modules(self) -> list[str]:
        """All parts: `generate` does not come through `forward`, so each has to bring its own weights."""
        return [name for name, part in self.named_children() if not isinstance(part, nn.ModuleList)]

    def init_tokens(self, dim: int, head_hidden_size: int, head_num_layers: int) -> None:
        """Make the head for conditions (B, n, dim)."""
        self.diffusion_head = DiffusionHead(self.token_dim, dim, head_hidden_size, head_num_layers)
        self.gradient_checkpointing = False

    def initialize_tokens(self) -> None:
        """Xavier for linear maps, 0.02 for embeddings, the head by its own rules."""
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
        """Numbers of a token."""
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

    def draw_order(self, scores: torch.Tensor) -> torch.Tensor:
        """Orders (B, N) from random numbers (B, N) without ties: every permutation is as likely as any other."""
        return scores.argsort(dim=1)

    def tokens_per_step(self, count: int, num_steps: int | None = None) -> list[int]:
        """How many of `count` unknown tokens each step draws.

        Args:
            num_steps: by default one token a step.

        Raises:
            ValueError: a number of steps that this model cannot take.
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
        """What the head needs to draw tokens `order[:, known : known + count]`, (B, count, dim).

        Args:
            tokens: (B, N, token_dim), of which the model reads what it may know.
            order: (B, N) long.
            class_labels: (B,) long, `num_classes` for none.
            cache: of `make_cache`; it takes in what is read.
        """
        raise NotImplementedError

    def make_cache(self, batch_size: int, device: torch.device) -> KVCache | None:
        """An empty cache for `predict_conditions`, of a model that can use one."""
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
        """Denoise the last M tokens of an order, D times each, given those before them.

        Args:
            hidden_states: clean latents (B, in_channels, H, W), of the size of training.
            noisy_tokens: (B, D, M, token_dim), the last M tokens of the order with noise on them, from D draws of it.
            timestep: (B, D, M), whole numbers from 0 (nearly data) to 999 (noise).
            class_labels: (B,) long; `num_classes` for none.
            order: (B, N) long, a permutation of the places of the tokens.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `Transformer2DModelOutput` instead of a tuple.

        Returns:
            `.sample`: (B, D, M, 2 * token_dim), the noise, and behind it the numbers that set the variance.

        Raises:
            ValueError: latents or noisy tokens of another shape.
        """
        tokens = self.to_tokens(hidden_states)
        if noisy_tokens.ndim != 4 or not 0 < noisy_tokens.shape[2] <= self.num_tokens:
            raise ValueError(
                f"noisy_tokens must have shape (batch, draws, 1 to {self.num_tokens}, {self.token_dim}), "
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
        """Draw latents.

        Args:
            hidden_states: latents (B, in_channels, H, W), of which the known tokens are read and kept.
            noise: (B, in_channels, H, W), from which the head starts at each token.
            order: (B, N) long; its first `num_known` places are the known ones.
            class_labels: (B,) long.
            scheduler: with the betas of training.
            num_inference_steps: as in `tokens_per_step`.
            num_diffusion_steps, temperature: of the head, for each token.
            guidance: see `TokenGuidance`; at scale 1 nothing unconditional is computed, but for what a cache holds.
            negative_class_labels: (B,), what to guide away from, by default the null class.
            generator: of the noise that the head adds; with a list, one for each image, an image is the same in any
                batch.
            on_step: called with the number of a step and the latents after it, zero where no token is yet; it returns
                the latents to go on with, and whether to end with them. With a cache only the newest token is read
                again.
            attention_kwargs: `{"scale": s}` scales LoRA layers.

        Returns:
            Latents (B, in_channels, H, W) in fp32.

        Raises:
            ValueError: latents of another shape, or a number of steps that does not fit.
        """
        places, noise = order[:, num_known:], self.to_tokens(noise.float())
        tokens = self.to_tokens(hidden_states.float())
        tokens = scatter_tokens(tokens, places, torch.zeros_like(gather_tokens(tokens, places)))
        cache = self.make_cache((1 + guidance.is_active) * len(tokens), tokens.device)
        known = num_known
        if negative_class_labels is None:
            negative_class_labels = torch.full_like(class_labels, self.config.num_classes)
        for step, count in enumerate(self.tokens_per_step(places.shape[1], num_inference_steps)):
            scale = guidance.scale_at(known / self.num_tokens)
            # A cache has to see all tokens of both halves, whether these are guided or not.
            halves = 1 + (guidance.is_active if cache is not None else scale != 1)
            labels = class_labels if halves == 1 else torch.cat([class_labels, negative_class_labels])
            inputs = [value.repeat(halves, *[1] * (value.ndim - 1)) for value in (tokens, order)]
            conditions = self.predict_conditions(*inputs, known, count, labels, cache)
            places = order[:, known : known + count]
            drawn = self.diffusion_head.sample_tokens(
                conditions[: len(tokens)],
                gather_tokens(noise, places),
                scheduler,
                num_diffusion_steps,
                temperature,
                conditions[len(tokens) :] if scale != 1 else None,
                guidance,
                scale,
                generator,
            )
            tokens, known = scatter_tokens(tokens, places, drawn), known + count
            if on_step is not None:
                latents, is_last = on_step(step, self.to_latents(tokens))
                tokens = self.to_tokens(latents.float())
                if is_last:
                    break
        return self.to_latents(tokens)
