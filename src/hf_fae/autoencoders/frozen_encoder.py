"""A tokenizer's frozen vision encoder: kept beside its own weights, found again, or left out."""

import os
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from ..encoders import VisionEncoder
from ..modeling import StrictModelMixin


__all__ = ["FrozenEncoderMixin"]

# The dot is needed: to find variants, diffusers splits every name in a component's folder at its dots.
SUBFOLDER = "image_encoder.d"
# What `from_pretrained` hands on to find the encoder's files in the same place as the tokenizer's.
LOCATION_KWARGS = (
    "revision",
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
    "proxies",
    "variant",
    "dtype",
)


class FrozenEncoderMixin(StrictModelMixin):
    """Adds `image_encoder`, a `VisionEncoder` or `None`, to a tokenizer.

    The encoder lives in the sub-folder `image_encoder.d/` in transformers' own format, because transformers renames
    weights between releases and only its own loader knows how. The tokenizer's config records the encoder's Hub id,
    revision and config, so a checkpoint without that folder (all that generation needs) finds it with `load_encoder`.
    """

    def load_encoder(self, pretrained_model_name_or_path: str | None = None, **kwargs) -> None:
        """Attach the frozen encoder.

        Args:
            pretrained_model_name_or_path: Hub id or folder; by default `config.image_encoder_id` at
                `config.image_encoder_revision`.
            kwargs: as `VisionEncoder.from_pretrained`.

        Raises:
            ValueError: no encoder is named here or in the config, or it is not the one this tokenizer was made for.
        """
        if pretrained_model_name_or_path is None:
            pretrained_model_name_or_path = self.config.image_encoder_id
            kwargs.setdefault("revision", self.config.image_encoder_revision)
        if pretrained_model_name_or_path is None:
            raise ValueError("config.image_encoder_id is None: pass the encoder's Hub id or folder to load_encoder")
        kwargs.setdefault("dtype", self.dtype)
        self.attach_encoder(VisionEncoder.from_pretrained(pretrained_model_name_or_path, **kwargs))

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

    @torch.no_grad()
    def extract_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The frozen encoder's own tokens for images (B, 3, H, W) in [-1, 1]: features (B, N, C) and their grid.

        Raises:
            ValueError: no encoder is attached, or these are no images with sides that are multiples of
                `config.patch_size`.
        """
        if self.image_encoder is None:
            raise ValueError(
                "image_encoder is None: this checkpoint was saved or loaded without its frozen encoder; call "
                f"load_encoder() to fetch {self.config.image_encoder_id!r}, or load_encoder(PATH_OR_ID)"
            )
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

        The arguments are spelled out because pipelines hand on only what they find in the signature.
        """
        image_encoder, self.image_encoder = self.image_encoder, None
        try:
            # The encoder first: `push_to_hub=True` uploads the folder at the end of diffusers' method.
            if image_encoder is not None and is_main_process:
                folder = os.path.join(save_directory, SUBFOLDER)
                image_encoder.save_pretrained(folder, variant=variant, max_shard_size=max_shard_size)
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
                it out (nothing of it is downloaded), a `VisionEncoder` is used as it is.
        """
        loaded = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if image_encoder == "auto":
            image_encoder = _find_encoder(pretrained_model_name_or_path, model.config.image_encoder_config, **kwargs)
        if image_encoder is not None:
            model.attach_encoder(image_encoder)
        return loaded


def _find_encoder(
    path: str, config: dict | None, subfolder: str | None = None, torch_dtype=None, **kwargs
) -> VisionEncoder | None:
    """The encoder in the checkpoint's sub-folder, a local folder or on the Hub; `None` where there is none."""
    location = {key: kwargs[key] for key in LOCATION_KWARGS if key in kwargs}
    if torch_dtype is not None:
        location["dtype"] = torch_dtype
    subfolder = "/".join(filter(None, [subfolder, SUBFOLDER]))
    if os.path.isdir(path):
        # Not the config: of a nested folder, a pipeline downloads the weights alone.
        exists = any(Path(path, subfolder).glob("model*.safetensors"))
    else:
        lookup = {key: location[key] for key in location if key not in ("variant", "dtype")}
        try:
            hf_hub_download(path, "config.json", subfolder=subfolder, **lookup)
            exists = True
        except EntryNotFoundError:
            exists = False
    return VisionEncoder.from_pretrained(path, subfolder=subfolder, config=config, **location) if exists else None
