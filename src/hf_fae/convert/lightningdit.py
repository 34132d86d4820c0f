"""LightningDiT (hustvl/LightningDiT, arXiv 2501.01423): `lightningdit-xl-imagenet256-800ep.pt` and its like."""

from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..pipelines.fae_dit import FAEDiTPipeline
from ..pipelines.latent_pipeline import Tokenizer
from .denoisers import LIGHTNINGDIT, build_denoiser
from .files import read_weights


__all__ = ["load_lightningdit"]


def load_lightningdit(
    weights: str | Path,
    vae: Tokenizer | None,
    guidance_scale: float | list | dict = 1.0,
    num_inference_steps: int = 249,
    shift: float = 1 / 0.3,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
) -> FAEDiTPipeline:
    """The pipeline of a published LightningDiT.

    Args:
        weights: file of the denoiser's weights, of which the averaged ones are taken.
        vae: tokenizer of its latents, for the published models VA-VAE.
        guidance_scale: as in `FAEDiTPipeline`. The published samplers guide three channels, up to noise time
            1 - `cfg_interval_start`: `{"intervals": [[0, 0.9, 10.0]], "channels": 3}` at 64 epochs.
        num_inference_steps: of Euler; the published code counts the points of the grid, one more.
        shift: of the scheduler, 1 / `timestep_shift`.
        num_attention_heads: needed for a width that is not DiT's, where no rotary table shows it.
        dtype: of the denoiser; None keeps that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family or size.
    """
    transformer = build_denoiser(read_weights(weights), LIGHTNINGDIT, num_attention_heads, dtype)
    return FAEDiTPipeline(
        vae=vae,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        guidance_scale=guidance_scale,
        num_inference_steps=num_inference_steps,
    )
