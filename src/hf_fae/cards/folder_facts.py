"""What the configs in a saved folder state: its kind, components, classes, encoders and papers."""

import importlib
import json
import os
from pathlib import Path
from typing import Any

from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open


__all__ = ["ORIGIN", "is_hub_id", "latest_images", "load_config", "read_folder", "text_facts"]

ORIGIN = "published.json"  # in folders of converted weights: what these are, see `convert.published`

# Papers by arXiv id, and which of them describe a class.
PAPERS = {
    "2112.10752": "High-Resolution Image Synthesis with Latent Diffusion Models",
    "2212.09748": "Scalable Diffusion Models with Transformers",
    "2401.08740": "SiT: Exploring Flow and Diffusion-based Generative Models with Scalable Interpolant Transformers",
    "2403.03206": "Scaling Rectified Flow Transformers for High-Resolution Image Synthesis",
    "2406.11838": "Autoregressive Image Generation without Vector Quantization",
    "2410.06940": (
        "Representation Alignment for Generation: Training Diffusion Transformers Is Easier Than You Think"
    ),
    "2501.01423": "Reconstruction vs. Generation: Taming Optimization Dilemma in Latent Diffusion Models",
    "2502.03444": "Masked Autoencoders Are Effective Tokenizers for Diffusion Models",
    "2506.06276": "STARFlow: Scaling Latent Normalizing Flows for High-resolution Image Synthesis",
    "2507.15856": "Latent Denoising Makes Good Tokenizers",
    "2510.11690": "Diffusion Transformers with Representation Autoencoders",
    "2512.07829": "One Layer Is Enough: Adapting Pretrained Visual Encoders for Image Generation",
    "2605.10780": "Beyond the Last Layer: Multi-Layer Representation Fusion for Visual Tokenization",
    "2605.18324": "Improved Baselines with Representation Autoencoders",
}
PAPERS_OF = {
    "AutoencoderDeTok": ["2507.15856"],
    "AutoencoderDRoRAE": ["2510.11690", "2605.10780"],
    "AutoencoderFAE": ["2512.07829"],
    "AutoencoderMAETok": ["2502.03444"],
    "AutoencoderRAEv2": ["2605.18324"],
    "AutoregressiveTransformer2DModel": ["2507.15856"],
    "DiTDHTransformer2DModel": ["2510.11690"],
    "LightningDiTTransformer2DModel": ["2501.01423"],
    "MARTransformer2DModel": ["2406.11838"],
    "MMDiTTransformer2DModel": ["2403.03206"],
    "RAEv2Transformer2DModel": ["2605.18324"],
    "STARFlowTransformer2DModel": ["2506.06276"],
}


def read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a saved folder, and the facts for the template of that kind.

    Folders of converted weights also have `origins`, an entry of the zoo for each part, and the papers to cite.

    Raises:
        ValueError: the folder holds no pipeline, tokenizer, generator or LoRA.
    """
    kind, facts = _kind_facts(folder)
    origins = _read_json(folder / ORIGIN) or []
    citations = {origin["paper"]: PAPERS[origin["paper"]] for origin in origins}
    return kind, {**facts, "origins": origins, "citations": citations}


def text_facts(index: dict[str, Any], transformer: dict[str, Any]) -> dict[str, Any]:
    """Whether a pipeline reads text and which encoder it lacks, from its own and its transformer's config."""
    reads_text = transformer.get("caption_channels") is not None
    _, text_encoder = index.get("text_encoder") or (None, None)
    return {
        "reads_text": reads_text,
        "lacks_text_encoder": reads_text and text_encoder is None,
        "text_encoder_id": index.get("text_encoder_id"),
    }


def load_config(name: str | None, component: str | None = None) -> dict[str, Any]:
    """The config of a pipeline or of one component, from a folder or the Hub's cache; empty if in neither."""
    if name is None:
        return {}
    file = f"{component}/config.json" if component else "model_index.json"
    path = try_to_load_from_cache(name, file) if is_hub_id(name) else Path(name, file)
    return _read_json(Path(path)) if isinstance(path, (str, Path)) else {}


def latest_images(folder: str | Path) -> list[Path]:
    """The newest image of each name in `validation/`, whose files the training loop names `NAME-STEP.png`."""
    paths = sorted(Path(folder, "validation").glob("*-*.png"))
    return list({path.stem.rpartition("-")[0]: path for path in paths}.values())


def is_hub_id(name: str) -> bool:
    """Whether a name is a valid repository id and not a local path."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _kind_facts(folder):
    index = _read_json(folder / "model_index.json")
    if index:
        return "pipeline", _pipeline_facts(folder, index)
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        with safe_open(folder / LORA_WEIGHT_NAME_SAFE, "pt") as file:
            keys = [key.partition(".") for key in file.keys()]
        new_classes = [name for kind, _, name in keys if kind == "new_classes"]
        return "lora", {"new_classes": new_classes, "encoder": None, "encoder_id": None}
    config = _read_json(folder / "config.json")
    name = config.get("_class_name")
    if not name:
        raise ValueError(f"folder must hold a saved pipeline, tokenizer, generator or LoRA, got {str(folder)!r}")
    facts = {
        "config": config,
        "encoder": config.get("image_encoder_config"),
        "encoder_id": config.get("image_encoder_id"),
        "papers": _papers([name]),
    }
    if "latent_channels" not in config:
        return "generator", facts
    libraries = map(importlib.import_module, ("hf_fae", "diffusers"))
    model_class = next(getattr(library, name) for library in libraries if hasattr(library, name))
    return "tokenizer", {
        **facts,
        "has_encoder": (folder / "image_encoder.d").is_dir(),
        "has_features": hasattr(model_class, "decode_features"),
    }


def _pipeline_facts(folder, index):
    parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)}
    vae = _read_json(folder / "vae" / "config.json")
    transformer = _read_json(folder / "transformer" / "config.json")
    return {
        "config": index,
        "components": {name: class_name for name, (_, class_name) in parts.items()},
        "labels": {int(key): label for key, label in (index.get("id2label") or {}).items()},
        "num_classes": transformer.get("num_classes"),
        **text_facts(index, transformer),
        "vae": vae,
        "encoder": vae.get("image_encoder_config"),
        "encoder_id": vae.get("image_encoder_id"),
        "papers": _papers(class_name for _, class_name in parts.values()),
    }


def _papers(class_names):
    return [(name, arxiv, PAPERS[arxiv]) for name in class_names for arxiv in PAPERS_OF.get(name, ())]


def _read_json(path):
    return json.loads(path.read_text()) if path.is_file() else {}
