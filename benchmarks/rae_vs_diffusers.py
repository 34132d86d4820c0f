"""Our RAE and diffusers' `AutoencoderRAE`: speed and memory with equal weights and images in one process.

    python benchmarks/rae_vs_diffusers.py
    python benchmarks/rae_vs_diffusers.py --device cuda --sizes base --batch-size 64 --rounds 30

The table has the largest differences of latents and of pixels in [0, 1], and the ratios of ours to theirs: of the time
of a job, the median over rounds in which both run twice, in random order ABBA or BAAB; and of the peak memory that a
job allocates, without the weights. Weights are random.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from statistics import median

import torch
from diffusers import AutoencoderRAE
from timing import timed
from torch.profiler import ProfilerActivity, profile

from hf_fae import AutoencoderDRoRAE


# DINOv2 with registers, and a decoder: small enough for tests, and DINOv2-B with RAE's ViT-B.
SIZES = {
    "tiny": {
        "encoder_hidden_size": 64,
        "encoder_num_hidden_layers": 3,
        "decoder_hidden_size": 64,
        "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 128,
    },
    "base": {
        "encoder_hidden_size": 768,
        "encoder_num_hidden_layers": 12,
        "decoder_hidden_size": 768,
        "decoder_num_hidden_layers": 12,
        "decoder_num_attention_heads": 12,
        "decoder_intermediate_size": 3072,
    },
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path, help="write all numbers to this file")
    args = parser.parse_args(argv)
    print("| size | latents | pixels | encode: time | memory | decode: time | memory |")
    print("|---|---|---|---|---|---|---|")
    results = {}
    for size in args.sizes:
        result = results[size] = compare(size, args.device, args.batch_size, args.rounds)
        ratios = [f"{result[job][kind]:.3f} x" for job in ("encode", "decode") for kind in ("time", "memory")]
        print(f"| {size} | {result['latents']:.1e} | {result['pixels']:.1e} | {' | '.join(ratios)} |", flush=True)
    if args.json:
        args.json.write_text(json.dumps(results, indent=2))


@torch.inference_mode()
def compare(size: str, device: str, batch_size: int, rounds: int) -> dict:
    """Differences, and for each job the ratios of ours to theirs."""
    torch.manual_seed(0)
    width, generator = SIZES[size]["encoder_hidden_size"], torch.Generator().manual_seed(1)
    statistics = {"latents_mean": torch.randn(width, 16, 16), "latents_std": torch.rand(width, 16, 16) + 0.5}
    theirs = AutoencoderRAE(**SIZES[size], **statistics).eval().to(device)
    ours = AutoencoderDRoRAE.from_rae(theirs)
    images = torch.rand(batch_size, 3, 256, 256, generator=generator).to(device)
    latents = theirs.encode(images).latent
    jobs = {
        "encode": (lambda: ours.encode(images * 2 - 1).latent_dist.mode(), lambda: theirs.encode(images).latent),
        "decode": (lambda: ours.decode(latents).sample / 2 + 0.5, lambda: theirs.decode(latents).sample),
    }
    result = {}
    for name, difference in (("encode", "latents"), ("decode", "pixels")):
        pair = jobs[name]
        mine, other = (job() for job in pair)  # also warms up
        result[difference] = (mine - other).abs().max().item()
        memory = [peak_allocation(job, device) for job in pair]
        result[name] = {"time": time_ratio(*pair, device, rounds), "memory": memory[0] / memory[1]}
    return result


def time_ratio(ours, theirs, device: str, rounds: int) -> float:
    chance, ratios = random.Random(0), []
    for _ in range(rounds):
        order = chance.choice(("abba", "baab"))
        seconds = {"a": 0.0, "b": 0.0}
        for name in order:
            seconds[name] += timed({"a": ours, "b": theirs}[name], device)
        ratios.append(seconds["a"] / seconds["b"])
    return median(ratios)


def peak_allocation(job, device: str) -> int:
    """Peak bytes that a job allocates on the device."""
    cuda = device.startswith("cuda")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities, profile_memory=True) as profiler:
        job()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    kind = 1 if cuda else 0  # torch's number of the device
    steps = [e for e in events if e["name"] == "[memory]" and e["args"]["Device Type"] == kind]
    held = peak = 0
    for step in sorted(steps, key=lambda event: event["ts"]):
        held += step["args"]["Bytes"]
        peak = max(peak, held)
    return peak


if __name__ == "__main__":
    main()
