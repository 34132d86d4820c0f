"""The pipelines that the demo serves, each loaded when it is first chosen."""

import os
from pathlib import Path

import torch

import hf_fae

from ..evaluation.inputs.spaces import decodes_features
from ..loading import complete_text_encoder, loading, open_pipeline
from ..pipelines.latent_pipeline import LatentPipeline


__all__ = ["EMBEDDED", "MODELS_VARIABLE", "Models", "default_models"]

# They come with a clone of the repository, not with an installed package.
EMBEDDED = [
    Path(hf_fae.__file__).parents[2] / "checkpoints" / name
    for name in ("fae-dit-emoji-256", "fae-starflow-emoji-256", "fae-text-emoji-256")
]
MODELS_VARIABLE = "HF_FAE_MODELS"


def default_models() -> list[str]:
    """The pipelines that the environment variable HF_FAE_MODELS names, else the embedded checkpoints.

    Raises:
        ValueError: there are none.
    """
    names = [name.strip() for name in os.environ.get(MODELS_VARIABLE, "").split(",") if name.strip()]
    names = names or [str(folder) for folder in EMBEDDED if folder.is_dir()]
    if not names:
        raise ValueError(
            f"--model or the variable {MODELS_VARIABLE} must name pipelines (folders or Hub ids): no embedded "
            f"checkpoints are in {str(EMBEDDED[0].parent)!r}, they come with a clone of the repository"
        )
    return names


class Models:
    """Pipelines by folder or Hub id, loaded on first use and kept: in bf16 on CUDA, else in fp32 on the CPU.

    Args:
        image_encoder: folder or Hub id of the frozen encoder of tokenizers that were saved without it; by default the
            one that they name.
        text_encoder: the same for pipelines that read text and were saved without theirs.
    """

    def __init__(self, image_encoder: str | None = None, text_encoder: str | None = None):
        self.image_encoder, self.text_encoder = image_encoder, text_encoder
        self.device, self.dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
        self.loaded = {}

    def pipeline(self, name: str) -> LatentPipeline:
        """The pipeline of that name.

        Raises:
            ValueError: it cannot be loaded, or is not a pipeline of hf_fae.
        """
        if name not in self.loaded:
            pipe = open_pipeline("model", name, self.dtype)
            if pipe.reads_text and pipe.text_encoder is None:
                complete_text_encoder(pipe, self.text_encoder)
            pipe.set_progress_bar_config(disable=True)
            self.loaded[name] = pipe.to(self.device)
        return self.loaded[name]

    def tokenizer(self, name: str):
        """The tokenizer of the pipeline of that name, with its frozen encoder if it has one.

        Raises:
            ValueError: as `pipeline`, or its encoder cannot be loaded.
        """
        vae = self.pipeline(name).vae
        if decodes_features(vae) and vae.image_encoder is None:
            encoder = self.image_encoder or vae.config.image_encoder_id
            if encoder is None:
                raise ValueError(f"model {name!r} comes without its frozen encoder and names none: --image_encoder")
            with loading("frozen encoder (--image_encoder)", encoder):
                vae.load_encoder(self.image_encoder)
        return vae
