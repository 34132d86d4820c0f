import json

import pytest
import torch
from factories import tiny_encoder

from hf_fae.training.perceptual import FeatureDistance


@pytest.fixture(scope="module")
def timm_folder(tmp_path_factory):
    """timm's own tiny network, with random weights, in timm's format."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("timm")
    torch.manual_seed(0)
    save_for_hf(timm.create_model("test_efficientnet"), folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformers")
    tiny_encoder("dinov2").save_pretrained(folder)
    return folder


@pytest.fixture(params=["timm", "transformers"])
def distance(request):
    return FeatureDistance.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


def images(batch_size=2, size=64):
    return torch.rand(batch_size, 3, size, size) * 2 - 1


def test_zero_for_equal_pictures_and_growing_with_noise(distance):
    x, noise = images(), torch.randn(2, 3, 64, 64)
    distances = [distance(x + scale * noise, x).item() for scale in (0.0, 0.05, 0.5)]
    assert 0 == distances[0] < distances[1] < distances[2] < 4


def test_features_have_length_one_in_several_stages(distance):
    features = distance.features(images())
    assert len(features) >= 4
    for stage in features:
        assert stage.dtype == torch.float32
        torch.testing.assert_close(stage.norm(dim=-1), torch.ones(stage.shape[:2]))


def test_gradients_reach_the_first_picture_only(distance):
    x, target = images().requires_grad_(), images().requires_grad_()
    distance.train()(x, target).backward()
    assert x.grad.abs().sum() > 0 and target.grad is None
    assert all(p.grad is None and not p.requires_grad for p in distance.parameters())


def test_train_mode_changes_nothing(distance):
    x, y = images(), images()
    before = distance(x, y)
    distance.train()
    assert not any(module.training for module in distance.modules())
    assert torch.equal(distance(x, y), before)


def test_under_bf16_autocast(distance):
    x = images()
    y = (x + 0.3 * torch.randn_like(x)).clamp(-1, 1)
    with torch.autocast("cpu", torch.bfloat16):
        half = distance(y, x)
    torch.testing.assert_close(half, distance(y, x), rtol=0.1, atol=1e-3, check_dtype=False)


def test_statistics_are_the_models_own(timm_folder):
    config = json.loads((timm_folder / "config.json").read_text())["pretrained_cfg"]
    stages = FeatureDistance.from_pretrained(timm_folder).network
    assert stages.mean.flatten().tolist() == pytest.approx(config["mean"])
    assert stages.std.flatten().tolist() == pytest.approx(config["std"])


def test_offline_asset(assets):
    distance = FeatureDistance.from_pretrained(assets / "efficientnet-lite0")
    x = images(size=128)
    assert [stage.shape[1:] for stage in distance.features(x)] == [
        (64**2, 16),
        (32**2, 24),
        (256, 40),
        (64, 112),
        (16, 320),
    ]
    assert distance(x.flip(-1), x) > 0.01


def test_folder_of_something_else(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="must be a timm or a transformers model"):
        FeatureDistance.from_pretrained(tmp_path)
