"""What `hf-fae train` is going to do: decided once from the folder, the machine and the arguments, then kept."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import hf_fae

from ..utils.atomic import atomic_write
from ..utils.precision import has_fast_bf16
from .folder import ImageFolder
from .recipe import choose_recipe


__all__ = ["Plan", "Request", "default_tokenizer", "make_plan", "open_plan", "store_plan"]

TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
IMAGE_ENCODER = "facebook/dinov2-small"
FILE = "plan.json"
PADDED_SHARE = 0.2  # of images with other sides than a square's from which none should lose its ends


@dataclass
class Request:
    """What a user has asked for; None leaves a choice to `make_plan`."""

    folder: str
    tokenizer: str | None = None
    recipe: str | None = None
    condition: str | None = None
    crop: str | None = None
    image_encoder: str | None = None
    text_encoder: str | None = None
    duration: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not self.duration > 0:
            raise ValueError(f"duration must be above 0, got {self.duration}")


@dataclass
class Plan:
    """All choices.

    Attributes:
        tokenizer: whose pixel decoder is fine-tuned; None: all stages are trained.
        condition: "classes", "captions" or "none".
        device, mixed_precision: of this machine.
        notes: lines on the folder.
    """

    recipe: str
    tokenizer: str | None
    image_encoder: str | None
    text_encoder: str | None
    condition: str
    crop: str
    resolution: int
    device: str
    mixed_precision: str
    duration: float
    seed: int
    notes: list[str]


def default_tokenizer() -> str:
    """The tokenizer in a clone of the repository.

    Raises:
        ValueError: the package was installed without the repository.
    """
    path = Path(hf_fae.__file__).resolve().parents[2] / "checkpoints" / "fae-emoji-256"
    if not path.is_dir():
        raise ValueError("tokenizer must name an AutoencoderFAE (Hub id or folder) outside a clone, got None")
    return str(path)


def make_plan(request: Request, folder: ImageFolder) -> Plan:
    """Decide what the request leaves open.

    Raises:
        ValueError: the folder does not have the condition that the request names, or no tokenizer is named.
    """
    recipe = request.recipe or choose_recipe(len(folder.images))
    tokenizer = request.tokenizer
    if tokenizer is None and recipe == "folder_small":
        tokenizer = default_tokenizer()
    condition = request.condition or _condition(folder)
    if condition == "classes" and not folder.classes:
        raise ValueError("condition must not be 'classes' for a folder without at least two sub-folders of images")
    if condition == "captions" and not folder.num_captions:
        raise ValueError("condition must not be 'captions' for a folder without captions")
    uneven = sum(abs(image.width - image.height) > 1 for image in folder.images) / len(folder.images)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return Plan(
        recipe=recipe,
        tokenizer=tokenizer,
        image_encoder=request.image_encoder or (None if tokenizer else IMAGE_ENCODER),
        text_encoder=(request.text_encoder or TEXT_ENCODER) if condition == "captions" else None,
        condition=condition,
        crop=request.crop or ("pad" if uneven > PADDED_SHARE else "center"),
        resolution=_resolution(tokenizer),
        device=device,
        mixed_precision="bf16" if has_fast_bf16() else "no",
        duration=request.duration,
        seed=request.seed,
        notes=folder.describe(),
    )


def open_plan(request: Request, output: Path) -> Plan | None:
    """The plan of an interrupted run; None for a new one.

    Raises:
        ValueError: the run was asked for something else.
    """
    path = output / FILE
    if not path.is_file():
        return None
    stored = json.loads(path.read_text())
    before, now = stored["request"], asdict(request)
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(
                f"{name} must be {before.get(name)!r} to resume the run in {str(output)!r}, got {value!r}; "
                "or pass another output"
            )
    return Plan(**stored["plan"])


def store_plan(request: Request, plan: Plan, output: Path) -> None:
    """Keep both for `open_plan`."""
    atomic_write(output / FILE, json.dumps({"request": asdict(request), "plan": asdict(plan)}, indent=1))


def _condition(folder):
    if folder.classes:
        return "classes"
    return "captions" if folder.num_captions == len(folder.images) else "none"


def _resolution(tokenizer):
    if tokenizer is None:
        return 256
    return hf_fae.AutoencoderFAE.load_config(tokenizer)["sample_size"]
