"""RAE and DRoRAE: their numbers, their bounds, and diffusers' `AutoencoderRAE` beside them."""

import math

import pytest
import torch
from diffusers import AutoencoderRAE
from factories import tiny_drorae, tiny_encoder, tiny_fae_dit_pipeline, tiny_lightning_dit, tiny_rae
from torch.nn import functional as F

from hf_fae import AutoencoderDRoRAE
from hf_fae.autoencoders.layer_fusion import LayerFusion, backbone_norm
from hf_fae.latents import normalized_posterior


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def published():
    """A diffusers `AutoencoderRAE` of 256 px images, as small as it gets, with weights and statistics of its own."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        rae = AutoencoderRAE(
            encoder_hidden_size=64,
            encoder_num_hidden_layers=3,
            decoder_hidden_size=32,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=80,
            latents_mean=torch.randn(64, 16, 16),
            latents_std=torch.rand(64, 16, 16) + 0.5,
        ).eval()
        for parameter in rae.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return rae


class TestFusion:
    def layers(self, count=5):
        return backbone_norm(torch.randn(3, count, 16, 32, generator=torch.Generator().manual_seed(1)))

    def fusion(self, count=5):
        torch.manual_seed(2)
        fusion = LayerFusion(32, count, 24, "gelu")
        torch.nn.init.normal_(fusion.router.weight)
        return fusion

    def test_equals_plain_formulas(self):
        layers, fusion = self.layers(), self.fusion()
        weights = torch.cat(list(layers.unbind(1)), dim=-1) @ fusion.router.weight.T + fusion.router.bias
        mixed = torch.zeros(3, 16, 32)
        for k, expert in enumerate(fusion.experts):
            hidden = layers[:, k] @ expert.proj_in.weight.T + expert.proj_in.bias
            hidden = (hidden - hidden.mean(-1, keepdim=True)) / (
                hidden.var(-1, keepdim=True, correction=0) + 1e-6
            ).sqrt()
            said = F.gelu(hidden) @ expert.proj_out.weight.T + expert.proj_out.bias
            mixed += weights[..., k : k + 1] * F.layer_norm(said, (32,), eps=1e-6)
        expected = F.layer_norm(mixed / weights.norm(dim=-1, keepdim=True), (32,), eps=1e-6)
        torch.testing.assert_close(fusion(layers), expected, atol=1e-4, rtol=1e-4)
        assert (weights < 0).any() and (weights.abs() > 1).any()  # signed, and no shares of a whole

    def test_the_divisor_cancels_under_the_norm(self):
        layers, fusion = self.layers(), self.fusion()
        reference = fusion(layers)
        fusion.router.weight.data *= 100
        fusion.router.bias.data *= 100
        torch.testing.assert_close(fusion(layers), reference, atol=2e-5, rtol=1e-4)

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


class TestLatents:
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


class TestDiffusers:
    """The same weights in both."""

    def images(self):
        return torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def test_latents_and_pixels(self, published):
        vae, pixels = AutoencoderDRoRAE.from_rae(published), self.images()
        latents = published.encode(pixels).latent
        torch.testing.assert_close(vae.encode(pixels * 2 - 1).latent_dist.mode(), latents, atol=1e-4, rtol=0)
        theirs = published.decode(latents).sample
        torch.testing.assert_close(vae.decode(latents).sample / 2 + 0.5, theirs, atol=1e-4, rtol=0)

    @torch.no_grad()
    def test_there_and_back(self, published, tmp_path):
        AutoencoderDRoRAE.from_rae(published).to_rae().save_pretrained(tmp_path)
        loaded, pixels = AutoencoderRAE.from_pretrained(tmp_path), self.images()
        for name, value in published.state_dict().items():
            torch.testing.assert_close(loaded.state_dict()[name], value)
        torch.testing.assert_close(loaded(pixels).sample, published(pixels).sample, atol=1e-5, rtol=1e-5)

    @torch.no_grad()
    def test_saved_with_its_encoder(self, published, tmp_path):
        vae, pixels = AutoencoderDRoRAE.from_rae(published), self.images() * 2 - 1
        vae.save_pretrained(tmp_path)
        assert torch.equal(AutoencoderDRoRAE.from_pretrained(tmp_path)(pixels).sample, vae(pixels).sample)

    def test_is_phase_one_of_drorae(self, published):
        vae = AutoencoderDRoRAE.from_rae(
            published, fusion_type="experts", fusion_layers=3, expert_hidden_size=32, fusion_weight=0.2
        )
        assert len(vae.fusion.experts) == 3
        assert torch.equal(vae.decoder.proj_in.weight, published.decoder.decoder_embed.weight)

    def test_what_has_no_counterpart(self, published):
        other = AutoencoderRAE(
            encoder_hidden_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1, scaling_factor=0.5
        )
        with pytest.raises(ValueError, match="rae must have reshape_to_2d and scaling_factor 1, got True and 0.5"):
            AutoencoderDRoRAE.from_rae(other)
        vae = AutoencoderDRoRAE.from_encoder(
            tiny_encoder("dinov2"),
            sample_size=32,
            patch_size=8,
            fusion_type="none",
            decoder_hidden_size=32,
            decoder_num_layers=1,
            decoder_num_attention_heads=2,
        )
        with pytest.raises(ValueError, match="image_encoder must be one of .*, got 'dinov2'"):
            vae.to_rae()


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
