"""DRoRAE on Fluent Emoji at 128 px: gains of fusing all layers, and of a decoder tuned to the fusion. Three seeds.

    python experiments/emoji/drorae.py --output outputs/emoji-drorae

For each seed, train_drorae.py trains with `configs/emoji_drorae_phase*.yaml` an RAE (phase 1), the fusion of all
twelve layers of DINOv2-small before its decoder (phase 2), and the decoder after that fusion (phase 3). Two controls:
the RAE trained for as many more steps as phase 3, and phases 2 and 3 with an expert for the last layer alone, as wide
as the twelve together. `results.md` has the mean absolute error of pixels in [0, 1] on the validation split,
`reconstructions.png` validation images above their reconstructions by the three phases of the first seed. Interrupted
runs resume.
"""

from pathlib import Path

import torch
from common import last_value
from experiment import list_metrics, parse, repeat, train, validation_images

from hf_fae import AutoencoderDRoRAE
from hf_fae.images import make_grid, to_pil


# Run -> its name in the table, its config, the run that it starts from, and further settings.
WIDTH, LAYERS = 384, 12
RUNS = {
    "rae": ("RAE (phase 1)", 1, None, {}),
    "rae-longer": ("RAE, trained further for as long as phase 3", 1, "rae", {"max_train_steps": 400}),
    "fusion": ("all layers, phase 2", 2, "rae", {"expert_hidden_size": WIDTH}),
    "decoder": ("all layers, phase 3", 3, "fusion", {}),
    "last-fusion": (
        "last layer alone, phase 2",
        2,
        "rae",
        {"expert_hidden_size": WIDTH * LAYERS, "fusion_layers": 1},
    ),
    "last-decoder": ("last layer alone, phase 3", 3, "last-fusion", {}),
}
METRICS = {"reconstruction": "mean absolute error", "psnr": "PSNR in dB"}
SHOWN = 10


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-drorae", argv)

    def once(folder, seed):
        for name, (_, phase, source, settings) in RUNS.items():
            start = {"tokenizer": folder / source} if source else {"image_encoder": args.encoder}
            settings = {"dataset_name": args.data, "seed": seed, **start, **settings}
            train("train_drorae.py", f"emoji_drorae_phase{phase}.yaml", folder / name, settings, args.flags)
        return {
            name: {metric: last_value(folder / name, f"validation/{metric}") for metric in METRICS} for name in RUNS
        }

    repeat(args, once, table)
    save_reconstructions(args.output / "reconstructions.png", args.output / "seed-0", args.data)


def table(results: list[dict]) -> str:
    """Markdown: mean and standard deviation over the seeds, and the number of seeds with a smaller error."""
    lines = list_metrics({name: title for name, (title, *_) in RUNS.items()}, METRICS, results)
    lines += ["", "| smaller error | than | seeds |", "|---|---|---|"]
    for name, other in (
        ("fusion", "rae"),
        ("decoder", "fusion"),
        ("decoder", "rae-longer"),
        ("fusion", "last-fusion"),
        ("decoder", "last-decoder"),
    ):
        count = sum(result[name]["reconstruction"] < result[other]["reconstruction"] for result in results)
        lines.append(f"| {RUNS[name][0]} | {RUNS[other][0]} | {count} of {len(results)} |")
    return "\n".join(lines)


@torch.no_grad()
def save_reconstructions(path: Path, folder: Path, data: str) -> None:
    """Save validation images above their reconstructions by the tokenizers of phases 1, 2 and 3."""
    tokenizers = [AutoencoderDRoRAE.from_pretrained(folder / name).eval() for name in ("rae", "fusion", "decoder")]
    size = tokenizers[0].config.sample_size
    images = validation_images(data, size, SHOWN)
    rows = [images, *(vae(images).sample for vae in tokenizers)]
    make_grid([image for row in rows for image in to_pil(row)], columns=len(images)).save(path)


if __name__ == "__main__":
    main()
