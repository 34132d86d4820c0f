"""MAETok (arXiv 2502.03444): a plain 1-D autoencoder that learns as a masked autoencoder does.

image -> patches, some of them replaced by a mask token, and learned latent tokens -> `encoder` -> the latent tokens
latent tokens, and a mask token in the place of every patch -> `decoder` -> image

In training, shallow auxiliary decoders tell from the same latents what the masked patches look like to others: HOG,
DINOv2, SigLIP.
"""

from dataclasses import dataclass

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional as F

from ..latents import MIN_LOGVAR
from ..layers.attention import SelfAttention
from ..layers.blocks import BlockStack, TransformerBlock, feed_forward, init_vit_weights
from ..layers.norms import normalization
from ..layers.positions import LearnedRotary, grid_size, rotary_angles, token_grid
from .pixel_tokenizer import PixelTokenizerMixin, check_heads


__all__ = ["CAPTION", "AutoencoderMAETok", "AutoencoderMAETokOutput"]

LAYER_SCALE = 1e-5  # initial value, as in DINOv2's ViT, whose shape the networks have
ROPE_TYPES = ("axial", "learned")
DECODER_TYPES = ("plain", "modulated")
CAPTION = "caption"  # name of the auxiliary decoder of words


class ModulatedBlock(nn.Module):
    """The block of the released decoders: the latent tokens, which come last, are told again what they are.

    Their normed activations become x * scale + shift, both computed from the raw latents (B, L, latent_channels). At
    first both are 0.
    """

    def __init__(self, dim: int, heads: int, latent_channels: int):
        super().__init__()
        self.norm1 = normalization("layer_norm", dim, elementwise_affine=False)
        self.attn = SelfAttention(dim, heads, dim // heads)
        self.norm2 = normalization("layer_norm", dim, elementwise_affine=False)
        self.ff = feed_forward("exact_gelu", dim)
        self.modulation = nn.Linear(latent_channels, 4 * dim)

    def forward(self, hidden_states, rotary_emb, latents):
        shift_attn, scale_attn, shift_ff, scale_ff = self.modulation(F.silu(latents)).chunk(4, dim=-1)
        normed = _modulate_last(self.norm1(hidden_states), shift_attn, scale_attn)
        hidden_states = hidden_states + self.attn(normed, rotary_emb)
        return hidden_states + self.ff(_modulate_last(self.norm2(hidden_states), shift_ff, scale_ff))


def _modulate_last(tokens, shift, scale):
    others, last = tokens.split([tokens.shape[1] - shift.shape[1], shift.shape[1]], dim=1)
    return torch.cat([others, torch.addcmul(shift, last, scale)], dim=1)


class LatentTokenStack(BlockStack):
    """Blocks on patches and latent tokens: patches have rotary positions, latent tokens learned ones that are added.

    Args:
        latent_channels: of `ModulatedBlock`s; None for plain ones.
    """

    def __init__(
        self,
        dim: int,
        num_layers: int,
        heads: int,
        num_latent_tokens: int,
        rope_type: str,
        rope_theta: float,
        latent_channels: int | None = None,
    ):
        super().__init__()
        self.head_dim, self.rope_theta = dim // heads, rope_theta
        self.mask_token = nn.Parameter(0.02 * torch.randn(dim))
        self.latent_positions = nn.Parameter(torch.empty(num_latent_tokens, dim))
        self.rotary = None
        if rope_type == "learned":
            self.rotary = LearnedRotary(num_layers, heads, dim // heads, rope_theta)
        if latent_channels is None:
            blocks = [
                TransformerBlock(dim, heads, "layer_norm", "exact_gelu", layer_scale=LAYER_SCALE)
                for _ in range(num_layers)
            ]
        else:
            blocks = [ModulatedBlock(dim, heads, latent_channels) for _ in range(num_layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = normalization("layer_norm", dim, elementwise_affine=latent_channels is None)

    def init_weights(self) -> None:
        """To be called by subclasses when all of their parts are there."""
        init_vit_weights(self)
        nn.init.trunc_normal_(self.latent_positions, std=0.02)
        for block in self.blocks:
            if isinstance(block, ModulatedBlock):
                nn.init.zeros_(block.modulation.weight)

    def run(
        self,
        patches: torch.Tensor,
        latents: torch.Tensor,
        grid: tuple[int, int],
        *inputs: torch.Tensor,
        prefix: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """A prefix, patches on a grid and latents as one sequence (B, P + N + L, dim); `inputs` go to the blocks."""
        latents = latents + self.latent_positions.to(latents.dtype)
        tokens = [patches, latents] if prefix is None else [prefix, patches, latents]
        if self.rotary is None:
            angles = rotary_angles(self.head_dim, grid, patches.device, self.rope_theta)
            cos, sin = (values[None, :, None] for values in angles)
        else:
            cos, sin = self.rotary(grid)
        # Axes are ..., tokens, heads, pairs. What is no patch stays as it is: angle 0.
        around = (0, 0, 0, 0, 0 if prefix is None else prefix.shape[1], latents.shape[1])
        rotary_emb = (F.pad(cos, around, value=1.0), F.pad(sin, around))
        if self.rotary is not None:  # of each layer
            rotary_emb = list(zip(*rotary_emb, strict=True))
        return self.run_blocks(torch.cat(tokens, dim=1), rotary_emb, *inputs)


class MAETokEncoder(LatentTokenStack):
    """Images (B, 3, H, W) -> latent tokens (B, L, latent_channels).

    Patches in `patch_mask` (B, N) are replaced by the mask token; none is dropped, and latent tokens are never masked.
    """

    def __init__(self, dim: int, *stack, num_latent_tokens: int, latent_channels: int, patch_size: int, **rope):
        super().__init__(dim, *stack, num_latent_tokens=num_latent_tokens, **rope)
        self.proj_in = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)
        self.class_token = nn.Parameter(0.02 * torch.randn(dim))
        self.latent_tokens = nn.Parameter(0.02 * torch.randn(num_latent_tokens, dim))
        self.proj_out = nn.Linear(dim, latent_channels)
        self.init_weights()

    def forward(self, pixel_values: torch.Tensor, patch_mask: torch.Tensor | None = None) -> torch.Tensor:
        patches = self.proj_in(pixel_values)
        grid = tuple(patches.shape[2:])
        patches = patches.flatten(2).transpose(1, 2).contiguous()
        if patch_mask is not None:
            patches = torch.where(patch_mask[..., None], self.mask_token.to(patches.dtype), patches)
        learned = (self.class_token[None], self.latent_tokens)
        prefix, latents = (part.to(patches.dtype).expand(len(patches), -1, -1) for part in learned)
        hidden_states = self.run(patches, latents, grid, prefix=prefix)
        return self.proj_out(self.norm_out(hidden_states[:, -latents.shape[1] :]))


class MAETokDecoder(LatentTokenStack):
    """Latent tokens (B, L, latent_channels) -> a vector (B, h * w, out_channels) for every place of a grid.

    One mask token stands in all places, and only their rotary positions tell them apart (the reference code; the paper
    speaks of one token for each place).
    """

    def __init__(
        self,
        dim: int,
        *stack,
        latent_channels: int,
        grid: tuple[int, int],
        out_channels: int,
        decoder_type: str,
        **kwargs,
    ):
        modulation = {"latent_channels": latent_channels if decoder_type == "modulated" else None}
        super().__init__(dim, *stack, **modulation, **kwargs)
        self.grid, self.decoder_type = grid, decoder_type
        self.proj_in = nn.Linear(latent_channels, dim)
        self.proj_out = nn.Linear(dim, out_channels)
        self.init_weights()

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(latents)
        places = self.grid[0] * self.grid[1]
        masks = self.mask_token.to(tokens.dtype).expand(len(tokens), places, -1)
        inputs = [latents] if self.decoder_type == "modulated" else []
        hidden_states = self.run(masks, tokens, self.grid, *inputs)
        # In the released weights the last norm modulates as well, but only the latent tokens, which end here.
        return self.proj_out(self.norm_out(hidden_states[:, :places]))


@dataclass
class AutoencoderMAETokOutput(BaseOutput):
    """What a pass through MAETok gives: images (B, 3, H, W), about [-1, 1], and what else is told from the latents.

    Attributes:
        predictions: with `predict_targets` those of the auxiliary decoders by name, a vector for each patch
            (B, N, channels); `"caption"`: logits (B, caption_length, caption_vocab_size).
    """

    sample: torch.Tensor
    predictions: dict[str, torch.Tensor] | None = None


class AutoencoderMAETok(PixelTokenizerMixin):
    """The tokenizer of MAETok: `encode` gives normalised latents (B, latent_channels, 1, num_latent_tokens).

    The latents have no spread: `.latent_dist.sample()` is their mode. There are as many whatever the size of the
    images. The defaults are the paper's model for 256 px without its auxiliary decoders, ViT-B in both halves.

    Args:
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per patch, along each axis.
        num_latent_tokens, latent_channels: how many latents there are, and their channels.
        encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads: depth and width of the encoder.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads: of the decoder.
        decoder_type: `"plain"` (the paper), or `"modulated"`: the blocks of the released weights.
        rope_type: rotary positions `"axial"`, or `"learned"` for each layer and head as in the released weights.
        rope_theta: their base; 10 in the released weights.
        auxiliary_targets: names and widths of what auxiliary decoders predict for each patch, such as
            `{"hog": 108, "dinov2": 1024, "siglip": 1152}`. They are trained and saved with the model; nothing but
            training needs them, see `remove_auxiliary_decoders`.
        auxiliary_hidden_size, auxiliary_num_layers, auxiliary_num_attention_heads: their depth and width.
        caption_vocab_size, caption_length: one more of them, `"caption"`, predicts so many token ids of the image's
            caption; None for none.

    Raises:
        ValueError: sizes that do not divide, an unknown `rope_type` or `decoder_type`, a target named `"caption"`, or
            only one of `caption_vocab_size` and `caption_length`.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["TransformerBlock", "ModulatedBlock"]
    _repeated_blocks = ["TransformerBlock", "ModulatedBlock"]
    _skip_layerwise_casting_patterns = ["norm", "rotary"]
    _keep_in_fp32_modules = ["latents_mean", "latents_std", "rotary"]  # rounded frequencies would be others

    @register_to_config
    def __init__(
        self,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        num_latent_tokens: int = 128,
        latent_channels: int = 32,
        encoder_hidden_size: int = 768,
        encoder_num_layers: int = 12,
        encoder_num_attention_heads: int = 12,
        decoder_hidden_size: int = 768,
        decoder_num_layers: int = 12,
        decoder_num_attention_heads: int = 12,
        decoder_type: str = "plain",
        rope_type: str = "axial",
        rope_theta: float = 100.0,
        auxiliary_targets: dict[str, int] | None = None,
        auxiliary_hidden_size: int = 192,
        auxiliary_num_layers: int = 3,
        auxiliary_num_attention_heads: int = 3,
        caption_vocab_size: int | None = None,
        caption_length: int | None = None,
    ):
        super().__init__()
        for part, width, heads in (
            ("encoder", encoder_hidden_size, encoder_num_attention_heads),
            ("decoder", decoder_hidden_size, decoder_num_attention_heads),
            ("auxiliary", auxiliary_hidden_size, auxiliary_num_attention_heads),
        ):
            check_heads(part, width, heads)
        for name, value, known in (
            ("decoder_type", decoder_type, DECODER_TYPES),
            ("rope_type", rope_type, ROPE_TYPES),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
        targets = dict(auxiliary_targets or {})
        if CAPTION in targets:
            raise ValueError(f"auxiliary_targets must not be named {CAPTION!r}, got {list(targets)}")
        if (caption_vocab_size is None) != (caption_length is None):
            raise ValueError(
                "caption_vocab_size and caption_length must be given together, "
                f"got {caption_vocab_size} and {caption_length}"
            )
        grid = token_grid(sample_size, patch_size)
        rope = {"num_latent_tokens": num_latent_tokens, "rope_type": rope_type, "rope_theta": rope_theta}
        common = {"latent_channels": latent_channels, **rope}
        self.encoder = MAETokEncoder(
            encoder_hidden_size, encoder_num_layers, encoder_num_attention_heads, patch_size=patch_size, **common
        )
        self.decoder = MAETokDecoder(
            decoder_hidden_size,
            decoder_num_layers,
            decoder_num_attention_heads,
            grid=grid,
            out_channels=3 * patch_size**2,
            decoder_type=decoder_type,
            **common,
        )
        places = {name: (grid, channels) for name, channels in targets.items()}
        if caption_vocab_size is not None:
            places[CAPTION] = ((1, caption_length), caption_vocab_size)
        self.auxiliary_decoders = nn.ModuleDict()
        for name, (cells, channels) in places.items():
            self.auxiliary_decoders[name] = MAETokDecoder(
                auxiliary_hidden_size,
                auxiliary_num_layers,
                auxiliary_num_attention_heads,
                grid=cells,
                out_channels=channels,
                decoder_type=decoder_type,
                **common,
            )
        self.init_latent_statistics(latent_channels, 1, 1, tile=None)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `PixelTokenizerMixin.latent_size`: always (1, num_latent_tokens)."""
        super().latent_size(height, width)
        return 1, self.config.num_latent_tokens

    def image_size(self, rows: int, columns: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.image_size`: always `config.sample_size`."""
        return grid_size(self.config.sample_size)

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        settings = [config.encoder_num_attention_heads, config.rope_type, config.rope_theta]
        return list(self.encoder.parameters()), settings

    def encode_moments(self, pixel_values: torch.Tensor) -> torch.Tensor:
        latents = self.encoder(pixel_values.to(self.dtype)).transpose(1, 2)[:, :, None]
        return torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        return DiagonalGaussianDistribution(super().posterior(pixel_values).parameters, deterministic=True)

    def decode_raw(self, latents: torch.Tensor) -> torch.Tensor:
        return self._to_image(self.decoder(latents.flatten(2).transpose(1, 2)))

    def remove_auxiliary_decoders(self) -> None:
        """Drop what only training needs: for the second stage, which tunes the decoder alone, and to publish."""
        self.auxiliary_decoders = nn.ModuleDict()
        self.register_to_config(auxiliary_targets=None, caption_vocab_size=None, caption_length=None)

    def forward(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None = None,
        predict_targets: bool = False,
        return_dict: bool = True,
    ) -> AutoencoderMAETokOutput | tuple:
        """Reconstruct images, as in training from what is left of them.

        Args:
            pixel_values: images (B, 3, H, W) in [-1, 1], of `config.sample_size`.
            patch_mask: (B, N) bool, True for patches, in raster order, that the encoder does not get to see.
            predict_targets: run the auxiliary decoders as well.
            return_dict: return an `AutoencoderMAETokOutput` instead of a tuple.

        Raises:
            ValueError: images of another size, another mask, or `predict_targets` without auxiliary decoders.
        """
        self.check_size(pixel_values)
        places = (len(pixel_values), self.grid[0] * self.grid[1])
        if patch_mask is not None and (patch_mask.dtype != torch.bool or tuple(patch_mask.shape) != places):
            raise ValueError(
                f"patch_mask must be bool of shape {places}, got {patch_mask.dtype} of {tuple(patch_mask.shape)}"
            )
        if predict_targets and not self.auxiliary_decoders:
            raise ValueError("predict_targets must be False for a model without auxiliary decoders, got True")
        latents = self.encoder(pixel_values.to(self.dtype), patch_mask)
        sample = self._to_image(self.decoder(latents))
        if not predict_targets:
            return AutoencoderMAETokOutput(sample) if return_dict else (sample,)
        predictions = {name: decoder(latents) for name, decoder in self.auxiliary_decoders.items()}
        return AutoencoderMAETokOutput(sample, predictions) if return_dict else (sample, predictions)

    def _to_image(self, patches):
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.config.patch_size)
