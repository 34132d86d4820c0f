"""Reconstruction metrics of features and images."""

import torch
from torch.nn import functional as F


__all__ = ["border_gradients", "feature_cosine", "psnr", "ssim", "token_cosine"]


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


def border_gradients(reconstruction: torch.Tensor, images: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Mean absolute gradients (B, 2) of the error of images (B, C, H, W): across borders of patches, and elsewhere.

    Both directions count. The ratio of the two is 1 where patches leave no seams, and for white noise.

    Raises:
        ValueError: images of a single patch, or patches of one pixel, which leave nothing to compare.
    """
    if patch_size < 2 or max(images.shape[2:]) <= patch_size:
        raise ValueError(f"patch_size must be from 2 to below {max(images.shape[2:])}, got {patch_size}")
    error, across, elsewhere = reconstruction.float() - images.float(), [], []
    for gradient in (error.diff(dim=3), error.diff(dim=2).transpose(2, 3)):
        columns = torch.arange(1, gradient.shape[3] + 1, device=error.device) % patch_size == 0
        across.append(gradient[..., columns].abs().flatten(1))
        elsewhere.append(gradient[..., ~columns].abs().flatten(1))
    return torch.stack([torch.cat(parts, dim=1).mean(1) for parts in (across, elsewhere)], dim=1)
