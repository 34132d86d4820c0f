"""How fast are the models, as a share of what the machine can multiply, and beside diffusers' own?

    python benchmarks/throughput.py
    python benchmarks/throughput.py --device cuda --dtype bfloat16 --compile --model-size xl --batch-size 64

Every round measures the matmul ceiling, each job, and the same job of its peer, one after the other: neighbours on a
shared machine slow all of them alike. The tables give medians over the rounds, ratios the medians of their ratios.
bfloat16 means weights in bfloat16 for inference, and fp32 weights under autocast for the training step.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderRAE, DiTTransformer2DModel
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hf_fae import AutoencoderFAE, LightningDiTTransformer2DModel, VisionEncoder


SIZES = {"b": (12, 12, 64), "xl": (28, 16, 72)}  # layers, heads, width of a head
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--model-size", choices=SIZES, default="b", help="of the denoiser")
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
    jobs = {**autoencoder_jobs(args, dtype), **denoiser_jobs(args, dtype)}
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


def timed(job, device: str) -> float:
    synchronize = torch.cuda.synchronize if device.startswith("cuda") else lambda: None
    synchronize()
    start = time.perf_counter()
    job()
    synchronize()
    return time.perf_counter() - start


def matmul_ceiling(args: argparse.Namespace, dtype: torch.dtype) -> float:
    """FLOP/s of the best among plain linear maps of the denoiser's own shapes, and a large square one."""
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
    """FAE beside diffusers' RAE: DINOv2-S as encoder, a ViT-B as pixel decoder, 256 px, 256 tokens."""
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


def denoiser_jobs(args: argparse.Namespace, dtype: torch.dtype) -> dict:
    """LightningDiT beside diffusers' DiT of the same width and depth, patch 1 on 32 x 16 x 16 latents."""
    layers, heads, head_dim = SIZES[args.model_size]
    size = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": head_dim, "in_channels": 32}
    noisy = torch.randn(args.batch_size, 32, 16, 16, device=args.device)
    timestep = torch.full((args.batch_size,), 500.0, device=args.device)
    labels = torch.zeros(args.batch_size, dtype=torch.long, device=args.device)
    jobs = {}
    for suffix, make in (
        ("", lambda: LightningDiTTransformer2DModel(**size)),
        (", peer", lambda: DiTTransformer2DModel(**size, out_channels=32, sample_size=16, patch_size=1)),
    ):
        model = make().to(args.device, dtype).eval()
        x = noisy.to(dtype)
        jobs[f"denoise{suffix}"] = inference(
            args, lambda model=model, x=x: model(x, timestep, class_labels=labels).sample
        )
        jobs[f"train{suffix}"] = training(args, dtype, make().to(args.device).train(), noisy, timestep, labels)
    return jobs


def inference(args: argparse.Namespace, job):
    compiled = torch.compile(job) if args.compile else job
    return torch.inference_mode()(compiled)


def training(args: argparse.Namespace, dtype, model, noisy, timestep, labels):
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    device = args.device.split(":")[0]

    def loss():
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return model(noisy, timestep, class_labels=labels).sample.float().square().mean()

    compiled = torch.compile(loss) if args.compile else loss

    def step():
        compiled().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def print_table(dtype: str, result: dict, batch_size: int) -> None:
    print(f"\n{dtype}: ceiling {median(result['ceiling']) / 1e12:.3f} TFLOP/s\n")
    print("| job | images/s | TFLOP/s | share of the ceiling | peer's share | speed beside the peer |")
    print("|---|---|---|---|---|---|")
    for name in [name for name in result["seconds"] if not name.endswith("peer")]:
        peer = f"{name.split(',')[0]}, peer"
        ratios = [theirs / ours for ours, theirs in zip(result["seconds"][name], result["seconds"][peer], strict=True)]
        rate = batch_size / median(result["seconds"][name])
        tflops = rate * result["flops"][name] / batch_size / 1e12
        print(
            f"| {name} | {rate:.2f} | {tflops:.3f} | {share(result, name):.0%} | {share(result, peer):.0%} "
            f"| {median(ratios):.2f} x |"
        )


def share(result: dict, name: str) -> float:
    rounds = zip(result["seconds"][name], result["ceiling"], strict=True)
    return median(result["flops"][name] / seconds / ceiling for seconds, ceiling in rounds)


if __name__ == "__main__":
    main()
