"""Feature extractors: a small protocol, Inception as in ADM, and any model of timm or transformers.

Features of an image do not depend on the rest of the batch: `extract_features` passes a fixed number of images.
"""

import io
import re
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import nn

from ...encoders import VisionEncoder
from ...images import from_uint8
from ...latents import check_finite
from ...loading import loading
from ...networks import TimmNetwork, load_hub_weights, read_config
from ...utils.digests import hash_file
from ..options import CHUNK
from ..provenance import identify_model
from .panel import PANEL


__all__ = [
    "FeatureExtractor",
    "InceptionExtractor",
    "TimmExtractor",
    "VisionExtractor",
    "extract_features",
    "load_extractors",
    "metric_name",
    "padded_chunks",
]

INCEPTION = "inception"


class FeatureExtractor(Protocol):
    """8-bit images (B, 3, H, W) on any device -> {"features": (B, D)}, for classifiers also {"logits": (B, K)}.

    Attributes:
        name: part of the metrics' names, as in `fid_effnet`.
        outputs: names of the outputs.
        settings: weights and resizing, for the report, JSON-able.
    """

    name: str
    outputs: tuple[str, ...]
    settings: dict

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]: ...


class InceptionExtractor(nn.Module):
    """InceptionV3 of December 2015, as in ADM's evaluator (with TensorFlow's resizing), by torch-fidelity.

    Besides "features" (B, 2048) and "logits" (B, 1008, without bias, as ADM's) "spatial" (B, 2023) for sFID: the
    first 7 channels of the convolution that TensorFlow calls `mixed_6/conv`, in row order.

    Args:
        weights: file of torch-fidelity's weights; by default downloaded to the cache of torch.hub.

    Raises:
        OSError: the file does not exist, or nothing is cached and the download fails.
    """

    name = INCEPTION
    outputs = ("features", "logits", "spatial")

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        state = load_hub_weights(URL_INCEPTION_V3, weights, "inception", "inception=FILE")
        # torch-fidelity unpickles any file: it gets one that was written here, with tensors alone.
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        layers = ["2048", "logits_unbiased"]
        self.network = FeatureExtractorInceptionV3(self.name, layers, feature_extractor_weights_path=file)
        self.network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)
        name = hash_file(weights) if weights else URL_INCEPTION_V3.rpartition("/")[2]
        self.settings = {"weights": name, "resize": "bilinear as TensorFlow 1, to 299"}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features, logits = self.network(images.to(self.network.fc.weight.device))
        return {"features": features, "logits": logits, "spatial": self._spatial}

    def _keep_spatial(self, module, args, output):
        self._spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)


class TimmExtractor(nn.Module):
    """Pooled features and logits of a timm classifier, at its own input size, or as in a space of `PANEL`.

    Args:
        path: Hub id or local folder.
        name: by default the architecture; a name of `PANEL` for a folder with its weights.

    Raises:
        ValueError: another network under a name of `PANEL`.
    """

    def __init__(self, path: str, name: str | None = None):
        super().__init__()
        self.space = PANEL.get(name)
        size = self.space and self.space.size
        self.network = TimmNetwork(path, image_size=size).requires_grad_(False).eval()
        architecture = self.network.model.pretrained_cfg["architecture"]
        if self.space and architecture != _architecture(self.space):
            raise ValueError(f"{name} must be a {_architecture(self.space)}, got a {architecture}")
        self.name = name or _identifier(architecture)
        resize = f"bicubic with antialias, to {self.network.size[0]}"
        self.settings = {"architecture": architecture, "resize": resize, **identify_model(path)}
        has_logits = self.network.model.num_classes and not self.space
        self.outputs = ("features", "logits") if has_logits else ("features",)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self.network.model
        maps = model.forward_features(self.network.preprocess(from_uint8(images.to(self.network.mean.device))))
        if self.space and self.space.reads_maps:
            return {"features": maps.mean((2, 3))}
        outputs = {"features": model.forward_head(maps, pre_logits=True)}
        if "logits" in self.outputs:
            outputs["logits"] = model.forward_head(maps)
        return outputs


class VisionExtractor(nn.Module):
    """Image features of a transformers vision model (DINOv2, CLIP, SigLIP, ...).

    Its pooled output (of DINOv2 and CLIP the class token); for models without one, the mean of the patch tokens.

    Args:
        path: Hub id or local folder.
        name: by default the last part of the path.
    """

    outputs = ("features",)

    def __init__(self, path: str, name: str | None = None):
        super().__init__()
        self.encoder = VisionEncoder.from_pretrained(path, dtype=torch.float32)
        self.name = name or _identifier(path.rstrip("/").split("/")[-1])
        height, width = self.encoder.image_size
        resize = f"bicubic without antialias, to {height} x {width}"
        self.settings = {"class": type(self.encoder.model).__name__, "resize": resize, **identify_model(path)}

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        outputs = self.encoder(from_uint8(images.to(self.encoder.device)))
        pooled = outputs.pooler_output
        return {"features": outputs.last_hidden_state.mean(1) if pooled is None else pooled}


def load_extractors(sources: list[str], device: torch.device | str = "cpu") -> list[FeatureExtractor]:
    """Extractors by name or path.

    Args:
        sources: each "inception", "inception=FILE" with its weights, "[NAME=]PATH" of a timm or transformers model,
            a Hub id or a folder, or a name of `PANEL`, for which "NAME=PATH" gives its weights.

    Raises:
        ValueError: no or malformed sources, a model of neither library, duplicate names, or a failure to load.
    """
    if not sources:
        raise ValueError("extractors must name at least one, got none")
    extractors = [_load(source).to(device).eval() for source in sources]
    names = [extractor.name for extractor in extractors]
    if len(set(names)) != len(names):
        raise ValueError(f"extractors must have different names, got {names}")
    return extractors


def _load(source):
    if source in PANEL and source != INCEPTION:
        source = f"{source}={PANEL[source].path}"
    name, separator, path = source.rpartition("=")
    if source == INCEPTION or name == INCEPTION:
        with loading("extractors", source):
            return InceptionExtractor(path if separator else None)
    if not path or (separator and (not name or name != _identifier(name))):
        raise ValueError(
            f"extractors must be inception, PATH or NAME=PATH with a name of a-z, 0-9, - and _, got {source!r}"
        )
    with loading("extractors", source):
        config = read_config(path)
        if "architecture" in config:
            return TimmExtractor(path, name or None)
        if name in PANEL:
            raise ValueError(f"{name} must be timm's {_architecture(PANEL[name])}")
        if "model_type" in config:
            return VisionExtractor(path, name or None)
        raise ValueError("its config.json names neither a timm nor a transformers model")


def metric_name(metric: str, extractor: FeatureExtractor) -> str:
    """A plain name such as "fid" for Inception alone; "fid_NAME" for other extractors."""
    return metric if extractor.name == INCEPTION else f"{metric}_{extractor.name}"


def padded_chunks(images: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """`CHUNK` images at a time, the last chunk padded with blank images, and the number of real ones."""
    for chunk in images.split(CHUNK):
        blank = chunk.new_zeros(CHUNK - len(chunk), *chunk.shape[1:])
        yield torch.cat([chunk, blank]), len(chunk)


@torch.no_grad()
def extract_features(
    extractors: list[FeatureExtractor], images: torch.Tensor, is_good: torch.Tensor | None = None, **_
) -> dict[str, torch.Tensor]:
    """Features in fp32 on the CPU, as "NAME.features" and so on, of 8-bit images (B, 3, H, W) on any device.

    Extractors get `CHUNK` images at a time, the last chunk padded, in fp32 without TF32: features do not depend on the
    batch size.

    Args:
        is_good: (B,) bool; features of other images are dropped.

    Raises:
        ValueError: features that are not finite.
    """
    found = {}
    for extractor in extractors:
        parts = []
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True, allow_tf32=False):
            for chunk, count in padded_chunks(images):
                outputs = extractor(chunk)
                parts.append({name: values[:count].float().cpu() for name, values in outputs.items()})
        for name in parts[0]:
            found[f"{extractor.name}.{name}"] = values = torch.cat([part[name] for part in parts])
            check_finite(f"{name} of {extractor.name}", values)
    return found if is_good is None else {name: values[is_good] for name, values in found.items()}


def _architecture(space):
    return space.path.removeprefix("timm/").partition(".")[0]


def _identifier(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower())
