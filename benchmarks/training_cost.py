"""Operations and memory of a training step, counted on torch's meta device without weights or a GPU.

    python benchmarks/training_cost.py

Operations of the objectives' forward and backward passes, and the bytes of weights, gradients, AdamW's moments and
averaged weights in fp32; activations are not included.
"""

import torch

from hf_fae import VisionEncoder
from hf_fae.losses.discriminators import PatchDiscriminator
from hf_fae.losses.gan import AdversarialLoss
from hf_fae.objectives.fae import FeatureObjective, PixelObjective
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.objectives.starflow import STARFlowObjective
from hf_fae.presets import PRESETS, build_preset
from hf_fae.training.flops import FlopMeter
from hf_fae.utils.randomness import ImageRandom


class NoRandom(ImageRandom):
    """Random numbers without values, for the meta device."""

    def __init__(self):
        self.seed, self.first_image = 0, 0

    def normal(self, *shape):
        return torch.empty(shape, device="meta")

    uniform = normal


def tokenizer(name):
    model = build_preset(name, "meta")
    with torch.device("meta"):
        model.set_latent_statistics = lambda mean, std: None  # it checks values, which meta tensors lack
        model.attach_encoder(VisionEncoder.from_config(PRESETS[name][1]["image_encoder_config"]))
    return model


def objectives():
    """Name and objective of each stage, preset by preset."""
    for name in ("fae-dinov2-b", "fae-dinov2-g", "fae-siglip2-g-opt"):
        yield f"{name}, Ia", FeatureObjective(tokenizer(name))
        with torch.device("meta"):
            adversarial = AdversarialLoss(PatchDiscriminator(), lecam_weight=0.001)
        yield f"{name}, Ib without LPIPS", PixelObjective(tokenizer(name), "Ib", adversarial=adversarial)
        yield f"{name}, II without LPIPS", PixelObjective(tokenizer(name), "II", adversarial=adversarial)
    vae = build_preset("fae-dinov2-b", "meta")
    for name in ("lightningdit-b-1", "lightningdit-xl-1"):
        yield f"{name} on cached latents", FlowMatchingObjective(build_preset(name, "meta"), vae)
    flow = "starflow-imagenet-256"
    yield f"{flow} on cached latents", STARFlowObjective(build_preset(flow, "meta"), vae)


def main() -> None:
    batch_size = 2
    batch = {
        "pixel_values": torch.empty(batch_size, 3, 256, 256, device="meta"),
        "class_labels": torch.zeros(batch_size, dtype=torch.long, device="meta"),
    }
    moments = torch.empty(batch_size, 64, 16, 16, device="meta")
    print("| stage | trained parameters | GFLOP per image | their state | frozen parts |")
    print("|---|---|---|---|---|")
    for name, objective in objectives():
        inputs = {**batch, "moments": moments} if "cached" in name else batch
        with FlopMeter() as meter:
            objective.train()(inputs, NoRandom())["loss"].backward()
        trained = sum(p.numel() for p in objective.parameters() if p.requires_grad)
        frozen = sum(p.numel() for p in objective.parameters() if not p.requires_grad)
        # fp32: weight, gradient, two moments, average.
        state, kept = 20 * trained / 2**30, 4 * frozen / 2**30
        gigaflops = meter.flops / batch_size / 1e9
        print(f"| {name} | {trained / 1e6:,.1f} M | {gigaflops:,.0f} | {state:.1f} GiB | {kept:.1f} GiB |")


if __name__ == "__main__":
    main()
