"""FAE end to end in minutes: train a small tokenizer and generator on Fluent Emoji, then generate.

    make demo-train

DINOv2-small is the frozen encoder. Each stage is a script of `training_scripts/` with a config `configs/demo_*.yaml`:
feature encoder and decoder (stage Ia), pixel decoder on noisy features (Ib) and on decoded ones (II), cached latents,
and a LightningDiT on these. New processes then load the saved models, reconstruct and generate.
"""

import argparse
import time
from pathlib import Path

from common import CLASSES, find_sources, has_fast_bf16, last_value, run, run_cli


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
    images = ["--dataset_name", data, *common]
    fae, decoder_ib, decoder_ii, latents, generator = (
        args.output / name for name in ("1-fae", "2-pixels", "3-pixels", "latents", "4-dit")
    )
    run("train_fae.py", "demo_fae.yaml", fae, ["--image_encoder", encoder, *images])
    run("train_pixel_decoder.py", "demo_pixel_decoder_ib.yaml", decoder_ib, ["--fae", fae, *images])
    run("train_pixel_decoder.py", "demo_pixel_decoder_ii.yaml", decoder_ii, ["--fae", decoder_ib, *images])
    run("cache_latents.py", "demo_latents.yaml", latents, ["--vae", decoder_ii, *images])
    run("train_generator.py", "demo_generator.yaml", generator, ["--dataset_name", latents, *common])

    print("\n== Reconstructing and generating, each in a new process", flush=True)
    originals = save_originals(data, args.output / "originals")
    reconstructions, samples = args.output / "reconstructions.png", args.output / "samples.png"
    run_cli(["reconstruct", "--model", decoder_ii, "--output", reconstructions, *originals])
    run_cli(["generate", "--model", generator, "--output", samples, "--seed", 1, "--class", *CLASSES])

    cosine, decibel = last_value(fae, "validation/feature_cosine"), last_value(decoder_ii, "validation/psnr")
    print(f"\nfeature cosine  {cosine:.3f}  (validation split, reconstructed features)")
    print(f"PSNR            {decibel:.2f} dB  (validation split)")
    print(f"seconds         {time.monotonic() - start:.0f}")
    print(f"images          {reconstructions}  {samples}")
    print(f"pipeline        {generator}  (hf-fae generate --model {generator} --class cat-face --output cat.png)")


def save_originals(data: str, folder: Path) -> list[Path]:
    """Eight images of the validation split as PNG files, named by their captions."""
    from datasets import load_dataset

    folder.mkdir(parents=True, exist_ok=True)
    rows = load_dataset(data, split="validation")
    rows = rows.select(range(0, len(rows), len(rows) // 8)).select(range(8))
    paths = [folder / f"{row['caption'].replace('/', '-')}.png" for row in rows]
    for row, path in zip(rows, paths, strict=True):
        row["image"].save(path)
    return paths


if __name__ == "__main__":
    main()
