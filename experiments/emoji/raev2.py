"""RAEv2 on Fluent Emoji at 64 px: layers of the latents, prediction of x, internal guidance. Three seeds.

    python experiments/emoji/raev2.py --output outputs/emoji-raev2
    python experiments/emoji/raev2.py table --output outputs/emoji-raev2

For each seed, train_drorae.py trains decoders of the last layer of DINOv2-small, of three of its layers and of all
twelve, with `configs/emoji_raev2_decoder.yaml`. On the latents of each, train_generator.py trains a LightningDiT with
a base head that predicts clean latents, and on those of three layers one that predicts velocities, with
`configs/emoji_raev2_generator.yaml`. `results.md` has PSNR and rFID of the tokenizers on the validation images, and
`fid_effnet` of samples against the training images, without and with guidance by the base head. `table` prints the
finished seeds alone. Interrupted runs resume.
"""

import json
import sys
from pathlib import Path

from common import find_judge, to_flags
from experiment import cache_latents, list_metrics, parse, repeat, shrink, train

from hf_fae.cli.evaluate import evaluate


# Layers of the latents -> their name in the table, and their blocks.
TOKENIZERS = {
    "last": ("last layer", [11]),
    "three": ("3 layers", [3, 7, 11]),
    "all": ("12 layers", list(range(12))),
}
# Generator -> its name in the table, its tokenizer, and what it predicts.
GENERATORS = {
    "last-sample": ("last layer, clean latents", "last", "sample"),
    "three-sample": ("3 layers, clean latents", "three", "sample"),
    "three-velocity": ("3 layers, velocity", "three", "velocity"),
    "all-sample": ("12 layers, clean latents", "all", "sample"),
}
# Metric of its samples -> its name in the table, and the scale of internal guidance, RAEv2's for ImageNet.
GUIDANCE = {
    "fid_effnet": ("fid_effnet, w = 1", 1.0),
    "guided_fid_effnet": ("fid_effnet, w = 1.78", [[0.1, 1.0, 1.78]]),
}
TOKENIZER_METRICS = {"psnr": "PSNR in dB", "rfid_effnet": "rfid_effnet"}
RESOLUTION = 64
SAMPLES = 300


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    only_table, argv = argv[:1] == ["table"], argv[argv[:1] == ["table"] :]
    args = parse(__doc__, "outputs/emoji-raev2", argv)
    if only_table:
        files = sorted(args.output.glob("seed-*/results.json"))
        print(table([json.loads(file.read_text()) for file in files]) if files else "no seed has finished")
        return
    judge = find_judge(args.judge)
    args.data = shrink(args.data, RESOLUTION, args.output / "images")
    repeat(args, lambda folder, seed: run_seed(folder, seed, args, judge), table)


def run_seed(folder: Path, seed: int, args, judge: str) -> dict[str, dict[str, float]]:
    """Train and evaluate everything of a seed: {tokenizer or generator: {metric: number}}."""
    results, latents = {}, args.output / "latents"
    for name, (_, layers) in TOKENIZERS.items():
        tokenizer = folder / name
        settings = {"dataset_name": args.data, "image_encoder": args.encoder, "layers": layers, "seed": seed}
        train("train_drorae.py", "emoji_raev2_decoder.yaml", tokenizer, settings, args.flags)
        results[name] = reconstruction_metrics(tokenizer, args, judge)
        if seed == 0:  # the encoder is frozen: latents are the same for every seed
            cache_latents(tokenizer, latents / name, args.data, RESOLUTION)
    for name, (_, source, prediction) in GENERATORS.items():
        settings = {"dataset_name": latents / source, "vae": folder / source, "prediction_type": prediction}
        settings |= {"seed": seed}
        train("train_generator.py", "emoji_raev2_generator.yaml", folder / name, settings, args.flags)
        results[name] = {
            metric: generation_fid(folder / name, metric, scale, args, judge)
            for metric, (_, scale) in GUIDANCE.items()
        }
    return results


def reconstruction_metrics(tokenizer: Path, args, judge: str) -> dict[str, float]:
    """PSNR and rFID of the validation images."""
    settings = {"model": tokenizer, "dataset_name": args.data, "metrics": ["psnr", "rfid"]}
    metrics = evaluate_here("reconstruction", tokenizer.with_name(f"{tokenizer.name}-images"), settings, judge)
    return {name: metrics[name] for name in TOKENIZER_METRICS}


def generation_fid(generator: Path, metric: str, scale: float | list, args, judge: str) -> float:
    """`fid_effnet` of samples against the training images."""
    settings = {"model": generator, "dataset_name": args.data, "split": "train", "label_column": "subgroup"}
    settings |= {"num_samples": SAMPLES, "metrics": ["fid"], "reference_cache": args.output / "reference"}
    settings["internal_guidance_scale"] = json.dumps(scale)
    return evaluate_here("generation", generator.with_name(f"{generator.name}-{metric}"), settings, judge)[
        "fid_effnet"
    ]


def evaluate_here(task: str, folder: Path, settings: dict, judge: str) -> dict[str, float]:
    """The metrics of `hf-fae evaluate` in this process, which saves its start; an existing report is read."""
    if not (folder / "report.json").exists():
        evaluate(task, to_flags({"output_dir": folder, "extractors": f"effnet={judge}", **settings}))
    return json.loads((folder / "report.json").read_text())["metrics"]


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the number of seeds in which one beat another."""
    lines = list_metrics({name: title for name, (title, _) in TOKENIZERS.items()}, TOKENIZER_METRICS, results)
    generators = {name: title for name, (title, *_) in GENERATORS.items()}
    titles = {metric: title for metric, (title, _) in GUIDANCE.items()}
    lines += ["", *list_metrics(generators, titles, results)]
    lines += ["", "| smaller fid_effnet | than | seeds |", "|---|---|---|"]
    plain, guided = GUIDANCE
    pairs = [(("three-sample", plain), (other, plain)) for other in GENERATORS if other != "three-sample"]
    pairs += [((name, guided), (name, plain)) for name in GENERATORS]
    for (name, metric), (other, other_metric) in pairs:
        count = sum(result[name][metric] < result[other][other_metric] for result in results)
        one, two = f"{generators[name]}: {titles[metric]}", f"{generators[other]}: {titles[other_metric]}"
        lines.append(f"| {one} | {two} | {count} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
