"""Loading of cached latents, as a share of a training step of a generator.

    python benchmarks/input_pipeline.py outputs/latents
    python benchmarks/input_pipeline.py outputs/latents --device cuda --dtype bfloat16 --model-size xl --batch-size 64

`outputs/latents` is a cache of training_scripts/cache_latents.py. Seconds per batch are medians of reading at full
speed; a training step hides them with workers, not without. The aim is a share of at most 5 %.
"""

import argparse
from statistics import median

import torch
from throughput import SIZES, training
from timing import timed

from hf_fae import LightningDiTTransformer2DModel
from hf_fae.data.latent_cache import CachedLatents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("latents", help="folder of the cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of the training step")
    parser.add_argument("--model-size", choices=SIZES, default="b", help="of the denoiser")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--num-workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batches", type=int, default=50)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the training step with torch.compile")
    args = parser.parse_args()

    latents = CachedLatents(args.latents)
    step = seconds_per_step(args, latents)
    print(f"LightningDiT-{args.model_size.upper()}, {args.dtype}, {args.device}: {step:.3f} s per step\n")
    print(f"| workers | ms per batch of {args.batch_size} | images/s | share of a step |")
    print("|---|---|---|---|")
    for num_workers in args.num_workers:
        batch = seconds_per_batch(args, latents, num_workers)
        print(f"| {num_workers} | {1000 * batch:.2f} | {args.batch_size / batch:,.0f} | {batch / step:.2%} |")


def seconds_per_batch(args: argparse.Namespace, latents: CachedLatents, num_workers: int) -> float:
    """Seconds to load a batch and move it to the device."""
    batches = latents.batches(args.batch_size, num_workers=num_workers)

    def load():
        return {name: values.to(args.device) for name, values in next(batches).items() if torch.is_tensor(values)}

    return median([timed(load, args.device) for _ in range(args.batches + 5)][5:])  # the workers start in the first


def seconds_per_step(args: argparse.Namespace, latents: CachedLatents) -> float:
    """Seconds of forward, backward and AdamW of a denoiser for these latents."""
    layers, heads, head_dim = SIZES[args.model_size]
    channels, side = latents.shape[0] // 2, latents.shape[1]
    model = LightningDiTTransformer2DModel(
        sample_size=side,
        in_channels=channels,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
    )
    noisy = torch.randn(args.batch_size, channels, side, side, device=args.device)
    timestep = torch.full((args.batch_size,), 500.0, device=args.device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
    model = model.to(args.device).train()

    def predict():
        return model(hidden_states=noisy, timestep=timestep, class_labels=labels).sample

    step = training(args, getattr(torch, args.dtype), model, predict)
    step()
    return median(timed(step, args.device) for _ in range(args.steps))


if __name__ == "__main__":
    main()
