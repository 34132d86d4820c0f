import pytest
import torch
from factories import tiny_fae
from objective_inputs import batch, numbers, trained
from torch import nn
from torch.nn import functional as F

from hf_fae.objectives.base import sample_posterior
from hf_fae.objectives.fae import FeatureObjective, NoisyLatentObjective, PixelObjective, kl_divergence
from hf_fae.utils.image_metrics import feature_cosine


class TestKL:
    @pytest.mark.parametrize(
        ("mean", "variance", "kl"), [(0.0, 1.0, 0.0), (1.0, 1.0, 0.5), (0.0, 0.25, 0.3181), (2.0, 1.0, 2.0)]
    )
    def test_kl(self, mean, variance, kl):  # fae spec, section 1
        shape = (2, 4, 3, 3)
        value = kl_divergence(torch.full(shape, mean), torch.full(shape, variance).log())
        assert value.item() == pytest.approx(kl, abs=1e-4)

    def test_kl_of_half_precision_is_computed_in_fp32(self):
        value = kl_divergence(torch.full((1000,), 0.1, dtype=torch.bfloat16), torch.zeros(1000, dtype=torch.bfloat16))
        assert value.dtype == torch.float32 and value.item() == pytest.approx(0.005, rel=2e-3)


class TestFeatureObjective:
    def test_trains_encoder_and_feature_decoder(self):
        assert trained(FeatureObjective(tiny_fae())) == {"model.encoder", "model.feature_decoder"}

    def test_terms(self):
        model, inputs = tiny_fae(), batch()
        objective = FeatureObjective(model, kl_weight=0.25).eval()
        assert not model.latents_mean.any() and (model.latents_std == 1).all()  # this stage defines the latents
        losses = objective(inputs, numbers(3))

        features, grid = model.extract_features(inputs["pixel_values"])
        posterior = model.encode_features(features, grid).latent_dist
        decoded = model.decode_features(sample_posterior(posterior, numbers(3)))
        mse = F.mse_loss(model.standardize_features(decoded), model.standardize_features(features))
        torch.testing.assert_close(losses["feature_mse"], mse)
        torch.testing.assert_close(losses["kl"], posterior.kl().mean() / posterior.mean[0].numel())
        torch.testing.assert_close(losses["loss"], mse + 0.25 * losses["kl"])
        torch.testing.assert_close(losses["feature_cosine"], feature_cosine(decoded, features))

    def test_frozen_parts_stay_in_eval_mode(self):
        objective = FeatureObjective(tiny_fae()).train()
        assert objective.model.encoder.training and objective.model.feature_decoder.training
        assert not objective.model.pixel_decoder.training and not objective.model.image_encoder.training


class TestNoisyLatentObjective:
    def test_trains_the_feature_decoder(self):
        assert trained(NoisyLatentObjective(tiny_fae(), 0.3)) == {"model.feature_decoder"}

    def test_is_the_error_of_the_noisy_latents_features(self):
        model, inputs = tiny_fae(), batch()
        statistics = model.latents_mean.clone(), model.latents_std.clone()
        losses = NoisyLatentObjective(model, 0.3).eval()(inputs, numbers(3))
        assert torch.equal(model.latents_mean, statistics[0]) and torch.equal(model.latents_std, statistics[1])

        random = numbers(3)
        features, grid = model.extract_features(inputs["pixel_values"])
        latents = sample_posterior(model.encode_features(features, grid).latent_dist, random)
        decoded = model.decode_features(latents + 0.3 * random.normal(*latents.shape))
        expected = F.mse_loss(model.standardize_features(decoded), model.standardize_features(features))
        torch.testing.assert_close(losses["loss"], expected)
        torch.testing.assert_close(losses["feature_cosine"], feature_cosine(decoded, features))


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, features, grid):
        return self.value.expand(len(features), 3, 8 * grid[0], 8 * grid[1])


class TestPixelObjective:
    @pytest.mark.parametrize("stage", ["Ib", "II"])
    def test_trains_the_pixel_decoder(self, stage):
        assert trained(PixelObjective(tiny_fae(), stage)) == {"model.pixel_decoder"}

    def test_stage_ib_adds_noise_of_fixed_strength_to_the_original_features(self):
        model = tiny_fae()
        features, grid = model.extract_features(batch(64)["pixel_values"])
        noise = PixelObjective(model, "Ib", noise_sigma=0.4).decoder_input(features, grid, numbers())
        noise = noise - model.standardize_features(features)
        assert noise.std().item() == pytest.approx(0.4, rel=0.01) and abs(noise.mean()) < 0.01

    def test_stage_ii_decodes_a_sample_of_the_posterior(self):
        model = tiny_fae()
        features, grid = model.extract_features(batch()["pixel_values"])
        found = PixelObjective(model, "II").decoder_input(features, grid, numbers(5))
        posterior = model.encode_features(features, grid).latent_dist
        wanted = model.decode_features(posterior.mean + posterior.std * numbers(5).normal(*posterior.mean.shape))
        torch.testing.assert_close(found, model.standardize_features(wanted), rtol=1e-4, atol=1e-5)

    def test_stage_ii_with_the_noise_of_a_flow(self):
        model = tiny_fae()
        features, grid = model.extract_features(batch()["pixel_values"])
        found = PixelObjective(model, "II", latent_noise=0.3).decoder_input(features, grid, numbers(5))
        random = numbers(5)
        latents = sample_posterior(model.encode_features(features, grid).latent_dist, random)
        wanted = model.decode_features(latents + 0.3 * random.normal(*latents.shape))
        torch.testing.assert_close(found, model.standardize_features(wanted), rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="latent_noise must be 0 in stage Ib, which decodes no latents, got 0.3"):
            PixelObjective(model, "Ib", latent_noise=0.3)

    @pytest.mark.parametrize(("name", "expected"), [("l2", 0.25**2), ("l1", 0.25)])
    def test_reconstruction_is_on_the_scale_of_pixels_from_0_to_1(self, name, expected):
        model = tiny_fae()
        model.pixel_decoder = Constant(0.5)
        inputs = {"pixel_values": torch.zeros(2, 3, 32, 32)}
        losses = PixelObjective(model, reconstruction_loss=name)(inputs, numbers())
        assert losses["loss"].item() == losses["reconstruction"].item() == pytest.approx(expected)

    def test_perceptual_term(self):
        class Distance(nn.Module):
            def forward(self, images, targets):
                return (images - targets).mean()

        model = tiny_fae()
        model.pixel_decoder = Constant(0.5)
        objective = PixelObjective(model, perceptual=Distance(), perceptual_weight=2.0)
        losses = objective({"pixel_values": torch.zeros(2, 3, 32, 32)}, numbers())
        assert losses["perceptual"].item() == 0.5 and losses["loss"].item() == pytest.approx(0.0625 + 1)

    @pytest.mark.parametrize(("argument", "value"), [("stage", "III"), ("reconstruction_loss", "l3")])
    def test_unknown_choices(self, argument, value):
        with pytest.raises(ValueError, match=f"{argument} must be .* got '{value}'"):
            PixelObjective(tiny_fae(), **{argument: value})
