"""Throughput of the models, as a share of the machine's matmul peak, and relative to diffusers' own models.

    python benchmarks/throughput.py
    python benchmarks/throughput.py --models mmdit --model-size s --batch-size 4
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --compile --model-size xl --batch-size 64

Every round measures the matmul ceiling, each job, and the same job of its peer in turn: other load on a shared machine
slows all of them alike. Tables give medians over the rounds, and medians of per-round ratios.
bfloat16 means weights in bfloat16 for inference, and fp32 weights under autocast for the training step.
"""

import argparse
import json
import platform
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderRAE, DiTTransformer2DModel, SD3Transformer2DModel
from timing import timed
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_fae import (
    AutoencoderFAE,
    LightningDiTTransformer2DModel,
    MMDiTTransformer2DModel,
    VisionEncoder,
    build_preset,
)
from hf_fae.latents import latent_size


SIZES = {"s": (12, 6, 64), "b": (12, 12, 64), "xl": (28, 16, 72)}  # layers, heads, width of a head
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--models", nargs="+", choices=JOBS, default=["fae", "lightningdit"])
    parser.add_argument("--model-size", choices=SIZES, default="b", help="of the denoisers")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile both sides with torch.compile")
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args()

    results = {}
    for dtype in args.dtype:
        results[dtype] = measure(args, getattr(torch, dtype))
        print_table(dtype, results[dtype], args.batch_size)
    if args.json:
        args.json.write_text(json.dumps({"machine": platform.platform(), "torch": torch.__version__, **results}))


def measure(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """Rounds of seconds for the ceiling and for each job, with its floating point operations."""
    jobs = {name: job for model in args.models for name, job in JOBS[model](args, dtype).items()}
    flops = {}
    for name, job in jobs.items():
        with FlopCounterMode(display=False) as counter:
            job()
        flops[name] = counter.get_total_flops()
    seconds = {name: [] for name in jobs}
    ceilings = []
    for _ in range(args.rounds):
        ceilings.append(matmul_ceiling(args, dtype))
        for name, job in jobs.items():
            seconds[name].append(timed(job, args.device))
    return {"ceiling": ceilings, "seconds": seconds, "flops": flops}


def matmul_ceiling(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """The best FLOP/s of linear maps with the denoiser's shapes and of a large square one."""
    _, heads, head_dim = SIZES[args.model_size]
    tokens, width = args.batch_size * 256, heads * head_dim
    best = 0.0
    for rows, inner, columns in ((tokens, width, 4 * width), (tokens, 4 * width, width), (2048, 2048, 2048)):
        x = torch.randn(rows, inner, device=args.device, dtype=dtype)
        weight = torch.randn(columns, inner, device=args.device, dtype=dtype)
        fastest = min(timed(lambda x=x, weight=weight: F.linear(x, weight), args.device) for _ in range(6))
        best = max(best, 2 * rows * inner * columns / fastest)
    return best


def autoencoder_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """FAE and diffusers' RAE: DINOv2-S as encoder, a ViT-B as pixel decoder, 256 px, 256 tokens."""
    dinov2_small = {"model_type": "dinov2", "hidden_size": 384, "num_attention_heads": 6, "image_size": 518}
    encoder = VisionEncoder.from_config({"model": dinov2_small, "image_size": 224, **IMAGENET})
    fae = AutoencoderFAE.from_encoder(
        encoder, latent_channels=32, pixel_hidden_size=768, pixel_num_layers=12, pixel_num_attention_heads=12
    )
    rae = AutoencoderRAE(
        encoder_hidden_size=384,
        decoder_hidden_size=768,
        decoder_num_hidden_layers=12,
        decoder_num_attention_heads=12,
        decoder_intermediate_size=3072,
        image_size=256,
    )
    fae, rae = (model.to(args.device, dtype).eval() for model in (fae, rae))
    images = torch.rand(args.batch_size, 3, 256, 256, device=args.device, dtype=dtype)
    latents = torch.randn(args.batch_size, 32, 16, 16, device=args.device, dtype=dtype)
    features = torch.randn(args.batch_size, 256, 384, device=args.device, dtype=dtype)
    rae_latents = torch.randn(args.batch_size, 384, 16, 16, device=args.device, dtype=dtype)
    return {
        "encode": inference(args, lambda: fae.encode(images).latent_dist.mode()),
        "encode, peer": inference(args, lambda: rae.encode(images).latent),
        "decode": inference(args, lambda: fae.decode(latents).sample),
        "decode, pixel decoder alone": inference(args, lambda: fae.decode_pixels(features).sample),
        "decode, peer": inference(args, lambda: rae.decode(rae_latents).sample),
    }


def pixel_tokenizer_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """l-DeTok and MAETok of base size at 256 px, without a peer: 256 tokens of 16 channels, 128 of 32."""
    images = torch.rand(args.batch_size, 3, 256, 256, device=args.device, dtype=dtype)
    jobs = {}
    for name, preset in (("l-DeTok", "detok-bb"), ("MAETok", "maetok-b-128")):
        vae = build_preset(preset).to(args.device, dtype).eval()
        shape = (args.batch_size, vae.config.latent_channels, *latent_size(vae, 256, 256))
        latents = torch.randn(shape, device=args.device, dtype=dtype)
        jobs[f"{name} encode"] = inference(args, lambda vae=vae: vae.encode(images).latent_dist.mode())
        jobs[f"{name} decode"] = inference(args, lambda vae=vae, latents=latents: vae.decode(latents).sample)
    return jobs


def token_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """LightningDiT on MAETok's 128 tokens, relative to 256 tokens."""
    jobs, labels = {}, torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
    for suffix, size in ((" 128 tokens", [1, 128]), (" 128 tokens, peer", [16, 16])):
        jobs |= denoiser_jobs(
            args,
            dtype,
            suffix,
            lambda size=size: LightningDiTTransformer2DModel(**size_of(args), sample_size=size),
            condition={"class_labels": labels},
            size=size,
        )
    return jobs


def class_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """LightningDiT and diffusers' DiT of the same width and depth, patch 1 on 32 x 16 x 16 latents."""
    size, labels = size_of(args), torch.zeros(args.batch_size, dtype=torch.long, device=args.device)

    def peer():
        return DiTTransformer2DModel(**size, out_channels=32, sample_size=16, patch_size=1)

    condition = {"class_labels": labels}
    return {
        **denoiser_jobs(args, dtype, "", lambda: LightningDiTTransformer2DModel(**size), condition),
        **denoiser_jobs(args, dtype, ", peer", peer, condition),
    }


def text_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """MMDiT and diffusers' SD3 of the same width and depth, on the same latents and 128 tokens of Flan-T5-XL.

    Half of the tokens are masked in ours; SD3 has no mask.
    """
    size = size_of(args)
    embeds = torch.randn(args.batch_size, 128, 2048, device=args.device)
    mask = torch.arange(128, device=args.device).expand(args.batch_size, -1) < 64
    pooled = torch.zeros(args.batch_size, 768, device=args.device)

    def peer():
        width = size["num_attention_heads"] * size["attention_head_dim"]
        return SD3Transformer2DModel(
            **size,
            out_channels=32,
            sample_size=16,
            patch_size=1,
            joint_attention_dim=2048,
            caption_projection_dim=width,
            pooled_projection_dim=768,
            pos_embed_max_size=16,
        )

    ours = {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}
    theirs = {"encoder_hidden_states": embeds, "pooled_projections": pooled}
    return {
        **denoiser_jobs(args, dtype, " text", lambda: MMDiTTransformer2DModel(**size), ours),
        **denoiser_jobs(args, dtype, " text, peer", peer, theirs),
    }


def size_of(args: argparse.Namespace) -> dict:
    layers, heads, head_dim = SIZES[args.model_size]
    return {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 32}


def denoiser_jobs(
    args: argparse.Namespace, dtype: torch.dtype, suffix: str, make, condition: dict, size: tuple = (16, 16)
) -> dict:
    """A sampling step and a training step of the model that `make` builds, patch 1 on latents of 32 channels."""
    noisy = torch.randn(args.batch_size, 32, *size, device=args.device)
    timestep = torch.full((args.batch_size,), 500.0, device=args.device)
    model, x = make().to(args.device, dtype).eval(), noisy.to(dtype)
    cast = {name: value.to(dtype) if value.is_floating_point() else value for name, value in condition.items()}
    trained = make().to(args.device).train()
    return {
        f"denoise{suffix}": inference(args, lambda: model(hidden_states=x, timestep=timestep, **cast).sample),
        f"train{suffix}": training(
            args, dtype, trained, lambda: trained(hidden_states=noisy, timestep=timestep, **condition).sample
        ),
    }


def inference(args: argparse.Namespace, job):
    compiled = torch.compile(job) if args.compile else job
    return torch.inference_mode()(compiled)


def training(args: argparse.Namespace, dtype, model, predict):
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = args.device.split(":")[0]

    def loss():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return predict().float().square().mean()

    compiled = torch.compile(loss) if args.compile else loss

    def step():
        compiled().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_table(dtype: str, result: dict, batch_size: int) -> None:
    print(f"\n{dtype}: ceiling {median(result['ceiling']) / 1e12:.3f} TFLOP/s\n")
    print("| job | images/s | TFLOP/s | share of the ceiling | peer's share | speed relative to the peer |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in result["seconds"] if not name.endswith("peer")]:
        peer = f"{name.split(',')[0]}, peer"
        comparison = "| |"
        if peer in result["seconds"]:
            pairs = zip(result["seconds"][name], result["seconds"][peer], strict=True)
            comparison = f"{share(result, peer):.0%} | {median(theirs / ours for ours, theirs in pairs):.2f} x |"
        rate = batch_size / median(result["seconds"][name])
        tflops = rate * result["flops"][name] / batch_size / 1e12
        print(f"| {name} | {rate:.2f} | {tflops:.3f} | {share(result, name):.0%} | {comparison}")


def share(result: dict, name: str) -> float:
    rounds = zip(result["seconds"][name], result["ceiling"], strict=True)
    return median(result["flops"][name] / seconds / ceiling for seconds, ceiling in rounds)


JOBS = {
    "fae": autoencoder_jobs,
    "pixel-tokenizers": pixel_tokenizer_jobs,
    "lightningdit": class_jobs,
    "tokens": token_jobs,
    "mmdit": text_jobs,
}

if __name__ == "__main__":
    main()
