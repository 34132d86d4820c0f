"""Time and memory of a plan, from one measured kind of training step and from counts of operations."""

import time
from dataclasses import dataclass

import torch

from .. import AutoencoderFAE, LightningDiTTransformer2DModel
from .plan import Plan
from .recipe import load_recipe


__all__ = ["Estimate", "estimate"]

LIBRARIES = 1.5e9  # bytes of a process that has imported everything
TRAINED, FROZEN = 20, 4  # bytes per parameter: weight, gradient, AdamW's two moments and the average; a weight
ACTIVATIONS = 100  # bytes per token, layer and channel that the backward pass keeps
ENCODER = 22_000_000  # parameters of DINOv2-small


@dataclass
class Estimate:
    """Seconds of each stage, and bytes of the largest one."""

    seconds: dict[str, float]
    memory: float

    def describe(self) -> list[str]:
        """Lines for the plan."""
        lines = [f"  {name}: {_duration(seconds)}" for name, seconds in self.seconds.items()]
        total = _duration(sum(self.seconds.values()))
        return [
            *lines,
            f"about {total} in all, from a measured training step; validations and decoding of images come on "
            "top, and other programs on this machine slow it down",
            f"about {self.memory / 2**30:.0f} GiB of memory",
        ]


def estimate(plan: Plan, num_images: int) -> Estimate:
    """Measure two training steps of the generator, and count the operations of all stages."""
    recipe = load_recipe(plan.recipe, plan.device, plan.duration)
    side = plan.resolution // 16
    tokens, generator = side**2, recipe["generator"]
    width = generator["num_attention_heads"] * generator["attention_head_dim"]
    decoder, decoder_width, decoder_layers = _pixel_decoder(plan, recipe)
    latent_tokens = tokens // generator["patch_size"] ** 2
    transformer = 12 * width**2 * generator["num_layers"]
    speed = 6 * latent_tokens * transformer * generator["train_batch_size"] / _step(plan, generator, side)
    work = {
        "features": 2 * tokens * (ENCODER + 3 * decoder / 2),
        "pixels-ib": 2 * tokens * (ENCODER + 3 * decoder),
        "pixels": 2 * tokens * (ENCODER + 3 * decoder),
        "generator": 6 * latent_tokens * transformer,
    }
    seconds, memory = {}, 0
    for name, settings in recipe.items():
        if plan.tokenizer is not None and name in ("features", "pixels-ib"):
            continue
        if name == "latents":
            seconds[name] = 2 * num_images * 2 * tokens * ENCODER / speed
            continue
        seconds[name] = settings["max_train_steps"] * settings["train_batch_size"] * work[name] / speed
        is_generator = name == "generator"
        parameters = 1.5 * transformer if is_generator else decoder
        channels = width * generator["num_layers"] if is_generator else decoder_width * decoder_layers
        kept = settings["train_batch_size"] * (latent_tokens if is_generator else tokens) * channels * ACTIVATIONS
        memory = max(memory, TRAINED * parameters + FROZEN * (ENCODER + decoder) + kept)
    return Estimate(seconds, memory + LIBRARIES)


def _pixel_decoder(plan, recipe):
    """Parameters, width and layers of the pixel decoder."""
    config = recipe.get("features") if plan.tokenizer is None else AutoencoderFAE.load_config(plan.tokenizer)
    width, layers = config["pixel_hidden_size"], config["pixel_num_layers"]
    return 12 * width**2 * layers, width, layers


def _step(plan, generator, side):
    """Seconds of one training step of the generator, the better of two after a warm-up.

    On a CPU it is the computing time of one thread, divided by the threads of a training: other programs shall not
    count, and where they use the same cores threads that wait for each other take ten times longer.
    """
    threads = torch.get_num_threads()
    clock = time.process_time if plan.device == "cpu" else time.perf_counter
    shape = ("patch_size", "num_layers", "num_attention_heads", "attention_head_dim")
    with torch.random.fork_rng([]):
        model = LightningDiTTransformer2DModel(
            sample_size=side, in_channels=32, num_classes=10, **{name: generator[name] for name in shape}
        ).to(plan.device)
        optimizer = torch.optim.AdamW(model.parameters())
        latents = torch.randn(generator["train_batch_size"], 32, side, side, device=plan.device)
    timestep = torch.full((len(latents),), 500.0, device=plan.device)
    labels = torch.zeros(len(latents), dtype=torch.long, device=plan.device)
    seconds = []
    torch.set_num_threads(1)
    try:
        for _ in range(3):
            start = clock()
            with torch.autocast(plan.device, torch.bfloat16, enabled=plan.mixed_precision == "bf16"):
                loss = model(latents, timestep, class_labels=labels).sample.square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device
            seconds.append(clock() - start)
    finally:
        torch.set_num_threads(threads)
    return min(seconds[1:]) / (threads if plan.device == "cpu" else 1)


def _duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
