"""Distances of features against closed forms and against other implementations."""

import math
import warnings

import pytest
import torch

from hf_fae.evaluation.metrics.distances import (
    GaussianStatistics,
    clip_score,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    sliced_distance,
)


def normal(count, width, seed=0, dtype=torch.float64):
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive_definite(width, seed):
    root = normal(width, width, seed)
    return root @ root.T / width + 0.1 * torch.eye(width, dtype=torch.float64)


def features_with(mean, covariance, count=200, seed=0):
    """Features (count, D) of exactly this mean and covariance."""
    features = normal(count, len(mean), seed)
    features -= features.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(features.T.cov()), features.T, upper=False)
    return mean + white.T @ torch.linalg.cholesky(covariance).T


def sqrtm_distance(first, second):
    """The distance of two (mean, covariance) by scipy's root of the product."""
    from scipy.linalg import sqrtm

    (mean1, covariance1), (mean2, covariance2) = first, second
    root = sqrtm((covariance1 @ covariance2).numpy()).real.trace()
    return ((mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace() - 2 * root).item()


def mean_and_covariance(features):
    return features.mean(0), features.T.cov()


def distance(samples, reference):
    return frechet_distance(GaussianStatistics.of([samples]), GaussianStatistics.of([reference]))


def test_statistics():
    features = normal(3000, 8) * torch.arange(1.0, 9) + 5
    statistics = GaussianStatistics.of(features.split(100))
    mean, covariance = mean_and_covariance(features)
    assert statistics.count == 3000 and statistics.covariance.dtype == torch.float64
    torch.testing.assert_close(statistics.mean, mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(statistics.covariance, covariance, rtol=0, atol=1e-11)


def test_statistics_far_from_zero():
    features = normal(3000, 8)
    covariance = GaussianStatistics.of((features + 2**20).split(100)).covariance
    torch.testing.assert_close(covariance, features.T.cov(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_of_lower_precision_are_summed_in_fp64(dtype):
    features = normal(500, 8, dtype=dtype).requires_grad_()
    statistics, expected = GaussianStatistics.of([features]), GaussianStatistics.of([features.double()])
    assert torch.equal(statistics.mean, expected.mean)
    assert torch.equal(statistics.covariance, expected.covariance)
    assert not statistics.covariance.requires_grad


def test_features_are_not_changed():
    features = normal(1100, 8)
    before = features.clone()
    GaussianStatistics.of([features])
    assert torch.equal(features, before)


def test_batches_do_not_matter():
    samples, reference = normal(1500, 32), 1.1 * normal(1300, 32, seed=1) + 0.1

    def in_batches(size):
        return [GaussianStatistics.of(features.split(size)) for features in (samples, reference)]

    expected = distance(samples, reference)
    for size in (1, 7, 64):
        assert frechet_distance(*in_batches(size)) == pytest.approx(expected, abs=1e-10)
    empty = torch.zeros(0, 32)
    assert distance(samples, reference) == frechet_distance(
        GaussianStatistics.of([empty, samples]), GaussianStatistics.of([reference, empty])
    )


def test_frechet_distance_of_commuting_gaussians():
    variances1, variances2 = torch.linspace(0.5, 4, 16).double(), torch.linspace(3, 1, 16).double()
    mean1, mean2 = normal(16, 1, seed=1).flatten(), normal(16, 1, seed=2).flatten()
    rotation = torch.linalg.qr(normal(16, 16, seed=3)).Q
    samples = features_with(mean1, rotation @ variances1.diag() @ rotation.T)
    reference = features_with(mean2, rotation @ variances2.diag() @ rotation.T, seed=4)
    expected = (mean1 - mean2).square().sum() + (variances1.sqrt() - variances2.sqrt()).square().sum()
    assert distance(samples, reference) == pytest.approx(expected.item(), rel=1e-6)


def test_frechet_distance_of_other_gaussians():
    first, second = (
        (normal(24, 1, seed=seed).flatten(), positive_definite(24, seed=seed + 1)) for seed in range(0, 4, 2)
    )
    assert not torch.allclose(first[1] @ second[1], second[1] @ first[1])
    samples, reference = features_with(*first), features_with(*second, seed=9)
    assert distance(samples, reference) == pytest.approx(sqrtm_distance(first, second), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*biased upwards")
def test_frechet_distance_of_fewer_samples_than_dimensions():
    samples, reference = normal(50, 300), 2 * normal(60, 300, seed=1) + 0.5
    (mean1, covariance1), (mean2, covariance2) = mean_and_covariance(samples), mean_and_covariance(reference)
    cross = (samples - mean1) @ (reference - mean2).T / math.sqrt(49 * 59)
    expected = (mean1 - mean2).square().sum() + covariance1.trace() + covariance2.trace()
    expected -= 2 * torch.linalg.matrix_norm(cross, "nuc")
    assert distance(samples, reference) == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_of_constant_and_repeated_dimensions():
    samples, reference = normal(100, 8), 2 * normal(100, 8, seed=1)
    wide = [torch.cat([features, features, torch.ones(100, 4)], dim=1) for features in (samples, reference)]
    assert distance(*wide) == pytest.approx(2 * distance(samples, reference), rel=1e-9)


def test_few_samples_are_warned_of():
    few, many = GaussianStatistics.of([normal(50, 60)]), GaussianStatistics.of([normal(61, 60)])
    with pytest.warns(UserWarning, match="samples are 50 in 60 dimensions"):
        frechet_distance(few, many)
    with pytest.warns(UserWarning, match="reference are 50 in 60 dimensions"):
        frechet_distance(many, few)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(many, GaussianStatistics(few.mean, few.covariance))


def test_frechet_distance_to_itself_and_to_a_point():
    samples = normal(100, 16)
    assert distance(samples, samples) == pytest.approx(0, abs=1e-10)
    assert distance(samples, samples) >= 0
    point = torch.zeros(100, 16)
    assert distance(samples, point) == pytest.approx(samples.mean(0).square().sum() + samples.var(0).sum())
    assert distance(point, point) == 0


def test_frechet_distance_to_arrays():
    samples, reference = normal(100, 16), normal(100, 16, seed=1)
    mean, covariance = mean_and_covariance(reference)
    arrays = GaussianStatistics(mean.float().numpy(), covariance.numpy())
    assert frechet_distance(GaussianStatistics.of([samples]), arrays) == pytest.approx(distance(samples, reference))


def test_frechet_distance_agrees_with_others():
    piq = pytest.importorskip("piq")
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    samples, reference = normal(400, 32), 1.3 * normal(300, 32, seed=1) + 0.2
    found = distance(samples, reference)

    statistics = [fid_features_to_statistics(features) for features in (samples, reference)]
    assert found == pytest.approx(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID], rel=1e-9)

    network = torch.nn.Identity()
    network.num_features = 32
    metric = FrechetInceptionDistance(feature=network, input_img_size=(32,), normalize=True).set_dtype(torch.float64)
    metric.update(samples, real=False)
    metric.update(reference, real=True)
    assert found == pytest.approx(metric.compute().item(), rel=1e-6)

    assert found == pytest.approx(piq.FID()(samples, reference).item(), rel=1e-6)


def test_kernel_distance_is_its_definition():
    """The whole set as the one subset: the unbiased estimate of the squared MMD, whatever the order."""
    samples, reference = normal(40, 8), 1.5 * normal(40, 8, seed=1) + 1

    def kernel(first, second):
        return (first @ second.T / 8 + 1) ** 3

    off_diagonal = 1 - torch.eye(40)
    expected = sum((kernel(features, features) * off_diagonal).sum() / (40 * 39) for features in (samples, reference))
    expected -= 2 * kernel(samples, reference).mean()
    mean, std = kernel_distance(samples, reference, subsets=3, subset_size=40)
    assert mean == pytest.approx(expected.item(), rel=1e-9) and std == pytest.approx(0, abs=1e-12)


def test_kernel_distance_of_the_same_set():
    features = normal(1000, 8)
    mean, std = kernel_distance(features, features, subset_size=200)
    assert abs(mean) < 0.02 and std < 0.1
    assert kernel_distance(features, features + 0.5, subset_size=200)[0] > 0.1
    assert (mean, std) == kernel_distance(features, features, subset_size=200)


def test_kernel_distance_of_few_samples():
    samples, reference = normal(100, 8), normal(80, 8, seed=1)
    with pytest.warns(UserWarning, match="from 1000 to 80: there are 100 samples and 80 in the reference"):
        found = kernel_distance(samples, reference)
    assert found == kernel_distance(samples, reference, subset_size=80)


def test_kernel_distance_agrees_with_piq():
    piq = pytest.importorskip("piq")
    samples, reference = normal(200, 16), 1.5 * normal(200, 16, seed=1)
    found, _ = kernel_distance(samples, reference, subset_size=200, subsets=1)
    other = piq.KID(average=False)(samples, reference)
    assert found == pytest.approx(other.item(), rel=1e-6)


def test_sliced_distance_in_one_dimension():
    """Every direction is +-1: 3 times the mean squared difference of the sorted numbers."""
    features = normal(200, 1)
    assert sliced_distance(features + 0.5, features) == pytest.approx(3 * 0.25)
    assert sliced_distance(2 * features, features) == pytest.approx(3 * features.square().mean().item())


def test_sliced_distance_of_the_same_set_in_any_order():
    features = normal(200, 16)
    assert sliced_distance(features.flip(0), features) == pytest.approx(0, abs=1e-20)


def test_sliced_distance_of_a_shift():
    """3 D E (direction . shift)^2 = 3 |shift|^2, up to the choice of directions."""
    features, shift = normal(300, 8), torch.linspace(0, 1, 8, dtype=torch.float64)
    expected = 3 * shift.square().sum().item()
    found = sliced_distance(features + shift, features)
    assert found == pytest.approx(expected, rel=0.15) and found == sliced_distance(features + shift, features)
    # As many of the larger set, chosen at random; few of the smaller set are further away, as they are noise.
    assert sliced_distance((features + shift)[:100], features) == pytest.approx(expected, rel=0.5)


def test_inception_score():
    assert inception_score(torch.zeros(100, 7)) == pytest.approx((1, 0))
    one_hot = 100 * torch.nn.functional.one_hot(torch.arange(100) % 5)
    assert inception_score(one_hot) == pytest.approx((5, 0))
    # All of one class in each run, though balanced as a whole: the order is kept.
    assert inception_score(one_hot.view(20, 5, 5).transpose(0, 1).reshape(100, 5), splits=5) == pytest.approx((1, 0))


def test_inception_score_agrees_with_torchmetrics():
    from torchmetrics.image.inception import InceptionScore

    logits = normal(100, 10)
    metric = InceptionScore(feature=torch.nn.Identity(), splits=1)
    metric.update(logits)
    assert inception_score(logits, splits=1)[0] == pytest.approx(metric.compute()[0].item())


def test_precision_and_recall_of_the_same_set_and_of_distant_sets():
    features = normal(300, 8)
    assert precision_recall(features, features) == (1, 1)
    assert precision_recall(features, features + 100) == (0, 0)


def test_precision_is_that_of_the_samples():
    """Samples of one of two modes are precise, and recall half of the reference."""
    near, far = normal(200, 4), normal(200, 4, seed=1) + 100
    assert precision_recall(near, torch.cat([near, far])) == (1, 0.5)
    assert precision_recall(torch.cat([near, far]), near) == (0.5, 1)


@pytest.mark.parametrize("neighbours", [1, 3])
def test_precision_and_recall_are_their_definition(neighbours):
    samples, reference = normal(1100, 4), normal(150, 4, seed=1) + 1

    def share_inside(points, manifold):
        radii = torch.cdist(manifold, manifold).sort().values[:, neighbours]
        return (torch.cdist(points, manifold) <= radii).any(dim=1).double().mean().item()

    expected = share_inside(samples, reference), share_inside(reference, samples)
    assert precision_recall(samples, reference, neighbours) == pytest.approx(expected, abs=1e-6)


def test_clip_score():
    images = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0]])
    assert clip_score(images, texts) == pytest.approx((100 + 100 / math.sqrt(2) + 0) / 3)


def test_clip_score_agrees_with_torchmetrics():
    from torchmetrics.functional.multimodal import clip_score as torchmetrics_clip_score
    from transformers import CLIPConfig, CLIPModel

    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**shape, "vocab_size": 16, "eos_token_id": 15},
        vision_config={**shape, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    model = CLIPModel(config).eval()
    pictures, texts = torch.randint(256, (4, 3, 16, 16)), ["a", "b", "c", "d"]

    class Embedder(torch.nn.Module):
        """The model as torchmetrics knows it: its features are tensors."""

        config = model.config

        def get_image_features(self, pixel_values):
            return model.get_image_features(pixel_values=pixel_values).pooler_output

        def get_text_features(self, input_ids, attention_mask):
            return model.get_text_features(input_ids=input_ids, attention_mask=attention_mask).pooler_output

    def processor(images=None, text=None, **kwargs):
        if images is not None:
            return {"pixel_values": torch.stack(images) / 255}
        input_ids = torch.tensor([[0, ord(letter) - ord("a") + 1, 15] for letter in text])
        return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}

    # One pair at a time: torchmetrics clamps the mean of the scores that it is given, the paper each score.
    scores = [
        torchmetrics_clip_score(picture, text, lambda: (Embedder(), processor)).item()
        for picture, text in zip(pictures, texts)
    ]
    image_embeds = Embedder().get_image_features(**processor(images=list(pictures)))
    text_embeds = Embedder().get_text_features(**processor(text=texts))
    assert clip_score(image_embeds, text_embeds) == pytest.approx(sum(scores) / 4, rel=1e-5)
    assert max(scores) > 0


GOOD, NARROW, FEW = normal(30, 4), normal(30, 3), normal(3, 4)
NAN = torch.full((30, 4), float("nan"))


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "features must hold at least 2 samples, got 0"),
        ([torch.zeros(0, 4)], "features must hold at least 2 samples, got 0"),
        ([GOOD[:1]], "features must hold at least 2 samples, got 1"),
        ([GOOD[0]], r"features must have shape \(N, D\), got \(4,\)"),
        ([GOOD, NARROW], r"features must have shape \(N, 4\), got \(30, 3\)"),
        ([GOOD, NAN], "features must be finite, got 120 NaN or infinite values"),
        ([GOOD * 1e300], "covariance must be finite"),
    ],
)
def test_bad_batches(batches, message):
    with pytest.raises(ValueError, match=message):
        GaussianStatistics.of(batches)


def test_batches_are_named():
    with pytest.raises(ValueError, match="reference must hold at least 2 samples, got 0"):
        GaussianStatistics.of([], name="reference")


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (torch.zeros(2, 2), torch.eye(2), r"mean must have shape \(D,\), got \(2, 2\)"),
        (torch.zeros(3), torch.eye(2), r"covariance must have shape \(3, 3\), got \(2, 2\)"),
        (NAN[0], torch.eye(4), "mean must be finite, got 4"),
        (torch.zeros(4), NAN[:4], "covariance must be finite, got 16"),
    ],
)
def test_bad_statistics(mean, covariance, message):
    with pytest.raises(ValueError, match=message):
        GaussianStatistics(mean, covariance)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distance(GOOD, NARROW), "samples must have the 3 dimensions of reference, got 4"),
        (lambda: kernel_distance(GOOD[0], GOOD), r"samples must have shape \(N, D\), got \(4,\)"),
        (lambda: kernel_distance(GOOD, NARROW), r"reference must have shape \(N, 4\), got \(30, 3\)"),
        (lambda: kernel_distance(GOOD, NAN), "reference must be finite"),
        (lambda: kernel_distance(GOOD[:1], GOOD), "samples must hold at least 2 samples, got 1"),
        (lambda: kernel_distance(GOOD, GOOD, subset_size=1), "subset_size must be at least 2, got 1"),
        (lambda: inception_score(FEW), "logits must hold at least 10 samples, got 3"),
        (lambda: inception_score(NAN), "logits must be finite"),
        (lambda: precision_recall(FEW, GOOD), "samples must hold at least 4 samples, got 3"),
        (lambda: precision_recall(GOOD, FEW), "reference must hold at least 4 samples, got 3"),
        (lambda: precision_recall(GOOD, NARROW), r"reference must have shape \(N, 4\), got \(30, 3\)"),
        (lambda: precision_recall(NAN, GOOD), "samples must be finite"),
        (lambda: clip_score(GOOD[:0], GOOD), "image_embeds must hold at least 1 samples, got 0"),
        (lambda: clip_score(GOOD, NARROW), r"text_embeds must have shape \(N, 4\), got \(30, 3\)"),
        (lambda: clip_score(GOOD, FEW), "text_embeds must be as many as the 30 images, got 3"),
        (lambda: clip_score(NAN, GOOD), "image_embeds must be finite"),
    ],
)
def test_bad_features(call, message):
    with pytest.raises(ValueError, match=message):
        call()
