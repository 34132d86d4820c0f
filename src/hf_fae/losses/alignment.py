"""Alignment of a VAE's latents with the features of a frozen encoder (VA-VAE, arXiv 2501.01423)."""

import torch
from torch import nn
from torch.nn import functional as F

from ..encoders import VisionEncoder


__all__ = ["LatentAlignment", "distance_matrix_loss", "marginal_cosine_loss"]


def marginal_cosine_loss(latents: torch.Tensor, features: torch.Tensor, margin: float = 0.5) -> torch.Tensor:
    """The mean over positions of max(0, 1 - margin - cos), of projected latents and features, both (B, C, h, w)."""
    return F.relu(1 - margin - F.cosine_similarity(latents, features, dim=1)).mean()


def distance_matrix_loss(latents: torch.Tensor, features: torch.Tensor, margin: float = 0.25) -> torch.Tensor:
    """The mean over all pairs of positions of max(0, |cos of latents - cos of features| - margin), within each image.

    The diagonal counts, with a difference of 0, and latents are projected, as in VA-VAE's code.

    Args:
        latents, features: (B, C, h, w); their channels may differ.
    """
    similarities = []
    for maps in (latents, features):
        tokens = F.normalize(maps.flatten(2), dim=1)
        similarities.append(tokens.transpose(1, 2) @ tokens)
    return F.relu((similarities[0] - similarities[1]).abs() - margin).mean()


class LatentAlignment(nn.Module):
    """Both losses of latents, which a learned 1x1 convolution projects to the features of the same images.

    VA-VAE's code gives the encoder the VAE's own images in [-1, 1], without the encoder's mean and std, and so does
    this class; they are resized so that the features have the grid of the latents.

    Args:
        encoder: frozen; its mean and std are replaced.
        latent_channels: of the latents.
        cosine_margin, distance_margin: of the losses. VA-VAE's three stages have (0, 0), (0, 0) and (0.5, 0.25).
    """

    def __init__(
        self,
        encoder: VisionEncoder,
        latent_channels: int,
        cosine_margin: float = 0.5,
        distance_margin: float = 0.25,
    ):
        super().__init__()
        self.encoder = encoder
        encoder.image_mean = encoder.image_std = [0.5, 0.5, 0.5]
        self.projection = nn.Conv2d(latent_channels, encoder.hidden_size, kernel_size=1, bias=False)
        self.cosine_margin, self.distance_margin = cosine_margin, distance_margin

    def forward(self, latents: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """The sum of both losses, a scalar.

        Args:
            latents: samples of the posterior (B, latent_channels, h, w).
            pixel_values: their images (B, 3, H, W) in [-1, 1].
        """
        grid = tuple(latents.shape[2:])
        tokens = self.encoder(pixel_values, grid).last_hidden_state
        features = tokens.transpose(1, 2).unflatten(2, grid).float()
        projected = self.projection(latents).float()
        cosine = marginal_cosine_loss(projected, features, self.cosine_margin)
        return cosine + distance_matrix_loss(projected, features, self.distance_margin)
