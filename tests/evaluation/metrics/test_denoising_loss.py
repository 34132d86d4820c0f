import math

import pytest
import torch

from hf_fae.evaluation.metrics.denoising_loss import INTERVALS, IntervalRandom, denoising_loss
from hf_fae.utils.randomness import ImageRandom, mix_seed


SMALL = {"num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16}


def smooth(count, seed=0):
    """Latents (N, 3, 4, 4) that are constant in space: easy to denoise."""
    colours = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(seed))
    return 5 + 2 * colours.expand(-1, -1, 4, 4)


def normalise(train, latents):
    statistics = {"dim": (0, 2, 3), "keepdim": True}
    return (latents - train.mean(**statistics)) / train.std(**statistics, correction=0)


def test_untrained_denoiser_has_the_mean_square_of_the_velocity():
    train, held_out = torch.randn(40, 3, 4, 4) * 3 + 1, torch.randn(11, 3, 4, 4) * 3 + 1
    result = denoising_loss(train, held_out, steps=0, batch_size=4, seed=7, **SMALL)
    for interval, loss in enumerate(result.by_time):
        random = ImageRandom(mix_seed(mix_seed(7, 2), interval), 0)
        random.uniform(11)
        noise = random.normal(11, 3, 4, 4)
        assert loss == pytest.approx((noise - normalise(train, held_out)).square().mean().item(), rel=1e-5)
    assert result.loss == pytest.approx(sum(result.by_time) / INTERVALS)
    assert result.loss == pytest.approx(2, abs=0.2) and result.training == []


def test_training_lowers_the_loss_where_there_is_something_to_learn():
    easy = denoising_loss(smooth(64), smooth(32, seed=1), steps=60, batch_size=16, learning_rate=3e-3, **SMALL)
    assert easy.loss < 1.3 and easy.training[-1] < easy.training[0] and len(easy.training) == 10
    noise = torch.randn(96, 3, 4, 4)
    hard = denoising_loss(noise[:64], noise[64:], steps=60, batch_size=16, learning_rate=3e-3, **SMALL)
    # The best for white noise is the linear estimate, whose error is 1 / (t^2 + (1 - t)^2): the mean is pi / 2.
    assert easy.loss < hard.loss and math.pi / 2 - 0.1 < hard.loss < 2.1


def test_scale_and_batches_do_not_matter():
    train, held_out = torch.randn(32, 3, 4, 4), torch.randn(10, 3, 4, 4)
    results = [denoising_loss(s * train + m, s * held_out + m, 3, 8, **SMALL) for s, m in ((1, 0), (30, -4))]
    assert results[0].by_time == pytest.approx(results[1].by_time, rel=1e-3)
    fresh = [denoising_loss(train, held_out, 0, batch, **SMALL).by_time for batch in (3, 10)]
    assert fresh[0] == pytest.approx(fresh[1], rel=1e-6)


def test_same_seed_same_loss_and_nobody_elses_random_numbers():
    state = torch.get_rng_state()
    runs = [denoising_loss(smooth(16), smooth(8, seed=1), 2, 4, seed, **SMALL) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_times_lie_in_their_interval():
    for interval in (0, INTERVALS - 1):
        times = IntervalRandom(interval, 0, 0).uniform(1000)
        assert interval / INTERVALS <= times.min() and times.max() <= (interval + 1) / INTERVALS
        assert times.std().item() == pytest.approx(12**-0.5 / INTERVALS, rel=0.1)


def test_latents_that_cannot_be_denoised():
    with pytest.raises(ValueError, match="train and held_out must have images, got 4 and 0"):
        denoising_loss(torch.randn(4, 3, 4, 4), torch.randn(0, 3, 4, 4), 1)
    with pytest.raises(ValueError, match="train must vary in every channel, got 3 constant ones"):
        denoising_loss(torch.ones(4, 3, 4, 4), torch.ones(4, 3, 4, 4), 1)
