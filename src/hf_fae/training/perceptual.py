"""A perceptual distance from any frozen vision model, so that training needs no weights but those at hand."""

import json
import os

import torch
from torch import nn
from torch.nn import functional as F

from ..encoders import VisionEncoder


__all__ = ["FeatureDistance"]


class FeatureDistance(nn.Module):
    """Mean squared distance of two pictures' unit-normalised feature maps, over several stages of a frozen network.

    LPIPS without its learned weights (arXiv 1801.03924, eq. 1): at every position the feature vectors of a stage are
    scaled to length 1; their squared distances, each between 0 and 4, are averaged over positions, then over stages.

    Args:
        network: images (B, 3, H, W) in [-1, 1] -> list of maps (B, C, h, w) or tokens (B, N, C), differentiable.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str) -> "FeatureDistance":
        """Of a timm model (the stages that `features_only` gives) or of a transformers vision model (four layers).

        Pictures are normalised with the model's own mean and std, and resized only where its input size is fixed.

        Args:
            pretrained_model_name_or_path: Hub id or local folder.

        Raises:
            ValueError: its `config.json` is neither timm's nor transformers'.
        """
        path = str(pretrained_model_name_or_path)
        if os.path.isdir(path):
            config_file = os.path.join(path, "config.json")
        else:
            from huggingface_hub import hf_hub_download

            config_file = hf_hub_download(path, "config.json")
        with open(config_file) as file:
            config = json.load(file)
        if "architecture" in config:
            return cls(_TimmStages(f"local-dir:{path}" if os.path.isdir(path) else f"hf-hub:{path}"))
        if "model_type" in config:
            return cls(_EncoderLayers(VisionEncoder.from_pretrained(path, dtype=torch.float32)))
        raise ValueError(f"{path!r} must be a timm or a transformers model, but its config.json names no architecture")

    def train(self, mode: bool = True) -> "FeatureDistance":
        """Stays in eval mode: the statistics of batch norms are part of the frozen network."""
        return super().train(False)

    def features(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Features (B, positions, channels) of length 1, fp32, of images (B, 3, H, W) in [-1, 1], stage by stage."""
        stages = [stage.flatten(2).transpose(1, 2) if stage.ndim == 4 else stage for stage in self.network(images)]
        # In fp32: half precision overflows in the squares, and loses small differences of vectors of length 1.
        return [F.normalize(stage.float(), dim=-1) for stage in stages]

    def forward(self, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The distance of images (B, 3, H, W) from targets of the same shape, both in [-1, 1]: a scalar in [0, 4].

        Gradients reach `images` only.
        """
        with torch.no_grad():
            wanted = self.features(targets)
        pairs = zip(self.features(images), wanted, strict=True)
        return torch.stack([(found - target).square().sum(-1).mean() for found, target in pairs]).mean()


class _TimmStages(nn.Module):
    def __init__(self, location: str):
        super().__init__()
        import timm

        model = timm.create_model(location, pretrained=True, features_only=True)
        self.model = model.to(memory_format=torch.channels_last)  # a third faster with EfficientNet-Lite0 on a CPU
        config = self.model.pretrained_cfg
        self.size = tuple(config["input_size"][1:]) if config.get("fixed_input_size") else None
        self.register_buffer("mean", torch.tensor(config["mean"]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(3, 1, 1), persistent=False)

    def forward(self, images):
        if self.size is not None and tuple(images.shape[2:]) != self.size:
            images = F.interpolate(images, self.size, mode="bicubic", align_corners=False)
        return self.model((images / 2 + 0.5 - self.mean) / self.std)


class _EncoderLayers(nn.Module):
    def __init__(self, encoder: VisionEncoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, images):
        # The encoder's forward without its `no_grad`: here gradients pass through to the images.
        states = VisionEncoder.forward.__wrapped__(self.encoder, images, output_hidden_states=True).hidden_states[1:]
        return [states[len(states) * (quarter + 1) // 4 - 1] for quarter in range(4)]
