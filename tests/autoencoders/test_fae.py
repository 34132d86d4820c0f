import pytest
import torch
from factories import tiny_encoder, tiny_fae, tiny_identity_fae
from torch.nn import functional as F

from hf_fae import AutoencoderFAE


@pytest.fixture
def vae():
    return tiny_fae()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32) * 2 - 1


def test_shapes(vae, images):
    posterior = vae.encode(images).latent_dist
    latents = posterior.sample()
    assert latents.shape == posterior.mode().shape == (2, 4, 4, 4)
    assert vae.decode(latents).sample.shape == images.shape
    assert vae.decode_features(latents).shape == (2, 16, 32)
    assert vae(images).sample.shape == images.shape


def test_encoder_wiring(vae, images):
    """params = W2 silu(attention(q, k, v) + W_skip x), no output projection in between (fae spec, section 4)."""
    features, _ = vae.extract_features(images)
    x = (features - vae.features_mean) / vae.features_std
    attn, heads = vae.encoder.attn, 4 * 32 // 32
    q, k, v = (layer(x).view(2, 16, heads, 32).transpose(1, 2) for layer in (attn.to_q, attn.to_k, attn.to_v))
    attended = ((q @ k.transpose(-1, -2) / 32**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)
    moments = vae.encoder.proj_out(F.silu(attended + vae.encoder.to_skip(x)))
    mean, logvar = moments.transpose(1, 2).view(2, 8, 4, 4).chunk(2, 1)
    posterior = vae.encode(images).latent_dist
    torch.testing.assert_close(posterior.mode(), (mean - vae.latents_mean) / vae.latents_std, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(posterior.std, (0.5 * logvar).exp() / vae.latents_std, atol=1e-5, rtol=1e-4)


def test_latents_are_normalised(vae, images):
    """Statistics change what generators see, and nothing else."""
    latents = vae.encode(images).latent_dist.mode()
    picture, features = vae.decode(latents).sample, vae.decode_features(latents)
    raw = vae.denormalize_latents(latents)
    mean, std = raw.mean((0, 2, 3)).view(4, 1, 1), raw.std((0, 2, 3)).view(4, 1, 1)
    vae.set_latent_statistics(mean, std)
    normalised = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(normalised.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(4), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(vae.decode(normalised).sample, picture, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(vae.decode_features(normalised), features, atol=1e-5, rtol=1e-4)


def test_decode_is_feature_decoder_then_pixel_decoder(vae, images):
    latents = vae.encode(images).latent_dist.mode()
    features = vae.decode_features(latents)
    torch.testing.assert_close(vae.decode_pixels(features).sample, vae.decode(latents).sample, atol=1e-4, rtol=1e-3)


def test_feature_statistics_are_undone(images):
    """`decode_features` speaks the encoder's own scale: a perfect decoder would give the features back."""
    vae = tiny_fae()
    features, _ = vae.extract_features(images)
    standard = vae.standardize_features(features)
    torch.testing.assert_close(standard * vae.features_std + vae.features_mean, features)
    vae.set_feature_statistics(features.mean((0, 1)), features.std((0, 1)))
    standard = vae.standardize_features(features)
    torch.testing.assert_close(standard.std((0, 1)), torch.ones(32), atol=1e-3, rtol=1e-3)


def test_sampling_follows_the_generator(vae, images):
    posterior = vae.encode(images).latent_dist
    first, again, other = (posterior.sample(torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    draws = torch.stack([posterior.sample() for _ in range(4000)])
    torch.testing.assert_close(draws.mean(0), posterior.mode(), atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std, atol=0.15, rtol=0.1)
    sampled = vae(images, sample_posterior=True, generator=torch.Generator().manual_seed(0)).sample
    torch.testing.assert_close(sampled, vae.decode(first).sample)


@pytest.mark.parametrize("size", [(16, 16), (32, 64), (48, 16), (64, 64)])
def test_any_grid(vae, size):
    images = torch.rand(1, 3, *size) * 2 - 1
    latents = vae.encode(images).latent_dist.mode()
    assert latents.shape == (1, 4, size[0] // 8, size[1] // 8)
    assert vae.decode(latents).sample.shape == images.shape


def test_output_may_be_finer_than_the_encoder(images):
    """A pixel decoder with larger patches paints 512 px from the tokens of 256."""
    vae = tiny_fae(patch_size=16, sample_size=64)
    images = F.interpolate(images, size=64)
    assert vae.encode(images).latent_dist.mode().shape == (2, 4, 4, 4)
    assert vae(images).sample.shape == images.shape


@pytest.mark.parametrize("family", ["dinov2_with_registers", "siglip", "siglip2", "dinov3_vit", "vit_mae", "clip"])
def test_any_encoder(family, images):
    vae = AutoencoderFAE.from_encoder(
        tiny_encoder(family),
        latent_channels=6,
        sample_size=32,
        patch_size=8,
        encoder_attention_head_dim=32,
        decoder_num_layers=1,
        decoder_attention_head_dim=16,
        pixel_hidden_size=32,
        pixel_num_layers=1,
        pixel_num_attention_heads=2,
    )
    assert vae.config.feature_dim == 32
    assert vae(images).sample.shape == images.shape


def test_linear_encoder(images):
    vae = tiny_fae(encoder_type="linear")
    assert isinstance(vae.encoder, torch.nn.Linear) and vae(images).sample.shape == images.shape


class TestIdentityEncoder:
    """The features themselves as latents (Table 5, diffusion on raw features)."""

    def test_latents_are_the_standardised_features(self, images):
        vae = tiny_identity_fae()
        features, grid = vae.extract_features(images)
        posterior = vae.encode(images).latent_dist
        standard = (features - vae.features_mean) / vae.features_std
        expected = standard.transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(posterior.mode(), (expected - vae.latents_mean) / vae.latents_std)
        assert posterior.std.max() < 1e-6

    def test_features_come_back_and_pixels_are_those_of_the_encoders_features(self, images):
        vae = tiny_identity_fae()
        features, grid = vae.extract_features(images)
        latents = vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(vae.decode_features(latents), features, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            vae.decode(latents).sample, vae.decode_pixels(features, grid).sample, atol=1e-4, rtol=1e-4
        )

    @pytest.mark.parametrize("name, value", [("latent_channels", 4), ("decoder_num_layers", 2)])
    def test_shapes_that_make_no_sense(self, name, value):
        config = {"latent_channels": 32, "decoder_num_layers": 0, name: value}
        with pytest.raises(ValueError, match=rf"{name} must be \d+ for encoder_type 'identity', got {value}"):
            tiny_fae(encoder_type="identity", **config)


def test_slicing_changes_nothing(vae, images):
    expected = vae(images).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(images).sample, expected, atol=1e-5, rtol=1e-4)
    vae.disable_slicing()
    assert torch.equal(vae(images).sample, expected)


def test_tiling(vae):
    small, large = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 3, 72, 40) * 2 - 1
    expected = vae(small).sample
    sizes = []
    vae.pixel_decoder.register_forward_hook(lambda module, args, output: sizes.append(tuple(output.shape[2:])))
    vae.enable_tiling()
    assert torch.equal(vae(small).sample, expected)  # one tile is enough
    sizes.clear()
    assert vae(large).sample.shape == large.shape
    assert len(sizes) == 6 and set(sizes) == {(32, 32)}


def test_tiles_of_a_local_function_leave_no_seam():
    from hf_fae.latents import blend_tiles

    latents = torch.randn(2, 3, 11, 6)
    blended = blend_tiles(lambda part: part.repeat_interleave(2, 2).repeat_interleave(2, 3), latents, (4, 4), 1, 2)
    torch.testing.assert_close(blended, latents.repeat_interleave(2, 2).repeat_interleave(2, 3))


def test_frozen_encoder_never_trains(vae, images):
    before = {name: p.clone() for name, p in vae.image_encoder.named_parameters()}
    vae.train()
    assert not vae.image_encoder.model.training
    vae(images, sample_posterior=True).sample.mean().backward()
    assert all(p.grad is None for p in vae.image_encoder.parameters())
    assert vae.encoder.to_skip.weight.grad is not None
    assert all(torch.equal(p, before[name]) for name, p in vae.image_encoder.named_parameters())


def test_encoder_goes_into_its_own_folder(vae, images, tmp_path):
    vae.save_pretrained(tmp_path)
    assert (tmp_path / "image_encoder.d" / "model.safetensors").is_file()
    from safetensors import safe_open

    with safe_open(tmp_path / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert not any("image_encoder" in key for key in file.keys())
    loaded = AutoencoderFAE.from_pretrained(tmp_path)
    assert torch.equal(loaded.encode(images).latent_dist.mode(), vae.encode(images).latent_dist.mode())


def test_encoder_may_be_absent(vae, images, tmp_path):
    latents = vae.encode(images).latent_dist.mode()
    vae.save_pretrained(tmp_path / "whole")
    light = AutoencoderFAE.from_pretrained(tmp_path / "whole", image_encoder=None)
    assert torch.equal(light.decode(latents).sample, vae.decode(latents).sample)
    with pytest.raises(ValueError, match=r"without its frozen encoder; call load_encoder\(\)"):
        light.encode(images)

    light.save_pretrained(tmp_path / "light")
    assert not (tmp_path / "light" / "image_encoder.d").exists()
    lighter = AutoencoderFAE.from_pretrained(tmp_path / "light")
    assert lighter.image_encoder is None
    with pytest.raises(ValueError, match="config.image_encoder_id is None"):
        lighter.load_encoder()
    lighter.load_encoder(tmp_path / "whole" / "image_encoder.d")
    assert torch.equal(lighter.encode(images).latent_dist.mode(), latents)


def test_saving_without_encoder_leaves_none_behind(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    vae.image_encoder = None
    vae.save_pretrained(tmp_path)
    assert AutoencoderFAE.from_pretrained(tmp_path).image_encoder is None


def test_hub_that_does_not_answer_is_no_absent_encoder(tmp_path, monkeypatch):
    from hf_fae.autoencoders.frozen_encoder import _is_on_hub

    with pytest.raises(OSError, match="the cache does not know whether 'user/fae' has a frozen encoder"):
        _is_on_hub("user/fae", "config.json", {"cache_dir": tmp_path, "local_files_only": True})


def test_encoder_is_found_by_the_id_in_the_config(images, tmp_path):
    tiny_encoder().save_pretrained(tmp_path / "encoder")
    vae = tiny_fae(with_encoder=False, image_encoder_id=str(tmp_path / "encoder"))
    vae.load_encoder()
    assert torch.equal(vae.image_encoder(images).last_hidden_state, tiny_encoder()(images).last_hidden_state)


def test_loading_in_half_precision_casts_the_encoder_too(vae, tmp_path):
    vae.save_pretrained(tmp_path)
    loaded = AutoencoderFAE.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.image_encoder.dtype == loaded.dtype == torch.bfloat16


def test_real_encoder(assets):
    """DINOv2-small: 256 px become 224 for the encoder and a 16x16 grid of latents."""
    from hf_fae import VisionEncoder

    encoder = VisionEncoder.from_pretrained(assets / "dinov2-small", dtype=torch.float32)
    vae = AutoencoderFAE.from_encoder(
        encoder,
        latent_channels=16,
        decoder_num_layers=1,
        pixel_hidden_size=64,
        pixel_num_layers=1,
        pixel_num_attention_heads=1,
    )
    images = torch.rand(1, 3, 256, 256) * 2 - 1
    features, grid = vae.extract_features(images)
    assert grid == (16, 16) and features.shape == (1, 256, 384)
    assert vae(images).sample.shape == images.shape
