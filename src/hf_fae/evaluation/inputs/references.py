"""References of generated images: ADM's reference batch, or the images of a data set."""

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from ...utils.digests import hash_file
from ..metrics.distances import GaussianStatistics
from ..resumable import Parts
from .extractors import INCEPTION, FeatureExtractor, extract_features
from .numbered_images import NumberedImages


__all__ = ["Reference", "ReferenceBatch", "write_batch"]

# Feature -> its mean and covariance in ADM's files, and its dimensions.
STATISTICS = {"features": ("mu", "sigma", 2048), "spatial": ("mu_s", "sigma_s", 2023)}


class ReferenceBatch:
    """An npz in the layout of ADM's evaluator, such as `VIRTUAL_imagenet256_labeled.npz`.

    `arr_0` holds images (N, H, W, 3) uint8; `mu`, `sigma`, `mu_s` and `sigma_s` are statistics of Inception's
    features, possibly of more images. Either may be absent.

    Args:
        path: the file; its images are read in pieces.
        argument: its name in messages.

    Attributes:
        shape: of `arr_0`; None without images.
        sha256: of the file.

    Raises:
        ValueError: the file does not exist, is not an npz, or has arrays of other shapes.
    """

    def __init__(self, path: str, argument: str = "reference"):
        self.path, self.shape, self._place = path, None, f"{argument} {path!r}"
        try:
            self._archive = zipfile.ZipFile(path)
            self._names = {name.removesuffix(".npy") for name in self._archive.namelist()}
            if "arr_0" in self._names:
                self._open_images()
            self.sha256 = hash_file(path)
        except (OSError, ValueError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{self._place} cannot be read as an npz: {error}") from error
        if self.shape is not None and (self._dtype != np.uint8 or len(self.shape) != 4 or self.shape[3] != 3):
            raise ValueError(
                f"{self._place} must hold images (N, H, W, 3) of uint8 as arr_0, got {self.shape} of {self._dtype}"
            )
        if self.shape is None and not {"mu", "sigma"} <= self._names:
            raise ValueError(f"{self._place} must hold arr_0, or mu and sigma, got {sorted(self._names)}")

    def __len__(self) -> int:
        return self.shape[0] if self.shape is not None else 0

    def describe(self) -> dict:
        """Identifies the file, JSON-able."""
        return {"file": os.path.basename(self.path), "sha256": self.sha256, "count": len(self)}

    def statistics(self, feature: str) -> GaussianStatistics | None:
        """Mean and covariance of Inception's "features" or "spatial" features; None if the file has none.

        Raises:
            ValueError: they are corrupt, or not of Inception's features.
        """
        *names, width = STATISTICS[feature]
        if not set(names) <= self._names:
            return None
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                statistics = GaussianStatistics(*(arrays[name] for name in names))
            covariance = statistics.covariance
            if not torch.allclose(covariance, covariance.T) or (covariance.diagonal() < 0).any():
                raise ValueError("the covariance must be symmetric with non-negative variances")
            if len(statistics.mean) != width:
                raise ValueError(f"Inception's have {width} dimensions, these {len(statistics.mean)}")
        except (OSError, ValueError, TypeError, zipfile.BadZipFile, EOFError) as error:
            raise ValueError(f"{' and '.join(names)} of {self._place} cannot be used: {error}") from error
        return statistics

    def read(self, numbers: range) -> dict[str, torch.Tensor]:
        """{"images": (B, 3, H, W) uint8} by number; sequential reads are cheap.

        Raises:
            ValueError: the file is truncated or corrupt.
        """
        size = int(np.prod(self.shape[1:]))
        try:
            self._file.seek(self._start + numbers.start * size)
            data = self._file.read(len(numbers) * size)
        except (OSError, zipfile.BadZipFile, EOFError, zlib.error) as error:
            raise ValueError(f"arr_0 of {self._place} is corrupt: {error}") from error
        if len(data) != len(numbers) * size:
            raise ValueError(f"arr_0 of {self._place} is truncated after image {numbers.start}")
        pixels = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(len(numbers), *self.shape[1:])
        return {"images": pixels.permute(0, 3, 1, 2)}

    def _open_images(self):
        self._file = self._archive.open("arr_0.npy")
        read_header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        self.shape, is_fortran, self._dtype = read_header[np.lib.format.read_magic(self._file)](self._file)
        if is_fortran:
            raise ValueError("arr_0 must be in C order, got Fortran's")
        self._start = self._file.tell()


class Reference:
    """Statistics and features of the reference images; those that no file states are computed, in parts.

    Args:
        source: the images, or a file with their statistics.
        extractors: the feature extractors.
        folder: folder of the parts.
        batch_size: images per batch.

    Raises:
        ValueError: a file with a single image or corrupt statistics, or one without images for other extractors than
            Inception.
    """

    def __init__(
        self,
        source: ReferenceBatch | NumberedImages,
        extractors: list[FeatureExtractor],
        folder: str | Path,
        batch_size: int,
    ):
        self.source, self.extractors = source, extractors
        self.parts = Parts(folder, len(source), batch_size)
        if len(source) == 1:
            raise ValueError("reference must have at least 2 images, got 1")
        others = [extractor.name for extractor in extractors if extractor.name != INCEPTION]
        if not len(source) and others:
            raise ValueError(f"reference must have images for {others[0]} to read, got {source.path!r} without any")
        self._stated = {}
        if isinstance(source, ReferenceBatch):
            self._stated = {feature: source.statistics(feature) for feature in STATISTICS}

    def compute(self) -> None:
        """Extract features of the images, distributed over the processes."""
        if len(self.source):
            self.parts.compute(
                lambda numbers: extract_features(self.extractors, **self.source.read(numbers)), "reference"
            )

    def _extract(self, numbers):
        return extract_features(self.extractors, **self.source.read(numbers))

    def statistics(self, feature: str, extractor: FeatureExtractor) -> GaussianStatistics | None:
        """Mean and covariance of a kind of features: stated by the file, else computed from the images."""
        stated = self._stated.get(feature) if extractor.name == INCEPTION else None
        if stated is not None or not len(self.source):
            return stated
        return GaussianStatistics.of(self.parts.iterate(f"{extractor.name}.{feature}"), "reference")

    def count_corrupt(self, extractor: FeatureExtractor) -> int:
        """Number of unreadable images."""
        if not len(self.source):
            return 0
        return len(self.source) - sum(len(part) for part in self.parts.iterate(f"{extractor.name}.features"))

    def features(self, extractor: FeatureExtractor) -> torch.Tensor | None:
        """Features of all images (N, D); None without images."""
        return self.parts.stack(f"{extractor.name}.features") if len(self.source) else None


def write_batch(path: str | Path, parts: Parts, name: str) -> None:
    """Write images as an npz for ADM's evaluator, one part in memory at a time.

    Args:
        path: the file, written atomically.
        parts: with a tensor `name` (B, H, W, 3) uint8.
    """
    shapes = [images.shape for images in parts.iterate(name)]
    header = {"descr": "|u1", "fortran_order": False, "shape": (sum(s[0] for s in shapes), *shapes[0][1:])}
    with zipfile.ZipFile(f"{path}.part", "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for images in parts.iterate(name):
            file.write(images.numpy().tobytes())
    os.replace(f"{path}.part", path)
