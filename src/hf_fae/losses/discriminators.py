"""Discriminators of images: convolutional (MaskBit, pix2pix) and heads on a frozen vision transformer."""

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from ..encoders import VisionEncoder
from .perceptual import EncoderLayers


__all__ = ["NLayerDiscriminator", "PatchDiscriminator", "TokenDiscriminator"]


class _BlurDownsample(nn.Module):
    """Halves height and width of (B, C, H, W) after a binomial filter of 4 x 4 (arXiv 1904.11486)."""

    def __init__(self):
        super().__init__()
        row = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("kernel", torch.outer(row, row)[None, None], persistent=False)

    def forward(self, hidden_states):
        channels = hidden_states.shape[1]
        kernel = self.kernel.to(hidden_states.dtype).expand(channels, -1, -1, -1)
        return F.conv2d(hidden_states, kernel, stride=2, padding=1, groups=channels)


class PatchDiscriminator(nn.Module):
    """Convolutional discriminator of patches with blurred downsampling (MaskBit, arXiv 2409.16211).

    The channels of the stages are base, 2 base, 4 base, ...; each halves the sides. The logits of an image do not
    depend on its batch.

    Args:
        base_channels: a multiple of 32, the number of groups of the norms.
        num_stages: at least 1.

    Raises:
        ValueError: other values.
    """

    def __init__(self, base_channels: int = 128, num_stages: int = 3):
        if base_channels < 1 or base_channels % 32:
            raise ValueError(f"base_channels must be a positive multiple of 32, got {base_channels}")
        if num_stages < 1:
            raise ValueError(f"num_stages must be at least 1, got {num_stages}")
        super().__init__()
        layers, channels = [nn.Conv2d(3, base_channels, 5, padding=2), nn.LeakyReLU(0.1)], base_channels
        for stage in range(num_stages):
            width = base_channels * 2**stage
            layers += [
                nn.Conv2d(channels, width, 3, padding=1),
                _BlurDownsample(),
                nn.GroupNorm(32, width),
                nn.LeakyReLU(0.1),
            ]
            channels = width
        layers += [nn.Conv2d(channels, channels, 1), nn.LeakyReLU(0.1), nn.Conv2d(channels, 1, 5, padding=2)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H / 2^num_stages, W / 2^num_stages), fp32, of images (B, 3, H, W) in [-1, 1]."""
        return self.layers(images).float()


class NLayerDiscriminator(nn.Module):
    """PatchGAN (pix2pix, arXiv 1611.07004, appendix 6.1.2; taming-transformers), the discriminator of l-DeTok.

    Its batch norms use the statistics of each call, in every mode: real images and reconstructions are judged in
    separate calls, and the logits of an image depend on the others in its process.

    Args:
        base_channels: of the first of `num_stages` + 2 layers; they double up to eight times as many.
        num_stages: layers that halve the sides, at least 1.

    Raises:
        ValueError: other values.
    """

    uses_batch_statistics = True

    def __init__(self, base_channels: int = 64, num_stages: int = 3):
        for name, value in (("base_channels", base_channels), ("num_stages", num_stages)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__()
        layers = [nn.Conv2d(3, base_channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = base_channels
        for stage in range(1, num_stages + 1):
            width = base_channels * min(2**stage, 8)
            layers += [
                nn.Conv2d(channels, width, 4, stride=2 if stage < num_stages else 1, padding=1, bias=False),
                nn.BatchNorm2d(width, track_running_stats=False),
                nn.LeakyReLU(0.2),
            ]
            channels = width
        layers.append(nn.Conv2d(channels, 1, 4, padding=1))
        self.layers = nn.Sequential(*layers)
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
            elif isinstance(layer, nn.BatchNorm2d):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 1, H / 2^num_stages - 2, W / 2^num_stages - 2), fp32, of images (B, 3, H, W) in [-1, 1]."""
        return self.layers(images).float()


def _token_block(channels, kernel_size):
    return nn.Sequential(
        spectral_norm(nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, padding_mode="circular")),
        # Per image and channel over the tokens, so that the logits do not depend on the batch.
        nn.InstanceNorm1d(channels, eps=1e-6, affine=True),
        nn.LeakyReLU(0.2),
    )


class _TokenHead(nn.Module):
    """Tokens (B, N, C) -> logits (B, N)."""

    def __init__(self, channels, kernel_size=9):
        super().__init__()
        self.input = _token_block(channels, 1)
        self.residual = _token_block(channels, kernel_size)
        self.output = spectral_norm(nn.Conv1d(channels, 1, 1))

    def forward(self, tokens):
        hidden_states = self.input(tokens.transpose(1, 2))
        hidden_states = (hidden_states + self.residual(hidden_states)) * 0.5**0.5
        return self.output(hidden_states).squeeze(1)


class TokenDiscriminator(nn.Module):
    """Heads on the tokens of a frozen vision transformer (StyleGAN-T, arXiv 2301.09515, section 3.2; RAE's settings).

    Five heads: at the ends of the network's four quarters, and a second one at the last (RAE) or one on the input of
    the first layer (MAETok). Only they are trained; gradients reach the images through the frozen network. (Some
    recipes zero that network's key biases, which do not affect attention.)

    Args:
        network: any encoder; images are judged at its input size (RAE: DINO ViT-S/8 at 224).
        with_embeddings: whether the fifth head is on the input of the first layer.
    """

    def __init__(self, network: VisionEncoder, with_embeddings: bool = False):
        super().__init__()
        self.network = EncoderLayers(network.requires_grad_(False), with_embeddings)
        self.heads = nn.ModuleList(_TokenHead(network.hidden_size) for _ in range(EncoderLayers.count + 1))

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str = "facebook/dino-vits8", with_embeddings: bool = False
    ) -> "TokenDiscriminator":
        """With untrained heads on a pretrained network.

        Args:
            pretrained_model_name_or_path: Hub id or folder, as for `VisionEncoder.from_pretrained`.
            with_embeddings: as above.
        """
        network = VisionEncoder.from_pretrained(pretrained_model_name_or_path, dtype=torch.float32)
        return cls(network, with_embeddings)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, 5 N), fp32, of images (B, 3, H, W) in [-1, 1]: one per head and patch."""
        layers = self.network(images)
        if not self.network.with_embeddings:
            layers = [*layers, layers[-1]]
        # In fp32: the spectral norms are quotients of small differences.
        with torch.autocast(images.device.type, enabled=False):
            pairs = zip(self.heads, layers, strict=True)
            return torch.cat([head(tokens.float()) for head, tokens in pairs], dim=1)
