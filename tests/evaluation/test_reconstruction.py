import pytest
import torch

from hf_fae.evaluation.reconstruction import feature_cosine, psnr


def test_feature_cosine():
    features = torch.randn(2, 5, 16)
    assert feature_cosine(3 * features, features).item() == pytest.approx(1)
    assert feature_cosine(-features, features).item() == pytest.approx(-1)
    first, second = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]]), torch.tensor([[[1.0, 1.0], [0.0, 2.0]]])
    assert feature_cosine(first, second).item() == pytest.approx(2**-0.5 / 2)


def test_feature_cosine_of_half_precision_is_computed_in_fp32():
    features = torch.randn(2, 5, 512).bfloat16()
    assert feature_cosine(features, features).item() == pytest.approx(1, abs=1e-6)


def test_psnr():
    images = torch.zeros(1, 3, 8, 8)
    assert psnr(images + 0.2, images).item() == pytest.approx(20)  # 10 log10(2^2 / 0.2^2)


def test_psnr_is_the_mean_over_images_and_clamps():
    images = torch.zeros(2, 3, 8, 8)
    noisy = images + torch.tensor([0.2, 0.02]).view(2, 1, 1, 1)
    assert psnr(noisy, images).item() == pytest.approx(30)
    white = torch.ones(1, 3, 8, 8)
    assert psnr(white * 5, white * 0.8).item() == pytest.approx(20, abs=1e-4)
