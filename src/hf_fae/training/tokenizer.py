"""The trained tokenizer that a later stage builds on."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, AutoencoderRAE, AutoModel

from ..autoencoders.drorae import AutoencoderDRoRAE
from ..autoencoders.fae import AutoencoderFAE
from ..autoencoders.frozen_encoder import FrozenEncoderMixin
from ..autoencoders.pixel_decoder import OverlapHead
from ..latents import LatentAutoencoderMixin, compression_ratio


__all__ = [
    "add_fusion",
    "add_overlap_head",
    "complete_tokenizer",
    "copy_pixel_decoder",
    "load_rae",
    "load_tokenizer",
    "load_trained_fae",
    "read_fusion_type",
    "store_latent_statistics",
]


def load_tokenizer(path: str, **kwargs) -> LatentAutoencoderMixin | AutoencoderKL:
    """A tokenizer of ours, or diffusers' `AutoencoderKL`, in fp32.

    Args:
        path: Hub id or folder.
        kwargs: as `from_pretrained`.

    Raises:
        ValueError: another model.
    """
    vae = AutoModel.from_pretrained(path, **kwargs)
    if not isinstance(vae, (LatentAutoencoderMixin, AutoencoderKL)):
        raise ValueError(f"{path!r} must be a tokenizer of hf_fae or an AutoencoderKL, got a {type(vae).__name__}")
    return vae.float()


def load_trained_fae(path: str, image_encoder: str | None, resolution: int) -> AutoencoderFAE:
    """An FAE in fp32 with its frozen encoder.

    Args:
        path: Hub id or folder.
        image_encoder: Hub id or folder of the encoder, where the FAE comes without it.
        resolution: side of the training pictures.

    Raises:
        ValueError: the FAE was trained on pictures of another size.
    """
    model = AutoencoderFAE.from_pretrained(path)
    complete_tokenizer(model, image_encoder, resolution)
    return model.float()


def copy_pixel_decoder(path: str, model: AutoencoderFAE) -> None:
    """Give `model` the pixel decoder of another FAE on the same features: stage Ib serves all of them (section 4.2).

    Args:
        path: Hub id or folder of the other one.

    Raises:
        ValueError: its pixel decoder has another shape, or its features are standardised otherwise.
    """
    source = AutoencoderFAE.from_pretrained(path, image_encoder=None).float()
    for name in ("features_mean", "features_std"):
        if not torch.allclose(getattr(source, name), getattr(model, name).cpu()):
            raise ValueError(f"pixel_decoder {path!r} was trained on features with another {name} than those of fae")
    shapes = [{name: p.shape for name, p in fae.pixel_decoder.named_parameters()} for fae in (source, model)]
    if shapes[0] != shapes[1]:
        names = (
            "pixel_hidden_size",
            "pixel_num_layers",
            "pixel_num_attention_heads",
            "pixel_head",
            "patch_size",
            "feature_dim",
        )
        theirs, ours = ({name: fae.config[name] for name in names} for fae in (source, model))
        raise ValueError(f"pixel_decoder {path!r} must have the shape of that of fae, {ours}, got {theirs}")
    model.pixel_decoder.load_state_dict(source.pixel_decoder.state_dict())


def add_overlap_head(model: AutoencoderFAE) -> None:
    """Replace a trained linear pixel head by an overlap head that continues its patches; others stay as they are."""
    if model.config.pixel_head == "linear":
        model.pixel_decoder.proj_out = OverlapHead.from_linear(model.pixel_decoder.proj_out)
        model.register_to_config(pixel_head="overlap")


def read_fusion_type(path: str) -> str:
    """The fusion of a saved `AutoencoderDRoRAE`, by its config alone; `"none"` of diffusers' `AutoencoderRAE`.

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
    """An `AutoencoderDRoRAE`, also of diffusers' `AutoencoderRAE`, in fp32 with its frozen encoder.

    Arguments and errors as `load_trained_fae`.
    """
    model = AutoModel.from_pretrained(path)
    if isinstance(model, AutoencoderRAE):
        model = AutoencoderDRoRAE.from_rae(model)
    complete_tokenizer(model, image_encoder, resolution)
    return model.float()


def add_fusion(rae: AutoencoderDRoRAE, fusion_layers: int | None = None, **config) -> AutoencoderDRoRAE:
    """A tokenizer with the encoder and decoder of `rae` and fresh experts: where phase 2 of DRoRAE starts.

    Args:
        rae: with its frozen encoder attached.
        fusion_layers: how many of the deepest layers take part; by default all.
        config: `fusion_weight`, `expert_hidden_size`, `expert_activation` of `AutoencoderDRoRAE`.

    Raises:
        ValueError: more layers than the encoder has, or arguments that `AutoencoderDRoRAE` refuses.
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


def complete_tokenizer(
    vae: LatentAutoencoderMixin | AutoencoderKL, image_encoder: str | None, resolution: int
) -> None:
    """Make a tokenizer ready to encode training pictures: of a size that fits, with its frozen encoder, if it has one.

    Arguments and errors as `load_trained_fae`.
    """
    if isinstance(vae, LatentAutoencoderMixin):
        if vae.config.sample_size != resolution:
            raise ValueError(f"resolution must be that of the tokenizer, {vae.config.sample_size}, got {resolution}")
        if isinstance(vae, FrozenEncoderMixin) and vae.image_encoder is None:
            vae.load_encoder(image_encoder)
    elif resolution % compression_ratio(vae):
        raise ValueError(f"resolution must be a multiple of {compression_ratio(vae)}, got {resolution}")


def store_latent_statistics(folder: str | Path, mean: torch.Tensor, std: torch.Tensor) -> None:
    """Replace the latent statistics, and nothing else, in the weights of a saved tokenizer.

    A file is whole at any moment, the old one or the new one.

    Raises:
        ValueError: `folder` holds no weights with statistics of this shape.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    values, stored = {"latents_mean": mean, "latents_std": std}, set()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata, names = file.metadata(), values.keys() & set(file.keys())
        if not names:
            continue
        tensors = load_file(path)
        for name in names:
            if values[name].shape != tensors[name].shape:
                raise ValueError(
                    f"{name} in {str(path)!r} has shape {tuple(tensors[name].shape)}, got {tuple(values[name].shape)}"
                )
            tensors[name] = values[name].cpu().float().contiguous()
        save_file(tensors, path.with_suffix(".part"), metadata)
        path.with_suffix(".part").replace(path)
        stored |= names
    if stored != values.keys():
        raise ValueError(f"folder {str(folder)!r} holds no weights with latents_mean and latents_std")
