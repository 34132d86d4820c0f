"""An FAE and its class and text generators on Fluent Emoji at 256 px, from scratch (docs/experiments/emoji-256.md).

    python experiments/emoji/emoji256.py --recipe session --output outputs/emoji256

    python experiments/emoji/emoji256.py --tokenizer checkpoints/fae-emoji-256 --output outputs/emoji256

Each stage is a script of the repository with a config `configs/emoji256_*.yaml`; a recipe overrides steps and batch
sizes of the configs. An interrupted run resumes. With --tokenizer only generators are trained, on that FAE.
--baselines also trains the two baselines of the FAE, --export writes the finished models in float16.
"""

import argparse
from pathlib import Path

import torch
from common import ENCODER, find_asset, find_sources, has_fast_bf16, run
from diffusers import DiffusionPipeline

from hf_fae import AutoencoderFAE


TEXT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"

# Stage -> settings that override those of its config. "session" is the configs as they are, about five hours on two
# CPU cores without the baselines; "overnight" takes eight hours on as many cores, "h100" 25 minutes on one H100. The
# last two are untested.
RECIPES = {
    "session": {},
    "overnight": {
        "1-fae": {"max_train_steps": 12_000},
        "2-pixels": {"max_train_steps": 24_000},
        "3-fae": {"max_train_steps": 8000},
        "4-dit": {"max_train_steps": 20_000},
        "5-starflow": {"max_train_steps": 10_000},
        "6-raw-dit": {"max_train_steps": 20_000},
        "7-vae": {"max_train_steps": 3000},
        "8-vae-dit": {"max_train_steps": 20_000},
        "9-text": {"max_train_steps": 20_000},
    },
    "h100": {
        "1-fae": {"max_train_steps": 6000, "train_batch_size": 64},
        "2-pixels": {"max_train_steps": 12_000, "train_batch_size": 64},
        "3-fae": {"max_train_steps": 3000, "train_batch_size": 64},
        "4-dit": {"max_train_steps": 12_000, "train_batch_size": 256, "ema_decay": 0.999},
        "5-starflow": {"max_train_steps": 6000, "train_batch_size": 256, "ema_decay": 0.999},
        "6-raw-dit": {"max_train_steps": 12_000, "train_batch_size": 256, "ema_decay": 0.999},
        "7-vae": {"max_train_steps": 6000, "train_batch_size": 64},
        "8-vae-dit": {"max_train_steps": 12_000, "train_batch_size": 256, "ema_decay": 0.999},
        "9-text": {"max_train_steps": 12_000, "train_batch_size": 256, "ema_decay": 0.999},
    },
}


def stages(
    output: Path, encoder: str, data: str, text_encoder: str, tokenizer: str | None = None
) -> dict[str, tuple[str, str, list[str]]]:
    """Stage -> script, config and arguments, in order; the folder of a stage has its name.

    With a tokenizer given, the stages that train one are left out.
    """
    features, pixels, fae, latents, text_latents, vae, vae_latents = (
        str(output / name)
        for name in ("features", "2-pixels", "3-fae", "latents", "text-latents", "7-vae", "vae-latents")
    )
    images = ["--dataset_name", data]
    cached = [*images, "--feature_cache", features]
    new = ["--image_encoder", encoder]
    raw = str(output / "0-features")
    reading = ["--text_encoder", text_encoder]
    generators = {
        "4-dit": ("train_generator.py", "generator", ["--dataset_name", latents]),
        "5-starflow": ("train_starflow.py", "starflow", ["--dataset_name", latents]),
        "9-text": ("train_text_to_image.py", "text", ["--dataset_name", text_latents]),
    }
    if tokenizer is not None:  # its statistics stay unchanged
        encoding = ["--vae", tokenizer, "--image_encoder", encoder, *images]
        generators = {
            name: (*stage, [*arguments, "--vae", tokenizer]) for name, (*stage, arguments) in generators.items()
        }
        return {
            "latents": ("cache_latents.py", "latents", encoding),
            "text-latents": ("cache_latents.py", "text_latents", [*encoding, *reading]),
            **generators,
        }
    return {
        "0-features": ("train_fae.py", "features", [*new, *images]),
        "features": ("cache_latents.py", "latents", ["--vae", raw, *images]),
        "1-fae": ("train_fae.py", "fae", [*new, *cached]),
        "2-pixels": ("train_pixel_decoder.py", "pixel_decoder_ib", ["--fae", raw, *cached]),
        "3-fae": (
            "train_pixel_decoder.py",
            "pixel_decoder_ii",
            ["--fae", str(output / "1-fae"), "--pixel_decoder", pixels, *cached],
        ),
        "latents": ("cache_latents.py", "latents", ["--vae", fae, *cached]),
        "text-latents": ("cache_latents.py", "text_latents", ["--vae", fae, *cached, *reading]),
        **generators,
        "6-raw-dit": ("train_generator.py", "generator", ["--vae", pixels, "--dataset_name", features]),
        "7-vae": ("train_vae.py", "vae", images),
        "vae-latents": ("cache_latents.py", "latents", ["--vae", vae, *images]),
        "8-vae-dit": ("train_generator.py", "generator", ["--dataset_name", vae_latents]),
    }


# Stage -> name of its export.
PIPELINES = {"4-dit": "fae-dit-emoji-256", "5-starflow": "fae-starflow-emoji-256", "9-text": "fae-text-emoji-256"}
BASELINES = ("6-raw-dit", "7-vae", "vae-latents", "8-vae-dit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", choices=RECIPES, default="session", help="how long to train (default: session)")
    parser.add_argument("--output", type=Path, default=Path("outputs/emoji256"), help="folder of all runs")
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    parser.add_argument(
        "--text_encoder", help="all-MiniLM-L6-v2: a folder or a Hub id (default: the assets, else the Hub)"
    )
    parser.add_argument("--tokenizer", help="train generators on this FAE: a folder or a Hub id (default: a new one)")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--baselines", action="store_true", help="also train the baselines of the FAE")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write tokenizer and pipelines in float16 here")
    args = parser.parse_args()
    if args.tokenizer is not None and args.baselines:
        parser.error("--baselines requires a run that trains its own tokenizer")

    encoder, data = find_sources(args.encoder, args.data)
    text_encoder = args.text_encoder or find_asset(TEXT_ENCODER.split("/")[1].lower()) or TEXT_ENCODER
    precision = "bf16" if has_fast_bf16() else "no"
    for name, (script, config, arguments) in stages(args.output, encoder, data, text_encoder, args.tokenizer).items():
        if name in BASELINES and not args.baselines:
            continue
        settings = RECIPES[args.recipe].get(name, {})
        overrides = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
        workers = "--num_workers" if script == "cache_latents.py" else "--dataloader_num_workers"
        overrides += [workers, str(args.workers), "--mixed_precision", precision]
        run(script, f"emoji256_{config}.yaml", args.output / name, [*arguments, *overrides])
    if args.export:
        export(args.output, args.export)


def export(output: Path, checkpoints: Path) -> None:
    """Write the models of a run in float16, without frozen encoders; the pipelines' tokenizers are links to one.

    An existing tokenizer and existing cards are kept.
    """
    tokenizer = checkpoints / "fae-emoji-256"
    if not (tokenizer / "config.json").is_file():
        vae = AutoencoderFAE.from_pretrained(output / "3-fae", image_encoder=None, dtype=torch.float16)
        # Independent of the paths of this run.
        vae.register_to_config(image_encoder_id=ENCODER, _name_or_path=tokenizer.name)
        vae.save_pretrained(tokenizer)
    for name, pipeline in PIPELINES.items():
        if not (output / name / "model_index.json").is_file():
            continue
        folder = checkpoints / pipeline
        pipe = DiffusionPipeline.from_pretrained(output / name, dtype=torch.float16)
        pipe.vae = AutoencoderFAE.from_pretrained(tokenizer, image_encoder=None, dtype=torch.float16)
        if pipe.reads_text:  # the text encoder is twice as large as everything else
            pipe.register_modules(text_encoder=None, tokenizer=None)
            pipe.register_to_config(text_encoder_id=TEXT_ENCODER)
        for part in (pipe, pipe.transformer):
            part.register_to_config(_name_or_path=pipeline)  # not the path of this run
        pipe.save_pretrained(folder)
        for file in (folder / "vae").iterdir():
            file.unlink()
            file.symlink_to(Path("..", "..", tokenizer.name, file.name))


if __name__ == "__main__":
    main()
