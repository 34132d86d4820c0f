"""One interface to every tokenizer: those of hf_fae, diffusers' `AutoencoderKL`, and published ones by their names."""

from typing import Any

import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from diffusers.models.autoencoders.vae import DecoderOutput
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import nn

from .convert.published import load_published
from .latents import LatentAutoencoderMixin, decode_latents, encode_images, latent_size
from .loading import open_tokenizer
from .zoo import ZOO


__all__ = ["AutoVisualTokenizer", "VisualTokenizer"]


class VisualTokenizer(nn.Module):
    """A tokenizer whose latents have zero mean and unit variance over its training images, whatever its class.

    Args:
        vae: the tokenizer; a frozen encoder is needed to encode only.
    """

    def __init__(self, vae: LatentAutoencoderMixin | AutoencoderKL):
        super().__init__()
        self.vae = vae

    def encode(self, pixel_values: torch.Tensor) -> AutoencoderKLOutput:
        """The posterior of the normalised latents of images (B, 3, H, W) in [-1, 1]: `.latent_dist`.

        Raises:
            ValueError: images that the tokenizer does not support, or it has no frozen encoder and needs one.
        """
        return AutoencoderKLOutput(latent_dist=encode_images(self.vae, pixel_values))

    def decode(self, latents: torch.Tensor) -> DecoderOutput:
        """Images `.sample` (B, 3, H, W), about [-1, 1], from normalised latents (B, C, h, w).

        Raises:
            ValueError: latents that the tokenizer does not support.
        """
        return DecoderOutput(sample=decode_latents(self.vae, latents))

    def decode_features(self, latents: torch.Tensor) -> torch.Tensor:
        """The frozen encoder's features (B, N, feature_dim) from normalised latents, where a tokenizer decodes them.

        Raises:
            ValueError: it does not.
        """
        if not hasattr(self.vae, "decode_features"):
            raise ValueError(f"decode_features requires a tokenizer of features, got a {type(self.vae).__name__}")
        return self.vae.decode_features(latents)

    def latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        """Channels, rows and columns of the latents of images of this size; a 1-D tokenizer has one row.

        Raises:
            ValueError: a size that the tokenizer does not support.
        """
        return self.vae.config.latent_channels, *latent_size(self.vae, height, width)


class AutoVisualTokenizer:
    """Opens any tokenizer as a [`VisualTokenizer`]."""

    def __init__(self):
        raise OSError("AutoVisualTokenizer is made by AutoVisualTokenizer.from_pretrained(name)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        image_encoder: str | None = None,
        dtype: torch.dtype = torch.float32,
        **kwargs: Any,
    ) -> VisualTokenizer:
        """A tokenizer with its frozen encoder, if it has one.

        Args:
            pretrained_model_name_or_path: a tokenizer of the zoo (`hf-fae zoo`), or the Hub id or folder of a
                tokenizer of hf_fae, of an `AutoencoderKL`, or of a pipeline with one.
            image_encoder: Hub id or folder of the frozen encoder, for a tokenizer saved without it; by default the
                one that its config names.
            dtype: to load in.
            kwargs: of a tokenizer of the zoo, as in `load_published`.

        Raises:
            ValueError: it cannot be loaded or is no tokenizer, or further arguments for one that is not of the zoo.
        """
        name = str(pretrained_model_name_or_path)
        if name not in ZOO:
            if kwargs:
                raise ValueError(f"{sorted(kwargs)} must not be given for {name!r}, which is not of the zoo")
            names = ("pretrained_model_name_or_path", "image_encoder")
            return VisualTokenizer(open_tokenizer(name, image_encoder, dtype, names))
        vae = load_published(name, dtype=dtype, **kwargs)
        if isinstance(vae, DiffusionPipeline):
            raise ValueError(f"pretrained_model_name_or_path must be a tokenizer, got the generator {name!r}")
        return VisualTokenizer(vae)
