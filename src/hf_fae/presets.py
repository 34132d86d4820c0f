"""The published sizes, as data. `build_preset(name)` builds the model of that size with random weights."""

import difflib

import diffusers
import torch
from diffusers import ModelMixin

import hf_fae


__all__ = ["PRESETS", "build_preset"]

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
HALF = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def _dinov2(hidden_size: int, num_layers: int, swiglu: bool = False) -> dict:
    """DINOv2/14 without registers (arXiv 2304.07193, Table 17: heads of width 64), at 224 px: a grid of 16 x 16."""
    model = {
        "model_type": "dinov2",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden_size // 64,
        "patch_size": 14,
        "image_size": 518,
        "use_swiglu_ffn": swiglu,
    }
    return {"model": model, "image_size": [224, 224], **IMAGENET}


def _siglip2(hidden_size: int, num_layers: int, heads: int, image_size: int) -> dict:
    """SigLIP2/16 (arXiv 2502.14786). Its fixed-size checkpoints have SigLIP's model type."""
    model = {
        "model_type": "siglip_vision_model",
        "hidden_size": hidden_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * hidden_size,
        "patch_size": 16,
        "image_size": image_size,
    }
    return {"model": model, "image_size": [image_size, image_size], **HALF}


def _mae_base() -> dict:
    """MAE's ViT-B/16 (arXiv 2111.06377), trained at 224 px; RAE reads 256 px with interpolated positions."""
    model = {
        "model_type": "vit_mae",
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "patch_size": 16,
        "image_size": 224,
    }
    return {"model": model, "image_size": [224, 224], **IMAGENET}


def _fae(encoder_id: str, encoder_config: dict, sample_size: int = 256, latent_channels: int = 32) -> tuple[str, dict]:
    """FAE (arXiv 2512.07829, appendix D): only the widths depend on the encoder, see `AutoencoderFAE`."""
    config = {
        "feature_dim": encoder_config["model"]["hidden_size"],
        "latent_channels": latent_channels,
        "sample_size": sample_size,
        "image_encoder_id": encoder_id,
        "image_encoder_config": encoder_config,
    }
    return "AutoencoderFAE", config


def _dinov2_reg(hidden_size: int, num_layers: int) -> dict:
    """DINOv2/14 with four registers (arXiv 2309.16588)."""
    config = _dinov2(hidden_size, num_layers)
    model = {**config["model"], "model_type": "dinov2_with_registers", "num_register_tokens": 4}
    return {**config, "model": model}


def _drorae(encoder_id: str, encoder_config: dict, **config) -> tuple[str, dict]:
    """DRoRAE (arXiv 2605.10780) with RAE's decoder ViT-XL; by default it fuses all layers of a ViT-B."""
    width = encoder_config["model"]["hidden_size"]
    config = {
        "feature_dim": width,
        "latent_channels": width,
        "image_encoder_id": encoder_id,
        "image_encoder_config": encoder_config,
        **config,
    }
    return "AutoencoderDRoRAE", config


def _rae(encoder_id: str, encoder_config: dict, **config) -> tuple[str, dict]:
    """RAE with the decoder ViT-XL (arXiv 2510.11690, section 3), which reads the last layer alone."""
    return _drorae(encoder_id, encoder_config, fusion_type="none", fusion_layers=1, **config)


# Layers of DINOv3-L in RAEv2's tokenizers (arXiv 2605.18324), by their number; blocks are counted from 0.
RAEV2_LAYERS = {1: [23], 7: list(range(11, 24, 2)), 23: list(range(1, 24))}


def _raev2(k: int, add_spatial_mean: bool = True) -> tuple[str, dict]:
    """RAEv2 with the decoder ViT-XL on DINOv3-L (arXiv 2508.10104)."""
    model = {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "num_register_tokens": 4,
        "patch_size": 16,
        "image_size": 224,
    }
    config = {
        "layers": RAEV2_LAYERS[k],
        "add_spatial_mean": add_spatial_mean,
        "image_encoder_id": "facebook/dinov3-vitl16-pretrain-lvd1689m",
        "image_encoder_config": {"model": model, "image_size": [224, 224], **IMAGENET},
    }
    return "AutoencoderRAEv2", config


# Widths, layers and heads of l-DeTok's encoders and decoders (arXiv 2507.15856); they differ from ViT's.
DETOK_SIZES = {"s": (512, 8, 8), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
DETOK_PAIRS = ("ss", "sb", "sl", "bs", "bb", "bl", "ls", "lb", "ll", "xlxl")


def _detok(pair: str) -> tuple[str, dict]:
    """l-DeTok for 256 px, computed as its weights were published; the letters name encoder and decoder."""
    config = {"rotary_as_released": True}
    for half, size in (("encoder", pair[: len(pair) // 2]), ("decoder", pair[len(pair) // 2 :])):
        width, num_layers, heads = DETOK_SIZES[size]
        config |= {
            f"{half}_hidden_size": width,
            f"{half}_num_layers": num_layers,
            f"{half}_num_attention_heads": heads,
        }
    return "AutoencoderDeTok", config


def _maetok(sample_size: int) -> tuple[str, dict]:
    """MAETok's published tokenizer for ImageNet (arXiv 2502.03444), whose decoder is modulated, unlike the paper's."""
    config = {
        "sample_size": sample_size,
        "decoder_type": "modulated",
        "rope_type": "learned",
        "rope_theta": 10.0,
    }
    return "AutoencoderMAETok", config


# DiT's sizes (arXiv 2212.09748, Table 1), which SiT and LightningDiT keep: layers, heads, head width.
DIT_SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "l": (24, 16, 64), "xl": (28, 16, 72)}
# The two ends of FAE's Table 6, and DiT, which differs from SiT only in what it predicts.
DIT_KINDS = {
    "lightningdit": {"norm_type": "rms_norm", "ff_type": "swiglu", "use_rope": True},  # arXiv 2501.01423
    "sit": {"norm_type": "layer_norm", "ff_type": "gelu", "use_rope": False},  # arXiv 2401.08740
    "dit": {  # arXiv 2212.09748
        "norm_type": "layer_norm",
        "ff_type": "gelu",
        "use_rope": False,
        "prediction_type": "epsilon",
    },
}


# What l-DeTok's code changes of them (arXiv 2507.15856).
DETOK_KINDS = {
    "lightningdit": {"pos_embed_type": "learned"},
    "sit": {"ff_type": "exact_gelu"},
    "dit": {"ff_type": "exact_gelu"},
}
# SD-VAE's latents of 256 px in 256 tokens.
SD_VAE = {"sample_size": 32, "patch_size": 2, "in_channels": 4}


def _dit(kind: str, size: str, **config) -> tuple[str, dict]:
    """A denoiser for the 1000 classes of ImageNet, by default with patch size 1 for FAE's latents (appendix D)."""
    num_layers, heads, head_dim = DIT_SIZES[size]
    config = {
        "sample_size": 16,
        "patch_size": 1,
        "in_channels": 32,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_classes": 1000,
        **DIT_KINDS[kind],
        **config,
    }
    return "LightningDiTTransformer2DModel", config


def _autoencoder_kl(latent_channels: int, decoder_attention: bool, **config) -> tuple[str, dict]:
    """LDM's convolutional autoencoder of 16 pixels per latent (arXiv 2112.10752), a class of diffusers."""
    config = {
        "down_block_types": [*4 * ["DownEncoderBlock2D"], "AttnDownEncoderBlock2D"],
        "up_block_types": ["AttnUpDecoderBlock2D" if decoder_attention else "UpDecoderBlock2D"]
        + 4 * ["UpDecoderBlock2D"],
        "block_out_channels": [128, 128, 256, 256, 512],
        "layers_per_block": 2,
        "latent_channels": latent_channels,
        "sample_size": 256,
        **config,
    }
    return "AutoencoderKL", config


def _dit_dh(size: str, sample_size: int = 16) -> tuple[str, dict]:
    """DiT^DH with patch size 1 for RAE's latents of DINOv2-B, 768 channels, and the 1000 classes of ImageNet."""
    num_layers, heads, head_dim = DIT_SIZES[size]
    config = {
        "sample_size": sample_size,
        "in_channels": 768,
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": head_dim,
        "num_classes": 1000,
    }
    return "DiTDHTransformer2DModel", config


def _starflow(num_layers: list[int], width: int, **config) -> tuple[str, dict]:
    """A flow with heads of width 64 (arXiv 2506.06276, section 4.1), by default on FAE's 16 x 16 x 32 latents."""
    config = {
        "sample_size": 16,
        "patch_size": 1,
        "in_channels": 32,
        "num_layers": num_layers,
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        **config,
    }
    return "STARFlowTransformer2DModel", config


def _mmdit(num_layers: int, width: int, sample_size: int, in_channels: int) -> tuple[str, dict]:
    """FAE's text-to-image models (appendix D) with heads of width 64, on 128 tokens of Flan-T5-XL."""
    config = {
        "sample_size": sample_size,
        "in_channels": in_channels,
        "num_layers": num_layers,
        "num_attention_heads": width // 64,
        "attention_head_dim": 64,
        "caption_channels": 2048,
        "max_caption_length": 128,
    }
    return "MMDiTTransformer2DModel", config


# MAR's sizes (arXiv 2406.11838, Table 1 and its code): layers of encoder and of decoder, width, heads; layers and
# width of the head, for B and L those of l-DeTok's 800-epoch runs, for H MAR's.
MAR_SIZES = {"b": (12, 768, 12, 6, 1024), "l": (16, 1024, 16, 8, 1280), "h": (20, 1280, 16, 12, 1536)}
# l-DeTok (arXiv 2507.15856): layers, width, heads of its causal models, all with the head of its 100-epoch runs.
AR_SIZES = {"b": (12, 768, 12), "l": (24, 1024, 16), "xl": (28, 1152, 16), "h": (32, 1280, 16)}


def _mar(size: str) -> tuple[str, dict]:
    """A MAR for l-DeTok's latents of 16 x 16 x 16 and the 1000 classes of ImageNet."""
    num_layers, width, heads, head_num_layers, head_hidden_size = MAR_SIZES[size]
    config = {
        "encoder_num_layers": num_layers,
        "decoder_num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "head_num_layers": head_num_layers,
        "head_hidden_size": head_hidden_size,
    }
    return "MARTransformer2DModel", config


def _autoregressive(order: str, size: str) -> tuple[str, dict]:
    """RasterAR or RandomAR for the same latents and classes."""
    num_layers, width, heads = AR_SIZES[size]
    config = {
        "num_layers": num_layers,
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "head_num_layers": 3,
        "head_hidden_size": 1024,
        "order": order,
    }
    return "AutoregressiveTransformer2DModel", config


# Name -> (class name, arguments of its constructor).
PRESETS: dict[str, tuple[str, dict]] = {
    # FAE appendix D: the main tokenizer, 38.17 + 170.43 + 305.36 M.
    "fae-dinov2-g": _fae("facebook/dinov2-giant", _dinov2(1536, 40, swiglu=True)),
    # Ours, for smaller budgets: the same recipe on smaller encoders.
    "fae-dinov2-b": _fae("facebook/dinov2-base", _dinov2(768, 12)),
    "fae-dinov2-s": _fae("facebook/dinov2-small", _dinov2(384, 12)),
    # FAE section 5.2: the tokenizer of text-to-image and retrieval.
    "fae-siglip2-g-opt": _fae("google/siglip2-giant-opt-patch16-256", _siglip2(1536, 40, 16, 256)),
    # FAE appendix D, column MMDiT-384: latents of 24 x 24 x 64 for the showcase images.
    "fae-siglip2-g-opt-384": _fae(
        "google/siglip2-giant-opt-patch16-384", _siglip2(1536, 40, 16, 384), sample_size=384, latent_channels=64
    ),
    # RAE's published tokenizers (nyu-visionx/RAE-collections), decoder 415.06 M; rae-dinov2-b is its default.
    **{
        f"rae-dinov2-{size}": _rae(f"facebook/dinov2-with-registers-{name}", _dinov2_reg(width, layers))
        for size, name, width, layers in (("s", "small", 384, 12), ("b", "base", 768, 12), ("l", "large", 1024, 24))
    },
    "rae-dinov2-b-512": _rae("facebook/dinov2-with-registers-base", _dinov2_reg(768, 12), sample_size=512),
    "rae-siglip2-b": _rae("google/siglip2-base-patch16-256", _siglip2(768, 12, 12, 256)),
    "rae-mae-b": _rae("facebook/vit-mae-base", _mae_base()),
    # DRoRAE on RAE's default: fusion 56.78 M (section 3.2).
    "drorae-dinov2-b": _drorae("facebook/dinov2-with-registers-base", _dinov2_reg(768, 12), fusion_layers=12),
    # RAEv2's published tokenizers, decoder 415.35 M: 7 layers for generation, 23 for reconstruction. That of the last
    # layer adds no spatial mean; with it (k1-mls) it is another one, in RAEv2's code of a list of one layer.
    "raev2-dinov3-l-k1": _raev2(1, add_spatial_mean=False),
    "raev2-dinov3-l-k1-mls": _raev2(1),
    "raev2-dinov3-l-k7": _raev2(7),
    "raev2-dinov3-l-k23": _raev2(23),
    # l-DeTok: detok-bb is the published one, detok-sb that of its ablations.
    **{f"detok-{pair}": _detok(pair) for pair in DETOK_PAIRS},
    # MAETok: 128 latent tokens at either size.
    "maetok-b-128": _maetok(256),
    "maetok-b-128-512": _maetok(512),
    # VA-VAE (arXiv 2501.01423), 69.84 M, and the KL-16 of MAR (arXiv 2406.11838).
    "vavae-f16d32": _autoencoder_kl(32, decoder_attention=True, scaling_factor=1.0),
    "kl-f16d16": _autoencoder_kl(16, decoder_attention=False, scaling_factor=0.2325),
    # FAE appendix D, column LDM: lightningdit-xl-1 is its 675.26 M; the sit models are those of its Tables 5 and 6.
    # lightningdit-xl-1 is also LightningDiT's own model, whose VA-VAE has latents of the same size.
    **{f"{kind}-{size}-1": _dit(kind, size) for kind in DIT_KINDS for size in DIT_SIZES},
    # SiT and DiT as published, on SD-VAE's latents; REPA (arXiv 2410.06940) trains sit-xl-2.
    **{f"{kind}-{size}-2": _dit(kind, size, **SD_VAE) for kind in ("sit", "dit") for size in DIT_SIZES},
    "dit-xl-2-512": _dit("dit", "xl", **{**SD_VAE, "sample_size": 64}),
    # The denoisers of l-DeTok's 16 x 16 x 16 latents, and of MAETok's 1 x 128 x 32 (its Tables 8 and 9).
    **{
        f"{kind}-{size}-1-detok": _dit(kind, size, in_channels=16, **DETOK_KINDS[kind])
        for kind in DIT_KINDS
        for size in ("b", "l", "xl")
    },
    "lightningdit-xl-1-maetok": _dit("lightningdit", "xl", sample_size=[1, 128]),
    **{
        f"sit-{size}-1-maetok": _dit("sit", size, sample_size=[1, 128], pos_embed_type="sincos_1d")
        for size in ("l", "xl")
    },
    # FAE appendix D, columns MMDiT and MMDiT-384: 603.46 M and 2017.84 M, counted here as 603.59 M and 2017.84 M.
    "mmdit-256": _mmdit(16, 1024, 16, 32),
    "mmdit-384": _mmdit(24, 1536, 24, 64),
    # RAE (arXiv 2510.11690): dit-dh-xl is its 839 M; S and XL are published for 512 px, too.
    **{f"dit-dh-{size}": _dit_dh(size) for size in DIT_SIZES},
    **{f"dit-dh-{size}-512": _dit_dh(size, sample_size=32) for size in ("s", "xl")},
    # RAEv2: its 875 M of class labels, and of texts on the last hidden states of Qwen3-0.6B.
    "raev2-dit-xl": ("RAEv2Transformer2DModel", {}),
    "raev2-dit-xl-text": ("RAEv2Transformer2DModel", {"num_classes": None, "caption_channels": 1024}),
    # The autoregressive generators of l-DeTok's latents; mar-b and mar-l are its 208 M and 479 M.
    **{f"mar-{size}": _mar(size) for size in MAR_SIZES},
    **{f"{order}-ar-{size}": _autoregressive(order, size) for order in ("raster", "random") for size in AR_SIZES},
    # FAE section 5.3: STARFlow's ImageNet model 18(6)-2048 on FAE's latents, 1.4 B, and its baseline: SD-VAE's latents
    # of 32 x 32 x 4 with patch size 2, so that there are 256 tokens as well.
    "starflow-imagenet-256": _starflow([2, 2, 2, 2, 2, 18], 2048, num_classes=1000),
    "starflow-imagenet-256-sd-vae": _starflow(
        [2, 2, 2, 2, 2, 18], 2048, num_classes=1000, sample_size=32, patch_size=2, in_channels=4
    ),
    # STARFlow's text-to-image model 24(6)-3072, 3.8 B, on 128 tokens of Flan-T5-XL: on FAE's latents, and as published
    # (apple/starflow, "3B") on SD-VAE's latents of 32 x 32 x 4, 1024 tokens.
    "starflow-text-256": _starflow(
        [2, 2, 2, 2, 2, 24], 3072, num_classes=None, caption_channels=2048, max_caption_length=128
    ),
    "starflow-text-256-sd-vae": _starflow(
        [2, 2, 2, 2, 2, 24],
        3072,
        num_classes=None,
        caption_channels=2048,
        max_caption_length=128,
        sample_size=32,
        in_channels=4,
    ),
}


def build_preset(name: str, device: str | torch.device | None = None) -> ModelMixin:
    """The model of that size with random weights; a tokenizer comes without its frozen encoder (`load_encoder`).

    Args:
        name: a key of `PRESETS`.
        device: where the weights are created, by default torch's default device; `"meta"` allocates no memory.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=3) or sorted(PRESETS)
        raise ValueError(f"name {name!r} is no preset; did you mean {', '.join(close)}?")
    class_name, config = PRESETS[name]
    with torch.device(device or torch.get_default_device()):
        return (getattr(hf_fae, class_name, None) or getattr(diffusers, class_name))(**config)
