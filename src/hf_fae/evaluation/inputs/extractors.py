"""What judges pictures: a small protocol, Inception as ADM uses it, and any model of timm or transformers.

Features of a picture do not depend on the pictures beside it: `judge` shows an extractor always the same number.
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
from ..reports.report import hash_file, identify_model


__all__ = [
    "CHUNK",
    "FeatureExtractor",
    "InceptionExtractor",
    "TimmExtractor",
    "VisionExtractor",
    "judge",
    "load_extractors",
    "metric_name",
    "padded_chunks",
]

CHUNK = 32  # pictures that an extractor gets at a time
INCEPTION = "inception"


class FeatureExtractor(Protocol):
    """8-bit pictures (B, 3, H, W) on any device -> {"features": (B, D)}, and with classes {"logits": (B, K)}.

    Attributes:
        name: stands in the name of every metric, as in `fid_effnet`.
        outputs: names of what it gives.
        settings: what a report tells of it, JSON-able: which weights, how it resizes.
    """

    name: str
    outputs: tuple[str, ...]
    settings: dict

    def __call__(self, images: torch.Tensor) -> dict[str, torch.Tensor]: ...


class InceptionExtractor(nn.Module):
    """InceptionV3 of December 2015, as ADM's evaluator runs it (TensorFlow's resizing), by torch-fidelity.

    Besides "features" (B, 2048) and "logits" (B, 1008, without bias, as ADM has them) it gives "spatial" (B, 2023),
    the first 7 channels of the convolution that TensorFlow calls `mixed_6/conv`, row by row: those of sFID.

    Args:
        weights: file of torch-fidelity's weights; by default its own in the cache of torch.hub, where they are
            downloaded to.

    Raises:
        OSError: the file is not there, or nothing is cached and the download fails.
    """

    name = INCEPTION
    outputs = ("features", "logits", "spatial")

    def __init__(self, weights: str | None = None):
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3

        state = load_hub_weights(URL_INCEPTION_V3, weights, "inception", "inception=FILE")
        # torch-fidelity unpickles whatever a file holds: it gets one that was written here, of tensors alone.
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
    """Pooled features of a timm classifier, with its logits, at its own input size.

    Args:
        path: Hub id or local folder.
        name: by default that of the architecture.
    """

    def __init__(self, path: str, name: str | None = None):
        super().__init__()
        self.network = TimmNetwork(path).requires_grad_(False).eval()
        architecture = self.network.model.pretrained_cfg["architecture"]
        self.name = name or _identifier(architecture)
        resize = f"bicubic with antialias, to {self.network.size[0]}"
        self.settings = {"architecture": architecture, "resize": resize, **identify_model(path)}
        self.outputs = ("features", "logits") if self.network.model.num_classes else ("features",)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        model = self.network.model
        maps = model.forward_features(self.network.preprocess(from_uint8(images.to(self.network.mean.device))))
        outputs = {"features": model.forward_head(maps, pre_logits=True)}
        if "logits" in self.outputs:
            outputs["logits"] = model.forward_head(maps)
        return outputs


class VisionExtractor(nn.Module):
    """What a transformers vision model (DINOv2, CLIP, SigLIP, ...) makes of a whole picture.

    Its pooled output, which for DINOv2 and CLIP is the class token; of models without one, the mean of their patch
    tokens.

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
    """Extractors by their names or places.

    Args:
        sources: each "inception", "inception=FILE" with its weights, or "[NAME=]PATH" of a timm or transformers model,
            a Hub id or a folder.

    Raises:
        ValueError: none, another form, a model of neither library, the same name twice, or nothing is found there.
    """
    if not sources:
        raise ValueError("extractors must name at least one, got none")
    extractors = [_load(source).to(device).eval() for source in sources]
    names = [extractor.name for extractor in extractors]
    if len(set(names)) != len(names):
        raise ValueError(f"extractors must have different names, got {names}")
    return extractors


def _load(source):
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
        if "model_type" in config:
            return VisionExtractor(path, name or None)
        raise ValueError("its config.json names neither a timm nor a transformers model")


def metric_name(metric: str, extractor: FeatureExtractor) -> str:
    """ "fid" for Inception's features, for which alone this name is right; "fid_NAME" for others."""
    return metric if extractor.name == INCEPTION else f"{metric}_{extractor.name}"


def padded_chunks(images: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """`CHUNK` pictures at a time, the last ones among blank ones, and how many of them are not blank."""
    for chunk in images.split(CHUNK):
        blank = chunk.new_zeros(CHUNK - len(chunk), *chunk.shape[1:])
        yield torch.cat([chunk, blank]), len(chunk)


@torch.no_grad()
def judge(
    extractors: list[FeatureExtractor], images: torch.Tensor, is_good: torch.Tensor | None = None, **_
) -> dict[str, torch.Tensor]:
    """Features in fp32 on the CPU, as "NAME.features" and so on, of 8-bit pictures (B, 3, H, W) anywhere.

    An extractor sees `CHUNK` pictures at a time, the last ones among blank ones, in fp32 without TF32: how many there
    are changes nothing.

    Args:
        is_good: (B,) bool: pictures that hold their places, but are not wanted.

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


def _identifier(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower())
