"""Images with cached features of a frozen encoder: the stages of a tokenizer train on them several times as fast.

The cache is the latent cache of an FAE of `encoder_type="identity"`, whose latents are the features (see
`latent_cache.py`).
"""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch

from ..autoencoders.fae import AutoencoderFAE
from .images import DataArguments, ImageData
from .latent_cache import CachedLatents
from .protocol import DataWrapper, TrainingData


__all__ = ["FeatureData", "LatentFeatures"]

# The fields of `DataArguments` that an image's features depend on.
SAME = ("train_split", "resolution", "crop", "min_image_side")


class FeatureReader:
    """The features in a cache, by the ids of their rows.

    Args:
        folder: of the cache.
        seed, random_flip: as in `CachedLatents`.

    Attributes:
        mean, std: of the cached features (C,), by which the cache's FAE standardises them.

    Raises:
        ValueError: `folder` is no cache of features. When reading: the cache lacks a row.
    """

    def __init__(self, folder: str, seed: int, random_flip: bool):
        self.cache = CachedLatents(folder, seed, random_flip)
        source = AutoencoderFAE.from_pretrained(self.cache.folder / "tokenizer", image_encoder=None)
        if source.config.encoder_type != "identity":
            raise ValueError(
                f"feature_cache must hold features, the latents of an FAE of encoder_type 'identity', got "
                f"{source.config.encoder_type!r} in {folder!r}"
            )
        self.mean, self.std = source.features_mean, source.features_std
        self.rows = {"train": self.cache.train, "validation": self.cache.validation}
        self.indices = {
            split: {row: index for index, row in enumerate(rows["row_id"].to_pylist())}
            for split, rows in self.rows.items()
        }

    def read(self, split: str, row_ids: list[int], mirrored: list[bool]) -> torch.Tensor:
        """Features (B, C, h, w) of rows of "train" or "validation", in float32."""
        if missing := [row for row in row_ids if row not in self.indices[split]]:
            raise ValueError(f"feature_cache {str(self.cache.folder)!r} has no row {missing[0]} of {split!r}")
        indices = [self.indices[split][row] for row in row_ids]
        moments = self.cache.read(self.rows[split], indices, mirrored)["moments"]
        # The cache's latents are standardised features: undo it.
        return moments.chunk(2, dim=1)[0] * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)

    def extend(self, batch: dict) -> dict:
        """A training batch with "features"."""
        return {**batch, "features": self.read("train", batch["row_ids"].tolist(), batch["mirrored"].tolist())}


class FeatureData(FeatureReader, DataWrapper):
    """`ImageData` whose training batches have "features": (B, C, h, w) float32, raw, at the precision of float16.

    Args:
        data: the images; the cache must hold all training rows.
        folder: of the cache.
        model: the tokenizer to be trained, with its frozen encoder.

    Raises:
        ValueError: as `FeatureReader`; `folder` has features of other images or of another encoder; the images are
            streamed; or `model` is no `AutoencoderFAE`.
    """

    def __init__(self, data: ImageData, folder: str, model: AutoencoderFAE):
        if data.args.streaming:
            raise ValueError("streaming must be False with feature_cache, got True")
        if not isinstance(model, AutoencoderFAE):
            raise ValueError(f"feature_cache requires an AutoencoderFAE, got a {type(model).__name__}")
        DataWrapper.__init__(self, data)
        super().__init__(folder, data.seed, data.args.random_flip)
        self.cache.check_image_encoder(model)
        self._check_images()

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """As `ImageData.validation_batches`: without features."""
        return self.data.validation_batches(batch_size)

    def _check_images(self):
        settings, args = self.cache.index["settings"], self.data.args
        for name in SAME:
            if settings[name] != getattr(args, name):
                raise ValueError(
                    f"{name} must be that of feature_cache, {settings[name]!r}, got {getattr(args, name)!r}"
                )
        columns = {field.name: settings[field.name] for field in fields(DataArguments) if "column" in field.name}
        counts = {name: settings[name] for name in ("max_train_samples", "max_validation_samples")}
        cached = ImageData(replace(args, **counts, **columns), settings["seed"])
        for split, fingerprint in self.cache.index["content"].items():
            if cached.fingerprint(split) != fingerprint:
                raise ValueError(f"feature_cache {str(self.cache.folder)!r} has the features of other images")


class LatentFeatures(FeatureReader, DataWrapper):
    """Cached latents whose training batches have the "features" of the same images, as in `FeatureData`.

    Args:
        data: `latents`, or made of them.
        folder: of the cache of features.
        latents: the cache of latents.

    Raises:
        ValueError: as `FeatureReader`, or `folder` has features of other images.
    """

    def __init__(self, data: TrainingData, folder: str, latents: CachedLatents):
        DataWrapper.__init__(self, data)
        super().__init__(folder, latents.seed, latents.random_flip)
        ours, theirs = latents.index["content"]["train"], self.cache.index["content"]["train"]
        if ours != theirs:
            raise ValueError(f"repa_features {folder!r} must have the images of {str(latents.folder)!r}, got others")

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """As `CachedLatents.validation_batches`: without features."""
        return self.data.validation_batches(batch_size)
