"""A tokenizer's frozen vision encoder: saved next to its own weights, found again, or left out."""

import os
import shutil
from pathlib import Path

import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.accelerate_utils import apply_forward_hook
from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from torch import nn

from ..encoders import VisionEncoder
from ..latents import LatentAutoencoderMixin
from ..modeling import StrictModelMixin


__all__ = ["FrozenEncoderMixin", "frozen_features"]

# The dot is required: to find variants, diffusers splits every name in a component's folder at its dots.
SUBFOLDER = "image_encoder.d"
# Passed on by `from_pretrained`, so that the encoder's files are found in the same place as the tokenizer's.
LOCATION_KWARGS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


class FrozenEncoderMixin(LatentAutoencoderMixin, StrictModelMixin):
    """Adds `image_encoder`, a `VisionEncoder` or `None`, to a tokenizer.

    The encoder is saved in the sub-folder `image_encoder.d/` in transformers' own format, because transformers renames
    weights between releases and only its own loader converts them. The tokenizer's config records the encoder's Hub
    id, revision and config, so a checkpoint without that folder (generation needs none) finds it with `load_encoder`.
    """

    @property
    def feature_shape(self) -> tuple[int, ...]:
        """Shape of the features of one image of `config.sample_size`, as `encode_features` accepts them."""
        raise NotImplementedError

    def posterior(self, pixel_values: torch.Tensor) -> DiagonalGaussianDistribution:
        """As `LatentAutoencoderMixin.posterior`."""
        return self.encode_features(*self.extract_features(pixel_values)).latent_dist

    def last_features(self, features: torch.Tensor) -> torch.Tensor:
        """The tokens (B, N, C) among the extracted features that `decode_features` reconstructs."""
        return features

    def load_encoder(self, pretrained_model_name_or_path: str | None = None, **kwargs) -> None:
        """Attach the frozen encoder.

        Args:
            pretrained_model_name_or_path: Hub id or folder; by default `config.image_encoder_id` at
                `config.image_encoder_revision`.
            kwargs: as `VisionEncoder.from_pretrained`.

        Raises:
            ValueError: no encoder is named here or in the config, or it is not the one of this tokenizer.
        """
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = self.config.image_encoder_id
            kwargs.setdefault("revision", self.config.image_encoder_revision)
        if pretrained_model_name_or_path is None:
            raise ValueError("config.image_encoder_id is None: pass the encoder's Hub id or folder to load_encoder")
        kwargs.setdefault("dtype", self.dtype)
        self.attach_encoder(VisionEncoder.from_pretrained(pretrained_model_name_or_path, **kwargs))

    def check_encoder(self) -> None:
        """Refuse to encode without an encoder.

        Raises:
            ValueError: none is attached.
        """
        if self.image_encoder is None:
            raise ValueError(
                "image_encoder is None: this checkpoint was saved or loaded without its frozen encoder; call "
                f"load_encoder() to fetch {self.config.image_encoder_id!r}, or load_encoder(PATH_OR_ID)"
            )

    def attach_encoder(self, image_encoder: VisionEncoder) -> None:
        """Use `image_encoder`, moved to this model's device.

        Raises:
            ValueError: its width is not `config.feature_dim`.
        """
        if image_encoder.hidden_size != self.config.feature_dim:
            raise ValueError(
                f"image_encoder has hidden_size {image_encoder.hidden_size}, "
                f"but this tokenizer was made for feature_dim {self.config.feature_dim}"
            )
        self.image_encoder = image_encoder.to(self.device)

    @apply_forward_hook
    @torch.no_grad()
    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The frozen encoder's own tokens for images (B, 3, H, W) in [-1, 1]: features (B, N, C) and their grid.

        Raises:
            ValueError: no encoder is attached, or the input is no images with sides that are multiples of
                `config.patch_size`.
        """
        self.check_encoder()
        patch_size = self.config.patch_size
        self.check_images(pixel_values, multiple_of=patch_size)
        grid = (pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size)
        return self.image_encoder(pixel_values, grid=grid).last_hidden_state, grid

    def save_pretrained(
        self,
        save_directory,
        is_main_process=True,
        safe_serialization=True,
        variant=None,
        max_shard_size="10GB",
        **kwargs,
    ):
        """As diffusers' `ModelMixin.save_pretrained`; an attached encoder goes into the sub-folder `image_encoder.d/`.

        The arguments are spelled out because pipelines pass on only those in the signature.
        """
        image_encoder, self.image_encoder = self.image_encoder, None
        try:
            # The encoder first: `push_to_hub=True` uploads the folder at the end of diffusers' method.
            folder = os.path.join(save_directory, SUBFOLDER)
            if image_encoder is not None and is_main_process:
                image_encoder.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
            elif is_main_process and os.path.isdir(folder):
                shutil.rmtree(folder)  # of an earlier tokenizer in this folder: it would be loaded with this one
            super().save_pretrained(
                save_directory,
                is_main_process=is_main_process,
                safe_serialization=safe_serialization,
                variant=variant,
                max_shard_size=max_shard_size,
                **kwargs,
            )
        finally:
            self.image_encoder = image_encoder

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, image_encoder="auto", **kwargs):
        """As diffusers' `ModelMixin.from_pretrained`.

        Args:
            image_encoder: `"auto"` loads the sub-folder `image_encoder.d/` where the checkpoint has one, `None` leaves
                it out (and downloads nothing of it), a `VisionEncoder` is attached.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_encoder == "auto":
            image_encoder = _find_encoder(pretrained_model_name_or_path, model, **kwargs)
        if image_encoder is not None:
            model.attach_encoder(image_encoder)
        return loaded


def _find_encoder(path, model: FrozenEncoderMixin, subfolder: str | None = None, **kwargs) -> VisionEncoder | None:
    """The encoder in the checkpoint's sub-folder, of a folder or on the Hub, in the model's dtype; None if absent."""
    subfolder = "/".join(filter(None, [subfolder, SUBFOLDER]))
    location = {key: kwargs[key] for key in LOCATION_KWARGS if key in kwargs}
    if os.path.isdir(path):
        # Not the config: pipelines download only the weights of a nested folder.
        exists = any(Path(path, subfolder).glob("model*.safetensors"))
    else:
        exists = _is_on_hub(path, f"{subfolder}/config.json", location)
    if not exists:
        return None
    return VisionEncoder.from_pretrained(
        path,
        subfolder=subfolder,
        config=model.config.image_encoder_config,
        dtype=model.dtype,
        variant=kwargs.get("variant"),
        **location,
    )


def _is_on_hub(repo_id: str, filename: str, location: dict) -> bool:
    """Whether a repository has a file; where the Hub does not answer, according to the cache."""
    try:
        hf_hub_download(repo_id, filename, **location)
    except LocalEntryNotFoundError:
        lookup = {key: location[key] for key in ("cache_dir", "revision") if key in location}
        if try_to_load_from_cache(repo_id, filename, **lookup) is _CACHED_NO_EXIST:
            return False
        raise OSError(
            f"the Hub does not answer, and the cache does not know whether {repo_id!r} has a frozen encoder: "
            "pass image_encoder=None to go without"
        ) from None
    except EntryNotFoundError:
        return False
    return True


def frozen_features(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The frozen encoder's raw features (B, N, C) and their grid: those in the batch, else of its pictures.

    Args:
        model: a tokenizer, which needs its encoder only if the batch has no "features" (B, C, h, w).
    """
    if "features" in batch:
        features = batch["features"]
        return features.flatten(2).transpose(1, 2), tuple(features.shape[2:])
    return model.extract_features(batch["pixel_values"])
