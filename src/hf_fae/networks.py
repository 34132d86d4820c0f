"""Frozen networks of other libraries: timm models by path, and weights that torch.hub keeps."""

import json
import os

import torch
from torch import nn
from torch.nn import functional as F

from .utils.hub_errors import hub_errors


__all__ = ["TimmNetwork", "load_hub_weights", "read_config"]


class TimmNetwork(nn.Module):
    """A timm model on images in [-1, 1]; classifiers and models of fixed input size get pictures of that size.

    Args:
        path: Hub id or local folder.
        features_only: give the maps of the model's stages instead of logits.
    """

    def __init__(self, path: str, features_only: bool = False):
        super().__init__()
        import timm

        location = f"local-dir:{path}" if os.path.isdir(path) else f"hf-hub:{path}"
        self.model = timm.create_model(location, pretrained=True, features_only=features_only)
        config = self.model.pretrained_cfg
        resized = config.get("fixed_input_size") or not features_only
        self.size = tuple(config["input_size"][1:]) if resized else None
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def preprocess(self, images: torch.Tensor) -> torch.Tensor:
        """What the model itself takes, of images (B, 3, H, W) in [-1, 1]: bicubic with antialias, normalised."""
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False, antialias=True)
        return (images / 2 + 0.5 - self.mean) / self.std

    def forward(self, images: torch.Tensor):
        """Logits or, with `features_only`, a list of maps (B, C, h, w), of images (B, 3, H, W) in [-1, 1]."""
        return self.model(self.preprocess(images))


def read_config(path: str) -> dict:
    """`config.json` of a Hub id or a local folder.

    Raises:
        OSError: there is none.
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
    """A state dict of a file, or of torch.hub's cache, where it is downloaded to. No pickled code is ever run.

    Args:
        url: where the weights are published; the hash in its name is checked.
        path: safetensors or a torch state dict; None for the cache.
        argument: whose value `path` is, for messages.
        hint: how a file is named, for messages.

    Raises:
        OSError: there is no such file, or nothing is cached and the download fails.
    """
    if path is not None and not os.path.isfile(path):
        raise FileNotFoundError(f"{argument}={path!r} must be a file of weights, but there is none")
    if path is not None and path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    if path is not None:
        return torch.load(path, map_location="cpu", weights_only=True)
    try:
        return torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
    except OSError as error:  # URLError is one
        cached = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
        raise OSError(
            f"{argument} needs weights that cannot be downloaded ({error}): put {url} at {cached}, or name a file "
            f"that holds them ({hint})"
        ) from error
