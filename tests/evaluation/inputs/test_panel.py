"""The spaces of FDr6 and MIND6: which networks, what is read of them, and what is refused under their names."""

import pytest
import timm
import torch
from factories import tiny_encoder
from timm.models import save_for_hf

from hf_fae.evaluation.inputs.extractors import load_extractors
from hf_fae.evaluation.inputs.panel import PANEL, FeatureSpace, panel_name


def test_spaces_are_those_of_the_specification():
    distances = {name: space.imagenet_distance for name, space in PANEL.items()}
    assert distances == {
        "inception": 1.68,
        "convnextv2-b": 56.87,
        "dinov2-l": 14.19,
        "mae-l": 0.04,
        "siglip2-so400m": 0.60,
        "clip-l": 5.60,
    }
    known = set(timm.list_pretrained())
    assert all(space.path.removeprefix("timm/") in known for space in PANEL.values() if space.path)
    own = {
        name: timm.get_pretrained_cfg(space.path.removeprefix("timm/")) for name, space in PANEL.items() if space.path
    }
    sizes = {name: PANEL[name].size or config.input_size[1] for name, config in own.items()}
    assert sizes == {"convnextv2-b": 224, "dinov2-l": 256, "mae-l": 224, "siglip2-so400m": 224, "clip-l": 256}


def test_subsets_are_named_as_such():
    assert panel_name("fdr", list(PANEL)) == panel_name("fdr", list(PANEL)[::-1]) == "fdr6"
    assert panel_name("mind", ["inception", "dinov2-l"]) == "mind_inception+dinov2-l"


def test_maps_and_sizes(tmp_path, monkeypatch):
    """The rules of the large networks on small ones: spatial means of maps, and class tokens at another size."""
    monkeypatch.setitem(PANEL, "convnextv2-b", FeatureSpace("timm/test_convnext", 1.0, reads_maps=True))
    monkeypatch.setitem(PANEL, "dinov2-l", FeatureSpace("timm/test_vit.in1k", 1.0, size=96))
    torch.manual_seed(0)
    for name in ("test_convnext", "test_vit"):
        save_for_hf(timm.create_model(name, num_classes=10), tmp_path / name, safe_serialization=True)
    sources = [f"convnextv2-b={tmp_path / 'test_convnext'}", f"dinov2-l={tmp_path / 'test_vit'}"]
    convnext, vit = load_extractors(sources)
    assert convnext.outputs == vit.outputs == ("features",) and vit.settings["resize"].endswith("to 96")
    images = torch.randint(256, (2, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        maps = convnext.network.model.forward_features(convnext.network.preprocess(images / 127.5 - 1))
        tokens = vit.network.model.forward_features(vit.network.preprocess(images / 127.5 - 1))
        assert torch.equal(convnext(images)["features"], maps.mean((2, 3)))
        torch.testing.assert_close(vit(images)["features"], tokens[:, 0])
    assert vit.network.model.patch_embed.grid_size == (6, 6) and tokens.shape[1] == 37


def test_other_networks_are_refused_under_these_names(judge_folder, tmp_path):
    with pytest.raises(ValueError, match="mae-l must be a vit_large_patch16_224, got a test_efficientnet"):
        load_extractors([f"mae-l={judge_folder}"])
    tiny_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="dinov2-l must be timm's vit_large_patch14_dinov2"):
        load_extractors([f"dinov2-l={tmp_path}"])
