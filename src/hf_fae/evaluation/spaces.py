"""The three spaces of a tokenizer: the frozen encoder's features, these given back, and the latents in between."""

import torch

from ..autoencoders.frozen_encoder import FrozenEncoderMixin


__all__ = ["SPACES", "token_spaces"]

SPACES = ("features", "reconstruction", "latents")


@torch.no_grad()
def token_spaces(vae: FrozenEncoderMixin, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Tokens of the same pictures in each of `SPACES`, all of them in fp32, and their grid (h, w).

    Args:
        vae: with its frozen encoder.
        images: (B, 3, H, W) uint8.

    Returns:
        {"features": (B, N, C), "reconstruction": (B, N, C), "latents": (B, N, c)}: raw features, the same decoded from
        the mode of the latents, and that mode, normalised.
    """
    pixel_values = (images.to(vae.device).float() / 127.5 - 1).to(vae.dtype)
    features, grid = vae.extract_features(pixel_values)
    latents = vae.encode_features(features, grid).latent_dist.mode()
    tokens = (features, vae.decode_features(latents), latents.flatten(2).transpose(1, 2))
    return dict(zip(SPACES, (values.float() for values in tokens), strict=True)), grid
