"""RAE (arXiv 2510.11690) and DRoRAE (arXiv 2605.10780): a frozen encoder's own features as latents.

image -> frozen encoder -> normalised states of its layers -> `fuse` -> latents
latents -> `decoder` -> image

RAE takes the last layer as it is; DRoRAE corrects it a little by all layers.
"""

import copy

import torch
from diffusers import AutoencoderRAE
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import AttentionMixin, FeedForward
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn
from torch.nn import functional as F

from ..encoders import VisionEncoder
from ..latents import MIN_LOGVAR, check_finite
from ..layers.attention import SelfAttention
from ..layers.blocks import BlockStack
from ..layers.positions import SinCosPositions, grid_size, token_grid
from .frozen_encoder import FrozenEncoderMixin


__all__ = ["AutoencoderDRoRAE"]

NORM_EPS = 1e-6  # of the backbones' own final norm, here without its gain and bias
ENERGY_EPS = 1e-6
ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
RAE_EPS = 1e-5  # diffusers adds it to the standard deviations of latents


def backbone_norm(tokens: torch.Tensor) -> torch.Tensor:
    """LN_bb: zero mean and unit variance over the channels of each token."""
    return F.layer_norm(tokens, tokens.shape[-1:], eps=NORM_EPS)


class LayerExpert(nn.Module):
    """What one layer has to say, as a token of the last one: linear, norm, activation, linear (appendix A)."""

    def __init__(self, feature_dim: int, hidden_size: int, activation: str):
        super().__init__()
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.activation = ACTIVATIONS[activation]
        self.proj_out = nn.Linear(hidden_size, feature_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.proj_in(tokens)
        return self.proj_out(self.activation(F.layer_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)))


class LayerFusion(nn.Module):
    """Normalised layer states (B, L, N, C) -> tokens (B, N, C): an expert a layer, weighted anew for each token.

    The weights are the router's raw numbers, of any sign: layers do not compete for them as under a softmax, and may
    count against each other (section 3.2).
    """

    def __init__(self, feature_dim: int, num_layers: int, hidden_size: int, activation: str):
        super().__init__()
        self.experts = nn.ModuleList(LayerExpert(feature_dim, hidden_size, activation) for _ in range(num_layers))
        self.router = nn.Linear(num_layers * feature_dim, num_layers)

    def forward(self, layers: torch.Tensor) -> torch.Tensor:
        weights = self.router(layers.transpose(1, 2).flatten(2))  # (B, N, L)
        mixed = 0
        for index, expert in enumerate(self.experts):
            mixed = mixed + weights[..., index, None] * backbone_norm(expert(layers[:, index]))
        energy = weights.square().sum(-1, keepdim=True)
        # The norm that follows cancels this divisor. It stays, as in the paper: the numbers remain of unit size on
        # the way there, whatever the router gives, and gradients with them.
        return backbone_norm(mixed / (energy + ENERGY_EPS).sqrt())


class DecoderBlock(nn.Module):
    """The block of RAE's decoder, that of MAE: pre-norm, exact GELU, an own width of the feed-forward."""

    def __init__(self, dim: int, heads: int, intermediate_size: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.attn = SelfAttention(dim, heads, dim // heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.ff = FeedForward(dim, inner_dim=intermediate_size, activation_fn="gelu")

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states))
        return hidden_states + self.ff(self.norm2(hidden_states))


class RAEDecoder(BlockStack):
    """Tokens (B, N, C) -> patches (B, 3, h * patch_size, w * patch_size) in the encoder's image normalisation.

    A ViT as in MAE: a class token before the patches, fixed sin-cos positions (published ViT-XL: 415,056,640).
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        num_layers: int,
        heads: int,
        intermediate_size: int,
        patch_size: int,
        grid: tuple[int, int],
    ):
        super().__init__()
        self.patch_size, self.grid = patch_size, grid
        self.proj_in = nn.Linear(feature_dim, hidden_size)
        self.class_token = nn.Parameter(torch.zeros(1, 1, hidden_size))
        self.pos_embed = SinCosPositions(hidden_size, grid, counted=False)
        self.blocks = nn.ModuleList(DecoderBlock(hidden_size, heads, intermediate_size) for _ in range(num_layers))
        self.norm_out = nn.LayerNorm(hidden_size, eps=1e-12)
        self.proj_out = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = self.proj_in(tokens)
        tokens = tokens + self.pos_embed(self.grid, tokens.device).to(tokens.dtype)
        hidden_states = torch.cat([self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1), tokens], dim=1)
        patches = self.proj_out(self.norm_out(self.run_blocks(hidden_states)[:, 1:]))
        # RAE's patches have their colours last, `pixel_shuffle` wants them first.
        patches = patches.unflatten(2, (self.patch_size**2, 3)).transpose(2, 3).flatten(2)
        return F.pixel_shuffle(patches.transpose(1, 2).unflatten(2, self.grid), self.patch_size)


class AutoencoderDRoRAE(FrozenEncoderMixin, AttentionMixin):
    """The tokenizer of RAE and DRoRAE: `encode` gives normalised latents (B, feature_dim, h, w).

    The latents have no spread: `.latent_dist.sample()` is their mode. Their statistics are per element, (C, h, w), so
    that images have to be of `sample_size`.

    Args:
        feature_dim: width of the frozen encoder.
        latent_channels: of the latents, the same.
        sample_size: image side or [height, width], in pixels.
        patch_size: image pixels per latent, along each axis; the encoder sees one of its own patches for each.
        fusion_type: `"experts"` (DRoRAE), `"mean"` of the layers (RAEv2, arXiv 2605.18324), or `"none"` (RAE).
        fusion_layers: how many layers take part, the deepest ones; 1 for `"none"`.
        fusion_weight: beta of z = LN(z_last + beta (z_fused - z_last)), DRoRAE's 0.2; 0 is RAE. With `"mean"` 1 leaves
            the mean alone.
        expert_hidden_size, expert_activation: of the experts; `"gelu"`, `"silu"` or `"relu"`.
        decoder_hidden_size, decoder_num_layers, decoder_num_attention_heads, decoder_intermediate_size: the decoder,
            by default RAE's ViT-XL.
        image_encoder_id, image_encoder_revision, image_encoder_config: where the frozen encoder comes from, and its
            `VisionEncoder.config`.
    """

    _supports_gradient_checkpointing = True
    _supports_group_offloading = True
    _no_split_modules = ["DecoderBlock", "LayerExpert"]
    _repeated_blocks = ["DecoderBlock"]
    _skip_layerwise_casting_patterns = ["pos_embed", "norm", "image_encoder"]

    @register_to_config
    def __init__(
        self,
        feature_dim: int = 768,
        latent_channels: int = 768,
        sample_size: int | list[int] = 256,
        patch_size: int = 16,
        fusion_type: str = "experts",
        fusion_layers: int = 12,
        fusion_weight: float = 0.2,
        expert_hidden_size: int = 3072,
        expert_activation: str = "gelu",
        decoder_hidden_size: int = 1152,
        decoder_num_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        image_encoder_id: str | None = None,
        image_encoder_revision: str | None = None,
        image_encoder_config: dict | None = None,
    ):
        super().__init__()
        if latent_channels != feature_dim:
            raise ValueError(f"latent_channels must be feature_dim {feature_dim}, got {latent_channels}")
        if fusion_type not in ("experts", "mean", "none"):
            raise ValueError(f"fusion_type must be 'experts', 'mean' or 'none', got {fusion_type!r}")
        if fusion_layers < 1 or (fusion_type == "none" and fusion_layers != 1):
            raise ValueError(f"fusion_layers must be positive, and 1 for fusion_type 'none', got {fusion_layers}")
        if expert_activation not in ACTIVATIONS:
            raise ValueError(f"expert_activation must be one of {list(ACTIVATIONS)}, got {expert_activation!r}")
        if not 0 <= fusion_weight <= 1:
            raise ValueError(f"fusion_weight must be from 0 to 1, got {fusion_weight}")
        if decoder_hidden_size % decoder_num_attention_heads:
            raise ValueError(
                f"decoder_num_attention_heads must divide the width {decoder_hidden_size}, "
                f"got {decoder_num_attention_heads}"
            )
        grid = token_grid(sample_size, patch_size)
        self.fusion = None
        if fusion_type == "experts":
            self.fusion = LayerFusion(feature_dim, fusion_layers, expert_hidden_size, expert_activation)
        self.decoder = RAEDecoder(
            feature_dim,
            decoder_hidden_size,
            decoder_num_layers,
            decoder_num_attention_heads,
            decoder_intermediate_size,
            patch_size,
            grid,
        )
        self.image_encoder = None
        self.init_latents(feature_dim, *grid, tile=None)

    @classmethod
    def from_encoder(cls, image_encoder: VisionEncoder, **config) -> "AutoencoderDRoRAE":
        """A fresh tokenizer for `image_encoder`, with it attached; `config` are further arguments of `__init__`."""
        width = image_encoder.hidden_size
        config = {
            "feature_dim": width,
            "latent_channels": width,
            "image_encoder_config": image_encoder.config,
            "image_encoder_id": image_encoder.repo_id,
            "image_encoder_revision": image_encoder.revision,
            **config,
        }
        fused = config.get("fusion_type") != "none"
        config.setdefault("fusion_layers", image_encoder.num_hidden_layers if fused else 1)
        model = cls(**config)
        model.attach_encoder(image_encoder)
        return model

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.patch_size

    @property
    def feature_shape(self) -> tuple[int, ...]:
        rows, columns = self.decoder.grid
        return (self.config.fusion_layers, rows * columns, self.config.feature_dim)

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """As `LatentAutoencoderMixin.latent_size`; there are statistics for images of `sample_size` alone."""
        self._check_sides("height and width must be", (height, width), grid_size(self.config.sample_size))
        return self.decoder.grid

    def encoding_parts(self) -> tuple[list[torch.Tensor], object]:
        config = self.config
        parameters = [] if self.fusion is None else list(self.fusion.parameters())
        return parameters, [config.fusion_type, config.fusion_layers, config.fusion_weight, config.expert_activation]

    @apply_forward_hook
    @torch.no_grad()
    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Normalised states of the fused layers of images (B, 3, H, W) in [-1, 1]: (B, L, N, C), the last one last.

        Raises:
            ValueError: no encoder is attached, or these are no images of `sample_size`.
        """
        self.check_encoder()
        self.check_images(pixel_values, multiple_of=self.config.patch_size)
        size = grid_size(self.config.sample_size)
        if tuple(pixel_values.shape[2:]) != size:
            raise ValueError(
                f"pixel_values must have images of {size[0]} x {size[1]}, for which there are latent statistics, "
                f"got {pixel_values.shape[2]} x {pixel_values.shape[3]}"
            )
        grid = self.decoder.grid
        count = self.config.fusion_layers
        if count > self.image_encoder.num_hidden_layers:
            raise ValueError(
                f"image_encoder must have fusion_layers {count}, got {self.image_encoder.num_hidden_layers} layers"
            )
        outputs = self.image_encoder(pixel_values, grid, output_hidden_states=count > 1, final_norm="plain")
        last = outputs.last_hidden_state
        earlier = outputs.hidden_states[-count:-1] if count > 1 else ()
        return torch.stack([*(backbone_norm(state) for state in earlier), last], dim=1), grid

    def last_features(self, features: torch.Tensor) -> torch.Tensor:
        """Of what `extract_features` gives the last layer (B, N, C): what `decode_features` comes close to."""
        return features[:, -1]

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Unnormalised latents as tokens (B, N, C) of the layers' states (B, L, N, C), see `extract_features`."""
        last = features[:, -1]
        if self.config.fusion_type == "none" or self.config.fusion_weight == 0:
            return last
        fused = self.fusion(features) if self.fusion is not None else backbone_norm(features.mean(1))
        # Under autocast the experts answer in half precision.
        return backbone_norm(torch.lerp(last, fused.to(last.dtype), self.config.fusion_weight))

    @apply_forward_hook
    def encode_features(
        self, features: torch.Tensor, grid: tuple[int, int] | None = None, return_dict: bool = True
    ) -> AutoencoderKLOutput | tuple:
        """The normalised latents of the layers' states (B, L, N, C), as a posterior without spread.

        Raises:
            ValueError: states of other layers, width or grid.
        """
        shape = self.feature_shape
        if features.ndim != 4 or tuple(features.shape[1:]) != shape or grid not in (None, self.decoder.grid):
            raise ValueError(
                f"features must have shape (batch, {', '.join(map(str, shape))}) on a grid of {self.decoder.grid}, "
                f"got {tuple(features.shape)} on {grid}"
            )
        latents = self.fuse(features.to(self.dtype)).transpose(1, 2).unflatten(2, self.decoder.grid).float()
        latents = (latents - self.latents_mean.to(latents.device)) / self.latents_std.to(latents.device)
        moments = torch.cat([latents, torch.full_like(latents, MIN_LOGVAR)], dim=1)
        posterior = DiagonalGaussianDistribution(moments.to(features.dtype), deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def encode(self, pixel_values: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple:
        """The posterior, without spread, of the normalised latents of images (B, 3, H, W) in [-1, 1].

        Raises:
            ValueError: as `extract_features`, or images that are not finite.
        """
        check_finite("pixel_values", pixel_values)
        parts = pixel_values.split(1 if self.use_slicing else len(pixel_values))
        posteriors = [self.encode_features(*self.extract_features(part)).latent_dist for part in parts]
        moments = torch.cat([posterior.parameters for posterior in posteriors])
        posterior = DiagonalGaussianDistribution(moments, deterministic=True)
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    @apply_forward_hook
    def decode(
        self, latents: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Images (B, 3, H, W), about [-1, 1] and unclamped, of normalised latents (B, feature_dim, h, w).

        `generator` is accepted as by all diffusers autoencoders; decoding is deterministic.

        Raises:
            ValueError: latents of another shape.
        """
        parts = latents.split(1 if self.use_slicing else max(len(latents), 1))
        sample = torch.cat([self.decode_tokens(self._tokens(part)) for part in parts])
        return DecoderOutput(sample=sample) if return_dict else (sample,)

    @apply_forward_hook
    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """Tokens (B, h * w, feature_dim) in the scale of the encoder's normalised last layer.

        Raises:
            ValueError: latents of another shape.
        """
        return self._tokens(latents)

    def decode_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W), about [-1, 1], of unnormalised latents (B, N, C): the decoder alone."""
        patches = self.decoder(tokens)
        statistics = self.config.image_encoder_config or {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        mean, std = (patches.new_tensor(statistics[name]).view(3, 1, 1) for name in ("image_mean", "image_std"))
        return (patches * std + mean) * 2 - 1

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple:
        """Reconstruct images (B, 3, H, W) in [-1, 1]."""
        return self.decode(self.encode(pixel_values).latent_dist.mode(), return_dict=return_dict)

    def _tokens(self, latents):
        self.check_latents(latents)
        if tuple(latents.shape[2:]) != self.decoder.grid:
            raise ValueError(f"latents must have sides {self.decoder.grid}, got {tuple(latents.shape[2:])}")
        return self.denormalize_latents(latents).to(self.dtype).flatten(2).transpose(1, 2)

    @classmethod
    def from_rae(cls, rae: AutoencoderRAE, **config) -> "AutoencoderDRoRAE":
        """The tokenizer of a diffusers `AutoencoderRAE`: its encoder, decoder and latent statistics.

        Args:
            rae: of 2-D latents without a scaling factor.
            config: further arguments of `__init__`: by default `fusion_type="none"`, which gives its very latents;
                with `"experts"` it is phase 1 of DRoRAE.

        Raises:
            ValueError: latents of another form.
        """
        theirs = rae.config
        if not theirs.reshape_to_2d or theirs.scaling_factor != 1:
            raise ValueError(
                "rae must have reshape_to_2d and scaling_factor 1, "
                f"got {theirs.reshape_to_2d} and {theirs.scaling_factor}"
            )
        mean, std = (buffer.flatten().tolist() for buffer in (rae.encoder_mean, rae.encoder_std))
        image_encoder = VisionEncoder(_with_plain_norm(rae.encoder), theirs.encoder_input_size, mean, std)
        model = cls.from_encoder(
            image_encoder,
            sample_size=rae.decoder_image_size,
            patch_size=theirs.patch_size,
            decoder_hidden_size=theirs.decoder_hidden_size,
            decoder_num_layers=theirs.decoder_num_hidden_layers,
            decoder_num_attention_heads=theirs.decoder_num_attention_heads,
            decoder_intermediate_size=theirs.decoder_intermediate_size,
            **{"fusion_type": "none", **config},
        )
        state = {_ours(name): value for name, value in rae.decoder.state_dict().items()}
        model.decoder.load_state_dict(state)
        shape = model.latents_mean.shape
        # Theirs are added to 1e-5 wherever they divide.
        model.set_latent_statistics(rae._latents_mean.expand(shape), (rae._latents_std + RAE_EPS).expand(shape))
        return _like(model, rae)

    def to_rae(self) -> AutoencoderRAE:
        """The diffusers `AutoencoderRAE` with this encoder, decoder and these statistics; the fusion is left behind.

        Raises:
            ValueError: no encoder is attached, or one of a family that `AutoencoderRAE` does not know; or the images
                are not square.
        """
        self.check_encoder()
        config, encoder = self.config, self.image_encoder
        types = {"dinov2_with_registers": "dinov2", "siglip_vision_model": "siglip2", "vit_mae": "mae"}
        kind = types.get(encoder.model.config.model_type)
        if kind is None:
            raise ValueError(f"image_encoder must be one of {list(types)}, got {encoder.model.config.model_type!r}")
        if not isinstance(config.sample_size, int):
            raise ValueError(f"sample_size must be one side for AutoencoderRAE, got {config.sample_size}")
        grid = self.decoder.grid[0]
        rae = AutoencoderRAE(
            encoder_type=kind,
            encoder_hidden_size=config.feature_dim,
            encoder_patch_size=encoder.patch_size,
            encoder_num_hidden_layers=encoder.num_hidden_layers,
            encoder_input_size=grid * encoder.patch_size,
            encoder_norm_mean=encoder.image_mean,
            encoder_norm_std=encoder.image_std,
            patch_size=config.patch_size,
            decoder_hidden_size=config.decoder_hidden_size,
            decoder_num_hidden_layers=config.decoder_num_layers,
            decoder_num_attention_heads=config.decoder_num_attention_heads,
            decoder_intermediate_size=config.decoder_intermediate_size,
            latents_mean=self.latents_mean,
            latents_std=self.latents_std - RAE_EPS,
        )
        state = encoder.model.state_dict()
        rae.encoder.load_state_dict({name: state[name] for name in rae.encoder.state_dict()})
        names = {_ours(name): name for name in rae.decoder.state_dict()}
        rae.decoder.load_state_dict({names[name]: value for name, value in self.decoder.state_dict().items()})
        return _like(rae, self)


# Parts of the names in the decoder of `AutoencoderRAE`, and ours.
RAE_NAMES = {
    "decoder_embed": "proj_in",
    "trainable_cls_token": "class_token",
    "decoder_layers": "blocks",
    "attention.to_": "attn.to_",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "intermediate.dense": "ff.net.0.proj",
    "output.dense": "ff.net.2",
    "decoder_norm": "norm_out",
    "decoder_pred": "proj_out",
}


def _like(model: nn.Module, other: nn.Module) -> nn.Module:
    """`model` on the device and in the dtype and mode of another."""
    model = model if other.dtype == model.dtype else model.to(other.dtype)
    return model.to(other.device).train(other.training)


def _ours(name: str) -> str:
    for theirs, ours in RAE_NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _with_plain_norm(encoder: nn.Module) -> nn.Module:
    """A copy of the encoder of an `AutoencoderRAE`, whose final norm has a gain of 1 and a bias of 0, not none."""
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is None:
            weight = next(encoder.parameters())
            module.weight = nn.Parameter(weight.new_ones(module.normalized_shape))
            module.bias = nn.Parameter(weight.new_zeros(module.normalized_shape))
    return encoder
