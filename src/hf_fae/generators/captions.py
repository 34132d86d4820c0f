"""Text embeddings and their mask, as text-conditional denoisers accept them."""

import torch
from torch.nn import functional as F


__all__ = ["caption_mask"]


def caption_mask(
    latents: torch.Tensor, embeds: torch.Tensor, mask: torch.Tensor | None, channels: int, padding: tuple[int, int]
) -> torch.Tensor | None:
    """Which tokens of a sequence with a text to attend to, (B, 1, 1, tokens) bool; None for all.

    Args:
        latents: (B, ...), what is denoised.
        embeds: `encoder_hidden_states`, to be (B, length, channels).
        mask: `encoder_attention_mask`, (B, length) bool, true for text; None if all are text.
        channels: `caption_channels` of the model.
        padding: number of other tokens before and behind the text.

    Raises:
        ValueError: embeddings or a mask of another shape, or a mask that is not bool.
    """
    batch_size = len(latents)
    if embeds.ndim != 3 or embeds.shape[0] != batch_size or embeds.shape[2] != channels:
        raise ValueError(
            f"encoder_hidden_states must have shape ({batch_size}, length, {channels}), got {tuple(embeds.shape)}"
        )
    if mask is None:
        return None
    if mask.shape != embeds.shape[:2] or mask.dtype != torch.bool:
        raise ValueError(
            f"encoder_attention_mask must be bool of shape {tuple(embeds.shape[:2])}, "
            f"got {mask.dtype} of {tuple(mask.shape)}"
        )
    return F.pad(mask, padding, value=True)[:, None, None]
