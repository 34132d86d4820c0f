"""RAE's tokenizer from and to diffusers' own class, `AutoencoderRAE`."""

import copy

from diffusers import AutoencoderRAE
from torch import nn

from ..encoders import VisionEncoder


__all__ = ["DiffusersRAEMixin"]

RAE_EPS = 1e-5  # diffusers adds it to the standard deviations of latents
# Encoders that `AutoencoderRAE` supports: transformers' model type and diffusers' name.
ENCODER_TYPES = {"dinov2_with_registers": "dinov2", "siglip_vision_model": "siglip2", "vit_mae": "mae"}
# Parts of the names in the decoder of `AutoencoderRAE`, and ours.
NAMES = {
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


class DiffusersRAEMixin:
    """Conversion from and to diffusers' `AutoencoderRAE`, for `AutoencoderDRoRAE`."""

    @classmethod
    def from_rae(cls, rae: AutoencoderRAE, **config) -> "DiffusersRAEMixin":
        """The tokenizer of a diffusers `AutoencoderRAE`: its encoder, decoder and latent statistics.

        Args:
            rae: of 2-D latents without a scaling factor.
            config: further arguments of `__init__`: by default `fusion_type="none"`, which keeps its latents; with
                `"experts"` it is phase 1 of DRoRAE.

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
        # diffusers adds 1e-5 to its standard deviations wherever it divides by them.
        model.set_latent_statistics(rae._latents_mean.expand(shape), (rae._latents_std + RAE_EPS).expand(shape))
        return _like(model, rae)

    def to_rae(self) -> AutoencoderRAE:
        """The diffusers `AutoencoderRAE` with this encoder, decoder and these statistics; a fusion is left out.

        Raises:
            ValueError: no encoder is attached, or one of a family that `AutoencoderRAE` does not support; or the
                images are not square.
        """
        self.check_encoder()
        config, encoder = self.config, self.image_encoder
        kind = ENCODER_TYPES.get(encoder.model.config.model_type)
        if kind is None:
            raise ValueError(
                f"image_encoder must be one of {list(ENCODER_TYPES)}, got {encoder.model.config.model_type!r}"
            )
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


def _like(model: nn.Module, other: nn.Module) -> nn.Module:
    """`model` on the device and in the dtype and mode of another."""
    model = model if other.dtype == model.dtype else model.to(other.dtype)
    return model.to(other.device).train(other.training)


def _ours(name: str) -> str:
    for theirs, ours in NAMES.items():
        name = name.replace(theirs, ours)
    return name


def _with_plain_norm(encoder: nn.Module) -> nn.Module:
    """A copy of the encoder of an `AutoencoderRAE` whose final norm has gain 1 and bias 0 instead of none."""
    encoder = copy.deepcopy(encoder)
    for module in encoder.modules():
        if isinstance(module, nn.LayerNorm) and module.weight is None:
            weight = next(encoder.parameters())
            module.weight = nn.Parameter(weight.new_ones(module.normalized_shape))
            module.bias = nn.Parameter(weight.new_zeros(module.normalized_shape))
    return encoder
