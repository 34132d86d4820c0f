"""Sample quality of a STARFlow on emoji, by how its noise is removed: a table and a grid of samples.

    python experiments/emoji/starflow_samples.py outputs/emoji/5-starflow --tuned outputs/emoji/6-noisy \
        --data ../shared/assets/fluent-emoji --judge ../shared/assets/efficientnet-lite0 --output docs/images

`fid_effnet` is the Fréchet distance of EfficientNet-Lite0's pooled features between samples (with the labels of random
training images) and all training images, composited on white and cropped as for training. It is not FID: compare it
within one table only. The untrained flow is the same pipeline with initial weights, the identity.
"""

import argparse
from pathlib import Path

import torch
from samples import read_images, sample_latents
from tqdm import tqdm

from hf_fae import AutoencoderFAE, FAEStarFlowPipeline, STARFlowTransformer2DModel
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.evaluation.inputs.extractors import extract_features, load_extractors
from hf_fae.evaluation.metrics.distances import GaussianStatistics, frechet_distance
from hf_fae.images import make_grid, to_pil, to_uint8
from hf_fae.latents import decode_latents


def noisy_latents(pipe, labels, args, guidance_scale):
    """Latents (N, C, h, w) with the flow's noise on them; the seed of a sample is its number."""
    return sample_latents(pipe, labels, args.batch_size, denoise=False, guidance_scale=guidance_scale)


def in_batches(function, args, *tensors):
    return torch.cat([function(*parts) for parts in zip(*(tensor.split(args.batch_size) for tensor in tensors))])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="folder of a FAEStarFlowPipeline")
    parser.add_argument("--tuned", help="folder of its tokenizer with decoders tuned to the noise")
    parser.add_argument("--encoder", help="its frozen encoder, to measure the tokenizer's own loss")
    parser.add_argument("--data", required=True, help="Fluent Emoji: a folder or a Hub id")
    parser.add_argument("--judge", required=True, help="folder of EfficientNet-Lite0")
    parser.add_argument("--output", type=Path, required=True, help="folder of the grid")
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
    labels = torch.tensor([data.example(data.train[row])["class_labels"] for row in range(len(data))])

    def statistics(batches):
        features = (extract_features(extractors, to_uint8(batch)) for batch in batches)
        return GaussianStatistics.of(found["effnet.features"] for found in features)

    starts = tqdm(range(0, len(data), 50), desc="training images")
    reference = statistics(read_images(data, range(start, min(start + 50, len(data)))) for start in starts)

    def score(images):
        return frechet_distance(statistics(images.split(50)), reference)

    chosen = labels[torch.randint(len(labels), (args.samples,), generator=torch.Generator().manual_seed(0))].tolist()
    print("| samples | guidance | fid_effnet |\n|---|---|---|")

    def report(name, scale, images):
        print(f"| {name} | {scale} | {score(images):.1f} |", flush=True)

    @torch.no_grad()
    def decode(latents, vae=pipe.vae):
        return in_batches(lambda part: decode_latents(vae, part), args, latents)

    classes = torch.tensor(chosen)
    validation = torch.cat([batch["pixel_values"] for batch in data.validation_batches(50)])
    report("333 validation images themselves", "", validation)
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))[: args.samples].tolist()
    if args.encoder:  # a lower bound for samples
        pipe.vae.load_encoder(args.encoder)
        rebuilt = in_batches(
            lambda part: decode(pipe.vae.encode(part).latent_dist.mode()), args, read_images(data, rows)
        )
        report("training images, reconstructed by the tokenizer", "", rebuilt)
    trained = pipe.transformer
    pipe.register_modules(transformer=STARFlowTransformer2DModel.from_config(trained.config).eval())
    report("untrained flow", 1.0, decode(noisy_latents(pipe, chosen, args, 1.0)))
    pipe.register_modules(transformer=trained)
    tuned = AutoencoderFAE.from_pretrained(args.tuned, image_encoder=None) if args.tuned else None
    sheet, names = [], [pipe.id2label[label] for label in chosen[:8]]
    for scale in args.scales:
        latents = noisy_latents(pipe, chosen, args, scale)
        routes = {
            "noise kept": lambda z: decode(z),
            "score step": lambda z: decode(in_batches(trained.denoise, args, z, classes)),
            "tuned decoder": lambda z: decode(z, tuned),
        }
        for name, route in routes.items():
            if name == "tuned decoder" and tuned is None:
                continue
            images = route(latents)
            report(name, scale, images)
            if scale == args.scales[len(args.scales) // 2]:
                sheet += to_pil(images[:8])
    make_grid(sheet, columns=8, labels=names * (len(sheet) // 8)).save(args.output / "emoji_starflow_routes.png")


if __name__ == "__main__":
    main()
