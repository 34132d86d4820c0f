"""How hard latents are to denoise: the loss of a small diffusion transformer, for comparison between spaces.

Spaces rank by diffusion loss as by mixture modes (MAETok, arXiv 2502.03444, appendix B.3).
"""

from dataclasses import dataclass

import torch
from torch import nn

from ...data.statistics import channel_statistics
from ...generators.lightning_dit import LightningDiTTransformer2DModel
from ...objectives.flow_matching import FlowMatchingObjective
from ...utils.randomness import ImageRandom, mix_seed


__all__ = ["DenoisingLoss", "denoising_loss", "held_out_loss"]

INTERVALS = 10  # of the noise times


@dataclass
class DenoisingLoss:
    """Mean of |v - (eps - x)|^2 over the elements of unit-variance latents; a constant prediction of 0 has 2.

    Attributes:
        loss: mean over noise times.
        by_time: mean in each of the `INTERVALS`, from no noise to pure noise.
        training: mean training loss of each tenth of the steps.
    """

    loss: float
    by_time: list[float]
    training: list[float]


class LatentFlowMatching(FlowMatchingObjective):
    """Flow matching on given latents (B, C, h, w) of one class, with uniform noise times."""

    def __init__(self, model: nn.Module):
        super().__init__(model, nn.Identity(), label_dropout=0.0)

    def latents(self, batch, random):
        return batch["latents"]


class IntervalRandom(ImageRandom):
    """Random numbers whose uniform ones are in one of `INTERVALS` equal parts of [0, 1)."""

    def __init__(self, interval: int, *args):
        super().__init__(*args)
        self.interval = interval

    def uniform(self, *shape):
        return (self.interval + super().uniform(*shape)) / INTERVALS


def denoising_loss(
    train: torch.Tensor,
    held_out: torch.Tensor,
    steps: int,
    batch_size: int = 64,
    seed: int = 0,
    learning_rate: float = 5e-4,
    num_layers: int = 4,
    num_attention_heads: int = 4,
    attention_head_dim: int = 48,
    device: torch.device | str = "cpu",
) -> DenoisingLoss:
    """Train an unconditional LightningDiT on latents by flow matching (AdamW, cosine), and measure held-out loss.

    Args:
        train, held_out: (N, C, h, w) and (M, C, h, w); both are normalised per channel by the training part.
        steps: optimiser steps; 0 measures the initial model, whose output is 0.

    Raises:
        ValueError: no images, or constant channels.
    """
    if not len(train) or not len(held_out):
        raise ValueError(f"train and held_out must have images, got {len(train)} and {len(held_out)}")
    mean, std = (value.view(-1, 1, 1) for value in channel_statistics([train.movedim(1, -1)]))
    if not (std > 0).all():
        raise ValueError(f"train must vary in every channel, got {int((std == 0).sum())} constant ones")
    train, held_out = ((latents.float() - mean) / std for latents in (train, held_out))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LightningDiTTransformer2DModel(
            sample_size=list(train.shape[2:]),
            in_channels=train.shape[1],
            num_layers=num_layers,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            num_classes=1,
        )
    objective = LatentFlowMatching(model.to(device)).train()
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    order = torch.Generator().manual_seed(mix_seed(seed, 1))
    losses = []
    for step in range(steps):
        rows = torch.randint(len(train), (batch_size,), generator=order)
        random = ImageRandom(seed, step * batch_size, device)
        loss = objective(_batch(train[rows], device), random)["loss"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    training = [part.mean().item() for part in torch.stack(losses).tensor_split(min(10, steps))] if steps else []
    by_time = held_out_loss(objective, held_out, batch_size, mix_seed(seed, 2), device)
    return DenoisingLoss(sum(by_time) / INTERVALS, by_time, training)


@torch.no_grad()
def held_out_loss(
    objective: LatentFlowMatching,
    latents: torch.Tensor,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[float]:
    """Loss in each of the `INTERVALS` of noise times, at one random time and noise per image and interval.

    They are the same for any denoiser.
    """
    objective.eval()
    totals = []
    for interval in range(INTERVALS):
        total = 0.0
        for start in range(0, len(latents), batch_size):
            batch = latents[start : start + batch_size]
            random = IntervalRandom(interval, mix_seed(seed, interval), start, device)
            total += objective(_batch(batch, device), random)["loss"].item() * len(batch)
        totals.append(total / len(latents))
    return totals


def _batch(latents, device):
    labels = torch.zeros(len(latents), dtype=torch.long, device=device)
    return {"latents": latents.to(device), "class_labels": labels}
