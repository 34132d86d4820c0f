"""The world of the documentation: tiny models and data under all the names that it uses.

The working directory of a page is a clone of the repository, next to the assets. Hub ids are folders of that name,
which `from_pretrained` and `load_dataset` prefer.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Value
from datasets import Image as ImageFeature
from documents import ROOT
from factories import (
    tiny_detok,
    tiny_drorae,
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_mar,
    tiny_raev2,
    tiny_raev2_dit,
    tiny_starflow,
)
from PIL import Image
from text_models import save_sentence_encoder

from hf_fae import AutoencoderFAE
from hf_fae.convert.published import cache_folder, imagenet_labels
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.images import ImageData
from hf_fae.data.source import DataArguments


__all__ = ["DATA", "JUDGE", "LATENTS", "PUBLISHED", "STAND_IN", "build_world"]

# The names of each tiny model in the documentation and in the configs that it uses.
ENCODERS = ["../shared/assets/dinov2-small", "facebook/dinov2-base", "facebook/dinov2-small", "facebook/dinov2-giant"]
ENCODERS += ["facebook/dinov2-large"]
ENCODERS += ["facebook/dinov2-with-registers-base", "facebook/dinov3-vitl16-pretrain-lvd1689m"]
TOKENIZERS = [
    "checkpoints/fae-emoji-256",
    "outputs/demo/3-pixels",
    "outputs/emoji/3-pixels",
    "outputs/pixel-decoder-dinov2-giant-ii",
    "user/detok",
    "user/fae",
]
FUSED_TOKENIZERS = ["user/drorae", "outputs/drorae-dinov2-base-phase3"]
PIXEL_TOKENIZERS = {"user/detok": tiny_detok, "user/maetok": tiny_maetok}
DENOISERS = ["outputs/demo/4-dit", "checkpoints/fae-dit-emoji-256", "user/fae-dit", "user/my-generator"]
FLOWS = ["outputs/starflow", "checkpoints/fae-starflow-emoji-256", "user/starflow"]
AUTOREGRESSIVE = ["user/mar"]
TEXT = ["user/text-to-image"]
TEXT_ALONE = ["checkpoints/fae-text-emoji-256"]  # without its text encoder, which it names
# Caches of latents.
LATENTS = ["outputs/latents-...", "outputs/emoji/latents"]
LATENTS += [f"outputs/latents-imagenet-{name}" for name in ("detok", "maetok", "dinov2-base", "dinov2-giant")]
# Conversions of published weights, beside the working directory.
PUBLISHED = "published"
# Marks folders that stand for the results of some page, which replaces them.
STAND_IN = ".stand-in"
TEXT_ENCODERS = ["../shared/assets/all-minilm-l6-v2", "sentence-transformers/all-MiniLM-L6-v2"]
JUDGE = "../shared/assets/efficientnet-lite0"
# Flags of runs on tiny data.
DATA = {"resolution": 32, "max_train_samples": 24, "max_validation_samples": 4}
CLASSES = ["heart", "cat-face", "animal-bird"]
ROWS = {"train": 216, "validation": 200}


def build_world(folder: Path) -> Path:
    """Fills `folder` and returns the working directory in it."""
    here = folder / "hf_fae"
    here.mkdir()
    for name in ("Makefile", "benchmarks", "experiments", "src", "training_scripts"):
        (here / name).symlink_to(ROOT / name)
    (here / "docs" / "images").mkdir(parents=True)

    index = json.loads((ROOT / "checkpoints" / "fae-dit-emoji-256" / "model_index.json").read_text())
    labels = {int(number): name for number, name in index["id2label"].items()}
    dit = {"id2label": labels, "transformer": tiny_lightning_dit(num_classes=97), "num_inference_steps": 2}
    mar = {"id2label": labels, "transformer": tiny_mar(num_classes=97), "num_inference_steps": 2}
    flow = {"id2label": labels, "transformer": tiny_starflow(num_classes=97)}
    alone = {"text_encoder": None, "tokenizer": None, "text_encoder_id": TEXT_ENCODERS[1]}
    for names, model in (
        (ENCODERS, tiny_encoder()),
        (TOKENIZERS, tiny_fae(image_encoder_id="facebook/dinov2-small")),
        (FUSED_TOKENIZERS, tiny_drorae()),
        (["user/raev2"], tiny_raev2()),
        (["user/raev2-dit"], tiny_fae_dit_pipeline(**{**dit, "transformer": tiny_raev2_dit(num_classes=97)})),
        *(([name], make()) for name, make in PIXEL_TOKENIZERS.items()),
        (DENOISERS, tiny_fae_dit_pipeline(with_encoder=True, **dit)),
        (FLOWS, tiny_fae_starflow_pipeline(with_encoder=True, **flow)),
        (TEXT, tiny_fae_text_to_image_pipeline(with_encoder=True, guidance_scale=1.5, num_inference_steps=2)),
        (TEXT_ALONE, tiny_fae_text_to_image_pipeline(num_inference_steps=2, **alone)),
        (AUTOREGRESSIVE, tiny_fae_mar_pipeline(with_encoder=True, **mar)),
    ):
        model.save_pretrained(here / names[0])
        for name in names[1:]:
            shutil.copytree(here / names[0], here / name)
    assets = folder / "shared" / "assets"
    for name in TEXT_ENCODERS:
        save_sentence_encoder(here / name)
    _save_judge(here / JUDGE)

    _save_parquet(assets / "fluent-emoji", ["group", "subgroup", "base", "caption"], ROWS)
    _save_parquet(here / "ILSVRC" / "imagenet-1k", ["label"], {"train": 24, "validation": 24})
    for index, name in enumerate(CLASSES * 8):
        for place in (f"my-images/train/{name}", f"my-images/validation/{name}", "dog-images", "outputs/drawings"):
            (here / place).mkdir(parents=True, exist_ok=True)
            image(index).save(here / place / f"{index}.png")
    _save_captioned(here / "captioned-images")
    image(0).resize((50, 40)).save(here / "image.jpg")
    np.savez(here / "VIRTUAL_imagenet256_labeled.npz", np.stack([np.asarray(image(index)) for index in range(20)]))
    _save_latents(here)
    published = folder / PUBLISHED / "hf_fae"
    pipe = tiny_fae_dit_pipeline(transformer=tiny_lightning_dit(num_classes=1000), id2label=imagenet_labels())
    pipe.save_pretrained(published / cache_folder("lightningdit-xl-800ep").name)
    for name in (*TOKENIZERS, *FUSED_TOKENIZERS, *DENOISERS, *FLOWS, *AUTOREGRESSIVE, *TEXT, *TEXT_ALONE, *LATENTS):
        (here / name / STAND_IN).touch()
    return here


def image(number: int) -> Image.Image:
    """32 x 32: noise on the colour of its class."""
    random = np.random.default_rng(number)
    colour = np.eye(3)[number % 3] * 160 + 40
    return Image.fromarray((colour + random.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8))


def _save_parquet(folder: Path, columns: list[str], rows: dict[str, int]) -> None:
    folder.mkdir(parents=True)
    kinds = {name: ClassLabel(names=CLASSES) if name == "label" else Value("string") for name in columns}
    for split, count in rows.items():
        names = [CLASSES[number % 3] for number in range(count)]
        letters = [chr(97 + number % 26) for number in range(count)]
        table = {"image": [image(number) for number in range(count)], **dict.fromkeys(columns, names)}
        if "base" in columns:
            table["base"] = letters
            table["caption"] = [f"{name.replace('-', ' ')} {letter}" for name, letter in zip(names, letters)]
        dataset = Dataset.from_dict(table, features=Features({"image": ImageFeature(), **kinds}))
        dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")


def _save_captioned(folder: Path) -> None:
    """An imagefolder with captions in metadata.jsonl."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        lines = []
        for number in range(24):
            image(number).save(folder / split / f"{number}.png")
            lines.append(json.dumps({"file_name": f"{number}.png", "text": f"a {CLASSES[number % 3]}"}))
        (folder / split / "metadata.jsonl").write_text("\n".join(lines))


def _save_judge(folder: Path) -> None:
    import timm
    from timm.models import save_for_hf

    model = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"input_size": (3, 32, 32)}, num_classes=10)
    save_for_hf(model, folder, safe_serialization=True)


def _save_latents(here: Path) -> None:
    """By the function that `cache_latents.py` calls."""
    images = str(here / "../shared/assets/fluent-emoji")
    data = ImageData(DataArguments(images, label_column="subgroup", **DATA))
    vae = AutoencoderFAE.from_pretrained(here / "user/fae")
    options = {"source": "user/fae", "batch_size": 32, "rows_per_shard": 512}
    encode_dataset(str(here / LATENTS[0]), vae, data, Accelerator(cpu=True), **options)
    for name in LATENTS[1:]:
        shutil.copytree(here / LATENTS[0], here / name)
