"""How fast are the models, as a share of what the machine can multiply, and beside diffusers' own?

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --compile --model-size xl --batch-size 64 --rounds 20

One process measures everything, in rounds. Before each pair of jobs, ours and its peer in diffusers, a round measures
the ceiling: the rate of the fastest of some large matrix products. Neighbours on a shared machine so slow both sides and
the ceiling alike, and the tables give medians over the rounds of ratios within a round. On a CPU each number is given
by wall time and by CPU time, which does not count the time that neighbours got.

`products alone` repeats only the matrix products and attention calls of our job, each by itself: the share of the
ceiling that would be left if all else were free.

bfloat16 means weights in bfloat16 for inference, and fp32 weights under autocast for the training step.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderRAE, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hf_fae import PRESETS, AutoencoderFAE, LightningDiTTransformer2DModel, VisionEncoder


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
SIDES = ("ours", "peer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--model-size", choices=["b", "xl"], default="b", help="of the denoiser")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile both sides with torch.compile")
    parser.add_argument("--json", type=Path, help="write all measurements to this file")
    args = parser.parse_args()

    print(machine(args.device), flush=True)
    results = {}
    for dtype in args.dtype:
        results[dtype] = measure(args, getattr(torch, dtype))
        print_table(dtype, results[dtype], args)
    if args.json:
        arguments = {**vars(args), "json": str(args.json)}
        record = {"machine": machine(args.device), "arguments": arguments, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def machine(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if f" {unit}" in flags]
        name += f" ({', '.join(units)}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# What is measured: pairs of jobs, ours and its peer.


def autoencoder_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """FAE beside diffusers' RAE: DINOv2-S as encoder, a ViT-B as pixel decoder, 256 px, 256 tokens.

    FAE's `decode` contains the feature decoder, which RAE has none of: like for like is `decode_pixels`.
    """
    size = {"batch": args.batch_size, "device": args.device, "dtype": dtype}
    encoder = VisionEncoder.from_config(PRESETS["fae-dinov2-s"][1]["image_encoder_config"])
    fae = AutoencoderFAE.from_encoder(
        encoder, pixel_hidden_size=768, pixel_num_layers=12, pixel_num_attention_heads=12
    )
    rae = AutoencoderRAE(
        encoder_hidden_size=384,
        decoder_hidden_size=768,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=12,
        decoder_intermediate_size=3072,
    )
    fae, rae = (randomize(model).to(args.device, dtype).eval() for model in (fae, rae))
    images, latents = noise((3, 256, 256), **size).clamp(-1, 1), noise((32, 16, 16), **size)
    features, feature_map = noise((256, 384), **size), noise((384, 16, 16), **size)
    decode_peer = torch.no_grad()(lambda: rae.decode(feature_map).sample)
    return {
        "FAE encode": (
            torch.no_grad()(lambda: fae.encode(images).latent_dist.mode()),
            torch.no_grad()(lambda: rae.encode(images).latent),
        ),
        "FAE decode": (torch.no_grad()(lambda: fae.decode(latents).sample), decode_peer),
        "FAE decode_pixels": (torch.no_grad()(lambda: fae.decode_pixels(features).sample), decode_peer),
    }


def denoiser_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """LightningDiT beside diffusers' DiT of the same width and depth, patch 1 on latents of 32 x 16 x 16."""
    config = PRESETS[f"lightningdit-{args.model_size}-1"][1]
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
    makers = (
        lambda: LightningDiTTransformer2DModel(**config),
        lambda: DiTTransformer2DModel(**{key: config[key] for key in keys}),
    )
    noisy, target = (noise((32, 16, 16), args.batch_size, args.device, torch.float32) for _ in range(2))
    timestep = torch.linspace(0, 999, args.batch_size, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)

    def forward(model: nn.Module) -> Callable:
        return torch.no_grad()(lambda: model(noisy.to(dtype), timestep, class_labels=labels).sample)

    def train(model: nn.Module) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            with torch.autocast(torch.device(args.device).type, dtype, enabled=dtype != torch.float32):
                sample = model(noisy, timestep, class_labels=labels).sample
            F.mse_loss(sample.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    name = f"LightningDiT-{args.model_size.upper()}/1"
    return {
        f"{name} forward": tuple(forward(randomize(make()).to(args.device, dtype).eval()) for make in makers),
        f"{name} training step": tuple(train(randomize(make()).to(args.device).train()) for make in makers),
    }


def randomize(model: nn.Module) -> nn.Module:
    """No matrix is left at zero, as many are at first: products with zeros draw less power and can be faster."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter.data, std=0.02)
    return model


def noise(shape: tuple[int, ...], batch: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(batch, *shape, device=device, dtype=dtype)


# How it is measured.


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """name -> {"flops": per side, "products": seconds, "rounds": [{"ceiling", "ours", "peer"} -> clock -> number]}."""
    ceiling = matmul_ceiling(args, dtype)
    jobs = {**autoencoder_jobs(args, dtype), **denoiser_jobs(args, dtype)}
    results = {}
    for name, pair in jobs.items():
        flops = {}
        for side, job in zip(SIDES, pair, strict=True):
            with FlopCounterMode(display=False) as counter, RecordProducts() as recorder:
                job()
            flops[side] = counter.get_total_flops()
            if side == "ours":
                products = recorder.products
        if args.compile:
            torch.compiler.reset()
            pair = tuple(torch.compile(job) for job in pair)
        calls = [*pair, lambda products=products: [call() for call in products]]
        repeats = []
        for call in calls:
            seconds(call, args.device)  # warm-up
            repeats.append(max(1, round(0.3 / seconds(call, args.device)["wall"])))
        jobs[name] = dict(zip((*SIDES, "products"), zip(calls, repeats, strict=True), strict=True))
        results[name] = {"flops": flops, "rounds": []}
    for index in range(args.rounds):
        for name, calls in jobs.items():
            order = sorted(calls, reverse=index % 2 == 0)  # whoever comes second may find warmer caches
            measured = {"ceiling": ceiling()}
            measured |= {key: seconds(calls[key][0], args.device, calls[key][1]) for key in order}
            results[name]["rounds"].append(measured)
    return results


def seconds(call: Callable, device: str, repeats: int = 1) -> dict[str, float]:
    """Clock -> seconds of one call, the mean of `repeats`."""
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    starts = {name: clock() for name, clock in CLOCKS.items()}
    for _ in range(repeats):
        call()
    synchronize()
    return {name: (clock() - starts[name]) / repeats for name, clock in CLOCKS.items()}


def matmul_ceiling(args: argparse.Namespace, dtype: torch.dtype) -> Callable[[], dict[str, float]]:
    """A function that measures clock -> FLOP/s of the fastest of plain products: the denoiser's and a large square."""
    config = PRESETS[f"lightningdit-{args.model_size}-1"][1]
    tokens, width = args.batch_size * 256, config["num_attention_heads"] * config["attention_head_dim"]
    square = 8192 if args.device.startswith("cuda") else 2048
    shapes = [(tokens, width, width), (tokens, width, 4 * width), (tokens, 4 * width, width), (square,) * 3]
    products = []
    for rows, inner, columns in shapes:
        left, right = (torch.randn(shape, device=args.device, dtype=dtype) for shape in ((rows, inner), (inner, columns)))
        call = torch.no_grad()(lambda left=left, right=right: left @ right)
        seconds(call, args.device)
        repeats = max(1, round(0.1 / seconds(call, args.device)["wall"]))
        products.append((2 * rows * inner * columns, call, repeats))

    def measure_ceiling() -> dict[str, float]:
        rates = [
            {clock: flops / value for clock, value in seconds(call, args.device, repeats).items()}
            for flops, call, repeats in products
        ]
        return {clock: max(rate[clock] for rate in rates) for clock in CLOCKS}

    return measure_ceiling


class RecordProducts(TorchDispatchMode):
    """Collects the calls that have floating point operations to count, in `products`, with inputs of their own."""

    def __init__(self):
        super().__init__()
        self.products, self._seen = [], {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in flop_registry:
            layout = lambda x: (x.shape, x.stride(), x.dtype) if isinstance(x, torch.Tensor) else x  # noqa: E731
            key = (func, str(tree_map(layout, (args, kwargs))))
            if key not in self._seen:  # one copy of the inputs for all calls alike
                copy = lambda x: x.detach().clone() if isinstance(x, torch.Tensor) else x  # noqa: E731
                inputs, named = tree_map(copy, (args, kwargs or {}))
                self._seen[key] = torch.no_grad()(lambda: func(*inputs, **named))
            self.products.append(self._seen[key])
        return result


# How it is told.


def print_table(dtype: str, results: dict, args: argparse.Namespace) -> None:
    """Shares of the ceiling and speed beside the peer; on a CPU by wall time, then by CPU time."""
    clocks = ["wall"] if args.device.startswith("cuda") else ["wall", "cpu"]

    def cell(function: Callable[[str], str]) -> str:
        return " / ".join(function(clock) for clock in clocks)

    ceilings = [measured["ceiling"] for result in results.values() for measured in result["rounds"]]
    print(f"\n{dtype}, ceiling {cell(lambda c: f'{median(x[c] for x in ceilings) / 1e12:.3f}')} TFLOP/s, by {' / '.join(clocks)}\n")
    print("| | images/s | TFLOP/s | share of the ceiling | products alone | peer's share | speed beside the peer |")
    print("|---|---|---|---|---|---|---|")
    for name, result in results.items():
        flops, rounds = result["flops"], result["rounds"]

        def share(key: str, side: str, clock: str, flops=flops, rounds=rounds) -> str:
            return f"{median(flops[side] / r[key][clock] / r['ceiling'][clock] for r in rounds):.0%}"

        def rate(work: float, rounds=rounds) -> float:
            return work / median(r["ours"]["wall"] for r in rounds)

        def beside(clock: str, rounds=rounds) -> str:
            return f"{median(r['peer'][clock] / r['ours'][clock] for r in rounds):.2f}"

        print(
            f"| {name} | {rate(args.batch_size):.2f} | {rate(flops['ours']) / 1e12:.3f} "
            f"| {cell(lambda c: share('ours', 'ours', c))} | {cell(lambda c: share('products', 'ours', c))} "
            f"| {cell(lambda c: share('peer', 'peer', c))} | {cell(beside)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
