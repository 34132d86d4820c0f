"""The published weights of this field, as data. `hf_fae.load_published(name)` loads a row, `hf-fae zoo` shows all.

A figure is what the authors report on ImageNet: gFID without / with guidance, or rFID of a tokenizer. The licence of
RAE is that of its code; nothing is said of its weights.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any

from .presets import RAEV2_LAYERS


__all__ = ["ZOO", "Published", "find"]


@dataclass(frozen=True)
class Published:
    """A model that its authors published.

    Attributes:
        loader: `module:function` in `hf_fae.convert`, called with `files`, `models`, `vae` and `settings` by name.
        files: argument of the loader -> path in the repository.
        source: Hub repository, or the address from which a user downloads the files.
        license: the Hub's identifier of the licence, None where none is stated.
        paper: arXiv id.
        figure: as reported, see the module; None where nothing is.
        tokenizer: name in `ZOO` of what a generator's latents are of, the loader's `vae`.
        models: argument of the loader -> Hub id of a model in the libraries' own format.
        settings: other arguments of the loader: sampler and guidance that go with the weights.
    """

    loader: str
    files: dict[str, str] = field(default_factory=dict)
    source: str = ""
    license: str | None = None
    paper: str = ""
    figure: str | None = None
    tokenizer: str | None = None
    models: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Where the files are published."""
        return self.source if "://" in self.source else f"https://huggingface.co/{self.source}"

    @property
    def needs_files(self) -> str | None:
        """Why a user has to download the files; None where they are fetched from the Hub."""
        if self.license is None:
            return "states no licence"
        return "is not on the Hub" if "://" in self.source else None


# What the rows of a publisher share.
DETOK = {"source": "jjiaweiyang/l-DeTok", "license": "mit", "paper": "2507.15856"}
LIGHTNINGDIT = {"license": "mit", "paper": "2501.01423"}
MAETOK = {"license": None, "paper": "2502.03444"}
MAR = {"source": "https://github.com/LTH14/mar", "license": "mit", "paper": "2406.11838"}
RAE = {"source": "nyu-visionx/RAE-collections", "license": "mit", "paper": "2510.11690"}
RAEV2 = {"source": "nyu-visionx/RAEv2-models", "license": None, "paper": "2605.18324"}
STEPS_OF_MAR = {"num_inference_steps": 256, "num_diffusion_steps": 100}


def _sd_vae(source: str) -> Published:
    loader, models = "autoencoder_kl:open_autoencoder_kl", {"path": source}
    return Published(loader, source=source, license="mit", paper="2112.10752", models=models)


def _rae(decoder: str, statistics: str, encoder: str, figure: str | None = None) -> Published:
    files = {"weights": f"decoders/{decoder}/model.pt", "statistics": f"stats/{statistics}/stat.pt"}
    models, settings = {"image_encoder": encoder}, {"image_encoder_id": encoder}
    return Published("rae:load_rae", files, figure=figure, models=models, settings=settings, **RAE)


def _dit_dh(size: int, strong: str, weak: str, scale: float, figure: str) -> Published:
    folder, tokenizer = f"DiTs/Dinov2/wReg_base/ImageNet{size}", "rae-dinov2-b" if size == 256 else "rae-dinov2-b-512"
    files = {"weights": f"{folder}/{strong}/stage2_model.pt", "weak_weights": f"{folder}/{weak}/stage2_model.pt"}
    settings = {"guidance_scale": scale}
    return Published("dit_dh:load_dit_dh", files, figure=figure, tokenizer=tokenizer, settings=settings, **RAE)


def _raev2(data: str, k: int, figure: str | None = None) -> Published:
    encoder, folder = "facebook/dinov3-vitl16-pretrain-lvd1689m", f"stage1/{data}/dinov3l-k{k}"
    files = {"weights": f"{folder}/decoder.pt", "statistics": f"{folder}/stats.pt"}
    settings = {"image_encoder_id": encoder, "layers": RAEV2_LAYERS[k], "add_spatial_mean": k > 1}
    models = {"image_encoder": encoder}
    return Published("raev2:load_raev2", files, figure=figure, models=models, settings=settings, **RAEV2)


def _detok(file: str, figure: str | None = None) -> Published:
    # The tuned decoder belongs to the same encoder, and so to the same statistics.
    files, settings = {"weights": file, "statistics": "stats.pkl"}, {"statistics_key": "detok-BB-gamm3.0-m0.7"}
    return Published("detok:load_detok", files, figure=figure, settings=settings, **DETOK)


def _detok_mar(file: str, scale: float, figure: str) -> Published:
    settings, tokenizer = {"guidance_scale": scale, **STEPS_OF_MAR}, "detok-bb-tuned"
    return Published("mar:load_mar", {"weights": file}, figure=figure, tokenizer=tokenizer, settings=settings, **DETOK)


def _mar(size: str, scale: float, figure: str) -> Published:
    files, settings = {"weights": f"mar/mar_{size}/checkpoint-last.pth"}, {"guidance_scale": scale, **STEPS_OF_MAR}
    return Published("mar:load_mar", files, figure=figure, tokenizer="kl16", settings=settings, **MAR)


def _maetok(source: str, figure: str) -> Published:
    files = {"config_file": "config.json", "weights": "model.safetensors"}
    return Published("maetok:load_maetok", files, source=source, figure=figure, **MAETOK)


def _maetok_sit(source: str, tokenizer: str, interval: list[float], figure: str) -> Published:
    files, settings = {"weights": "model.safetensors"}, {"guidance_scale": [interval]}
    loader, origin = "sit:load_maetok_sit", {"source": source, **MAETOK}
    return Published(loader, files, figure=figure, tokenizer=tokenizer, settings=settings, **origin)


def _lightningdit(epochs: str, interval: list[float], figure: str) -> Published:
    source = f"hustvl/lightningdit-xl-imagenet256-{epochs}"
    files = {"weights": f"lightningdit-xl-imagenet256-{epochs}.pt"}
    settings = {"guidance_scale": {"intervals": [interval], "channels": 3}}
    loader, origin = "lightningdit:load_lightningdit", {"source": source, **LIGHTNINGDIT}
    return Published(loader, files, figure=figure, tokenizer="vavae-f16d32", settings=settings, **origin)


def _dit(size: int, figure: str) -> Published:
    files = {"weights": "transformer/diffusion_pytorch_model.bin"}
    settings = {"guidance_scale": {"intervals": [[0, 1, 1.5]], "channels": 3}, "sample_size": size // 8}
    origin = {"source": f"facebook/DiT-XL-2-{size}", "license": "cc-by-nc-4.0", "paper": "2212.09748"}
    return Published("dit:load_dit", files, figure=figure, tokenizer="sd-vae-ft-ema", settings=settings, **origin)


ZOO = {
    # Tokenizers
    "sd-vae-ft-ema": _sd_vae("stabilityai/sd-vae-ft-ema"),
    "sd-vae-ft-mse": _sd_vae("stabilityai/sd-vae-ft-mse"),
    "kl16": Published(
        "autoencoder_kl:load_autoencoder_kl",
        {"weights": "vae/kl16.ckpt"},
        figure="rFID 0.53",
        settings={"scaling_factor": 0.2325},
        **MAR,
    ),
    "vavae-f16d32": Published(
        "autoencoder_kl:load_autoencoder_kl",
        {"weights": "vavae-imagenet256-f16d32-dinov2.pt", "statistics": "latents_stats.pt"},
        source="hustvl/vavae-imagenet256-f16d32-dinov2",
        figure="rFID 0.28",
        **LIGHTNINGDIT,
    ),
    "rae-dinov2-b": _rae(
        "dinov2/wReg_base/ViTXL_n08", "dinov2/wReg_base/imagenet1k", "facebook/dinov2-with-registers-base", "rFID 0.57"
    ),
    "rae-dinov2-b-512": _rae(
        "dinov2/wReg_base/ViTXL_n08_i512",
        "dinov2/wReg_base/imagenet1k_512",
        "facebook/dinov2-with-registers-base",
        "rFID 0.53",
    ),
    "rae-siglip2-b": _rae(
        "siglip2/base_p16_i256/ViTXL_n08", "siglip2/base_p16_i256/ImageNet1k", "google/siglip2-base-patch16-256"
    ),
    "rae-mae-b": _rae("mae/base_p16/ViTXL_n08", "mae/base_p16/ImageNet1k", "facebook/vit-mae-base"),
    "raev2-dinov3-l-k1": _raev2("imagenet", 1, "rFID 0.60"),
    "raev2-dinov3-l-k7": _raev2("imagenet", 7, "rFID 0.30"),
    "raev2-dinov3-l-k23": _raev2("imagenet", 23, "rFID 0.18"),
    "raev2-dinov3-l-k7-general": _raev2("general", 7),
    "raev2-dinov3-l-k23-general": _raev2("general", 23),
    "detok-bb": _detok("detok-BB-gamm3.0-m0.7.pth", "rFID 0.68"),
    "detok-bb-tuned": _detok("detok-BB-gamm3.0-m0.7-decoder_tuned.pth"),
    "maetok-b-256": _maetok("MAETok/maetok-b-128", "rFID 0.48"),
    "maetok-b-512": _maetok("MAETok/maetok-b-128-512", "rFID 0.62"),
    # Generators
    "lightningdit-xl-64ep": _lightningdit("64ep", [0, 0.9, 10.0], "gFID 5.14 / 2.11"),
    "lightningdit-xl-800ep": _lightningdit("800ep", [0, 0.875, 6.7], "gFID 2.17 / 1.35"),
    "dit-dh-xl-256": _dit_dh(256, "DiTDH-XL", "DiTDH-S_ep14", 1.42, "gFID 1.51 / 1.13"),
    "dit-dh-xl-512": _dit_dh(512, "DiTDH-XL_ep400", "DiTDH-S_ep20", 1.5, "gFID - / 1.13"),
    "raev2-dit-xl": Published(
        "raev2_dit:load_raev2_dit",
        {"weights": "stage2/imagenet/dinov3l-k7/checkpoint.pt"},
        figure="gFID - / 1.06",
        tokenizer="raev2-dinov3-l-k7",
        settings={"internal_guidance_scale": [[0.1, 1.0, 1.78]]},
        **RAEV2,
    ),
    "mar-b-detok": _detok_mar("mar_base.pth", 3.9, "gFID - / 1.55"),
    "mar-l-detok": _detok_mar("mar_large.pth", 3.4, "gFID - / 1.35"),
    "mar-b": _mar("base", 2.9, "gFID - / 2.31"),
    "mar-l": _mar("large", 3.0, "gFID - / 1.78"),
    "mar-h": _mar("huge", 3.2, "gFID - / 1.55"),
    "sit-xl-maetok-256": _maetok_sit("MAETok/sit-xl_maetok-b-128", "maetok-b-256", [0, 0.75, 1.9], "gFID 2.31 / 1.67"),
    "sit-xl-maetok-512": _maetok_sit(
        "MAETok/sit-xl_maetok-b-128-512", "maetok-b-512", [0, 0.7, 1.5], "gFID 2.79 / 1.69"
    ),
    "sit-xl-2": Published(
        "sit:load_sit",
        {"weights": "SiT-XL-2-256.pt"},
        source="nyu-visionx/SiT-collections",
        license="mit",
        paper="2401.08740",
        figure="gFID 8.61 / 2.06",
        tokenizer="sd-vae-ft-ema",
        settings={"guidance_scale": {"intervals": [[0, 1, 1.5]], "channels": 3}},
    ),
    "repa-xl-2": Published(
        "sit:load_repa",
        {"weights": "last.pt"},
        source="https://github.com/sihyun-yu/REPA",
        license="mit",
        paper="2410.06940",
        figure="gFID 5.90 / 1.42",
        tokenizer="sd-vae-ft-ema",
        settings={"guidance_scale": [[0, 0.7, 1.8]]},
    ),
    "dit-xl-2-256": _dit(256, "gFID 9.62 / 2.27"),
    "dit-xl-2-512": _dit(512, "gFID - / 3.04"),
    "starflow-3b-text": Published(
        "starflow:load_starflow",
        {"weights": "starflow_3B_t2i_256x256.pth"},
        source="apple/starflow",
        license="apple-amlr",
        paper="2506.06276",
        tokenizer="sd-vae-ft-ema",
    ),
}


def find(name: str) -> Published:
    """The row of a name.

    Raises:
        ValueError: there is none.
    """
    if name in ZOO:
        return ZOO[name]
    close = difflib.get_close_matches(name, ZOO, n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else "see `hf-fae zoo` for all names"
    raise ValueError(f"name must be of published weights, got {name!r}; {hint}")
