"""The spaces of a tokenizer: the frozen encoder's features, the reconstructed features, and the latents."""

import torch
from diffusers import AutoencoderKL

from ...autoencoders.frozen_encoder import FrozenEncoderMixin
from ...images import from_uint8
from ...latents import LatentAutoencoderMixin, encode_images
from ...loading import open_tokenizer
from ..options import TokenizerArguments


__all__ = ["SPACES", "decodes_features", "open_any_tokenizer", "open_feature_tokenizer", "token_spaces"]

SPACES = ("features", "reconstruction", "latents")


def decodes_features(vae: torch.nn.Module) -> bool:
    """Whether a tokenizer reconstructs the features of a frozen encoder."""
    return hasattr(vae, "decode_features")


def open_any_tokenizer(args: TokenizerArguments, device: torch.device) -> LatentAutoencoderMixin | AutoencoderKL:
    """The tokenizer to evaluate, with its frozen encoder if it has one.

    Raises:
        ValueError: it cannot be loaded.
    """
    return open_tokenizer(args.model, args.encoder, getattr(torch, args.dtype)).eval().to(device)


def open_feature_tokenizer(args: TokenizerArguments, device: torch.device) -> FrozenEncoderMixin:
    """The tokenizer to evaluate, which must reconstruct features, with its frozen encoder.

    Raises:
        ValueError: it cannot be loaded, or does not reconstruct features.
    """
    vae = open_any_tokenizer(args, device)
    if not decodes_features(vae):
        raise ValueError(f"model {args.model!r} must reconstruct features, got a {type(vae).__name__}, which does not")
    return vae


@torch.no_grad()
def token_spaces(
    vae: LatentAutoencoderMixin | AutoencoderKL, images: torch.Tensor
) -> tuple[dict[str, torch.Tensor], tuple[int, int]]:
    """Tokens of images in each of `SPACES`, in fp32, and their grid (h, w).

    Args:
        vae: with its frozen encoder; a tokenizer without features has "latents" alone.
        images: (B, 3, H, W) uint8.

    Returns:
        {"features": (B, N, C), "reconstruction": (B, N, C), "latents": (B, N, c)}: raw features, features decoded
        from the latents' mode, and that mode, normalised.
    """
    pixel_values = from_uint8(images.to(vae.device)).to(vae.dtype)
    if not decodes_features(vae):
        latents = encode_images(vae, pixel_values).mode()
        return {"latents": latents.flatten(2).transpose(1, 2).float()}, tuple(latents.shape[2:])
    features, grid = vae.extract_features(pixel_values)
    latents = vae.encode_features(features, grid).latent_dist.mode()
    tokens = (vae.last_features(features), vae.decode_features(latents), latents.flatten(2).transpose(1, 2))
    return dict(zip(SPACES, (values.float() for values in tokens), strict=True)), grid
