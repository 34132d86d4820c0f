import pytest
import torch

from hf_fae.utils.image_metrics import border_gradients, feature_cosine, psnr, ssim, token_cosine


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


def test_ssim_is_that_of_torchmetrics_on_images_from_0_to_1():
    from torchmetrics.functional.image import structural_similarity_index_measure

    images = 1.2 * torch.rand(3, 3, 32, 32) - 0.6
    noisy = images + 0.5 * torch.arange(3).view(3, 1, 1, 1) * torch.randn(3, 3, 32, 32)
    pictures = [(clamped.clamp(-1, 1) + 1) / 2 for clamped in (noisy, images)]
    each = structural_similarity_index_measure(*pictures, data_range=1.0, reduction="none")
    assert ssim(noisy, images).item() == pytest.approx(each.mean().item(), abs=1e-5)
    assert ssim(images, images).item() == pytest.approx(1)


def test_ssim_of_nearly_equal_greys():
    grey = torch.full((1, 3, 32, 32), 0.01)
    assert ssim(-grey, grey).item() == pytest.approx(1, abs=1e-3)
    assert ssim(5 * torch.ones(1, 3, 32, 32), torch.ones(1, 3, 32, 32)).item() == pytest.approx(1)


def test_token_cosine_is_of_each_token():
    features = torch.randn(2, 3, 8).bfloat16()
    scales = torch.tensor([1.0, -2.0, 0.5]).view(1, 3, 1).bfloat16()
    torch.testing.assert_close(token_cosine(features * scales, features), torch.tensor([[1.0, -1.0, 1.0]] * 2))


def seam_ratio(error, patch_size):
    across, elsewhere = border_gradients(error, torch.zeros_like(error), patch_size).mean(0)
    return (across / elsewhere).item()


def test_white_noise_has_no_seams():
    noise = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert seam_ratio(noise, 16) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("direction", [2, 3])
def test_planted_seams(direction):
    """A ramp of slope 1 with steps of 7 between patches of 8, along one direction; nothing changes along the other."""
    line = torch.arange(32.0) + 6 * (torch.arange(32) // 8)
    error = line.view(1, 1, -1, 1) if direction == 2 else line.view(1, 1, 1, -1)
    error = error.expand(2, 3, 32, 32)
    assert border_gradients(error, torch.zeros_like(error), 8).tolist() == [[3.5, 0.5]] * 2
    assert seam_ratio(error, 8) == 7


@pytest.mark.parametrize("patch_size", [1, 32])
def test_borders_need_several_patches(patch_size):
    with pytest.raises(ValueError, match=f"patch_size must be from 2 to below 32, got {patch_size}"):
        border_gradients(torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 32), patch_size)
