"""Reconstruction metrics of features and images."""

import torch
from torch.nn import functional as F


__all__ = ["feature_cosine", "psnr", "ssim", "token_cosine"]


def feature_cosine(reconstruction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Cosine over the channels of features (B, N, C), mean over tokens and samples: a scalar, 1 for equal directions.

    On raw features of the frozen encoder, as the paper's similarity of reconstructed features; in fp32.
    """
    return token_cosine(reconstruction, features).mean()


def token_cosine(reconstruction: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Cosine (B, N) of each token with its original, for features (B, N, C), in fp32."""
    return F.cosine_similarity(reconstruction.float(), features.float(), dim=-1)


def psnr(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Peak signal-to-noise ratio in dB of images (B, 3, H, W) in [-1, 1], clamped first: the mean over the images."""
    from torchmetrics.functional.image import peak_signal_noise_ratio

    return peak_signal_noise_ratio(
        reconstruction.float().clamp(-1, 1), images.float().clamp(-1, 1), data_range=2.0, dim=(1, 2, 3)
    )


def ssim(reconstruction: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Structural similarity (Wang et al. 2004) of images (B, 3, H, W) in [-1, 1], clamped first: mean over the images.

    By torchmetrics, with Gaussian windows of 11 pixels: a scalar, 1 for equal images.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    # The luminance term expects intensities from 0: around 0 it would treat two greys as opposites.
    reconstruction, images = (1 + part.float().clamp(-1, 1) for part in (reconstruction, images))
    return structural_similarity_index_measure(reconstruction, images, data_range=2.0)
