"""The frozen vision encoder against each library's own forward, with preprocessing and slicing done here again."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from factories import TINY_VISION_CONFIGS, tiny_encoder
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoImageProcessor, AutoModel, CLIPModel, Siglip2Model, SiglipModel

from hf_fae.encoders import VisionEncoder


FAMILIES = list(TINY_VISION_CONFIGS)
PREFIX_TOKENS = {
    "dinov2": 1,
    "dinov2_with_registers": 5,
    "dinov3_vit": 5,
    "siglip": 0,
    "siglip2": 0,
    "vit_mae": 1,
    "clip": 1,
    "vit": 1,
    "timm_wrapper": 3,
}
GRIDS = [None, (6, 6), (3, 5)]
PROCESSOR = {"size": 32, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


def images(height=40, width=48, batch=2):
    return torch.rand(batch, 3, height, width) * 2 - 1


def final_norm(encoder):
    model = getattr(encoder.model, "timm_model", encoder.model)
    return next(getattr(model, name) for name in ("layernorm", "post_layernorm", "norm") if hasattr(model, name))


def normalized(encoder, pixel_values, height, width):
    """fp32 preprocessing, written out."""
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (encoder.image_mean, encoder.image_std))
    return ((F.interpolate(pixel_values, (height, width), mode="bicubic") + 1) / 2 - mean) / std


@torch.no_grad()
def library_forward(family, encoder, pixel_values, grid):
    """(tokens after the final norm, hidden states) of the library's model, prefix tokens removed."""
    model, height, width = encoder.model, grid[0] * 8, grid[1] * 8
    pixels, prefix = normalized(encoder, pixel_values, height, width), PREFIX_TOKENS[family]
    kwargs = {"output_hidden_states": True}
    if family == "timm_wrapper":
        vit = model.timm_model
        tokens, states = vit.forward_intermediates(pixels, output_fmt="NLC")
        embeddings = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))
        return tokens[:, prefix:], [embeddings[:, prefix:], *states]
    if family in ("siglip", "clip", "vit", "vit_mae"):
        kwargs["interpolate_pos_encoding"] = (height, width) != (32, 32)
    if family == "vit_mae":
        kwargs["noise"] = torch.linspace(0, 1, grid[0] * grid[1]).repeat(len(pixels), 1)
    if family == "siglip2":
        # (h, p, w, p, 3) of one channels-last image, then patch by patch
        patches = [
            np.stack([x[i : i + 8, j : j + 8].reshape(-1) for i in range(0, height, 8) for j in range(0, width, 8)])
            for x in pixels.permute(0, 2, 3, 1).numpy()
        ]
        pixels = torch.tensor(np.stack(patches))
        kwargs["pixel_attention_mask"] = torch.ones(pixels.shape[:2], dtype=torch.int32)
        kwargs["spatial_shapes"] = torch.tensor([grid] * len(pixels))
    outputs = model(pixels, **kwargs)
    tokens = outputs.last_hidden_state
    if family == "clip":
        tokens = model.post_layernorm(tokens)
    return tokens[:, prefix:], [state[:, prefix:] for state in outputs.hidden_states]


def assert_same_encoder(one, other, **kwargs):
    assert one.config == other.config
    pixel_values = images()
    expected, actual = one(pixel_values, **kwargs), other(pixel_values, **kwargs)
    assert torch.equal(expected.last_hidden_state, actual.last_hidden_state)


# Parity


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_the_librarys_own(family, grid):
    encoder, pixel_values = tiny_encoder(family), images()
    outputs = encoder(pixel_values, grid=grid, output_hidden_states=True)
    grid = grid or (4, 4)
    tokens, states = library_forward(family, encoder, pixel_values, grid)

    assert outputs.grid == grid
    assert outputs.last_hidden_state.shape == (2, grid[0] * grid[1], 32)
    torch.testing.assert_close(outputs.last_hidden_state, tokens, rtol=1e-5, atol=1e-5)
    assert len(outputs.hidden_states) == len(states) == encoder.num_hidden_layers + 1 == 4
    for state, expected in zip(outputs.hidden_states, states, strict=True):
        torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5)
    # the last state comes before the final norm, whatever the library calls it
    torch.testing.assert_close(final_norm(encoder)(outputs.hidden_states[-1]), tokens, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_facts(family):
    encoder = tiny_encoder(family)
    assert (encoder.hidden_size, encoder.num_hidden_layers, encoder.patch_size) == (32, 3, 8)
    assert encoder.num_prefix_tokens == PREFIX_TOKENS[family]
    assert (encoder.dtype, encoder.device.type) == (torch.float32, "cpu")


@pytest.mark.parametrize("family", ["dinov2_with_registers", "dinov3_vit"])
@pytest.mark.parametrize("registers", [0, 3])
def test_prefix_tokens_follow_the_config(family, registers):
    encoder = tiny_encoder(family, num_register_tokens=registers)
    assert encoder.num_prefix_tokens == 1 + registers
    assert encoder(images()).last_hidden_state.shape == (2, 16, 32)


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_norm_is_the_final_norm_without_gain_and_bias(family):
    encoder, pixel_values = tiny_encoder(family), images()
    plain = encoder(pixel_values, final_norm="plain")
    assert plain.hidden_states is None
    assert not torch.allclose(plain.last_hidden_state, encoder(pixel_values).last_hidden_state, atol=1e-2)

    nn.init.ones_(final_norm(encoder).weight)
    nn.init.zeros_(final_norm(encoder).bias)
    affine = encoder(pixel_values).last_hidden_state
    torch.testing.assert_close(plain.last_hidden_state, affine, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16(family):
    encoder, pixel_values = tiny_encoder(family), images()
    expected = encoder(pixel_values, grid=(3, 5)).last_hidden_state
    encoder.to(torch.bfloat16)
    outputs = encoder(pixel_values, grid=(3, 5), output_hidden_states=True, final_norm="plain")
    assert {x.dtype for x in (outputs.last_hidden_state, *outputs.hidden_states)} == {torch.bfloat16}
    actual = encoder(pixel_values.bfloat16(), grid=(3, 5)).last_hidden_state
    assert F.cosine_similarity(actual.float(), expected, dim=-1).mean() > 0.99


def test_default_size_need_not_be_a_multiple_of_the_patch():
    encoder = tiny_encoder("siglip", image_size=35)  # as SigLIP-so400m: 384 px, patch 14, 27 x 27 positions
    encoder.image_size, pixel_values = (35, 35), images()
    outputs = encoder(pixel_values)
    expected = encoder.model(normalized(encoder, pixel_values, 35, 35)).last_hidden_state
    assert outputs.grid == (4, 4)
    torch.testing.assert_close(outputs.last_hidden_state, expected)


# Frozen


def test_never_trains():
    encoder = tiny_encoder("dinov2", hidden_dropout_prob=0.5, drop_path_rate=0.5)
    parent = nn.Sequential(encoder).train()
    assert parent.training and not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    pixel_values = images()
    assert torch.equal(encoder(pixel_values).last_hidden_state, encoder(pixel_values).last_hidden_state)


def test_builds_no_graph():
    encoder = tiny_encoder().requires_grad_(True)
    outputs = encoder(images().requires_grad_(), output_hidden_states=True, final_norm="plain")
    assert not any(x.requires_grad for x in (outputs.last_hidden_state, *outputs.hidden_states))


def test_compute_features_passes_gradients_to_the_images_only():
    encoder, pixels = tiny_encoder(), images().requires_grad_()
    encoder.compute_features(pixels).last_hidden_state.square().mean().backward()
    assert pixels.grad.abs().sum() > 0 and all(parameter.grad is None for parameter in encoder.parameters())


def test_timm_leaves_no_hooks():
    encoder = tiny_encoder("timm_wrapper")
    encoder(images(), output_hidden_states=True)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


# Building, saving and loading


@pytest.mark.parametrize("family", FAMILIES)
def test_save_and_load(family, tmp_path):
    encoder = tiny_encoder(family)
    encoder.save_pretrained(tmp_path)
    loaded = VisionEncoder.from_pretrained(tmp_path)
    # the library notes what it saved
    saved = {"model": {**loaded.config["model"], **encoder.config["model"]}}
    assert {**encoder.config, **saved} == loaded.config
    assert_same_encoder(encoder, loaded, grid=(3, 5))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("family", ["dinov2", "siglip", "timm_wrapper"])
def test_save_and_load_variant_in_shards(family, tmp_path):
    encoder = tiny_encoder(family).half()
    encoder.save_pretrained(tmp_path / "image_encoder", variant="fp16", max_shard_size="20KB")
    assert len(list(tmp_path.glob("image_encoder/model.fp16-*.safetensors"))) > 1
    loaded = VisionEncoder.from_pretrained(tmp_path, subfolder="image_encoder", variant="fp16")
    assert loaded.dtype == torch.float16
    assert_same_encoder(encoder, loaded)
    upcast = VisionEncoder.from_pretrained(tmp_path / "image_encoder", variant="fp16", dtype=torch.float32)
    assert upcast.dtype == torch.float32


@pytest.mark.parametrize("family", ["dinov2", "siglip2", "clip"])
def test_saved_folder_is_transformers_own(family, tmp_path):
    encoder = tiny_encoder(family)
    encoder.save_pretrained(tmp_path)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    inputs = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")(picture, return_tensors="pt")
    with torch.no_grad():
        expected = AutoModel.from_pretrained(tmp_path)(**inputs).last_hidden_state[:, encoder.num_prefix_tokens :]
    if family == "clip":
        expected = encoder.model.post_layernorm(expected)
    pixel_values = torch.tensor(picture).permute(2, 0, 1)[None] / 127.5 - 1
    torch.testing.assert_close(encoder(pixel_values).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_config_builds_the_same_architecture(family):
    encoder = tiny_encoder(family)
    config = json.loads(json.dumps(encoder.config))
    assert config == encoder.config
    shapes = {name: x.shape for name, x in encoder.state_dict().items()}
    with torch.device("meta"):
        on_meta = VisionEncoder.from_config(config)
    assert on_meta.config == config
    assert on_meta.device.type == "meta"
    assert {name: x.shape for name, x in on_meta.state_dict().items()} == shapes
    assert VisionEncoder.from_config(config)(images()).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("model_class", [CLIPModel, SiglipModel, Siglip2Model])
def test_image_text_checkpoint_gives_its_vision_tower(model_class, tmp_path):
    family = model_class.config_class.model_type
    text = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "bos_token_id": 0, "eos_token_id": 0}
    text |= {"num_hidden_layers": 1, "num_attention_heads": 1, "pad_token_id": 0}
    tower = tiny_encoder(family)
    model = model_class(model_class.config_class(text_config=text, vision_config=tower.model.config.to_dict()))
    model.vision_model.load_state_dict(tower.model.state_dict())
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    for encoder in (VisionEncoder.from_pretrained(tmp_path), VisionEncoder(model, 32, [0.5] * 3, [0.5] * 3)):
        assert type(encoder.model) is type(tower.model)
        assert encoder.state_dict().keys() == tower.state_dict().keys()
        assert all(torch.equal(x, tower.state_dict()[name]) for name, x in encoder.state_dict().items())
        assert encoder.image_mean == [0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "architecture, model_args",
    [
        ("vit_small_patch16_224", {"fc_norm": True, "global_pool": "avg"}),  # the final norm stands behind the pooling
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch16_dinov3", {}),  # rotary positions in buffers that are not saved
        ("vit_base_patch16_siglip_224", {}),
    ],
)
def test_folder_in_timms_own_format(architecture, model_args, tmp_path):
    import timm

    model_args = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8, "img_size": 32, **model_args}
    vit = timm.create_model(architecture, num_classes=5, **model_args).eval()
    save_file(vit.state_dict(), tmp_path / "model.safetensors")
    cfg = {"input_size": [3, 32, 32], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "num_classes": 5}
    config = {"architecture": architecture, "num_classes": 5, "model_args": model_args, "pretrained_cfg": cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))

    encoder, pixel_values = VisionEncoder.from_pretrained(tmp_path), images()
    assert (encoder.image_size, encoder.image_mean, encoder.image_std) == ((32, 32), cfg["mean"], cfg["std"])
    with torch.no_grad():
        tokens = vit.fc_norm(vit.forward_features(normalized(encoder, pixel_values, 32, 32)))
    outputs = encoder(pixel_values, output_hidden_states=True)
    torch.testing.assert_close(outputs.last_hidden_state, tokens[:, vit.num_prefix_tokens :], rtol=1e-5, atol=1e-5)
    assert [state.shape for state in outputs.hidden_states] == [(2, 16, 32)] * 3
    encoder.save_pretrained(tmp_path / "again")
    assert_same_encoder(encoder, VisionEncoder.from_pretrained(tmp_path / "again"), grid=(5, 3), final_norm="plain")


@pytest.mark.parametrize(
    "processor, expected",
    [
        ({"size": 24}, (24, 24)),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 24}}, (32, 24)),
        ({"size": {"shortest_edge": 40}, "crop_size": 32, "do_center_crop": False}, (40, 40)),
        ({"size": {"height": 16, "width": 24}, "crop_size": None}, (16, 24)),
    ],
)
def test_input_size_comes_from_the_processor(processor, expected, tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**PROCESSOR, **processor}))
    encoder = VisionEncoder.from_pretrained(tmp_path)
    assert encoder.image_size == expected
    assert encoder(images()).grid == (expected[0] // 8, expected[1] // 8)


def test_input_size_of_naflex_is_the_largest_square(tmp_path):
    tiny_encoder("siglip2").save_pretrained(tmp_path)
    processor = {"patch_size": 8, "max_num_patches": 30, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    assert VisionEncoder.from_pretrained(tmp_path).image_size == (40, 40)


# Bad input


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda x: {"pixel_values": x[0]}, r"pixel_values must have the shape .* got \(3, 40, 48\)"),
        (lambda x: {"pixel_values": x[:, :1]}, r"pixel_values must have the shape .* got \(2, 1, 40, 48\)"),
        (lambda x: {"pixel_values": (x * 127).to(torch.uint8)}, "pixel_values must be floating.*torch.uint8"),
        (lambda x: {"grid": (4, 0)}, r"grid must be two positive integers \(h, w\), got \(4, 0\)"),
        (lambda x: {"grid": (-1, 4)}, r"grid must be two positive integers \(h, w\), got \(-1, 4\)"),
        (lambda x: {"grid": (4,)}, r"grid must be two positive integers \(h, w\), got \(4,\)"),
        (lambda x: {"final_norm": "none"}, "final_norm must be 'affine' or 'plain', got 'none'"),
    ],
)
def test_bad_input(change, message):
    encoder, pixel_values = tiny_encoder(), images()
    with pytest.raises(ValueError, match=message):
        encoder(**{"pixel_values": pixel_values, **change(pixel_values)})


@pytest.mark.parametrize("model_type", ["resnet", "bert", "nonsense"])
def test_unsupported_model_type(model_type):
    config = {**tiny_encoder().config, "model": {"model_type": model_type}}
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is not a supported encoder: use one of dinov2"):
        VisionEncoder.from_config(config)


def test_unsupported_checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ValueError, match="model_type 'resnet' is not a supported encoder"):
        VisionEncoder.from_pretrained(tmp_path)


def test_timm_convnet(tmp_path):
    config = {"architecture": "resnet18", "num_classes": 5, "pretrained_cfg": {"input_size": [3, 32, 32]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="'resnet18' is not a plain vision transformer"):
        VisionEncoder.from_pretrained(tmp_path)


def test_timm_model_of_fixed_size():
    encoder = tiny_encoder("timm_wrapper")
    encoder.model.timm_model.dynamic_img_size = False
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        VisionEncoder(encoder.model, 32, encoder.image_mean, encoder.image_std)


def test_missing_preprocessor_config(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(OSError, match="no preprocessor_config.json, which gives the encoder's image mean and std"):
        VisionEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["size", "image_mean", "image_std"])
def test_incomplete_preprocessor_config(key, tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({k: v for k, v in PROCESSOR.items() if k != key}))
    with pytest.raises(ValueError, match="preprocessor_config.json of .* must give size, mean and std, got .*None"):
        VisionEncoder.from_pretrained(tmp_path)


def test_timm_without_pretrained_cfg(tmp_path):
    tiny_encoder("timm_wrapper").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] = {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pretrained_cfg in config.json of .* must give size, mean and std"):
        VisionEncoder.from_pretrained(tmp_path)


def test_missing_weights(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["layernorm.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights of Dinov2Model, such as layernorm.weight"):
        VisionEncoder.from_pretrained(tmp_path)


# Real weights


def test_dinov2_small(assets):
    encoder = VisionEncoder.from_pretrained(assets / "dinov2-small", dtype=torch.float32)
    assert (encoder.image_size, encoder.hidden_size, encoder.num_hidden_layers) == ((224, 224), 384, 12)
    rng = np.random.default_rng(0)
    coarse = torch.tensor(rng.integers(0, 256, (1, 3, 8, 8)), dtype=torch.float32)
    picture = F.interpolate(coarse, (224, 224), mode="bilinear").round().byte()

    outputs = encoder(picture / 127.5 - 1)
    assert outputs.grid == (16, 16)
    assert outputs.last_hidden_state.shape == (1, 256, 384)
    assert outputs.last_hidden_state.isfinite().all()

    # a picture of the input size is not resized, so the library's processor must agree to rounding
    processor = AutoImageProcessor.from_pretrained(assets / "dinov2-small", backend="pil")
    model = AutoModel.from_pretrained(assets / "dinov2-small", dtype=torch.float32)
    with torch.no_grad():
        expected = model(**processor(picture[0].permute(1, 2, 0).numpy(), return_tensors="pt")).last_hidden_state[
            :, 1:
        ]
    torch.testing.assert_close(outputs.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_dinov2_small_keeps_its_dtype(assets):
    encoder = VisionEncoder.from_pretrained(assets / "dinov2-small")
    assert encoder.dtype == torch.float16
    assert str(assets) not in json.dumps(encoder.config)
    with torch.device("meta"):
        shapes = VisionEncoder.from_config(encoder.config)
    assert sum(x.numel() for x in shapes.parameters()) == sum(x.numel() for x in encoder.parameters()) == 22_056_576
    assert copy.deepcopy(encoder).config == encoder.config
