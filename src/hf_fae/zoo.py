"""The published weights of this field, as data. `hf_fae.load_published(name)` loads a row, `hf-fae zoo` shows all.

A figure is what the authors report on ImageNet: gFID without / with guidance, or rFID of a tokenizer. The licence of
RAE is that of its code; nothing is said of its weights.
"""

import difflib
from dataclasses import dataclass, field
from typing import Any


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


DETOK = {"source": "jjiaweiyang/l-DeTok", "license": "mit", "paper": "2507.15856"}
# The tuned decoder has the same encoder, and the same statistics of latents.
DETOK_STATISTICS = {"settings": {"statistics_key": "detok-BB-gamm3.0-m0.7"}, **DETOK}
MAR = {"source": "https://github.com/LTH14/mar", "license": "mit", "paper": "2406.11838"}
MAETOK = {"license": None, "paper": "2502.03444"}


def _detok(file: str, figure: str | None = None) -> Published:
    files = {"weights": file, "statistics": "stats.pkl"}
    return Published("detok:load_detok", files, figure=figure, **DETOK_STATISTICS)


def _maetok(source: str, figure: str) -> Published:
    files = {"config_file": "config.json", "weights": "model.safetensors"}
    return Published("maetok:load_maetok", files, source=source, figure=figure, **MAETOK)


def _mar(file: str, figure: str, scale: float, tokenizer: str, family: dict) -> Published:
    settings = {"guidance_scale": scale, "num_inference_steps": 256, "num_diffusion_steps": 100}
    files = {"weights": file}
    return Published("mar:load_mar", files, figure=figure, tokenizer=tokenizer, settings=settings, **family)


ZOO = {
    "detok-bb": _detok("detok-BB-gamm3.0-m0.7.pth", "rFID 0.68"),
    "detok-bb-tuned": _detok("detok-BB-gamm3.0-m0.7-decoder_tuned.pth"),
    "maetok-b-256": _maetok("MAETok/maetok-b-128", "rFID 0.48"),
    "maetok-b-512": _maetok("MAETok/maetok-b-128-512", "rFID 0.62"),
    "mar-b-detok": _mar("mar_base.pth", "gFID - / 1.55", 3.9, "detok-bb-tuned", DETOK),
    "mar-l-detok": _mar("mar_large.pth", "gFID - / 1.35", 3.4, "detok-bb-tuned", DETOK),
    "mar-b": _mar("mar/mar_base/checkpoint-last.pth", "gFID - / 2.31", 2.9, "kl16", MAR),
    "mar-l": _mar("mar/mar_large/checkpoint-last.pth", "gFID - / 1.78", 3.0, "kl16", MAR),
    "mar-h": _mar("mar/mar_huge/checkpoint-last.pth", "gFID - / 1.55", 3.2, "kl16", MAR),
    "starflow-3b-text": Published(
        "starflow:load_starflow",
        {"path": "starflow_3B_t2i_256x256.pth"},
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
