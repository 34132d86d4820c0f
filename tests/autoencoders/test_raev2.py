"""RAEv2's tokenizer: sums of layers, and how its decoder's output is read."""

import pytest
import torch
from factories import tiny_encoder, tiny_raev2
from torch.nn import functional as F

from hf_fae import AutoencoderRAEv2, build_preset
from hf_fae.autoencoders.rae_decoder import RAEDecoder


DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture
def states(images):
    """Of the three blocks, normalised by the encoder's own epsilon."""
    states = tiny_encoder("dinov3_vit")(images, (4, 4), output_hidden_states=True).hidden_states
    return [F.layer_norm(state, (32,), eps=1e-5) for state in states[1:]]


@pytest.mark.parametrize("layers", [[0, 2], [1, 2], [0, 1]])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("add_spatial_mean", [True, False])
def test_sum_of_layers(images, states, layers, reduction, add_spatial_mean):
    vae = tiny_raev2(layers=layers, layer_reduction=reduction, add_spatial_mean=add_spatial_mean)
    expected = sum(states[layer] for layer in layers) / (len(layers) if reduction == "mean" else 1)
    if add_spatial_mean:
        expected = expected + states[layers[-1]].mean(dim=1, keepdim=True)
    tokens, grid = vae.extract_features(images)
    assert grid == (4, 4) and torch.equal(vae.fuse(tokens), tokens)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)
    latents = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(vae.decode_features(latents), tokens, atol=1e-5, rtol=1e-5)


def test_each_layer_has_mean_0_and_variance_1(images):
    tokens = tiny_raev2(layers=[1], add_spatial_mean=False).extract_features(images)[0]
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)


def test_decoder_output(images):
    pixels, normalized = (tiny_raev2(decoder_output=name) for name in ("pixels", "normalized"))
    tokens = pixels.extract_features(images)[0]
    raw = pixels.decoder(tokens)
    assert torch.equal(pixels.decode_tokens(tokens), 2 * raw - 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in ([0.5, 0.4, 0.3], [0.2, 0.25, 0.3]))
    torch.testing.assert_close(normalized.decode_tokens(tokens), 2 * (raw * std + mean) - 1)


def test_resize_is_bilinear_with_antialias(images):
    """Where the encoder's patches are not the tokenizer's: here 4 pixels instead of 8."""
    encoder = tiny_encoder("dinov3_vit", patch_size=4)
    vae = AutoencoderRAEv2.from_encoder(encoder, layers=[2], sample_size=32, patch_size=8, **DECODER)
    small = F.interpolate(images, (16, 16), mode="bilinear", antialias=True)
    state = encoder(small, (4, 4), final_norm="plain").last_hidden_state
    expected = state + state.mean(dim=1, keepdim=True)
    torch.testing.assert_close(vae.extract_features(images)[0], expected, atol=1e-5, rtol=1e-5)


def test_encoder_stays_in_eval_mode(images):
    """In training mode DINOv3 would jitter its positions."""
    vae = tiny_raev2()
    expected = vae.extract_features(images)[0]
    assert torch.equal(vae.train().extract_features(images)[0], expected)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip", "siglip2", "vit_mae", "clip"])
def test_encoders_of_other_families(family, images):
    encoder = tiny_encoder(family)
    vae = AutoencoderRAEv2.from_encoder(encoder, layers=[0, 2], sample_size=32, patch_size=8, **DECODER)
    assert vae(images).sample.shape == images.shape


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("raev2-dinov3-l-k1", [23]),
        ("raev2-dinov3-l-k1-mls", [23]),
        ("raev2-dinov3-l-k7", [11, 13, 15, 17, 19, 21, 23]),
        ("raev2-dinov3-l-k23", list(range(1, 24))),
    ],
)
def test_presets(name, layers):
    vae = build_preset(name, device="meta")
    assert vae.config.layers == layers and vae.config.add_spatial_mean == (name != "raev2-dinov3-l-k1")
    assert vae.latents_mean.shape == (1024, 16, 16) and vae.latents_mean.numel() == 262_144
    assert sum(parameter.numel() for parameter in vae.parameters()) == 415_351_552


@pytest.mark.parametrize(
    ("feature_dim", "width", "layers", "heads", "inner", "exact", "table"),
    [
        (1024, 768, 12, 12, 3072, 86_434_560, 197_376),
        (1024, 1024, 24, 16, 4096, 304_149_248, 263_168),
        (1024, 1152, 28, 16, 4096, 415_351_552, 296_064),
        (1152, 1152, 28, 16, 4096, 415_499_008, 296_064),
    ],
)
def test_decoder_parameters(feature_dim, width, layers, heads, inner, exact, table):
    """Section 1 of the specification; the published table has a row for the class token."""
    with torch.device("meta"):
        decoder = RAEDecoder(feature_dim, width, layers, heads, inner, 16, (16, 16))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == exact
    assert decoder.pos_embed.table.numel() + width == table


class TestBadInput:
    @pytest.mark.parametrize(
        ("config", "message"),
        [
            ({"layers": []}, r"layers must be rising numbers of blocks from 0, got \[\]"),
            ({"layers": [2, 1]}, r"layers must be rising .*, got \[2, 1\]"),
            ({"layers": [-1]}, "layers in the config of AutoencoderRAEv2 must be from 0 to 1024, got -1"),
            ({"layer_reduction": "max"}, "layer_reduction must be 'mean' or 'sum', got 'max'"),
            ({"decoder_output": "rgb"}, "decoder_output must be 'pixels' or 'normalized', got 'rgb'"),
            ({"latent_channels": 8}, "latent_channels must be feature_dim 32, got 8"),
        ],
    )
    def test_configs(self, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_raev2(**config)

    def test_layers_that_the_encoder_lacks(self, images):
        with pytest.raises(ValueError, match=r"image_encoder must have the layers \[0, 3\], got one of 3 layers"):
            tiny_raev2(layers=[0, 3]).encode(images)

    def test_images_of_another_size(self):
        with pytest.raises(ValueError, match="pixel_values must have images of 32 x 32, .* got 40 x 32"):
            tiny_raev2().encode(torch.zeros(1, 3, 40, 32))
