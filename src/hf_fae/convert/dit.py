"""DiT (arXiv 2212.09748) in its authors' layout and in diffusers', and l-DeTok's DiT.

diffusers' `DiTTransformer2DModel` computes the sinusoids of time with other frequencies than the published code, with
which the weights were trained (it divides exponents by 127 instead of 128): ours are those of training.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from ..generators.lightning_dit import LightningDiTTransformer2DModel
from ..pipelines.fae_dit import FAEDiTPipeline
from ..pipelines.latent_pipeline import Tokenizer
from ..schedulers.learned_variance import learned_variance_scheduler
from .denoisers import DETOK_DIT, DIT, attention_heads, build_denoiser
from .files import build, read_weights
from .keys import KeyTable
from .layouts import check_family, count_layers
from .transforms import pixel_rows


__all__ = ["diffusers_dit_config", "diffusers_dit_table", "load_detok_dit", "load_dit"]


def load_dit(
    weights: str | Path,
    vae: Tokenizer | None,
    sample_size: int = 32,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **settings,
) -> FAEDiTPipeline:
    """DiT, such as `DiT-XL-2-256x256.pt`, or the weights of `facebook/DiT-XL-2-256`, on SD-VAE's latents.

    Args:
        weights: file of the denoiser's weights, in either layout.
        vae: tokenizer of its latents.
        sample_size: latent side of training, which diffusers' weights do not show.
        num_attention_heads: needed for a width that is not DiT's.
        dtype: of the denoiser; None keeps that of the file.
        settings: other arguments of `FAEDiTPipeline`. The published sampler guides three channels,
            `guidance_scale={"intervals": [[0, 1, 4.0]], "channels": 3}`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: weights of another family or size.
    """
    state = read_weights(weights)
    if any(key.startswith("transformer_blocks.") for key in state):
        config = diffusers_dit_config(state, sample_size, num_attention_heads)
        table = diffusers_dit_table(config["patch_size"], config["in_channels"])
        transformer = build(LightningDiTTransformer2DModel, config, table.to_ours(state), dtype)
    else:
        transformer = build_denoiser(state, DIT, num_attention_heads, dtype)
    return _pipeline(transformer, vae, settings)


def load_detok_dit(
    weights: str | Path,
    vae: Tokenizer | None,
    num_attention_heads: int | None = None,
    dtype: torch.dtype | None = None,
    **settings,
) -> FAEDiTPipeline:
    """DiT of l-DeTok's latents (arXiv 2507.15856); arguments and errors as in `load_dit`."""
    state = read_weights(weights, ("model_ema",))
    return _pipeline(build_denoiser(state, DETOK_DIT, num_attention_heads, dtype), vae, settings)


def diffusers_dit_table(patch_size: int, in_channels: int) -> KeyTable:
    """The keys of diffusers' `DiTTransformer2DModel`.

    There every block has a copy of the embeddings of time and class: those of the first one are taken.
    """
    block, embeddings = "transformer_blocks.{i}", "transformer_blocks.0.norm1.emb"
    rules = [
        ("pos_embed.proj.{weight,bias}", "proj_in.{weight,bias}"),
        (
            f"{embeddings}.timestep_embedder.linear_{{1,2}}.{{weight,bias}}",
            "time_embedding.linear_{1,2}.{weight,bias}",
        ),
        (f"{embeddings}.class_embedder.embedding_table.weight", "class_embedding.weight"),
        (f"{block}.norm1.linear.{{weight,bias}}", "blocks.{i}.modulation.{weight,bias}"),
        (f"{block}.attn1.to_{{q,k,v,out.0}}.{{weight,bias}}", "blocks.{i}.attn.to_{q,k,v,out.0}.{weight,bias}"),
        (f"{block}.ff.net.{{0.proj,2}}.{{weight,bias}}", "blocks.{i}.ff.net.{0.proj,2}.{weight,bias}"),
        ("proj_out_1.{weight,bias}", "modulation_out.{weight,bias}"),
        ("proj_out_2.{weight,bias}", "proj_out.{weight,bias}", pixel_rows(patch_size, 2 * in_channels)),
    ]
    return KeyTable(rules, dropped=("pos_embed.pos_embed", f"{block}.norm1.emb.*"))


def diffusers_dit_config(
    state: Mapping[str, torch.Tensor], sample_size: int, num_attention_heads: int | None = None
) -> dict:
    """The config of `LightningDiTTransformer2DModel` for the state dict of a `DiTTransformer2DModel`.

    Raises:
        ValueError: the state dict is not that of such a model, or its number of heads is unknown.
    """
    names = ("pos_embed.proj.weight", "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight")
    check_family(state, "a DiTTransformer2DModel", names)
    patches, classes = (state[name] for name in names)
    dim, in_channels, patch_size = patches.shape[:3]
    heads = attention_heads(dim, num_attention_heads)
    return {
        "sample_size": sample_size,
        "patch_size": patch_size,
        "in_channels": in_channels,
        "num_layers": count_layers(state, "transformer_blocks"),
        "num_attention_heads": heads,
        "attention_head_dim": dim // heads,
        "num_classes": len(classes) - 1,
        "norm_type": "layer_norm",
        "ff_type": "gelu",
        "use_rope": False,
        "prediction_type": "epsilon",
    }


def _pipeline(transformer, vae, settings):
    return FAEDiTPipeline(vae=vae, transformer=transformer, scheduler=learned_variance_scheduler("linear"), **settings)
