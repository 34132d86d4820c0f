"""The three spaces of a tokenizer: the frozen encoder's features, these given back, and the latents in between."""

import torch

from ..autoencoders.frozen_encoder import FrozenEncoderMixin
from ..images import from_uint8
from ..loading import open_tokenizer
from .arguments import DTYPES, TokenizerArguments


__all__ = ["SPACES", "open_feature_tokenizer", "token_spaces"]

SPACES = ("features", "reconstruction", "latents")


def open_feature_tokenizer(args: TokenizerArguments, device: torch.device) -> FrozenEncoderMixin:
    """The tokenizer to evaluate, with its frozen encoder.

    Raises:
        ValueError: it cannot be loaded, or does not give features back.
    """
    vae = open_tokenizer(args.model, args.encoder, DTYPES[args.dtype]).eval().to(device)
    if not hasattr(vae, "decode_features"):
        raise ValueError(f"model {args.model!r} must give features back, which a {type(vae).__name__} does not")
    return vae


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
    pixel_values = from_uint8(images.to(vae.device)).to(vae.dtype)
    features, grid = vae.extract_features(pixel_values)
    latents = vae.encode_features(features, grid).latent_dist.mode()
    tokens = (vae.last_features(features), vae.decode_features(latents), latents.flatten(2).transpose(1, 2))
    return dict(zip(SPACES, (values.float() for values in tokens), strict=True)), grid
