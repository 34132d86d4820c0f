"""The whole of FAE in minutes: train a small tokenizer and generator on Fluent Emoji, then draw.

    make demo-train

DINOv2-small is the frozen encoder. Each step is one of the repository's own scripts with a config
`configs/demo_*.yaml`: encoder and feature decoder (stage Ia), pixel decoder on noisy features (Ib) and on decoded ones
(II), the latents of all pictures, LightningDiT on these. New processes then reload what was saved and draw pictures.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "training_scripts"
CONFIGS = Path(__file__).parent / "configs"
ENCODER = "facebook/dinov2-small"

CLASSES = [
    "face-smiling",
    "cat-face",
    "heart",
    "animal-mammal",
    "animal-bird",
    "plant-flower",
    "food-fruit",
    "food-sweet",
    "sky & weather",
    "transport-ground",
    "clothing",
    "person-role",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/demo"), help="folder of all results")
    parser.add_argument("--encoder", help="DINOv2-small: a folder or a Hub id (default: the assets, else the Hub)")
    parser.add_argument("--data", help="Fluent Emoji: a folder or a Hub id (default: the assets)")
    args = parser.parse_args()

    encoder, data = find_sources(args.encoder, args.data)
    precision = "bf16" if has_fast_bf16() else "no"

    start = time.monotonic()
    common = ["--mixed_precision", precision]
    pictures = ["--dataset_name", data, *common]
    fae, decoder_ib, decoder_ii, latents, generator = (
        args.output / name for name in ("1-fae", "2-pixels", "3-pixels", "latents", "4-dit")
    )
    run("train_fae.py", "demo_fae.yaml", fae, "--image_encoder", encoder, *pictures)
    run("train_pixel_decoder.py", "demo_pixel_decoder_ib.yaml", decoder_ib, "--fae", str(fae), *pictures)
    run("train_pixel_decoder.py", "demo_pixel_decoder_ii.yaml", decoder_ii, "--fae", str(decoder_ib), *pictures)
    run("cache_latents.py", "demo_latents.yaml", latents, "--vae", str(decoder_ii), *pictures)
    run("train_generator.py", "demo_generator.yaml", generator, "--dataset_name", str(latents), *common)

    print("\n== Drawing, each picture in a new process", flush=True)
    originals = save_originals(data, args.output / "originals")
    reconstructions, samples = args.output / "reconstructions.png", args.output / "samples.png"
    run_cli("reconstruct", "--model", decoder_ii, "--output", reconstructions, *originals)
    run_cli("generate", "--model", generator, "--output", samples, "--seed", 1, "--class", *CLASSES)

    print(
        f"\nfeature cosine  {last(fae, 'validation/feature_cosine'):.3f}  (validation split, reconstructed features)"
    )
    print(f"PSNR            {last(decoder_ii, 'validation/psnr'):.2f} dB  (validation split)")
    print(f"seconds         {time.monotonic() - start:.0f}")
    print(f"pictures        {reconstructions}  {samples}")
    print(f"pipeline        {generator}  (hf-fae generate --model {generator} --class cat-face --output cat.png)")


def find_sources(encoder: str | None, data: str | None) -> tuple[str, str]:
    """The frozen encoder and the pictures: what is named, else the assets, else the encoder from the Hub."""
    assets = Path(os.environ.get("HF_FAE_ASSETS", ROOT.parent / "shared" / "assets"))
    encoder = encoder or find(assets / "dinov2-small") or ENCODER
    data = data or find(assets / "fluent-emoji")
    if data is None or not is_reachable(encoder):
        sys.exit(
            "DINOv2-small and Fluent Emoji are needed: set HF_FAE_ASSETS to the folder that holds dinov2-small/ and "
            "fluent-emoji/, or pass --encoder PATH_OR_ID --data PATH_OR_ID (make demo-train ARGS='...')."
        )
    return encoder, data


def find(path: Path) -> str | None:
    return str(path) if path.is_dir() else None


def is_reachable(model: str) -> bool:
    """Whether a model is a folder, in the cache, or on a Hub that answers."""
    from huggingface_hub import hf_hub_download

    if os.path.isdir(model):
        return True
    try:
        return bool(hf_hub_download(model, "config.json"))
    except Exception:  # whatever keeps the Hub from answering, the remedy is the same
        return False


def has_fast_bf16() -> bool:
    """On a CPU without bf16 instructions autocast would only slow the training down."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def run(script: str, config: str, output: Path, *arguments: str) -> None:
    print(f"\n== {script} with {config}", flush=True)
    command = [sys.executable, str(SCRIPTS / script), "--config", str(CONFIGS / config)]
    # Threads that sleep while they wait lose little on idle cores, and far less than spinning ones beside a neighbour.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    subprocess.run([*command, "--output_dir", str(output), *arguments], check=True, env=environment)


def run_cli(*arguments) -> None:
    subprocess.run([sys.executable, "-m", "hf_fae.cli", *map(str, arguments)], check=True)


def save_originals(data: str, folder: Path) -> list[Path]:
    """Eight pictures of the validation split as PNG, named by their captions."""
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    rows = load_dataset(data, split="validation")
    rows = rows.select(range(0, len(rows), len(rows) // 8)).select(range(8))
    paths = [folder / f"{row['caption'].replace('/', '-')}.png" for row in rows]
    for row, path in zip(rows, paths, strict=True):
        row["image"].save(path)
    return paths


def last(run: Path, name: str) -> float:
    """The last value of a name in a run's log."""
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [entry[name] for entry in entries if name in entry][-1]


if __name__ == "__main__":
    main()
