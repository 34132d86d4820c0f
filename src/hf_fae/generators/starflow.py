"""STARFlow (arXiv 2506.06276): a normalizing flow on latents, one deep and several shallow autoregressive blocks.

A block maps each token x_n to z_n = (x_n - mean_n) / scale_n, where mean and scale come from a causal transformer that
has seen x_1 ... x_{n-1}; so the whole is invertible, one token after the other. Data pass the shallow blocks first and
the deep block, the only one that knows the condition, last. Every other block reads the tokens backwards.
"""

import math
from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.utils import BaseOutput, apply_lora_scale
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..guidance import FlowGuidance
from ..latents import check_finite
from ..layers.blocks import TransformerBlock
from ..layers.kv_cache import KVCache
from ..layers.norms import RMSNorm
from ..layers.positions import axial_angles, grid_positions, token_grid
from ..modeling import StrictModelMixin
from .class_table import ClassTableMixin


__all__ = ["UNIT_SCALE", "STARFlowOutput", "STARFlowTransformer2DModel", "soft_clip"]

# softplus(UNIT_SCALE) = 1: an untrained block is the identity.
UNIT_SCALE = math.log(math.e - 1)


def soft_clip(values: torch.Tensor) -> torch.Tensor:
    """Into (-4, 4), with slope 1 at 0."""
    return 4 * torch.tanh(values / 4)


@dataclass
class STARFlowOutput(BaseOutput):
    """What a flow makes of latents.

    Attributes:
        sample: z (B, C, H, W), standard normal if the latents are as those of training.
        log_det: (B,) fp32, log |det dz/dx| of each image, in nats.
        block_inputs: with `output_block_inputs`, what each block has read: tokens (B, N, C * patch_size^2) in fp32,
            the latents themselves first.
    """

    sample: torch.Tensor
    log_det: torch.Tensor | None = None  # always there; Accelerate rebuilds outputs without arguments
    block_inputs: tuple[torch.Tensor, ...] | None = None

    def log_prob(self) -> torch.Tensor:
        """Log-density (B,) of the latents in nats, the prior being standard normal."""
        z = self.sample.float().flatten(1)
        return self.log_det - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


class ClassEmbedding(nn.Embedding):
    """The paper's linear map of a one-hot vector: the columns of its matrix are the rows of a table."""

    def __init__(self, num_embeddings: int, dim: int):
        super().__init__(num_embeddings, dim)
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, class_labels):
        return super().forward(class_labels) + self.bias


class STARFlowBlock(nn.Module):
    """A causal transformer that predicts mean and scale of every token from those before it.

    The first token is predicted from a learned start token, which has as many channels as the data.
    """

    def __init__(self, token_dim: int, dim: int, num_layers: int, heads: int):
        super().__init__()
        self.start_token = nn.Parameter(0.02 * torch.randn(token_dim))
        self.proj_in = nn.Linear(token_dim, dim)
        self.layers = nn.ModuleList(
            TransformerBlock(dim, heads, "layer_norm", "gelu", is_causal=True) for _ in range(num_layers)
        )
        self.norm_out = RMSNorm(dim, eps=1e-6)
        self.proj_out = nn.Linear(dim, 2 * token_dim)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)
        self.gradient_checkpointing = False

    def forward(self, tokens, rotary_emb, prefix=None, cache=None):
        """Means and scales of the tokens that follow `tokens`; of the very first one, too, unless a cache has it.

        Args:
            tokens: (B, n, token_dim), those before the predicted ones; with a cache only those that it does not have.
            rotary_emb: angles of the whole sequence, of prefix and tokens.
            prefix: (B, P, dim), read before all tokens.
            cache: `KVCache` that takes the new tokens in; at its first use also prefix and start token.

        Returns:
            Two tensors (B, n or n + 1, token_dim) in fp32.
        """
        first = 0 if cache is None else cache.length
        if first == 0:
            start = self.start_token.to(tokens.dtype).expand(len(tokens), 1, -1)
            tokens = torch.cat([start, tokens], dim=1)
        hidden_states = self.proj_in(tokens)
        if first == 0 and prefix is not None:
            hidden_states = torch.cat([prefix.to(hidden_states.dtype), hidden_states], dim=1)
        count = hidden_states.shape[1]
        rotary_emb = tuple(angles[first : first + count] for angles in rotary_emb)
        caches = [None] * len(self.layers) if cache is None else cache.extend(count)
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, rotary_emb)
            else:
                hidden_states = layer(hidden_states, rotary_emb, cache=layer_cache)
        predicted = self.proj_out(self.norm_out(hidden_states[:, -tokens.shape[1] :]))
        mean, scale = soft_clip(predicted.float()).chunk(2, dim=-1)
        return mean, F.softplus(scale + UNIT_SCALE)


class STARFlowTransformer2DModel(ClassTableMixin, StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """A flow of latents (B, in_channels, H, W): `forward` to noise, `inverse` back.

    The defaults are the paper's ImageNet model 18(6)-2048 on 32 channels (1.413 B). The network runs in the model's
    dtype; means, scales and all arithmetic with them are fp32.

    Args:
        sample_size: latent side or [height, width] of training; others work, too.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        num_layers: layers of each block, in the order that data pass them: shallow ones first, the deep one last.
        num_attention_heads, attention_head_dim: their product is the width. Of a head's channels 3/4 turn with row and
            column, 1/4 with the place in the caption.
        num_classes: number of classes, label `num_classes` being the null class; None without classes.
        caption_channels: width of text embeddings that condition the deep block; None without text.
        max_caption_length: of these, in tokens.
        noise_sigma: the flow models latents plus Gaussian noise of this standard deviation, see `denoise`.

    A flow has classes, text, or no condition at all.

    Raises:
        ValueError: a head width that is no multiple of 16, blocks without layers, both kinds of condition, or a number
            out of range.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["TransformerBlock"]
    _repeated_blocks = ["TransformerBlock"]
    _skip_layerwise_casting_patterns = ["norm", "proj_out"]
    _group_offload_block_modules = ["class_embedding", "caption_projection"]
    _skip_keys = ["cache"]

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 16,
        patch_size: int = 1,
        in_channels: int = 32,
        num_layers: list[int] = [2, 2, 2, 2, 2, 18],  # noqa: B006 - the config wants a list
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_classes: int | None = 1000,
        caption_channels: int | None = None,
        max_caption_length: int = 128,
        noise_sigma: float = 0.3,
    ):
        super().__init__()
        if attention_head_dim % 16:
            raise ValueError(f"attention_head_dim must be a multiple of 16, got {attention_head_dim}")
        if not num_layers or min(num_layers) < 1:
            raise ValueError(f"num_layers must list at least one layer for each block, got {list(num_layers)}")
        if num_classes is not None and caption_channels is not None:
            raise ValueError(
                f"num_classes must be None for a flow with caption_channels {caption_channels}, got {num_classes}"
            )
        if not 0 <= noise_sigma < math.inf:
            raise ValueError(f"noise_sigma must be finite and not negative, got {noise_sigma}")
        for name, number in (
            ("patch_size", patch_size),
            ("in_channels", in_channels),
            ("num_attention_heads", num_attention_heads),
            ("attention_head_dim", attention_head_dim),
            ("max_caption_length", max_caption_length),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        token_grid(sample_size, patch_size)  # that it can be cut
        dim, token_dim = num_attention_heads * attention_head_dim, in_channels * patch_size**2
        self.blocks = nn.ModuleList(
            STARFlowBlock(token_dim, dim, layers, num_attention_heads) for layers in num_layers
        )
        if num_classes is not None:
            self.class_embedding = ClassEmbedding(num_classes + 1, dim)
        if caption_channels is not None:
            self.caption_projection = nn.Linear(caption_channels, dim)

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        output_block_inputs: bool = False,
        attention_kwargs: dict | None = None,
        return_dict: bool = True,
    ) -> STARFlowOutput | tuple:
        """Latents to noise.

        Args:
            hidden_states: latents (B, in_channels, H, W); sides that are multiples of `patch_size`.
            class_labels: (B,) long, `num_classes` for none; of a class-conditional flow.
            encoder_hidden_states: text embeddings (B, length, caption_channels), zero where there is no text; of a
                flow with captions.
            output_block_inputs: return what each block has read as well.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `STARFlowOutput` instead of a tuple (z, log_det).

        Returns:
            `.sample`, in the dtype of the latents, and `.log_det`.

        Raises:
            ValueError: latents of another shape or, outside of training, not finite; a condition that does not fit.
        """
        tokens, grid = self._to_tokens(hidden_states)
        if not self.training:  # where it would make the host wait in every step
            check_finite("hidden_states", hidden_states)
        prefix = self._prefix(class_labels, encoder_hidden_states, len(tokens))
        shallow, deep = (self._rotary_emb(grid, value, tokens.device) for value in (None, prefix))
        block_inputs, log_det = [], torch.zeros(len(tokens), device=tokens.device)
        for index, block in enumerate(self.blocks):
            block_inputs.append(tokens)
            block_prefix, rotary_emb = (prefix, deep) if self._is_deep(index) else (None, shallow)
            tokens = self._ordered(tokens, index)
            mean, scale = block(tokens[:, :-1].to(self.dtype), rotary_emb, block_prefix)
            tokens = self._ordered((tokens - mean) / scale, index)
            log_det = log_det - scale.log().sum(dim=(1, 2))
        sample = self._to_latents(tokens, grid).to(hidden_states.dtype)
        if not return_dict:
            return (sample, log_det, tuple(block_inputs)) if output_block_inputs else (sample, log_det)
        return STARFlowOutput(sample, log_det, tuple(block_inputs) if output_block_inputs else None)

    def inverse(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_class_labels: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        guidance: FlowGuidance = FlowGuidance(),  # noqa: B008 - a frozen value
        jacobi_block_size: int = 1,
        jacobi_tolerance: float = 1e-3,
        attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """Noise to latents: the inverse of `forward`, block by block and token by token.

        Args:
            hidden_states: z (B, in_channels, H, W).

        The others are as in `inverse_block`.

        Returns:
            Latents (B, in_channels, H, W), in the dtype of z.

        Raises:
            ValueError: as `inverse_block`.
        """
        latents = hidden_states.float()  # in fp32 from block to block
        for index in reversed(range(len(self.blocks))):
            latents = self.inverse_block(
                latents,
                index,
                class_labels,
                encoder_hidden_states,
                negative_class_labels,
                negative_encoder_hidden_states,
                guidance,
                jacobi_block_size,
                jacobi_tolerance,
                attention_kwargs=attention_kwargs,
            )
        return latents.to(hidden_states.dtype)

    @apply_forward_hook
    @torch.no_grad()
    @apply_lora_scale("attention_kwargs")
    def inverse_block(
        self,
        hidden_states: torch.Tensor,
        index: int,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        negative_class_labels: torch.Tensor | None = None,
        negative_encoder_hidden_states: torch.Tensor | None = None,
        guidance: FlowGuidance = FlowGuidance(),  # noqa: B008 - a frozen value
        jacobi_block_size: int = 1,
        jacobi_tolerance: float = 1e-3,
        attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """What `blocks[index]` has read, given what it made of it; keys and values are cached.

        Args:
            hidden_states: (B, in_channels, H, W).
            index: the last block has to be inverted first.
            class_labels, encoder_hidden_states: as in `forward`.
            negative_class_labels, negative_encoder_hidden_states: what the deep block is guided away from; used where
                `guidance` is active, and nowhere else does the batch double.
            guidance: see `FlowGuidance`.
            jacobi_block_size: find so many tokens at a time by fixed-point (Jacobi) iteration; 1 is token by token.
            jacobi_tolerance: an image's tokens are found when the mean square of their last change, relative to their
                own, is at most this. After `jacobi_block_size` sweeps they are exact in any case.
            attention_kwargs: `{"scale": s}` scales LoRA layers.

        Returns:
            (B, in_channels, H, W), in the dtype of `hidden_states`.

        Raises:
            ValueError: latents of another shape or not finite, a condition that does not fit, a block or a Jacobi
                setting out of range.
        """
        if not 0 <= index < len(self.blocks):
            raise ValueError(f"index must be that of one of {len(self.blocks)} blocks, got {index}")
        if not isinstance(jacobi_block_size, int) or jacobi_block_size < 1 or not 0 <= jacobi_tolerance < math.inf:
            raise ValueError(
                "jacobi_block_size must be a whole number from 1 and jacobi_tolerance finite and not negative, "
                f"got {jacobi_block_size!r} and {jacobi_tolerance}"
            )
        noise, grid = self._to_tokens(hidden_states)
        check_finite("hidden_states", hidden_states)
        prefix, is_guided = None, False
        if self._is_deep(index):
            prefix = self._prefix(class_labels, encoder_hidden_states, len(noise))
            is_guided = guidance.is_active and prefix is not None  # without a condition both predictions are one
            if is_guided:
                negative = self._prefix(
                    negative_class_labels, negative_encoder_hidden_states, len(noise), name="negative_"
                )
                if negative.shape != prefix.shape:
                    raise ValueError(
                        f"negative_encoder_hidden_states must have {prefix.shape[1]} tokens as encoder_hidden_states, "
                        f"got {negative.shape[1]}"
                    )
                prefix = torch.cat([prefix, negative])
        block, rotary_emb = self.blocks[index], self._rotary_emb(grid, prefix, noise.device)
        cache = KVCache(
            len(block.layers),
            (1 + is_guided) * len(noise),
            len(rotary_emb[0]),
            self.config.num_attention_heads,
            self.config.attention_head_dim,
            noise.device,
            self.dtype,
            # As `compile_repeated_blocks` leaves them.
            static=any(layer._compiled_call_impl is not None for layer in block.layers),
        )

        def affine(previous):
            """Mean and scale of the tokens that follow `previous`, guided."""
            previous = previous.to(self.dtype)
            mean, scale = block(previous.repeat(1 + is_guided, 1, 1), rotary_emb, prefix, cache)
            if not is_guided:
                return mean, scale
            (mean, negative_mean), (scale, negative_scale) = mean.chunk(2), scale.chunk(2)
            return guidance.combine(mean, scale, negative_mean, negative_scale)

        noise = self._ordered(noise, index)
        mean, scale = affine(noise[:, :0])
        tokens = [noise[:, :1] * scale + mean]
        for start in range(1, noise.shape[1], jacobi_block_size):
            wanted = noise[:, start : start + jacobi_block_size]
            tokens.append(_solve(affine, tokens[-1][:, -1:], wanted, cache, jacobi_tolerance))
        tokens = self._ordered(torch.cat(tokens, dim=1), index)
        return self._to_latents(tokens, grid).to(hidden_states.dtype)

    @apply_forward_hook
    @apply_lora_scale("attention_kwargs")
    def denoise(
        self,
        hidden_states: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_kwargs: dict | None = None,
    ) -> torch.Tensor:
        """One score step from noisy latents y to the mean of the clean ones, y + noise_sigma^2 * grad log p(y).

        This is Tweedie's formula; the gradient is that of the log-density of each image, a sum over its elements. It
        needs a forward and a backward pass with all weights on the device, and needs no training.

        Args:
            hidden_states: latents (B, in_channels, H, W) with noise of standard deviation `config.noise_sigma`, as
                `inverse` draws them.
            class_labels, encoder_hidden_states, attention_kwargs: as in `forward`.

        Returns:
            (B, in_channels, H, W), in the dtype of `hidden_states`.

        Raises:
            ValueError: as `forward`.
        """
        # Saved by value: where weights are offloaded, those of a layer are gone when its backward pass comes.
        saved = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
        with torch.inference_mode(False), torch.enable_grad(), saved:
            # Copies: no gradient passes through what an inference mode around this has made.
            condition = [None if value is None else value.clone() for value in (class_labels, encoder_hidden_states)]
            latents = hidden_states.detach().float().clone().requires_grad_()
            (score,) = torch.autograd.grad(self(latents, *condition).log_prob().sum(), latents)
        return (latents.detach() + self.config.noise_sigma**2 * score).to(hidden_states.dtype)

    def _prefix(self, class_labels, encoder_hidden_states, batch_size, name=""):
        """The condition as tokens (B, P, dim), or None; `name` is put before those of arguments in errors."""
        config = self.config
        for argument, value, channels in (
            ("class_labels", class_labels, config.num_classes),
            ("encoder_hidden_states", encoder_hidden_states, config.caption_channels),
        ):
            if (value is None) != (channels is None):
                expected = "None for a flow that was not made for it" if channels is None else "given"
                raise ValueError(f"{name}{argument} must be {expected}, got {type(value).__name__}")
            axes = 1 if argument == "class_labels" else 3
            if value is not None and (value.ndim != axes or len(value) != batch_size):
                raise ValueError(
                    f"{name}{argument} must have {axes} axes and {batch_size} rows as hidden_states, "
                    f"got shape {tuple(value.shape)}"
                )
        if class_labels is not None:
            return self.class_embedding(class_labels)[:, None]
        if encoder_hidden_states is None:
            return None
        length, channels = encoder_hidden_states.shape[1:]
        if channels != config.caption_channels or not 0 < length <= config.max_caption_length:
            raise ValueError(
                f"{name}encoder_hidden_states must have 1 to {config.max_caption_length} tokens of width "
                f"{config.caption_channels}, got {length} of {channels}"
            )
        return self.caption_projection(encoder_hidden_states.to(self.dtype))

    def _is_deep(self, index):
        """Whether it is the block that knows the condition: the last one, next to the noise."""
        return index == len(self.blocks) - 1

    def _rotary_emb(self, grid, prefix, device):
        """Angles of prefix and tokens: row, column and place in the caption; the prefix stands at row and column 0.

        They are those of places in the sequence: a block that reads backwards sees the grid turned by 180 degrees.
        """
        length = 0 if prefix is None else prefix.shape[1]
        rows, columns = (F.pad(positions + 1, (length, 0)) for positions in grid_positions(grid, device))
        words = F.pad(torch.arange(length, device=device), (0, grid[0] * grid[1]))
        axis = self.config.attention_head_dim * 3 // 8
        return axial_angles([(rows, axis), (columns, axis), (words, self.config.attention_head_dim - 2 * axis)])

    def _ordered(self, tokens, index):
        """Tokens as a block reads them, and back: the deep block in raster order, every other one backwards."""
        return tokens.flip(1) if (len(self.blocks) - 1 - index) % 2 else tokens

    def _to_tokens(self, latents):
        channels, patch_size = self.config.in_channels, self.config.patch_size
        if latents.ndim != 4 or latents.shape[1] != channels or 0 in latents.shape:
            raise ValueError(
                f"hidden_states must have shape (batch, {channels}, height, width), got {tuple(latents.shape)}"
            )
        grid = token_grid(tuple(latents.shape[2:]), patch_size, name="sides of hidden_states")
        return F.pixel_unshuffle(latents.float(), patch_size).flatten(2).transpose(1, 2), grid

    def _to_latents(self, tokens, grid):
        return F.pixel_shuffle(tokens.transpose(1, 2).unflatten(2, grid), self.config.patch_size)


def _solve(affine, last, noise, cache, tolerance):
    """The tokens x with x = noise * scale + mean, where mean and scale follow from `last` and x, shifted by one.

    Each sweep finds at least one more token for good, so that as many sweeps as tokens are exact. An image that is
    done is left alone, so that it does not depend on the others of its batch.

    Args:
        last: (B, 1, C), the token before the wanted ones.
        noise: (B, n, C).
    """
    place, count = cache.length, noise.shape[1]
    previous = torch.cat([last, noise[:, :-1]], dim=1)
    done = torch.zeros(len(noise), 1, 1, dtype=torch.bool, device=noise.device)
    for sweep in range(count):
        cache.length = place
        mean, scale = affine(previous)
        tokens = noise * scale + mean
        if sweep == count - 1:
            break
        following = torch.cat([last, tokens[:, :-1]], dim=1)
        change = (following - previous).square().mean((1, 2), keepdim=True)
        done = done | (change <= tolerance * following.square().mean((1, 2), keepdim=True))
        if done.all():
            break
        previous = torch.where(done, previous, following)
    return tokens
