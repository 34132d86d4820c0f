"""How good are a flow's samples of emoji, with each way to take off its noise? Writes a table and a sheet of pictures.

    python experiments/emoji/starflow_emoji.py outputs/emoji/5-starflow --tuned outputs/emoji/6-noisy \
        --data ../shared/assets/fluent-emoji --judge ../shared/assets/efficientnet-lite0 --output docs/images

`fid_effnet` is the Fréchet distance of EfficientNet-Lite0's pooled features between samples (of the
labels of random training pictures) and all training pictures, composited on white and cropped as for training. It is
no FID: compare it within one table only. The untrained flow is the same pipeline with fresh weights, the identity.
"""

import argparse
from pathlib import Path

import torch
from tqdm import tqdm

from hf_fae import AutoencoderFAE, FAEStarFlowPipeline, STARFlowTransformer2DModel
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.evaluation.inputs.extractors import judge, load_extractors
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance
from hf_fae.images import make_grid, to_pil, to_uint8
from hf_fae.latents import decode_latents


@torch.no_grad()
def draw(pipe, labels, args, **options):
    """Latents (N, C, h, w) with the flow's noise on them, each from a seed of its own."""
    parts = []
    for start in tqdm(range(0, len(labels), args.batch_size), leave=False, unit="batch"):
        part = labels[start : start + args.batch_size]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(part))]
        options = {"denoise": False, "output_type": "latent", **options}
        parts.append(pipe(class_labels=part, generator=generators, **options).images)
    return torch.cat(parts)


def in_batches(function, args, *tensors):
    return torch.cat([function(*parts) for parts in zip(*(tensor.split(args.batch_size) for tensor in tensors))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a FAEStarFlowPipeline")
    parser.add_argument("--tuned", help="folder of its tokenizer with decoders tuned to the noise")
    parser.add_argument("--encoder", help="its frozen encoder, to show what the tokenizer itself loses")
    parser.add_argument("--data", required=True, help="Fluent Emoji: a folder or a Hub id")
    parser.add_argument("--judge", required=True, help="folder of EfficientNet-Lite0")
    parser.add_argument("--output", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50)
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0, 1.5, 2.0, 3.0, 4.0])
    args = parser.parse_args()

    pipe = FAEStarFlowPipeline.from_pretrained(args.pipeline)
    pipe.set_progress_bar_config(disable=True)
    resolution = pipe.vae.config.sample_size
    data = ImageData(
        DataArguments(args.data, label_column="subgroup", resolution=resolution, max_validation_samples=333)
    )
    extractors = load_extractors([f"effnet={args.judge}"])
    labels = torch.tensor([data.example(data.train[place])["class_labels"] for place in range(len(data))])

    def statistics(batches):
        return GaussianStatistics.of(judge(extractors, to_uint8(batch))["effnet.features"] for batch in batches)

    def read(places):
        return torch.stack([data.example(data.train[place])["pixel_values"] for place in places])

    starts = tqdm(range(0, len(data), 50), desc="training pictures")
    reference = statistics(read(range(start, min(start + 50, len(data)))) for start in starts)

    def score(pictures):
        return frechet_distance(statistics(pictures.split(50)), reference)

    chosen = labels[torch.randint(len(labels), (args.samples,), generator=torch.Generator().manual_seed(0))].tolist()
    print("| samples | guidance | fid_effnet |\n|---|---|---|")

    def report(name, scale, pictures):
        print(f"| {name} | {scale} | {score(pictures):.1f} |", flush=True)

    @torch.no_grad()
    def decode(latents, vae=pipe.vae):
        return in_batches(lambda part: decode_latents(vae, part), args, latents)

    classes = torch.tensor(chosen)
    validation = torch.cat([batch["pixel_values"] for batch in data.validation_batches(50)])
    report("333 validation pictures themselves", "", validation)
    places = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: args.samples].tolist()
    if args.encoder:  # no sample can be expected to be better
        pipe.vae.load_encoder(args.encoder)
        rebuilt = in_batches(lambda part: decode(pipe.vae.encode(part).latent_dist.mode()), args, read(places))
        report("training pictures, through the tokenizer", "", rebuilt)
    trained = pipe.transformer
    pipe.register_modules(transformer=STARFlowTransformer2DModel.from_config(trained.config).eval())
    report("untrained flow", 1.0, decode(draw(pipe, chosen, args, guidance_scale=1.0)))
    pipe.register_modules(transformer=trained)
    tuned = AutoencoderFAE.from_pretrained(args.tuned, image_encoder=None) if args.tuned else None
    sheet, names = [], [pipe.id2label[label] for label in chosen[:8]]
    for scale in args.scales:
        latents = draw(pipe, chosen, args, guidance_scale=scale)
        routes = {
            "noise left on": lambda z: decode(z),
            "score step": lambda z: decode(in_batches(trained.denoise, args, z, classes)),
            "tuned decoder": lambda z: decode(z, tuned),
        }
        for name, route in routes.items():
            if name == "tuned decoder" and tuned is None:
                continue
            pictures = route(latents)
            report(name, scale, pictures)
            if scale == args.scales[len(args.scales) // 2]:
                sheet += to_pil(pictures[:8])
    make_grid(sheet, columns=8, labels=names * (len(sheet) // 8)).save(args.output / "emoji_starflow_routes.png")


if __name__ == "__main__":
    main()
