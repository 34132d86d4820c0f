"""Cost of sampling from a flow: with and without a cache, by number of tokens, by Jacobi iteration; and its memory.

    python benchmarks/starflow_sampling.py
    python benchmarks/starflow_sampling.py --transformer outputs/starflow/transformer
    python benchmarks/starflow_sampling.py --device cuda --dtype bfloat16 --compile --preset starflow-imagenet-256

Compared jobs run in turn, for several rounds; ratios are medians over the rounds. "Recompute" is sampling
without a cache: a full pass over all tokens so far for each token, timed at eight lengths. Memory is measured in
processes of their own: on a GPU torch's peak allocation, on a CPU the growth of the resident set.
"""

import argparse
import multiprocessing
import re
from functools import partial
from pathlib import Path
from statistics import median

import torch
from timing import timed

from hf_fae import PRESETS, FlowGuidance, STARFlowTransformer2DModel


SMALL = {
    "sample_size": 16,
    "in_channels": 32,
    "num_layers": [1, 1, 6],
    "num_attention_heads": 8,
    "attention_head_dim": 64,
    "num_classes": 1000,
}
GUIDANCE = FlowGuidance(3.0)


def make_model(args):
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), torch.device(args.device)
    if args.transformer:
        return STARFlowTransformer2DModel.from_pretrained(args.transformer, dtype=dtype).to(device).eval()
    with device:
        model = STARFlowTransformer2DModel(**(PRESETS[args.preset][1] if args.preset else SMALL)).to(dtype).eval()
    if args.compile:
        model.compile_repeated_blocks(fullgraph=True)
    return model


def make_inputs(model, args, tokens):
    """Noise of a number of tokens in rows of the training width, classes, and the null class."""
    config = model.config
    width = config.sample_size
    noise = torch.randn(args.batch_size, config.in_channels, tokens * config.patch_size**2 // width, width)
    labels = torch.arange(args.batch_size) % config.num_classes
    null = torch.full_like(labels, config.num_classes)
    return [value.to(args.device) for value in (noise, labels, null)]


def sample(model, args, tokens, index=None, **options):
    """Guided noise -> latents; one block or all."""
    noise, labels, null = make_inputs(model, args, tokens)
    options = {"guidance": GUIDANCE, "negative_class_labels": null, **options}
    if index is None:
        return model.inverse(noise, labels, **options)
    return model.inverse_block(noise, index, labels, **options)


@torch.no_grad()
def recompute(model, args, tokens):
    """Seconds of sampling without a cache, from passes at eight of all lengths."""
    noise, labels, null = make_inputs(model, args, tokens)
    x, grid = model._to_tokens(noise)
    total = 0.0
    for index, block in enumerate(model.blocks):
        deep = index == len(model.blocks) - 1
        inputs = torch.cat([x, x]) if deep else x
        prefix = model._prefix(torch.cat([labels, null]), None, len(inputs)) if deep else None
        rotary_emb = model._rotary_emb(grid, prefix, x.device)
        lengths = range(tokens // 16, tokens, tokens // 8)
        for length in lengths:
            part = inputs[:, :length].to(model.dtype)
            one_pass = timed(partial(block, part, rotary_emb, prefix), args.device)
            total += one_pass * tokens / len(lengths)
    return total


def training_step(args, checkpointing):
    """Forward, backward and AdamW of one batch of the flow, fp32 weights under autocast."""
    settings = {"dtype": "float32", "compile": False, "batch_size": args.train_batch_size}
    args = argparse.Namespace(**{**vars(args), **settings})
    model = make_model(args).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    noise, labels, _ = make_inputs(model, args, model.config.sample_size**2 // model.config.patch_size**2)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with torch.autocast(args.device, torch.bfloat16):
        loss = -model(noise, labels).log_prob().mean()
    loss.backward()
    optimizer.step()


def sampling(args):
    model = make_model(args)
    sample(model, args, model.config.sample_size**2 // model.config.patch_size**2)


def score_step(args):
    model = make_model(args)
    noise, labels, _ = make_inputs(model, args, model.config.sample_size**2 // model.config.patch_size**2)
    model.denoise(noise, labels)


def weights_alone(args):
    make_model(args)


MEMORY = {
    "weights": (weights_alone, ()),
    "sampling with guidance": (sampling, ()),
    "score step": (score_step, ()),
    "training step": (training_step, (False,)),
    "training step, gradient checkpointing": (training_step, (True,)),
}


def peak_memory(args, job):
    """Peak memory of a job in GiB, in a process of its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (args, job))


def _peak(args, job):
    function, options = MEMORY[job]
    if torch.device(args.device).type == "cuda":
        function(args, *options)
        return torch.cuda.max_memory_allocated() / 2**30
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    function(args, *options)
    return (_resident("VmHWM") - before) / 2**20


def _resident(name):
    """KiB of this process, from Linux' status file."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--preset", choices=[name for name in PRESETS if name.startswith("starflow-imagenet")])
    model.add_argument("--transformer", help="folder of a trained flow, instead of random weights")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--train-batch-size", type=int, default=32, help="of the training steps' memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="compile the layers")
    args = parser.parse_args()

    flow = make_model(args)
    tokens = flow.config.sample_size**2 // flow.config.patch_size**2
    deep = len(flow.blocks) - 1

    def time_sample(tokens, **options):
        return timed(lambda: sample(flow, args, tokens, **options), args.device)

    jobs = {
        "one batch": lambda: time_sample(tokens),
        "its deep block": lambda: time_sample(tokens, index=deep),
        "a shallow block": lambda: time_sample(tokens, index=0),
        "without guidance": lambda: time_sample(tokens, guidance=FlowGuidance(0.0)),
        "twice the tokens": lambda: time_sample(2 * tokens),
        "recompute": lambda: recompute(flow, args, tokens),
    }
    if args.transformer:  # random weights are the identity: nothing to solve
        jobs["Jacobi, 16 tokens"] = lambda: time_sample(tokens, jacobi_block_size=16)
    sample(flow, args, tokens)  # warm up, and compile
    times = {name: [] for name in jobs}
    for _ in range(args.rounds):
        for name, job in jobs.items():
            times[name].append(job())
    print(
        f"\n{tokens} tokens, batch {args.batch_size}, guidance w = {GUIDANCE.weight}, {args.dtype} on {args.device}\n"
    )
    print("| job | seconds | relative to one batch |\n|---|---|---|")
    for name, values in times.items():
        ratios = [value / base for value, base in zip(values, times["one batch"], strict=True)]
        print(f"| {name} | {median(values):.3f} | {median(ratios):.2f} x |")

    if args.transformer:
        torch.manual_seed(0)
        sequential = sample(flow, args, tokens)
        torch.manual_seed(0)
        error = (sample(flow, args, tokens, jacobi_block_size=16) - sequential).square().mean()
        print(f"\nJacobi: mean square error {(error / sequential.square().mean()).item():.1e} of the latents' own")

    print("\n| peak memory | GiB |\n|---|---|")
    for job in MEMORY:
        print(f"| {job} | {peak_memory(args, job):.2f} |", flush=True)


if __name__ == "__main__":
    main()
