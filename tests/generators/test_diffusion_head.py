import math

import pytest
import torch

from hf_fae import TokenGuidance
from hf_fae.generators.diffusion_head import DiffusionHead, head_scheduler
from hf_fae.schedulers.learned_variance import add_noise, hybrid_loss


@pytest.mark.parametrize(
    ("num_layers", "width", "condition_dim", "exact"),
    [(3, 1024, 768, 19_999_776), (6, 1024, 768, 35_749_920), (8, 1280, 1024, 72_230_432)],
)
def test_parameters(num_layers, width, condition_dim, exact):
    """Section 1 of the l-DeTok specification."""
    with torch.device("meta"):
        head = DiffusionHead(16, condition_dim, width, num_layers)
    assert sum(parameter.numel() for parameter in head.parameters()) == exact


def make_head(**config):
    torch.manual_seed(0)
    head = DiffusionHead(**{"token_dim": 2, "condition_dim": 8, "dim": 64, "num_layers": 2, **config})
    head.initialize_weights()
    return head


def test_untrained_head_predicts_nothing():
    head = make_head()
    assert not head(torch.randn(3, 2), torch.tensor([0, 5, 999]), torch.randn(3, 8)).any()


def moved(head):
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return head


def test_tokens_are_sampled_independently():
    head, scheduler = moved(make_head()), head_scheduler()
    condition, noise = torch.randn(2, 3, 8), torch.randn(2, 3, 2)
    options = {"scheduler": scheduler, "num_steps": 4, "temperature": 0.0}
    whole = head.sample_tokens(condition, noise, **options)
    assert whole.dtype == torch.float32 and whole.shape == noise.shape
    for row in range(2):
        for position in range(3):
            one = (slice(row, row + 1), slice(position, position + 1))
            alone = head.sample_tokens(condition[one], noise[one], **options)
            torch.testing.assert_close(alone, whole[one], rtol=1e-4, atol=1e-4 * whole.abs().max().item())


def test_guidance_is_of_the_noise_and_the_variance_is_the_conditional_one():
    head, scheduler = moved(make_head()), head_scheduler()
    condition, negative, noise = torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3, 2)
    plain = head.sample_tokens(condition, noise, scheduler, 4, generator=torch.Generator().manual_seed(0))

    def guided(scale, temperature=1.0):
        return head.sample_tokens(
            condition,
            noise,
            scheduler,
            num_steps=4,
            temperature=temperature,
            negative_condition=negative,
            guidance=TokenGuidance(scale),
            scale=scale,
            generator=torch.Generator().manual_seed(0),
        )

    torch.testing.assert_close(guided(1.0), plain, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(guided(3.0), plain, rtol=1e-2)

    # At scale 0 the noise is the negative one alone: with its own variance, too, it would be the negative sample.
    unconditional = head.sample_tokens(negative, noise, scheduler, 4, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(guided(0.0), unconditional, rtol=1e-4)
    cold = guided(0.0, temperature=0.0)
    expected = head.sample_tokens(negative, noise, scheduler, 4, temperature=0.0)
    torch.testing.assert_close(cold, expected, rtol=1e-3, atol=1e-3)


def test_temperature_is_a_factor_of_the_noise_that_is_added():
    """Of two steps the first one adds noise, and the second one is almost affine: so is the result in it."""
    head = make_head()  # predicts 0: the steps are linear
    condition, noise = torch.zeros(1, 50, 8), torch.randn(1, 50, 2)

    def sample(temperature):
        generator = torch.Generator().manual_seed(0)
        return head.sample_tokens(condition, noise, head_scheduler(), 2, temperature, generator=generator).double()

    cold, warm, hot = (sample(temperature) for temperature in (0.0, 1.0, 2.0))
    torch.testing.assert_close(hot - cold, 2 * (warm - cold), rtol=1e-3, atol=1e-3 * cold.abs().max().item())
    assert (warm - cold).abs().max() > 0.01


def test_head_learns_a_mixture():
    """Two classes, each a ring of Gaussians in the plane; the head gets their positions, shares and widths right."""
    torch.manual_seed(0)
    scheduler = head_scheduler("leading")  # for so short a training
    head, table, std = make_head(), scheduler.alphas_cumprod, 0.1
    angles = torch.arange(3) * 2 * math.pi / 3
    centers = torch.stack([angles.cos(), angles.sin()], dim=1)
    centers = torch.stack([centers, -1.5 * centers])  # of two classes: (2, 3, 2)
    shares = torch.tensor([0.5, 0.3, 0.2])
    conditions = torch.nn.functional.one_hot(torch.arange(2), 8).float() * 3

    optimizer = torch.optim.AdamW(head.parameters(), 2e-3, weight_decay=0.0)
    steps = 500
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        labels = torch.randint(2, (256,))
        clean = centers[labels, torch.multinomial(shares, 256, replacement=True)] + std * torch.randn(256, 2)
        timestep, noise = torch.randint(1000, (256,)), torch.randn(256, 2)
        noisy = add_noise(clean, noise, table[timestep][:, None])
        predicted = head(noisy, timestep, conditions[labels]).chunk(2, dim=-1)
        error, bound = hybrid_loss(*predicted, clean, noise, timestep[:, None], table)
        optimizer.zero_grad()
        (error.mean() + bound.mean()).backward()
        optimizer.step()
        schedule.step()

    count = 1000
    condition = conditions[:, None].expand(-1, count, -1)
    sampled = head.sample_tokens(condition, torch.randn(2, count, 2), scheduler, 100)
    for tokens, centers_of_class in zip(sampled, centers):
        distances = torch.cdist(tokens, centers_of_class)
        nearest = distances.argmin(dim=1)
        assert (distances.min(dim=1).values < 4 * std).float().mean() > 0.97
        for index in range(3):
            mine = tokens[nearest == index]
            assert len(mine) / count == pytest.approx(shares[index].item(), abs=0.06)
            torch.testing.assert_close(mine.mean(0), centers_of_class[index], atol=0.06, rtol=0)
            assert mine.std(0).mean().item() == pytest.approx(std, rel=0.35)
