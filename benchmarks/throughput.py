"""How fast are the models, as a share of what the machine can multiply, and beside diffusers' own?

    OMP_NUM_THREADS=2 python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --compile --model-size xl --batch-size 64

One process measures everything, in rounds. In each round every pair of jobs, ours and its peer in diffusers, comes with
a measurement of the ceiling, the rate of the fastest of some large matrix products: neighbours on a shared machine slow
all of them alike. The table gives medians over the rounds of ratios within a round. On a CPU there are two values, by
wall time and by CPU time, which leaves out the time that neighbours got.

"Products alone" repeats just the matrix products and attention calls of our job, each by itself: the share of the
ceiling that would be left if all else were free.

bfloat16 means weights in bfloat16 for inference, and fp32 weights under autocast for the training step.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderRAE, DiTTransformer2DModel
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from hf_fae import PRESETS, AutoencoderFAE, LightningDiTTransformer2DModel, VisionEncoder


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


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
        record = {"machine": machine(args.device), "arguments": vars(args), "results": results}
        args.json.write_text(json.dumps(record, indent=1, default=str) + "\n")


def machine(device: str) -> str:
    if device.startswith("cuda"):
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next(line for line in lines if line.startswith("flags")).split()
        units = [unit for unit in ("avx512f", "avx512_bf16", "amx_bf16") if unit in flags]
        name = next(line.split(": ")[1] for line in lines if line.startswith("model name"))
        name += f" ({', '.join(units)}), {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


# What is measured: pairs of jobs, ours and its peer.


def autoencoder_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """FAE beside diffusers' RAE: DINOv2-S as encoder, a ViT-B as pixel decoder, 256 px, 256 tokens.

    FAE's `decode` has the feature decoder to run besides, and RAE nothing like it: `decode_pixels` is like for like.
    """
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
    noise = partial(torch.randn, device=args.device, dtype=dtype)
    images, latents = noise(args.batch_size, 3, 256, 256).clamp(-1, 1), noise(args.batch_size, 32, 16, 16)
    features, feature_map = noise(args.batch_size, 256, 384), noise(args.batch_size, 384, 16, 16)
    pairs = {
        "FAE encode": (lambda: fae.encode(images).latent_dist.mode(), lambda: rae.encode(images).latent),
        "FAE decode": (lambda: fae.decode(latents).sample, lambda: rae.decode(feature_map).sample),
        "FAE decode_pixels": (lambda: fae.decode_pixels(features).sample, lambda: rae.decode(feature_map).sample),
    }
    return {name: tuple(torch.no_grad()(job) for job in pair) for name, pair in pairs.items()}


def denoiser_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict[str, tuple[Callable, Callable]]:
    """LightningDiT beside diffusers' DiT of the same width and depth, patch 1 on latents of 32 x 16 x 16."""
    config = PRESETS[f"lightningdit-{args.model_size}-1"][1]
    shared = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "sample_size", "patch_size")
    makers = (
        lambda: LightningDiTTransformer2DModel(**config),
        lambda: DiTTransformer2DModel(**{key: config[key] for key in shared}),
    )
    noisy, target = torch.randn(2, args.batch_size, 32, 16, 16, device=args.device)
    timestep = torch.linspace(0, 999, args.batch_size, device=args.device)
    labels = torch.arange(args.batch_size, device=args.device)

    def forward(model: nn.Module) -> Callable:
        return torch.no_grad()(lambda: model(noisy.to(dtype), timestep, class_labels=labels).sample)

    def training_step(model: nn.Module) -> Callable:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

        def step():
            with torch.autocast(noisy.device.type, dtype, enabled=dtype != torch.float32):
                sample = model(noisy, timestep, class_labels=labels).sample
            F.mse_loss(sample.float(), target).backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    name = f"LightningDiT-{args.model_size.upper()}/1"
    return {
        f"{name} forward": tuple(forward(randomize(make()).to(args.device, dtype).eval()) for make in makers),
        f"{name} training step": tuple(training_step(randomize(make()).to(args.device)) for make in makers),
    }


def randomize(model: nn.Module) -> nn.Module:
    """Leaves no matrix at zero, as some are at first: a GPU multiplies zeros faster than numbers."""
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter.data, std=0.02)
    return model


# How it is measured.


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """name -> the "flops" of both sides, and "rounds": seconds of ours, peer and products, and FLOP/s of the ceiling."""
    ceiling = matmul_ceiling(args, dtype)
    calls, results = {}, {}
    for name, pair in {**autoencoder_jobs(args, dtype), **denoiser_jobs(args, dtype)}.items():
        flops, recorder = {}, RecordProducts()
        for side, job in zip(("ours", "peer"), pair, strict=True):
            with FlopCounterMode(display=False) as counter, recorder:
                job()
            recorder.products = recorder.products or list(recorder.seen)
            flops[side] = counter.get_total_flops()
    return results
