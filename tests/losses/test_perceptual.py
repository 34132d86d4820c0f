"""Perceptual distances: LPIPS and logits against plain arithmetic, features by what they are for."""

import json

import pytest
import torch
from factories import tiny_encoder
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from hf_fae.losses.perceptual import (
    LPIPS,
    EncoderLayers,
    FeatureDistance,
    LogitDistance,
    WeightedDistance,
    load_perceptual,
)


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


@pytest.fixture(scope="module")
def vgg16():
    """The convolutions of torchvision's VGG16 with random weights of the usual scale."""
    from torchvision.models import vgg

    torch.manual_seed(0)
    layers = vgg.make_layers(vgg.cfgs["D"]).eval()
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.1)
    return layers


@pytest.fixture(scope="module")
def vgg16_file(vgg16, tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_file({f"features.{name}": value for name, value in vgg16.state_dict().items()}, path)
    return str(path)


KINDS = {
    "timm": (FeatureDistance, "timm_folder"),
    "transformers": (FeatureDistance, "transformers_folder"),
    "logits": (LogitDistance, "timm_folder"),
    "lpips": (LPIPS, "vgg16_file"),
}


@pytest.fixture(scope="module", params=KINDS)
def distance(request):
    cls, source = KINDS[request.param]
    return cls.from_pretrained(request.getfixturevalue(source))


@pytest.fixture(params=["timm", "transformers"])
def feature_distance(request):
    return FeatureDistance.from_pretrained(request.getfixturevalue(f"{request.param}_folder"))


def images(batch_size=2, size=64):
    return torch.rand(batch_size, 3, size, size) * 2 - 1


def test_zero_for_equal_images_and_growing_with_noise(distance):
    x, noise = images(), torch.randn(2, 3, 64, 64)
    distances = [distance(x + scale * noise, x).item() for scale in (0.0, 0.05, 0.5)]
    assert 0 == distances[0] < distances[1] < distances[2]
    assert distances[2] < 4 or not isinstance(distance, FeatureDistance)


def test_features_have_length_one_in_several_stages(feature_distance):
    features = feature_distance.features(images())
    assert len(features) >= 4
    for stage in features:
        assert stage.dtype == torch.float32
        torch.testing.assert_close(stage.norm(dim=-1), torch.ones(stage.shape[:2]))


def test_gradients_reach_the_first_image_only(distance):
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


@pytest.mark.parametrize("depth, expected", [(3, [1, 2, 3, 3]), (4, [1, 2, 3, 4]), (12, [3, 6, 9, 12])])
def test_encoder_layers_end_the_quarters(depth, expected):
    encoder, x = tiny_encoder(num_hidden_layers=depth), images()
    states = encoder(x, output_hidden_states=True).hidden_states
    for found, layer in zip(EncoderLayers(encoder)(x), expected, strict=True):
        torch.testing.assert_close(found, states[layer])


def test_lpips_against_plain_arithmetic(vgg16, vgg16_file):
    import torchmetrics.functional.image.lpips as torchmetrics_lpips

    x, y = images(), images()
    heads = torch.load(
        torchmetrics_lpips.__file__.replace("lpips.py", "lpips_models/vgg.pth"), map_location="cpu", weights_only=True
    )
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)

    def stages(pixels):
        found, pixels = [], (pixels / 2 + 0.5 - mean) / std
        for number, layer in enumerate(vgg16):
            pixels = layer(pixels)
            if number in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                found.append(pixels / pixels.norm(dim=1, keepdim=True).clamp_min(1e-8))
        return found

    with torch.no_grad():
        terms = [
            (heads[f"lin{stage}.model.1.weight"] * (found - target).square()).sum(1).mean()
            for stage, (found, target) in enumerate(zip(stages(x), stages(y)))
        ]
        # The paper's mean and std are rounded to three digits in [-1, 1].
        torch.testing.assert_close(LPIPS.from_pretrained(vgg16_file)(x, y), sum(terms), rtol=5e-3, atol=0)


def test_lpips_of_a_torch_file(vgg16, vgg16_file, tmp_path):
    path = tmp_path / "vgg16.pth"
    classifier = {"classifier.0.weight": torch.zeros(1)}
    torch.save({**{f"features.{k}": v for k, v in vgg16.state_dict().items()}, **classifier}, path)
    x, y = images(), images()
    assert torch.equal(LPIPS.from_pretrained(str(path))(x, y), LPIPS.from_pretrained(vgg16_file)(x, y))


def test_lpips_without_weights_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # refuses at once
    with pytest.raises(
        OSError, match=rf"put https://\S+/vgg16-397923af.pth at {tmp_path}/hub/checkpoints/vgg16.*lpips:"
    ):
        load_perceptual(["lpips=1.0"])


def test_lpips_takes_no_other_network(tmp_path):
    save_file({"features.0.weight": torch.zeros(64, 3, 5, 5)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"features.0.weight of shape \(64, 3, 3, 3\) is not in it"):
        LPIPS.from_pretrained(str(tmp_path / "other.safetensors"))
    with pytest.raises(FileNotFoundError, match="vgg16='nowhere.pth' must be a file"):
        LPIPS.from_pretrained("nowhere.pth")


def test_logits_are_those_of_the_classifier(timm_folder):
    import timm

    model = timm.create_model(f"local-dir:{timm_folder}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    size = model.pretrained_cfg["input_size"][1]
    x, y = images(size=size), images(size=size)
    with torch.no_grad():
        logits = [model((pixels / 2 + 0.5 - mean) / std) for pixels in (x, y)]
    distance = LogitDistance.from_pretrained(timm_folder)
    torch.testing.assert_close(distance(x, y), (logits[0] - logits[1]).square().mean())
    half = F.interpolate(x, scale_factor=0.5, mode="area")
    resized = F.interpolate(half, (size, size), mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(distance(half, half.flip(-1)), distance(resized, resized.flip(-1)))


def test_logits_need_a_classifier(transformers_folder, tmp_path):
    with pytest.raises(ValueError, match="must be a timm model"):
        LogitDistance.from_pretrained(transformers_folder)
    import timm
    from timm.models import save_for_hf

    save_for_hf(timm.create_model("test_efficientnet", num_classes=0), tmp_path, safe_serialization=True)
    with pytest.raises(ValueError, match="must be a classifier"):
        LogitDistance.from_pretrained(tmp_path)


def test_weighted_average(timm_folder, vgg16_file):
    x, y = images(), images()
    perceptual = load_perceptual([f"lpips:{vgg16_file}=1.0", f"logits:{timm_folder}=0.1", f"features:{timm_folder}=2"])
    assert [type(term) for term in perceptual.distances] == [LPIPS, LogitDistance, FeatureDistance]
    parts = [term(x, y) for term in perceptual.distances]
    torch.testing.assert_close(perceptual(x, y), (parts[0] + 0.1 * parts[1] + 2 * parts[2]) / 3.1)
    assert WeightedDistance([perceptual.distances[0]], [0.3])(x, y) == pytest.approx(parts[0].item())
    assert not any(p.requires_grad for p in perceptual.parameters())


@pytest.mark.parametrize(
    "terms, message",
    [
        ([], "terms must name at least one distance"),
        (["lpips"], "got 'lpips'"),
        (["lpips=heavy"], "got 'lpips=heavy'"),
        (["lpips=0"], "a positive weight, got 'lpips=0'"),
        (["lpips=nan"], "a positive weight, got 'lpips=nan'"),
        (["dists:x=1"], "a kind of lpips, logits, features .* got 'dists:x=1'"),
        (["logits=1"], r"terms must name a model for logits \(logits:MODEL=WEIGHT\), got 'logits=1'"),
        (["features:=1"], "got 'features:=1'"),
    ],
)
def test_terms_of_another_form(terms, message):
    with pytest.raises(ValueError, match=message):
        load_perceptual(terms)
