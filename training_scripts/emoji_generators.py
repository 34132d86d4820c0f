"""Which generator for which tokenizer? Six generators on the latents of three tokenizers of Fluent Emoji, three seeds.

    python training_scripts/emoji_generators.py --output outputs/emoji-generators

The tokenizers are the FAE in `checkpoints/` (256 px, 16x16 latents in patches of 2x2), and an l-DeTok and a MAETok of
128 px that are trained first, longer than in `emoji_detok.py` and `emoji_maetok.py`. The generators have 4.1
million parameters each and are trained for as many steps, by `train_generator.py` and `train_autoregressive.py`.
`results.md` has `fid_effnet` of samples against the training pictures. A run that was stopped goes on where it was.
"""

from pathlib import Path

from demo import ROOT
from experiment import evaluate_fid, find_judge, parse, repeat, spread, train


# Tokenizer -> what it is in the table, how it is trained if it is not there, and how a generator reads its latents.
LONGER = {"resolution": 128, "max_train_steps": 3000, "checkpointing_steps": 500}
TOKENIZERS = {
    "fae": ("FAE", None, {"patch_size": 2}),
    "detok": ("l-DeTok", ("train_detok.py", "emoji_detok.yaml", LONGER), {}),
    "maetok": ("MAETok", ("train_maetok.py", "emoji_maetok.yaml", {**LONGER, "num_latent_tokens": 32}), {}),
}
DENOISER, AUTOREGRESSIVE = "generator", "autoregressive"
SIT = {"norm_type": "layer_norm", "ff_type": "gelu", "use_rope": "false"}
# Generator -> what it is in the table, the script and config of that name, and its settings.
GENERATORS = {
    "mar": ("MAR", AUTOREGRESSIVE, {"model": "mar", "num_layers": 3, "num_inference_steps": 32}),
    "raster": ("RasterAR", AUTOREGRESSIVE, {"model": "raster"}),
    "random": ("RandomAR", AUTOREGRESSIVE, {"model": "random"}),
    "sit": ("SiT", DENOISER, SIT),
    "dit": ("DiT", DENOISER, {**SIT, "prediction_type": "epsilon"}),
    "lightningdit": ("LightningDiT", DENOISER, {}),
}
SAMPLES = 500


def main(argv: list[str] | None = None) -> None:
    args = parse(__doc__, "outputs/emoji-generators", argv)
    judge = find_judge(args.judge)
    latents = {name: encode(args.output, name, args) for name in TOKENIZERS}

    def once(folder, seed):
        return {
            name: {
                kind: measure(folder / f"{name}-{kind}", name, kind, latents[name], seed, args, judge)
                for kind in GENERATORS
            }
            for name in TOKENIZERS
        }

    repeat(args, once, table)


def encode(output: Path, name: str, args) -> Path:
    """The cached latents of a tokenizer, which is trained first where there is none."""
    _, training, _ = TOKENIZERS[name]
    tokenizer, latents = ROOT / "checkpoints" / "fae-emoji-256", output / f"{name}-latents"
    settings = {"dataset_name": args.data}
    if training is not None:
        script, config, others = training
        tokenizer = output / name
        train(script, config, tokenizer, {**settings, **others}, args.flags)
    else:
        settings |= {"image_encoder": args.encoder, "resolution": 256}
    train("cache_latents.py", "demo_latents.yaml", latents, {**settings, "vae": tokenizer}, [])
    return latents


def measure(folder: Path, tokenizer: str, kind: str, latents: Path, seed: int, args, judge: str) -> float:
    """Train a generator on cached latents; `fid_effnet` of what it draws, against the training pictures."""
    _, config, settings = GENERATORS[kind]
    settings = {"dataset_name": latents, "seed": seed, **TOKENIZERS[tokenizer][2], **settings}
    train(f"train_{config}.py", f"emoji_table_{config}.yaml", folder, settings, args.flags)
    return evaluate_fid(folder, args, judge, SAMPLES)


def table(results: list[dict]) -> str:
    """Markdown: `fid_effnet`, mean and deviation over the seeds, and in how many of them l-DeTok was best."""
    lines = ["| | " + " | ".join(title for title, *_ in TOKENIZERS.values()) + " | l-DeTok is best |"]
    lines.append("|---" * (2 + len(TOKENIZERS)) + "|")
    for kind, (title, *_) in GENERATORS.items():
        cells = [spread([result[name][kind] for result in results]) for name in TOKENIZERS]
        best = sum(min(TOKENIZERS, key=lambda name: result[name][kind]) == "detok" for result in results)
        lines.append(f"| {title} | {' | '.join(cells)} | {best} of {len(results)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
