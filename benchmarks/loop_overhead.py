"""Overhead of the training loop over the bare forward pass, backward pass and optimiser step.

    python benchmarks/loop_overhead.py
    python benchmarks/loop_overhead.py --model-size xl --batch-size 64

A LightningDiT is trained on synthetic latents, by a bare loop and by `TrainingLoop` with all of its features:
per-image noise, clipping, EMA, the non-finite guard, the log. Both run in turn, for several rounds; ratios are
of each round's median steps. The aim is at most 1.03.
"""

import argparse
import tempfile
import time
from statistics import median

import torch
from throughput import SIZES as PUBLISHED

from hf_fae import AutoencoderFAE, LightningDiTTransformer2DModel
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop
from hf_fae.utils.randomness import ImageRandom


SIZES = {**PUBLISHED, "emoji": (8, 6, 64)}  # as in docs/experiments/emoji-128.md


class Latents:
    """One batch of synthetic moments, repeated; records the time of each request."""

    def __init__(self, batch_size, channels=16, side=8):
        self.batch = {
            "moments": torch.randn(batch_size, 2 * channels, side, side),
            "class_labels": torch.arange(batch_size) % 10,
        }
        self.requests = []

    def signature(self, batch_size, world_size, num_workers):
        return {}

    def batches(self, batch_size, **place):
        while True:
            self.requests.append(time.perf_counter())
            yield dict(self.batch)

    def step_seconds(self):
        """Median seconds from one batch to the next, without the first steps."""
        times = self.requests[2:]
        return median(later - earlier for earlier, later in zip(times, times[1:], strict=False))


def make_objective(args):
    layers, heads, head_dim = SIZES[args.model_size]
    torch.manual_seed(0)
    transformer = LightningDiTTransformer2DModel(
        sample_size=8,
        in_channels=16,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_classes=10,
    )
    vae = AutoencoderFAE(
        feature_dim=64,
        latent_channels=16,
        sample_size=64,
        patch_size=8,
        encoder_attention_head_dim=64,
        decoder_num_layers=1,
        pixel_hidden_size=64,
        pixel_num_layers=1,
        pixel_num_attention_heads=1,
    )
    return FlowMatchingObjective(transformer, vae, shift=0.4)


def bare_step(args):
    """Seconds of forward, backward and AdamW."""
    objective, data = make_objective(args).train().to(args.device), Latents(args.batch_size)
    optimizer = torch.optim.AdamW(objective.model.parameters(), fused=True)
    for step, batch in zip(range(args.steps + 3), data.batches(args.batch_size), strict=False):
        batch = {name: value.to(args.device) for name, value in batch.items()}
        random = ImageRandom(0, step * args.batch_size, args.device)
        with torch.autocast(args.device, torch.bfloat16):
            loss = objective(batch, random)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device == "cuda":
            torch.cuda.synchronize()
    return data.step_seconds()


def loop_step(args):
    """Seconds of a step of `TrainingLoop`."""
    data = Latents(args.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        arguments = LoopArguments(
            output_dir=folder,
            max_train_steps=args.steps + 3,
            train_batch_size=args.batch_size,
            mixed_precision="bf16",
            logging_steps=5 if args.device == "cpu" else 1,  # on a GPU, synchronise every step as the bare loop does
            checkpointing_steps=10**6,
            report_to="none",
        )
        TrainingLoop(arguments).run(make_objective(args), data)
    return data.step_seconds()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model-size", choices=SIZES, default="emoji")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    ratios = []
    for number in range(args.rounds):
        bare, loop = bare_step(args), loop_step(args)
        ratios.append(loop / bare)
        print(f"round {number}: bare {bare:.4f} s, loop {loop:.4f} s, ratio {ratios[-1]:.3f}", flush=True)
    print(f"LightningDiT-{args.model_size.upper()}, batch {args.batch_size}: median ratio {median(ratios):.3f}")


if __name__ == "__main__":
    main()
