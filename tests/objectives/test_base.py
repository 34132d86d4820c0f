import pytest
import torch
from factories import tiny_maetok
from objective_inputs import numbers

from hf_fae.objectives.base import Objective, add_noise
from hf_fae.utils.randomness import ImageRandom


def test_noise_has_its_strength_and_belongs_to_the_images():
    latents = torch.zeros(64, 4, 8, 8)
    noisy = add_noise(latents, 0.3, numbers(1))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noisy[3:], add_noise(latents[3:], 0.3, ImageRandom(1, first_image=3)))
    assert add_noise(latents, 0.0, numbers()) is latents


@pytest.mark.parametrize("decoder_type, decoder_block", [("plain", []), ("modulated", ["ModulatedBlock"])])
def test_blocks_to_shard_are_those_that_are_there(decoder_type, decoder_block):
    model = tiny_maetok(decoder_type=decoder_type)
    assert Objective(model, [])._no_split_modules == ["TransformerBlock", *decoder_block]
