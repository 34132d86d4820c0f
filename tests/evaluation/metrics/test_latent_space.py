import math

import pytest
import torch

from hf_fae.evaluation.metrics.latent_space import channel_moments, mode_count_curve, power_spectrum, reduce_spaces


def gaussian(count, dimension, seed=0):
    return torch.randn(count, dimension, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_one_component_is_a_gaussian():
    train = gaussian(500, 4) @ gaussian(4, 4, seed=1) + 3
    held_out = gaussian(300, 4, seed=2)
    curve = mode_count_curve(train, held_out, [1])
    mean, covariance = train.mean(0), torch.cov(train.T, correction=0)
    entropy = 2 * (1 + math.log(2 * math.pi)) + 0.5 * torch.logdet(covariance)
    assert curve[0]["nll"] == pytest.approx(entropy.item(), abs=1e-3)
    expected = -torch.distributions.MultivariateNormal(mean, covariance).log_prob(held_out).mean()
    assert curve[0]["held_out_nll"] == pytest.approx(expected.item(), rel=1e-3)
    assert curve[0]["components"] == 1 and curve[0]["converged"]


def test_two_far_blobs_need_two_components():
    points = gaussian(1000, 2)
    points[:500] += 100
    one, two, three = (point["nll"] for point in mode_count_curve(points, points, [1, 2, 3]))
    # Two modes: the entropy of each, and one bit for which of them it is.
    parts = [torch.logdet(torch.cov(part.T, correction=0)).item() for part in (points[:500], points[500:])]
    assert two == pytest.approx(1 + math.log(2 * math.pi) + sum(parts) / 4 + math.log(2), abs=1e-3)
    assert one - two > 3 and 0 <= two - three < 0.05


@pytest.mark.parametrize("covariance_type", ["diag", "spherical", "tied"])
def test_covariance_types(covariance_type):
    points = gaussian(400, 3) * torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    variances = torch.cov(points.T, correction=0).diagonal()
    logdet = {
        "diag": variances.log().sum(),
        "spherical": 3 * variances.mean().log(),
        "tied": torch.logdet(torch.cov(points.T, correction=0)),
    }[covariance_type]
    nll = mode_count_curve(points, points, [1], covariance_type)[0]["nll"]
    assert nll == pytest.approx(1.5 * (1 + math.log(2 * math.pi)) + 0.5 * logdet.item(), abs=1e-3)


def test_overfitting_shows_on_held_out_points():
    one, many = mode_count_curve(gaussian(60, 10), gaussian(60, 10, seed=1), [1, 20])
    assert many["nll"] < one["nll"] - 10 and many["held_out_nll"] > one["held_out_nll"] + 10
    repeated = mode_count_curve(gaussian(60, 10), gaussian(60, 10, seed=1), [1, 20])
    assert repeated == [one, many]


def test_too_few_points():
    with pytest.raises(ValueError, match="components must be at most the 5 training images, got 6"):
        mode_count_curve(gaussian(5, 2), gaussian(5, 2), [2, 6])
    with pytest.raises(ValueError, match="held_out must have images, got none"):
        mode_count_curve(gaussian(5, 2), gaussian(0, 2), [2])


def test_mixtures_that_have_not_converged_say_so():
    curve = mode_count_curve(gaussian(200, 3), gaussian(200, 3), [8], max_iter=1)
    assert curve[0]["iterations"] == 1 and not curve[0]["converged"]


@pytest.mark.parametrize("count", [400, 12])  # more and fewer pictures than numbers in each
def test_dimension_is_the_smallest_for_all_spaces(count):
    train = {
        "flat": gaussian(count, 30).view(count, 5, 6),
        "steep": gaussian(count, 40, seed=1) * 0.9 ** torch.arange(40),
    }
    held_out = {name: values[:7] + 1 for name, values in train.items()}
    reduced = reduce_spaces(train, held_out)
    explained = {}
    for name, values in train.items():
        centred = values.flatten(1) - values.flatten(1).mean(0)
        variances = torch.linalg.svdvals(centred).square() / count
        known = variances[: len(reduced.variances[name])]
        torch.testing.assert_close(reduced.variances[name], known)
        explained[name] = variances.cumsum(0) / variances.sum()
        assert reduced.shares[name] == pytest.approx(explained[name][reduced.dimension - 1].item())
        assert reduced.train[name].shape == (count, reduced.dimension)
        torch.testing.assert_close(
            torch.cov(reduced.train[name].T, correction=0),
            torch.eye(reduced.dimension, dtype=torch.float64),
            atol=1e-6,
            rtol=0,
        )
        # Held-out points are where the same points of the training part would be, moved by the shift alone.
        shift = (reduced.held_out[name] - reduced.train[name][:7]).std(0)
        assert shift.max() < 1e-6
    assert min(reduced.shares.values()) > 0.9
    assert min(shares[reduced.dimension - 2].item() for shares in explained.values()) <= 0.9


def test_dimension_is_bounded():
    train = {"a": gaussian(50, 30), "b": gaussian(50, 4, seed=1)}
    assert reduce_spaces(train, train, max_dimension=3).dimension == 3
    assert reduce_spaces(train, train).dimension == 4  # of a space of 4 there is no more
    assert reduce_spaces(train, train).shares["b"] == pytest.approx(1)


def test_spaces_that_cannot_be_reduced():
    with pytest.raises(ValueError, match="train must have at least 2 images, got 1"):
        reduce_spaces({"a": gaussian(1, 3)}, {"a": gaussian(1, 3)})
    with pytest.raises(ValueError, match="train must vary, got a constant space 'a'"):
        reduce_spaces({"a": torch.ones(4, 3)}, {"a": torch.ones(4, 3)})


def test_effective_rank():
    independent = gaussian(4, 8 * 8).view(1, 4, 8, 8)
    white = torch.linalg.qr((independent.flatten(2)[0] - independent.flatten(2)[0].mean(1, keepdim=True)).T)[0].T
    assert channel_moments(white.view(1, 4, 8, 8))["effective_rank"] == pytest.approx(4)
    same = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1, 1) * gaussian(5, 64).view(5, 1, 8, 8)
    assert channel_moments(same)["effective_rank"] == pytest.approx(1, abs=1e-6)


def test_channel_moments():
    # Two values: kurtosis is 1 for even odds; for odds p it is (1 - 3 p (1 - p)) / (p (1 - p)), skewness likewise.
    coin, rare = torch.tensor([1.0, 3.0] * 8), torch.tensor([0.0] * 12 + [1.0] * 4)
    latents = torch.stack([coin.view(4, 4), rare.view(4, 4), torch.full((4, 4), 0.1)])[None]
    moments = channel_moments(latents)
    assert moments["mean"] == pytest.approx([2, 0.25, 0.1])
    assert moments["std"] == pytest.approx([1, 0.1875**0.5, 0], abs=1e-7)
    assert moments["skewness"] == pytest.approx([0, 0.5 / 0.1875**0.5, 0])
    assert moments["excess_kurtosis"] == pytest.approx([-2, (1 - 3 * 0.1875) / 0.1875 - 3, 0])
    normal = channel_moments(gaussian(200, 2 * 16).view(200, 2, 4, 4))
    assert normal["excess_kurtosis"] == pytest.approx([0, 0], abs=0.3)


def test_white_noise_has_a_flat_spectrum():
    spectrum = power_spectrum(gaussian(500, 2 * 64).view(500, 2, 8, 8))
    assert spectrum["power"] == pytest.approx([1] * len(spectrum["power"]), abs=0.1)
    assert spectrum["frequency"] == pytest.approx([0, 1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8, 6 / 8])


@pytest.mark.parametrize("shape", [(8, 8), (1, 16), (4, 12)])
def test_power_adds_up_to_the_mean_square(shape):
    latents = gaussian(300, 3 * math.prod(shape)).view(300, 3, *shape) + 2
    spectrum = power_spectrum(latents)
    assert sum(spectrum["cells"]) == math.prod(shape)
    total = sum(power * cells for power, cells in zip(spectrum["power"], spectrum["cells"]))
    assert total / math.prod(shape) == pytest.approx(latents.square().mean().item())


def test_waves_are_where_they_must_be():
    x = torch.arange(16)
    wave = torch.sin(2 * torch.pi * 3 * x / 16)
    across = wave.expand(1, 1, 16, 16)
    diagonal = torch.sin(2 * torch.pi * 4 * (x[:, None] + x) / 16)[None, None]
    for latents, frequency in ((across, 3 / 16), (across.mT, 3 / 16), (diagonal, round(4 * 2**0.5) / 16)):
        spectrum = power_spectrum(latents)
        peak = max(range(len(spectrum["power"])), key=lambda index: spectrum["power"][index])
        assert spectrum["frequency"][peak] == pytest.approx(frequency)
        assert spectrum["power"][peak] * spectrum["cells"][peak] == pytest.approx(0.5 * 256, rel=1e-6)
    assert power_spectrum(torch.ones(2, 3, 4, 4))["power"] == pytest.approx([16, 0, 0, 0])
