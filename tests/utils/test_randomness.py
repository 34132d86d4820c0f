"""Random numbers of images: the same in any process, and as random as they should be."""

import torch

from hf_fae.utils.randomness import ImageRandom


def test_two_halves_equal_the_whole():
    whole = ImageRandom(3, first_image=10)
    halves = ImageRandom(3, first_image=10), ImageRandom(3, first_image=14)
    for draw, shape in (("normal", (2, 5)), ("uniform", ()), ("normal", (30,))):
        expected = getattr(whole, draw)(8, *shape)
        assert torch.equal(expected, torch.cat([getattr(half, draw)(4, *shape) for half in halves]))


def test_numbers_differ_between_images_calls_and_seeds():
    random = ImageRandom(0, 0)
    draws = [*random.normal(50, 1000), *random.normal(50, 1000), *ImageRandom(1, 0).normal(50, 1000)]
    correlations = torch.corrcoef(torch.stack(draws)) - torch.eye(150)
    assert correlations.abs().max() < 0.2  # six standard deviations of 1 / sqrt(1000)


def test_distributions():
    normal, uniform = ImageRandom(0, 0).normal(20_000, 3), ImageRandom(0, 0).uniform(20_000)
    assert abs(normal.mean()) < 0.02 and abs(normal.std() - 1) < 0.02
    assert 0 <= uniform.min() and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.01
    assert abs(uniform.std() - 12**-0.5) < 0.01


def test_shared_numbers_are_new_in_every_call_and_the_first_images():
    random, again = ImageRandom(3, first_image=10), ImageRandom(3, first_image=10)
    numbers = [random.shared_uniform() for _ in range(1000)]
    assert numbers[:5] == [again.shared_uniform() for _ in range(5)] and len(set(numbers)) == 1000
    assert numbers[0] == ImageRandom(3, first_image=10).uniform(4)[0].item()
    assert 0 <= min(numbers) and max(numbers) < 1 and abs(sum(numbers) / 1000 - 0.5) < 0.05
