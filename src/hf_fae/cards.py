"""Model cards: what a saved folder says about itself, and what its training adds.

`render_card` reads the saved configs, so a card cannot disagree with what it lies beside; [`TrainingRun`] brings what
no config knows. What neither knows is left out. The templates are in `model_cards/`, one for each kind of folder.
"""

import hashlib
import importlib
import json
import os
import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from huggingface_hub import (
    EvalResult,
    EvalResultEntry,
    ModelCard,
    ModelCardData,
    eval_result_entries_to_yaml,
    try_to_load_from_cache,
)
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open


__all__ = [
    "EVAL_RESULTS",
    "ORIGIN",
    "Result",
    "TrainingRun",
    "address_card",
    "is_generated",
    "latest_pictures",
    "merge_metadata",
    "render_card",
    "write_card",
    "write_eval_results",
]

EVAL_RESULTS = ".eval_results/hf_fae.yaml"
ORIGIN = "published.json"  # of a folder with converted weights: what they are, see `convert.published`
FOOTER = "<!-- Written by hf_fae, which replaces this card with every push until someone edits it: "

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
PIPELINE_TAGS = {"tokenizer": "image-feature-extraction"}
DRAWING_TAG = "unconditional-image-generation"  # as other class-conditional generators on the Hub have it
PROMPT = "a teddy bear"  # of a snippet where the run names none
DINOV3_LICENSE = {
    "license": "other",
    "license_name": "dinov3-license",
    "license_link": "https://ai.meta.com/resources/models-and-libraries/dinov3-license",
}


@dataclass
class Result:
    """One measured number.

    Attributes:
        name: the metric, such as `"psnr"`.
        value: of any type of number; kept as a float.
        dataset, split: what it was measured on: Hub id or folder.
        protocol: what it takes to measure it again: sampler, steps, guidance, number of samples, precision, ...
    """

    name: str
    value: float
    dataset: str
    split: str | None = None
    protocol: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        self.value = float(self.value)  # YAML knows no numbers of numpy

    def describe_protocol(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in self.protocol.items())


@dataclass
class TrainingRun:
    """What a training script knows about its result and the saved files do not say.

    Attributes:
        command: the script and its arguments, as they were typed.
        machine: where it ran, such as `"2 processes (DDP) on cuda, in bf16"`.
        config: all arguments of the run as plain values.
        datasets: Hub ids or folders of the training data.
        step, images_seen: how long it trained.
        results: what was measured on the saved weights.
        prompts: texts that it draws, or classes; the first one stands in the snippet.
        base_model: Hub id or folder of the pipeline that a LoRA belongs to.
        license: the Hub's identifier of the licence of the weights.
    """

    command: list[str] = field(default_factory=list)
    machine: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    datasets: list[str] = field(default_factory=list)
    step: int | None = None
    images_seen: int | None = None
    results: list[Result] = field(default_factory=list)
    prompts: list[str] = field(default_factory=list)
    base_model: str | None = None
    license: str | None = None


def write_card(folder: str | Path, run: TrainingRun | None = None, repo_id: str | None = None) -> None:
    """Write `README.md` into a saved folder, and results on Hub data sets into `.eval_results/`.

    A `README.md` that someone has edited is kept. Arguments and errors as [`render_card`].
    """
    folder = Path(folder)
    card = render_card(folder, run, repo_id)
    path = folder / "README.md"
    if not path.exists() or is_generated(path.read_text(encoding="utf-8")):
        path.write_text(card, encoding="utf-8")
    write_eval_results(folder, run.results if run else [])


def write_eval_results(folder: Path, results: list[Result]) -> None:
    """Write results on Hub data sets into `.eval_results/`; those that were there may speak of other weights."""
    entries = [
        EvalResultEntry(r.dataset, _identifier(r.name), r.value, notes=r.describe_protocol() or None)
        for r in _results_on_hub(results)
    ]
    path = folder / EVAL_RESULTS
    path.unlink(missing_ok=True)
    if entries:
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False))


def render_card(folder: str | Path, run: TrainingRun | None = None, repo_id: str | None = None) -> str:
    """The card of a saved pipeline, tokenizer, generator or LoRA.

    Of absolute paths in `run` it shows the last part alone: where things lie on one's machine is nobody's business.

    Args:
        folder: where it was saved.
        run: its training. Only with one does the card show the newest pictures of `validation/`.
        repo_id: Hub id that the snippet loads; by default the folder.

    Raises:
        ValueError: the folder holds none of these, or a LoRA whose `run` does not name its `base_model`.
    """
    import jinja2

    folder = Path(folder)
    source = repo_id or folder.as_posix()
    kind, facts = _read_folder(folder)
    if kind == "lora":
        if not (run and run.base_model):
            raise ValueError(f"run must name the base_model of the LoRA in {str(folder)!r}, got {run}")
        facts |= _reading(_config_of(run.base_model), _config_of(run.base_model, "transformer"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "model_cards"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        python=repr, shell=shlex.join, yaml=lambda x: yaml.safe_dump(x, sort_keys=False), shorten=_shorten
    )
    name = source.rstrip("/").split("/")[-1]
    origins = _read_json(folder / ORIGIN) or []
    text = environment.get_template(f"{kind}.md").render(
        metadata=_metadata(kind, facts | {"origins": origins}, run or TrainingRun(), name).to_yaml(),
        origins=origins,
        citations={origin["paper"]: PAPERS[origin["paper"]] for origin in origins},
        name=name,
        source=source,
        run=run or TrainingRun(),
        prompts=_prompts(facts, run),
        pictures=[path.relative_to(folder).as_posix() for path in latest_pictures(folder)] if run else [],
        **facts,
    )
    return _sign(text)


def is_generated(card: str) -> bool:
    """Whether a card is ours, unedited: the hash at its end is that of its text."""
    text = card.replace("\r\n", "\n")
    body, footer, _ = text.rpartition(FOOTER)
    return bool(footer) and _sign(body).rstrip() == text.rstrip()


def address_card(card: str, repo_id: str) -> str:
    """A card of ours whose snippet loads `repo_id` and which has its name, whatever it was written for."""
    body = card.replace("\r\n", "\n").rpartition(FOOTER)[0]
    loaders = ("load_lora_weights", "from_pretrained")  # of a LoRA's snippet, the other line loads its base model
    source = next(match for name in loaders if (match := re.search(rf'\b{name}\("(.*?)"', body)))
    body = body[: source.start(1)] + repo_id + body[source.end(1) :]
    name = repo_id.split("/")[-1]
    body = re.sub(r"^# .*", f"# {name}", body, count=1, flags=re.MULTILINE)
    return _sign(re.sub(r"^(model-index:\n- name: ).*", rf"\g<1>{name}", body, count=1, flags=re.MULTILINE))


def merge_metadata(card: str, metadata: dict[str, Any]) -> str:
    """A card with more in its YAML head: lists are joined, of everything else `metadata` has the last word."""
    signed = is_generated(card)
    ours = ModelCard(card.rpartition(FOOTER)[0] if signed else card)
    merged = ours.data.to_dict()
    if "license" in metadata:  # with all that says which one it is
        merged = {key: value for key, value in merged.items() if not key.startswith("license")}
    for key, value in metadata.items():
        if isinstance(value, list) and isinstance(merged.get(key), list):
            value = [*merged[key], *(item for item in value if item not in merged[key])]
        merged[key] = value
    head = yaml.safe_dump(merged, sort_keys=False, allow_unicode=True).strip()
    text = f"---\n{head}\n---\n{ours.text}"
    return _sign(text) if signed else text


def latest_pictures(folder: str | Path) -> list[Path]:
    """The newest picture of each name in `validation/`, whose files the training loop names `NAME-STEP.png`."""
    paths = sorted(Path(folder, "validation").glob("*-*.png"))
    return list({path.stem.rpartition("-")[0]: path for path in paths}.values())


def _shorten(value):
    """The last part of an absolute path; also of `--name=PATH`, and of those in lists and dicts."""
    if isinstance(value, dict):
        return {key: _shorten(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(item) for item in value]
    if not isinstance(value, str):
        return value
    flag, equals, path = value.rpartition("=") if value.startswith("--") else ("", "", value)
    return flag + equals + (Path(path).name or path if path.startswith("~") or os.path.isabs(path) else path)


def _sign(text: str) -> str:
    text = text.rstrip() + "\n\n"
    return f"{text}{FOOTER}{hashlib.sha256(text.encode()).hexdigest()} -->\n"


def _read_folder(folder: Path) -> tuple[str, dict[str, Any]]:
    """The kind of a saved folder, and what its configs say for the template of that kind."""
    index, config = _read_json(folder / "model_index.json"), _read_json(folder / "config.json")
    if index:
        parts = {k: v for k, v in index.items() if isinstance(v, list) and len(v) == 2 and isinstance(v[1], str)}
        vae = _read_json(folder / "vae" / "config.json")
        transformer = _read_json(folder / "transformer" / "config.json")
        labels = {int(key): label for key, label in (index.get("id2label") or {}).items()}
        return "pipeline", {
            "config": index,
            "components": {name: class_name for name, (_, class_name) in parts.items()},
            "labels": labels,
            "num_classes": transformer.get("num_classes"),
            **_reading(index, transformer),
            "vae": vae,
            "encoder": vae.get("image_encoder_config"),
            "encoder_id": vae.get("image_encoder_id"),
            "papers": _papers(class_name for _, class_name in parts.values()),
        }
    if (folder / LORA_WEIGHT_NAME_SAFE).is_file():
        with safe_open(folder / LORA_WEIGHT_NAME_SAFE, "pt") as file:
            keys = [key.partition(".") for key in file.keys()]
        new_classes = [name for kind, _, name in keys if kind == "new_classes"]
        return "lora", {"new_classes": new_classes, "encoder": None, "encoder_id": None}
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


def _read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _papers(class_names) -> list[tuple[str, str, str]]:
    return [(name, arxiv, PAPERS[arxiv]) for name in class_names for arxiv in PAPERS_OF.get(name, ())]


def _metadata(kind: str, facts: dict[str, Any], run: TrainingRun, name: str) -> ModelCardData:
    """The YAML head. Only Hub ids go there: the Hub makes links of them."""
    tag = "text-to-image" if facts.get("reads_text") else PIPELINE_TAGS.get(kind, DRAWING_TAG)
    base_model = run.base_model if kind == "lora" else facts["encoder_id"]
    encoder = facts["encoder"] or _config_of(run.base_model, "vae").get("image_encoder_config") or {}
    encoder = encoder.get("model", {})
    if run.license:
        licence = {"license": run.license}
    elif facts["origins"]:
        licences = [origin["license"] for origin in facts["origins"]]
        licence = {"license": "unknown" if None in licences else licences[0]}
    else:
        names = (encoder.get("model_type"), encoder.get("architecture"))  # of transformers, of timm
        licence = DINOV3_LICENSE if any("dinov3" in (name or "") for name in names) else {}
    results = [
        EvalResult(
            task_type=tag,
            dataset_type=result.dataset,
            dataset_name=result.dataset.split("/")[-1],
            dataset_split=result.split,
            metric_type=_identifier(result.name),
            metric_name=result.name,
            metric_value=result.value,
            metric_args=result.protocol or None,
        )
        for result in _results_on_hub(run.results)
    ]
    return ModelCardData(
        **licence,
        library_name="diffusers",
        pipeline_tag=tag,
        tags=["hf_fae", "lora"] if kind == "lora" else ["hf_fae"],
        base_model=base_model if base_model and _is_hub_id(base_model) else None,
        base_model_relation="adapter" if kind == "lora" and _is_hub_id(base_model) else None,
        widget=[{"text": prompt} for prompt in _prompts(facts, run)] or None,
        datasets=[dataset for dataset in run.datasets if _is_hub_id(dataset)] or None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )


def _config_of(name: str | None, component: str | None = None) -> dict[str, Any]:
    """The config of a component of a pipeline, or its own, in a folder or on the Hub if it has been loaded here."""
    if name is None:
        return {}
    file = f"{component}/config.json" if component else "model_index.json"
    path = try_to_load_from_cache(name, file) if _is_hub_id(name) else Path(name, file)
    return _read_json(Path(path)) if isinstance(path, (str, Path)) else {}


def _reading(index: dict[str, Any], transformer: dict[str, Any]) -> dict[str, Any]:
    """What a snippet has to know of a pipeline's texts, by the configs of itself and of its transformer."""
    reads_text = transformer.get("caption_channels") is not None
    _, text_encoder = index.get("text_encoder") or (None, None)
    return {
        "reads_text": reads_text,
        "lacks_text_encoder": reads_text and text_encoder is None,
        "text_encoder_id": index.get("text_encoder_id"),
    }


def _prompts(facts: dict[str, Any], run: TrainingRun | None) -> list[str]:
    """Texts to show the model with; the Hub's own snippet has the first one of the metadata."""
    return ((run.prompts if run else []) or [PROMPT]) if facts.get("reads_text") else []


def _results_on_hub(results: list[Result]) -> list[Result]:
    return [result for result in results if _is_hub_id(result.dataset)]


def _is_hub_id(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not os.path.exists(name)


def _identifier(metric: str) -> str:
    return metric.lower().replace(" ", "_")
