"""Trained tokenizers as the start of a training stage: loaded, completed, and extended by what the stage trains."""

import torch
from diffusers import AutoencoderKL, AutoencoderRAE, AutoModel

from ..latents import LatentAutoencoderMixin, compression_ratio
from .drorae import AutoencoderDRoRAE
from .fae import AutoencoderFAE
from .frozen_encoder import FrozenEncoderMixin
from .pixel_decoder import OverlapHead


__all__ = [
    "add_fusion",
    "add_overlap_head",
    "complete_tokenizer",
    "copy_pixel_decoder",
    "load_rae",
    "load_trained_fae",
    "read_fusion_type",
]

# What determines the shape of an FAE's pixel decoder.
PIXEL_DECODER_KEYS = (
    "pixel_hidden_size",
    "pixel_num_layers",
    "pixel_num_attention_heads",
    "pixel_head",
    "patch_size",
    "feature_dim",
)


def complete_tokenizer(
    vae: LatentAutoencoderMixin | AutoencoderKL, image_encoder: str | None, resolution: int
) -> None:
    """Make a tokenizer ready to encode training images: check its size and attach its frozen encoder, if it has one.

    Args:
        image_encoder: Hub id or folder of the encoder, for a tokenizer saved without it; by default the one that its
            config names.
        resolution: side of the training images.

    Raises:
        ValueError: the tokenizer was made for images of another size.
    """
    if isinstance(vae, LatentAutoencoderMixin):
        if vae.config.sample_size != resolution:
            raise ValueError(f"resolution must be that of the tokenizer, {vae.config.sample_size}, got {resolution}")
        if isinstance(vae, FrozenEncoderMixin) and vae.image_encoder is None:
            vae.load_encoder(image_encoder)
    elif resolution % compression_ratio(vae):
        raise ValueError(f"resolution must be a multiple of {compression_ratio(vae)}, got {resolution}")


def load_trained_fae(path: str, image_encoder: str | None, resolution: int) -> AutoencoderFAE:
    """An FAE in fp32 with its frozen encoder.

    Args:
        path: Hub id or folder.
        image_encoder, resolution: as in `complete_tokenizer`.

    Raises:
        ValueError: as `complete_tokenizer`.
    """
    model = AutoencoderFAE.from_pretrained(path)
    complete_tokenizer(model, image_encoder, resolution)
    return model.float()


def copy_pixel_decoder(path: str, model: AutoencoderFAE) -> None:
    """Give `model` the pixel decoder of another FAE on the same features: stage Ib serves them all (section 4.2).

    Args:
        path: Hub id or folder of the other FAE.

    Raises:
        ValueError: its pixel decoder has another shape, or its features are standardised differently.
    """
    source = AutoencoderFAE.from_pretrained(path, image_encoder=None).float()
    for name in ("features_mean", "features_std"):
        if not torch.allclose(getattr(source, name), getattr(model, name).cpu()):
            raise ValueError(f"pixel_decoder {path!r} was trained on features with another {name} than those of fae")
    shapes = [{name: p.shape for name, p in fae.pixel_decoder.named_parameters()} for fae in (source, model)]
    if shapes[0] != shapes[1]:
        theirs, ours = ({name: fae.config[name] for name in PIXEL_DECODER_KEYS} for fae in (source, model))
        raise ValueError(f"pixel_decoder {path!r} must have the shape of that of fae, {ours}, got {theirs}")
    model.pixel_decoder.load_state_dict(source.pixel_decoder.state_dict())


def add_overlap_head(model: AutoencoderFAE) -> None:
    """Replace a trained linear pixel head by an overlap head that continues its patches; others stay unchanged."""
    if model.config.pixel_head == "linear":
        model.pixel_decoder.proj_out = OverlapHead.from_linear(model.pixel_decoder.proj_out)
        model.register_to_config(pixel_head="overlap")


def read_fusion_type(path: str) -> str:
    """The fusion of a saved `AutoencoderDRoRAE`, from its config alone; `"none"` for diffusers' `AutoencoderRAE`.

    Args:
        path: Hub id or folder.

    Raises:
        ValueError: another model.
    """
    config = AutoencoderDRoRAE.load_config(path)
    name = config.get("_class_name")
    if name not in ("AutoencoderDRoRAE", "AutoencoderRAE"):
        raise ValueError(f"tokenizer must be an AutoencoderDRoRAE or AutoencoderRAE, got {name} in {path!r}")
    return config.get("fusion_type", "none")


def load_rae(path: str, image_encoder: str | None, resolution: int) -> AutoencoderDRoRAE:
    """An `AutoencoderDRoRAE`, also from diffusers' `AutoencoderRAE`, in fp32 with its frozen encoder.

    Arguments and errors as in `load_trained_fae`.
    """
    model = AutoModel.from_pretrained(path)
    if isinstance(model, AutoencoderRAE):
        model = AutoencoderDRoRAE.from_rae(model)
    complete_tokenizer(model, image_encoder, resolution)
    return model.float()


def add_fusion(rae: AutoencoderDRoRAE, fusion_layers: int | None = None, **config) -> AutoencoderDRoRAE:
    """A tokenizer with the encoder and decoder of `rae` and untrained experts: the start of DRoRAE's phase 2.

    Args:
        rae: with its frozen encoder attached.
        fusion_layers: number of the deepest layers to fuse; by default all.
        config: `fusion_weight`, `expert_hidden_size`, `expert_activation` of `AutoencoderDRoRAE`.

    Raises:
        ValueError: more layers than the encoder has, or arguments that `AutoencoderDRoRAE` does not accept.
    """
    available = rae.image_encoder.num_hidden_layers
    fusion_layers = available if fusion_layers is None else fusion_layers
    if fusion_layers > available:
        raise ValueError(f"fusion_layers must be at most {available}, the layers of the encoder, got {fusion_layers}")
    kept = {name: value for name, value in rae.config.items() if not name.startswith("_")}
    model = AutoencoderDRoRAE(**{**kept, "fusion_type": "experts", "fusion_layers": fusion_layers, **config})
    model.decoder.load_state_dict(rae.decoder.state_dict())
    model.attach_encoder(rae.image_encoder)
    return model
