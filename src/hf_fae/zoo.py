"""The published weights of this field, as data. `hf_fae.load_published(name)` loads a row, `hf-fae zoo` shows all.

A figure is what the authors report on ImageNet: gFID without / with guidance, or rFID of a tokenizer. RAE's licence is
that of its code; nothing is said of its weights.
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
        source: Hub repository, or the address from which a user downloads the files.
        files: argument of the loader -> path in the repository.
        figure: as reported, see the module; None where nothing is.
        license: the Hub's identifier of the licence, None where none is stated.
        paper: arXiv id.
        tokenizer: what a generator's latents are of: a name in `ZOO`, or the Hub id of an `AutoencoderKL`.
        models: argument of the loader -> Hub id of a model in the libraries' own format.
        settings: other arguments of the loader: sampler and guidance that go with the weights.
    """

    loader: str
    source: str
    files: dict[str, str]
    figure: str | None
    license: str | None
    paper: str
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


ZOO: dict[str, Published] = {
    "starflow-3b-text": Published(
        "starflow:load_starflow",
        "apple/starflow",
        {"path": "starflow_3B_t2i_256x256.pth"},
        None,
        "apple-amlr",
        "2506.06276",
        "stabilityai/sd-vae-ft-ema",
    ),
}
