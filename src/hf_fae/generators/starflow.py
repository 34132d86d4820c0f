"""STARFlow (arXiv 2506.06276): a normalizing flow on latents, one deep and several shallow autoregressive blocks.

A block maps each token x_n to z_n = (x_n - mean_n) / scale_n, where mean and scale come from a causal transformer that
has seen x_1 ... x_{n-1}; so the whole is invertible, one token after the other. Data pass the shallow blocks first and
the deep block, the only one that is conditioned, last. The first block and every other one read the tokens backwards.

Positions, activations and epsilons are those of the published code (apple/ml-starflow), with which the weights run.
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
from ..layers.kv_cache import KVCache
from ..layers.positions import token_grid
from ..modeling import StrictModelMixin
from .class_table import ClassTableMixin
from .starflow_block import CAPTION_CHANNELS, STARFlowBlock, sequence_angles
from .starflow_inverse import BlockInverse


__all__ = ["STARFlowOutput", "STARFlowTransformer2DModel"]


@dataclass
class STARFlowOutput(BaseOutput):
    """The noise that a flow maps latents to, and the density that follows.

    Attributes:
        sample: z (B, C, H, W), standard normal for latents like those of training.
        log_det: (B,) fp32, log |det dz/dx| of each image, in nats.
        block_inputs: with `output_block_inputs`, the input of each block: tokens (B, N, C * patch_size^2) in fp32,
            the latents themselves first.
    """

    sample: torch.Tensor
    log_det: torch.Tensor | None = None  # always set; Accelerate rebuilds outputs without arguments
    block_inputs: tuple[torch.Tensor, ...] | None = None

    def log_prob(self) -> torch.Tensor:
        """Log-density (B,) of the latents in nats, under a standard normal prior."""
        z = self.sample.float().flatten(1)
        return self.log_det - 0.5 * z.square().sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi)


class ClassEmbedding(nn.Embedding):
    """The paper's linear map of a one-hot vector: the columns of its matrix are the rows of this table."""

    def __init__(self, num_embeddings: int, dim: int):
        super().__init__(num_embeddings, dim)
        self.bias = nn.Parameter(torch.zeros(dim))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, class_labels):
        return super().forward(class_labels) + self.bias


class STARFlowTransformer2DModel(ClassTableMixin, StrictModelMixin, AttentionMixin, PeftAdapterMixin):
    """A flow on latents (B, in_channels, H, W): `forward` to noise, `inverse` back.

    The defaults are the paper's ImageNet model 18(6)-2048 on 32 channels (1.413 B). The network runs in the model's
    dtype; means, scales and all arithmetic with them are fp32.

    Args:
        sample_size: latent side or [height, width] of training; other sizes work as well, with positions scaled to it.
        patch_size: latents per token along each axis.
        in_channels: channels of the latents.
        num_layers: layers of each block, in the order that data pass them: shallow ones first, the deep one last.
        num_attention_heads, attention_head_dim: their product is the width. Of a head's channels 16 turn with the
            position in the caption, the others with row and column.
        num_classes: number of classes, label `num_classes` being the null class; None without classes.
        caption_channels: width of the text embeddings that condition the deep block; None without text.
        max_caption_length: their number of tokens in training; shorter captions keep the positions of padded ones.
        noise_sigma: the flow models latents plus Gaussian noise of this standard deviation, see `denoise`.

    A flow is conditioned on classes, on text, or not at all.

    Raises:
        ValueError: a head width that is no multiple of 4 above 16, blocks without layers, both kinds of condition, or
            a number out of range.
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
        num_layers: list[int] = [2, 2, 2, 2, 2, 18],  # noqa: B006 - configs hold lists
        num_attention_heads: int = 32,
        attention_head_dim: int = 64,
        num_classes: int | None = 1000,
        caption_channels: int | None = None,
        max_caption_length: int = 128,
        noise_sigma: float = 0.3,
    ):
        super().__init__()
        if attention_head_dim % 4 or attention_head_dim <= CAPTION_CHANNELS:
            raise ValueError(
                f"attention_head_dim must be a multiple of 4 above {CAPTION_CHANNELS}, got {attention_head_dim}"
            )
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
            ("max_caption_length", max_caption_length),
        ):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        token_grid(sample_size, patch_size)  # refuses sizes that cannot be cut into patches
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
            class_labels: (B,) long, `num_classes` for the null class; of a class-conditional flow.
            encoder_hidden_states: text embeddings (B, length, caption_channels), zero at padding; of a flow on text.
            output_block_inputs: also return the input of each block.
            attention_kwargs: `{"scale": s}` scales LoRA layers.
            return_dict: return a `STARFlowOutput` instead of a tuple (z, log_det).

        Returns:
            `.sample`, in the dtype of the latents, and `.log_det`.

        Raises:
            ValueError: latents of another shape or, outside of training, not finite; a condition of another kind or
                shape.
        """
        tokens, grid = self._to_tokens(hidden_states)
        if not self.training:  # where it would synchronise host and device in every step
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

        The other arguments are those of `inverse_block`.

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
                class_labels=class_labels,
                encoder_hidden_states=encoder_hidden_states,
                negative_class_labels=negative_class_labels,
                negative_encoder_hidden_states=negative_encoder_hidden_states,
                guidance=guidance,
                jacobi_block_size=jacobi_block_size,
                jacobi_tolerance=jacobi_tolerance,
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
        """The input of `blocks[index]`, given its output; keys and values are cached.

        Args:
            hidden_states: (B, in_channels, H, W).
            index: the last block is the first to be inverted.
            class_labels, encoder_hidden_states: as in `forward`.
            negative_class_labels, negative_encoder_hidden_states: the condition that the deep block is guided away
                from; used where `guidance` is active, and only there does the batch double.
            guidance: see `FlowGuidance`.
            jacobi_block_size: tokens to solve for at a time, by fixed-point (Jacobi) iteration; 1 is token by token.
            jacobi_tolerance: the tokens of an image have converged when the mean square of their last change, relative
                to their own, is at most this. After `jacobi_block_size` sweeps they are exact in any case.
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
            batch_size=(1 + is_guided) * len(noise),
            places=len(rotary_emb[0]),
            heads=self.config.num_attention_heads,
            head_dim=self.config.attention_head_dim,
            device=noise.device,
            dtype=self.dtype,
            # As `compile_repeated_blocks` leaves them.
            static=any(layer._compiled_call_impl is not None for layer in block.layers),
        )
        invert = BlockInverse(block, rotary_emb, cache, self.dtype, prefix, guidance=guidance if is_guided else None)
        tokens = invert(self._ordered(noise, index), jacobi_block_size, jacobi_tolerance)
        tokens = self._ordered(tokens, index)
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
        requires a forward and a backward pass with all weights on the device, but no training.

        Args:
            hidden_states: latents (B, in_channels, H, W) with noise of standard deviation `config.noise_sigma`, as
                `inverse` generates them.
            class_labels, encoder_hidden_states, attention_kwargs: as in `forward`.

        Returns:
            (B, in_channels, H, W), in the dtype of `hidden_states`.

        Raises:
            ValueError: as `forward`.
        """
        # Saved by value: where weights are offloaded, those of a layer have left the device by its backward pass.
        saved = torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)
        with torch.inference_mode(False), torch.enable_grad(), saved:
            # Copies: no gradient passes through tensors that an inference mode around this has made.
            condition = [None if value is None else value.clone() for value in (class_labels, encoder_hidden_states)]
            latents = hidden_states.detach().float().clone().requires_grad_()
            (score,) = torch.autograd.grad(self(latents, *condition).log_prob().sum(), latents)
        return (latents.detach() + self.config.noise_sigma**2 * score).to(hidden_states.dtype)

    def _prefix(self, class_labels, encoder_hidden_states, batch_size, name=""):
        """The condition as tokens (B, P, dim), or None; errors put `name` before the names of arguments."""
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
        """Whether it is the conditioned block: the last one, next to the noise."""
        return index == len(self.blocks) - 1

    def _rotary_emb(self, grid, prefix, device):
        """Rotary angles of the prefix (None without one) and the tokens.

        A caption is as long as the image is wide: position k of L is at k / L of the side of training.
        """
        side = math.sqrt(math.prod(token_grid(self.config.sample_size, self.config.patch_size)))
        words = torch.arange(0 if prefix is None else prefix.shape[1], device=device, dtype=torch.float32)
        words = words / self.config.max_caption_length * side
        return sequence_angles(self.config.attention_head_dim, grid, side, words)

    def _ordered(self, tokens, index):
        """Tokens in the order in which a block reads them, and back: the first and every other block read backwards.

        With an even number of blocks, as in all published models, the deep block reads in raster order.
        """
        return tokens if index % 2 else tokens.flip(1)

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
