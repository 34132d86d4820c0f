"""Cost of token-by-token sampling: causal models with and without a cache, MAR by its steps, the head alone.

    python benchmarks/autoregressive_sampling.py
    python benchmarks/autoregressive_sampling.py --device cuda --dtype bfloat16 --compile --size b --batch-size 64

Compared jobs run in turn, for several rounds; ratios are medians over the rounds. "Recompute" is sampling without a
cache: a full pass over all tokens so far for each token, timed at eight lengths. Trunks are timed without the head,
which costs both the same; it has a row of its own, as have whole images. On a CPU, seconds are summed over threads:
use a single one (OMP_NUM_THREADS=1).
"""

import argparse
import time
from statistics import median

import torch
from timing import timed

from hf_fae import PRESETS, AutoregressiveTransformer2DModel, MARTransformer2DModel, TokenGuidance
from hf_fae.generators.diffusion_head import head_scheduler


SMALL = {"num_attention_heads": 4, "attention_head_dim": 64, "head_num_layers": 3, "head_hidden_size": 256}
LAYERS = {
    AutoregressiveTransformer2DModel: {"num_layers": 6, "order": "random"},
    MARTransformer2DModel: {"encoder_num_layers": 3, "decoder_num_layers": 3},
}
GUIDANCE = TokenGuidance(3.0)


def make_model(model_class, args):
    """On 16 x 16 x 16 latents: 256 tokens."""
    name = {AutoregressiveTransformer2DModel: "random-ar", MARTransformer2DModel: "mar"}[model_class]
    config = PRESETS[f"{name}-{args.size}"][1] if args.size else {**SMALL, **LAYERS[model_class]}
    torch.manual_seed(0)
    with torch.device(args.device):
        model = model_class(**config).to(getattr(torch, args.dtype)).eval()
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    return model


def seconds(args, job):
    """Seconds of a job; on a CPU those of its threads, whatever else the machine does."""
    return timed(job, args.device, cpu_clock=time.process_time)


def make_inputs(model, args):
    """Latents, an order and classes."""
    latents = torch.randn(args.batch_size, model.config.in_channels, 16, 16, device=args.device)
    order = torch.rand(args.batch_size, model.num_tokens, device=args.device).argsort(1)
    return latents, order, torch.arange(args.batch_size, device=args.device) % model.config.num_classes


@torch.no_grad()
def cached(model, args):
    """Predict the conditions of all tokens, one after the other."""
    latents, order, labels = make_inputs(model, args)
    tokens, cache = model.to_tokens(latents), model.make_cache(len(order), order.device)
    for known in range(model.num_tokens):
        model.predict_conditions(tokens, order, known, 1, labels, cache=cache)


@torch.no_grad()
def recompute(model, args):
    """Seconds of the same without a cache, from passes at eight of all lengths."""
    latents, order, labels = make_inputs(model, args)
    tokens, lengths = model.to_tokens(latents), range(model.num_tokens // 16, model.num_tokens, model.num_tokens // 8)
    passes = [
        seconds(args, lambda length=length: model.predict_conditions(tokens, order, 0, length, labels))
        for length in lengths
    ]
    return sum(passes) * model.num_tokens / len(lengths)


@torch.no_grad()
def head(model, args, count):
    """Sample the tokens of one step at once."""
    dim = model.config.num_attention_heads * model.config.attention_head_dim
    condition = torch.randn(args.batch_size, count, dim, device=args.device, dtype=model.dtype)
    noise = torch.randn(args.batch_size, count, model.token_dim, device=args.device)
    model.diffusion_head.sample_tokens(condition, noise, head_scheduler(), args.diffusion_steps)


def images(model, args, steps=None, guidance=GUIDANCE):
    """Sample whole latents, with guidance."""
    latents, order, labels = make_inputs(model, args)
    model.generate(
        torch.zeros_like(latents),
        latents,
        order,
        labels,
        head_scheduler(),
        num_inference_steps=steps,
        num_diffusion_steps=args.diffusion_steps,
        guidance=guidance,
        negative_class_labels=torch.full_like(labels, model.config.num_classes),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--size", choices=["b", "l"], help="of the presets mar-SIZE and random-ar-SIZE; none: small ones"
    )
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--diffusion-steps", type=int, default=100, help="of the head")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    args = parser.parse_args()

    causal, mar = (make_model(cls, args) for cls in (AutoregressiveTransformer2DModel, MARTransformer2DModel))
    jobs = {
        "cached trunk": lambda: seconds(args, lambda: cached(causal, args)),
        "recomputed trunk": lambda: recompute(causal, args),
        "head, a token": lambda: seconds(args, lambda: head(causal, args, 1)),
        "head, 16 tokens": lambda: seconds(args, lambda: head(causal, args, 16)),
        "RandomAR, 256 steps": lambda: seconds(args, lambda: images(causal, args)),
        "MAR, 64 steps": lambda: seconds(args, lambda: images(mar, args, 64)),
        "MAR, 256 steps": lambda: seconds(args, lambda: images(mar, args, 256)),
        "MAR, 64 steps, no guidance": lambda: seconds(args, lambda: images(mar, args, 64, TokenGuidance())),
    }
    if args.compile or torch.device(args.device).type == "cuda":
        for job in jobs.values():  # to compile, and to warm up
            job()
    times = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            times[name].append(job())
    print(
        f"\n256 tokens, batch {args.batch_size}, {args.diffusion_steps} steps of the head, "
        f"guidance {GUIDANCE.scale}, {args.dtype} on {args.device}\n"
    )
    print("| job | seconds | images/s | relative to the cached trunk |\n|---|---|---|---|")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["cached trunk"], strict=True)]
        rate = f"{args.batch_size / median(values):.2f}" if "AR" in name else ""
        print(f"| {name} | {median(values):.3f} | {rate} | {median(ratios):.2f} x |")


if __name__ == "__main__":
    main()
