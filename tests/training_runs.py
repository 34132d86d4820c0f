"""Small runs of the training loop, shared by its tests."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from hf_fae.objectives.base import Objective
from hf_fae.training.arguments import LoopArguments
from hf_fae.training.loop import TrainingLoop


# Everything of both recipes at once; the discriminator rests for a step, the decoder feels it one step later.
ADVERSARIAL = ["--discriminator", "patch", "--discriminator_channels", "32", "--discriminator_start", "1"]
ADVERSARIAL += ["--adversarial_start", "2", "--adaptive_weight", "--lecam_weight", "0.1", "--diff_augment"]
ADVERSARIAL += ["--discriminator_learning_rate", "0.002"]


class Stopped(BaseException):
    """Stands for a kill: nothing catches it."""


class Vectors:
    """Endless batches of vectors that depend on the image's number only; a kill can be booked."""

    def __init__(self, kill_after=None, poison=()):
        self.kill_after, self.poison = kill_after, poison

    def signature(self, batch_size, world_size=1, num_workers=0):
        return {}

    def batches(self, batch_size, *, images_seen=0, rank=0, world_size=1, num_workers=0):
        for start in range(images_seen + rank * batch_size, 10**9, world_size * batch_size):
            if self.kill_after is not None and start >= self.kill_after:
                raise Stopped
            rows = [
                torch.randn(8, generator=torch.Generator().manual_seed(n)) for n in range(start, start + batch_size)
            ]
            yield {"x": torch.stack(rows) * (float("nan") if start // batch_size in self.poison else 1.0)}


class Regression(Objective):
    """A small network with frozen part, buffer and noise: all that a checkpoint has to care for."""

    def __init__(self):
        model = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 8))
        super().__init__(model, [model])
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        with torch.no_grad():  # as if loaded: the same in every run
            self.frozen.weight.copy_(torch.linspace(-1, 1, 64).view(8, 8).sin())
            self.frozen.bias.zero_()
        self.register_buffer("offset", torch.rand(8))

    def forward(self, batch, random):
        # One noise belongs to the image, the other to the step.
        noise = random.normal(*batch["x"].shape) + torch.randn_like(batch["x"])
        prediction = self.model(batch["x"] + 0.1 * noise)
        loss = (prediction - self.frozen(batch["x"]) - self.offset).float().square().mean()
        return {"loss": loss, "twice": 2 * loss.detach()}


class ImageNoise(Regression):
    """All of its noise belongs to images, so that it does not matter how they are divided into batches."""

    def forward(self, batch, random):
        noise = 0.1 * random.normal(*batch["x"].shape) * random.uniform(len(batch["x"]), 1)
        return {"loss": (self.model(batch["x"] + noise) - self.frozen(batch["x"])).square().mean()}


def arguments(folder, **kwargs):
    defaults = {
        "max_train_steps": 12,
        "train_batch_size": 4,
        "learning_rate": 1e-2,
        "ema_decay": 0.9,
        "logging_steps": 3,
        "checkpointing_steps": 4,
        "validation_steps": 5,
        "report_to": "none",
    }
    return LoopArguments(output_dir=str(folder), **{**defaults, **kwargs})


def run(folder, data=None, objective=None, validate=None, save=None, **kwargs):
    loop = TrainingLoop(arguments(folder, **kwargs))
    objective = objective or Regression()
    results = loop.run(objective, data or Vectors(), validate, save)
    return loop, objective, results


def read_log(folder):
    """The log without speed and memory, which no two runs share."""
    machine = ("images_per_second", "input_wait", "flop_share", "peak_memory_gib")
    lines = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in machine} for line in lines]


def assert_equal_checkpoints(*folders):
    """Weights, averages and optimiser state, to the bit."""
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        one, other = (load_file(folder / name) for folder in folders)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one), name
    assert len({(folder / "state.json").read_text() for folder in folders}) == 1


def checkpoints(folder):
    return sorted(path.name for path in Path(folder).glob("checkpoint-*"))


def entries(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def last(folder, name):
    return [entry[name] for entry in entries(folder) if name in entry][-1]
