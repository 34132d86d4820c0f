"""SiT (arXiv 2401.08740) and what is trained with its network: REPA, MAETok's SiT-XL and l-DeTok's SiT.

The loaders differ in layout and default sampler. They share these arguments:

- `weights`: file of the denoiser's weights; of a training checkpoint the averaged ones are taken.
- `vae`: tokenizer of its latents.
- `sampler`: `"sde"`, Euler-Maruyama whose last step starts at 0.04, or `"ode"`, Euler.
- `num_attention_heads`: needed for a width that is not DiT's.
- `dtype`: of the denoiser; None keeps that of the file.
- `settings`: other arguments of `FAEDiTPipeline`, such as `guidance_scale` and `num_inference_steps`.

All raise FileNotFoundError where there is no file, and ValueError for weights of another family or size, or another
sampler.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from ..pipelines.fae_dit import FAEDiTPipeline
from ..pipelines.latent_pipeline import Tokenizer
from ..schedulers.euler_maruyama import FlowMatchEulerMaruyamaScheduler
from .denoisers import DETOK_SIT, MAETOK_SIT, REPA, SIT, Layout, build_denoiser
from .files import read_weights
from .layouts import count_layers


__all__ = ["load_detok_sit", "load_maetok_sit", "load_repa", "load_sit"]

SCHEDULERS = {"ode": FlowMatchEulerDiscreteScheduler, "sde": FlowMatchEulerMaruyamaScheduler}


def load_sit(weights: str | Path, vae: Tokenizer | None, sampler: str = "sde", **settings) -> FAEDiTPipeline:
    """SiT, such as `SiT-XL-2-256.pt`, on SD-VAE's latents; arguments as in the module.

    The published sampler guides three channels: `guidance_scale={"intervals": [[0, 1, 4.0]], "channels": 3}`.
    """
    return _pipeline(read_weights(weights), SIT, vae, sampler, **settings)


def load_repa(weights: str | Path, vae: Tokenizer | None, sampler: str = "sde", **settings) -> FAEDiTPipeline:
    """REPA's SiT (arXiv 2410.06940), such as `last.pt`, on SD-VAE's latents; arguments as in the module.

    Its projectors, which only training uses, are dropped. The published sampler guides all channels up to noise time
    0.7: `guidance_scale=[[0, 0.7, 1.8]]`.
    """
    return _pipeline(_without_decoder_blocks(read_weights(weights)), REPA, vae, sampler, **settings)


def load_maetok_sit(weights: str | Path, vae: Tokenizer | None, sampler: str = "sde", **settings) -> FAEDiTPipeline:
    """SiT of MAETok's (arXiv 2502.03444) and SoftVQ-VAE's 1-D latents; arguments as in the module."""
    return _pipeline(read_weights(weights), MAETOK_SIT, vae, sampler, **settings)


def load_detok_sit(weights: str | Path, vae: Tokenizer | None, sampler: str = "ode", **settings) -> FAEDiTPipeline:
    """SiT of l-DeTok's latents (arXiv 2507.15856); arguments as in the module."""
    return _pipeline(read_weights(weights, ("model_ema",)), DETOK_SIT, vae, sampler, **settings)


def _pipeline(
    state: Mapping[str, torch.Tensor],
    layout: Layout,
    vae: Tokenizer | None,
    sampler: str,
    *,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **settings,
) -> FAEDiTPipeline:
    if sampler not in SCHEDULERS:
        raise ValueError(f"sampler must be 'ode' or 'sde', got {sampler!r}")
    transformer = build_denoiser(state, layout, num_attention_heads, dtype)
    return FAEDiTPipeline(vae=vae, transformer=transformer, scheduler=SCHEDULERS[sampler](), **settings)


def _without_decoder_blocks(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Legacy checkpoints of REPA count the blocks behind the aligned one anew, as `decoder_blocks`."""
    first = count_layers(state, "blocks")

    def renamed(match):
        return f"blocks.{int(match[1]) + first}."

    return {re.sub(r"^decoder_blocks\.(\d+)\.", renamed, key): tensor for key, tensor in state.items()}
