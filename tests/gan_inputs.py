"""Discriminators and images for the tests of the adversarial loss."""

import torch
from factories import tiny_encoder

from hf_fae.losses.discriminators import PatchDiscriminator, TokenDiscriminator


def images(batch_size=4, size=32):
    return torch.rand(batch_size, 3, size, size) * 2 - 1


def tiny_discriminator(kind):
    if kind == "patch":
        return PatchDiscriminator(base_channels=32, num_stages=2)
    return TokenDiscriminator(tiny_encoder())


def gradients(module):
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
