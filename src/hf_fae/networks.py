"""Frozen networks from other libraries: timm models by path, and weights from torch.hub's cache."""

import json
import os

import torch
from torch import nn
from torch.nn import functional as F

from .utils.hub_errors import hub_errors


__all__ = ["TimmNetwork", "load_hub_weights", "read_config"]


class TimmNetwork(nn.Module):
    """A timm model on images in [-1, 1]; for classifiers and fixed-size models these are resized to the input size.

    Args:
        path: Hub id or local folder.
        features_only: return the feature maps of the model's stages instead of logits.
        image_size: side of the input, where it is not the model's own.
    """

    def __init__(self, path: str, features_only: bool = False, image_size: int | None = None):
        super().__init__()
        import timm

        location = f"local-dir:{path}" if os.path.isdir(path) else f"hf-hub:{path}"
        options = {} if image_size is None else {"img_size": image_size}
        self.model = timm.create_model(location, pretrained=True, features_only=features_only, **options)
        config = self.model.pretrained_cfg
        resized = config.get("fixed_input_size") or not features_only
        self.size = 2 * (image_size,) if image_size else tuple(config["input_size"][1:]) if resized else None
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """Images (B, 3, H, W) in [-1, 1] as the model's input: resized bicubically with antialias, normalised."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        return (images / 2 + 0.5 - self.mean) / self.std

    def forward(self, images: torch.Tensor):
        """Logits or, with `features_only`, a list of feature maps (B, C, h, w), for images (B, 3, H, W) in [-1, 1]."""
        return self.model(self.preprocess(images))


def read_config(path: str) -> dict:
    """`config.json` of a Hub id or local folder.

    Raises:
        OSError: there is no such file.
    """
    path = str(path)
    if os.path.isdir(path):
        file = os.path.join(path, "config.json")
    else:
        from huggingface_hub import hf_hub_download

        with hub_errors(path):
            file = hf_hub_download(path, "config.json")
    with open(file) as config:
        return json.load(config)


def load_hub_weights(url: str, path: str | None, argument: str, hint: str) -> dict[str, torch.Tensor]:
    """A state dict from a file, or from torch.hub's cache, filled by a download if need be. No pickled code is run.

    Args:
        url: address of the published weights; the hash in its name is checked.
        path: a safetensors file or a torch state dict; None for the cache.
        argument: its name in messages.
        hint: how a file is passed, for messages.

    Raises:
        OSError: the file does not exist, or nothing is cached and the download fails.
    """
    if path is not None and not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}={path!r} must be a file of weights, but does not exist")
    if path is not None and path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        reason = str(error)
    # Outside of the handler: behind this error there is nothing that would say more about the Hub.
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    raise OSError(
        f"{argument} needs weights that cannot be downloaded ({reason}): put {url} at {cached}, or pass a file "
        f"({hint})"
    )
