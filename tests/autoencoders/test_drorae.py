"""RAE and DRoRAE: their numbers and their bounds."""

import math

import pytest
import torch
from factories import tiny_drorae, tiny_encoder, tiny_fae_dit_pipeline, tiny_lightning_dit, tiny_rae
from torch.nn import functional as F

from hf_fae import AutoencoderDRoRAE
from hf_fae.autoencoders.layer_fusion import backbone_norm
from hf_fae.latents import normalized_posterior


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


class TestLatents:
    @pytest.mark.parametrize("beta", [0.05, 0.2, 0.5])
    def test_angle_to_the_last_layer_is_bounded(self, beta):
        vae = tiny_drorae(fusion_weight=beta)
        features = backbone_norm(torch.randn(64, 3, 16, 32, generator=torch.Generator().manual_seed(3)))
        fused, last = vae.fuse(features), features[:, -1]
        angle = F.cosine_similarity(fused, last, dim=-1).clamp(-1, 1).acos().max()
        if beta < 0.5:
            assert angle <= math.asin(beta / (1 - beta)) + 1e-3  # 14.48 degrees at 0.2
        assert angle > 0.01
        change = beta * (vae.fusion(features) - last)
        assert (change.norm(dim=-1) <= 2 * beta * last.norm(dim=-1) * (1 + 1e-4)).all()

    def test_of_rae_are_the_last_layer_normalised_by_element(self, images):
        vae = tiny_rae()
        tokens = vae.image_encoder(images, (4, 4), final_norm="plain").last_hidden_state
        torch.testing.assert_close(tokens.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)
        torch.testing.assert_close(tokens.var(-1, correction=0), torch.ones(2, 16), atol=1e-3, rtol=0)
        expected = (tokens.transpose(1, 2).unflatten(2, (4, 4)) - vae.latents_mean) / vae.latents_std
        posterior = vae.encode(images).latent_dist
        torch.testing.assert_close(posterior.mode(), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(posterior.sample(), posterior.mode())
        torch.testing.assert_close(vae.decode_features(posterior.mode()), tokens, atol=1e-5, rtol=1e-5)

    def test_beta_zero_is_rae(self, images):
        drorae, rae = tiny_drorae(fusion_weight=0.0), tiny_rae()
        rae.decoder.load_state_dict(drorae.decoder.state_dict())
        torch.testing.assert_close(drorae.encode(images).latent_dist.mode(), rae.encode(images).latent_dist.mode())
        torch.testing.assert_close(drorae(images).sample, rae(images).sample, atol=1e-5, rtol=1e-5)

    def test_a_little_beta_changes_little(self, images):
        small, zero = (tiny_drorae(fusion_weight=beta).encode(images).latent_dist.mode() for beta in (1e-4, 0.0))
        torch.testing.assert_close(small, zero, atol=2e-3, rtol=2e-3)
        assert not torch.equal(small, zero)

    def test_mean_of_the_last_layers(self, images):
        vae = tiny_drorae(fusion_type="mean", fusion_layers=2, fusion_weight=1.0)
        states = vae.image_encoder(images, (4, 4), output_hidden_states=True).hidden_states
        mean = sum(F.layer_norm(state, (32,), eps=1e-6) for state in states[-2:]) / 2
        fused = vae.fuse(vae.extract_features(images)[0])
        torch.testing.assert_close(fused, F.layer_norm(mean, (32,), eps=1e-6), atol=1e-5, rtol=1e-4)
        assert not any(name.startswith("fusion") for name, _ in vae.named_parameters())

    def test_under_autocast(self, images):
        vae = tiny_drorae()
        expected = vae.encode(images).latent_dist.mode()
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encode(images).latent_dist.mode()
        torch.testing.assert_close(latents.float(), expected, atol=0.2, rtol=0.1)

    def test_moments_survive_a_cache(self, images):
        vae = tiny_drorae()
        posterior = vae.encode(images).latent_dist
        moments = torch.cat([vae.denormalize_latents(posterior.mean), posterior.logvar], dim=1)
        again = normalized_posterior(moments, vae.latents_mean, vae.latents_std)
        torch.testing.assert_close(again.sample(), posterior.mode(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["dinov2", "dinov2_with_registers", "siglip", "siglip2", "dinov3_vit", "vit_mae"])
@pytest.mark.parametrize("depth, layers", [(3, 3), (3, 1), (4, 2)])
def test_encoders_of_any_depth_and_prefix(family, depth, layers, images):
    vae = AutoencoderDRoRAE.from_encoder(
        tiny_encoder(family, num_hidden_layers=depth),
        sample_size=32,
        patch_size=8,
        fusion_layers=layers,
        expert_hidden_size=16,
        decoder_hidden_size=32,
        decoder_num_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )
    assert vae.extract_features(images)[0].shape == (2, layers, 16, 32)
    assert vae(images).sample.shape == images.shape


def test_slicing_changes_nothing(images):
    vae = tiny_drorae()
    expected = vae(images).sample
    vae.enable_slicing()
    torch.testing.assert_close(vae(images).sample, expected, atol=1e-5, rtol=1e-4)


def test_pipeline_draws_with_it():
    pipe = tiny_fae_dit_pipeline(
        vae=tiny_drorae(with_encoder=False), transformer=tiny_lightning_dit(in_channels=32), num_inference_steps=2
    )
    assert pipe([1, 2]).images[1].size == (32, 32)


class TestBadInput:
    @pytest.mark.parametrize(
        "config, message",
        [
            ({"latent_channels": 8}, "latent_channels must be feature_dim 32, got 8"),
            ({"fusion_type": "sum"}, "fusion_type must be 'experts', 'mean' or 'none', got 'sum'"),
            ({"fusion_layers": 0}, "fusion_layers must be positive, .* got 0"),
            ({"fusion_type": "none", "fusion_layers": 2}, "fusion_layers must be .* 1 for fusion_type 'none', got 2"),
            ({"fusion_weight": 1.5}, "fusion_weight must be from 0 to 1, got 1.5"),
            ({"decoder_num_attention_heads": 5}, "decoder_num_attention_heads must divide the width 32, got 5"),
            ({"expert_activation": "tanh"}, "expert_activation must be .*, got 'tanh'"),
        ],
    )
    def test_configs(self, config, message):
        with pytest.raises(ValueError, match=message):
            tiny_drorae(**config)

    def test_more_layers_than_the_encoder_has(self, images):
        with pytest.raises(ValueError, match="image_encoder must have fusion_layers 9, got 3 layers"):
            tiny_drorae(fusion_layers=9).encode(images)

    def test_images_of_another_size(self):
        with pytest.raises(ValueError, match="pixel_values must have images of 32 x 32, .* got 40 x 32"):
            tiny_drorae().encode(torch.zeros(1, 3, 40, 32))
        with pytest.raises(ValueError, match=r"latents must have sides \(4, 4\), got \(5, 4\)"):
            tiny_drorae().decode(torch.zeros(1, 32, 5, 4))

    def test_features_of_another_shape(self):
        with pytest.raises(ValueError, match=r"features must have shape \(batch, 3, 16, 32\) .* got \(1, 16, 32\)"):
            tiny_drorae().encode_features(torch.zeros(1, 16, 32))

    def test_no_encoder(self, images):
        with pytest.raises(ValueError, match="image_encoder is None"):
            tiny_drorae(with_encoder=False).encode(images)

    def test_sizes_and_tiles(self):
        """There is one size: a pipeline knows before it draws."""
        vae = tiny_drorae(with_encoder=False)
        pipe = tiny_fae_dit_pipeline(vae=vae, transformer=tiny_lightning_dit(in_channels=32))
        with pytest.raises(ValueError, match="height and width must be 32 x 32, got 64 x 32"):
            pipe(1, height=64)
        with pytest.raises(NotImplementedError, match="AutoencoderDRoRAE"):
            vae.enable_tiling()
