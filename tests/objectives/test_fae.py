import pytest
import torch
from factories import (
    tiny_drorae,
    tiny_fae,
    tiny_rae,
)
from objective_inputs import batch, numbers, trained
from torch import nn
from torch.nn import functional as F

from hf_fae.losses.discriminators import PatchDiscriminator
from hf_fae.losses.gan import AdversarialLoss
from hf_fae.objectives.base import sample_posterior
from hf_fae.objectives.drorae import DRoRAEObjective, add_decoder_noise
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


class TestDRoRAEObjective:
    def test_noise_has_the_scale_of_raes_code(self):  # rae_drorae spec, section 1: tau 0.8
        noise = add_decoder_noise(torch.zeros(4000, 16, 32), 0.8, numbers())
        sigma = noise.flatten(1).std(1)
        assert sigma.mean().item() == pytest.approx(0.40, abs=0.01)
        assert sigma.square().mean().sqrt().item() == pytest.approx(0.4619, abs=0.01)
        assert sigma.min() < 0.02 and 0.76 < sigma.max() < 0.9  # one uniform number for each image
        assert noise.mean().abs() < 1e-3

    @pytest.mark.parametrize("make, part", [(tiny_rae, "decoder"), (tiny_drorae, "fusion"), (tiny_drorae, "decoder")])
    def test_trains_one_part(self, make, part):
        objective = DRoRAEObjective(make(), part)
        assert trained(objective) == {f"model.{part}"}
        assert [p.shape for p in objective.parameter_groups()[0]["params"]] == [
            p.shape for p in getattr(objective.model, part).parameters()
        ]

    def test_frozen_parts_stay_in_eval_mode(self):
        model = DRoRAEObjective(tiny_drorae(), "fusion").train().model
        assert model.fusion.training and not model.decoder.training and not model.image_encoder.training

    def test_terms(self):
        model, inputs = tiny_drorae(), batch()
        objective = DRoRAEObjective(model, "decoder", decoder_noise=0.5).train()
        losses = objective(inputs, numbers(3))
        tokens = model.fuse(model.extract_features(inputs["pixel_values"])[0])
        random = numbers(3)
        sigma = 0.5 * random.uniform(4).view(-1, 1, 1)
        decoded = model.decode_tokens(tokens + sigma * random.normal(4, 16, 32))
        torch.testing.assert_close(losses["loss"], F.l1_loss(decoded / 2, inputs["pixel_values"] / 2))

    def test_without_noise_it_is_the_tokenizers_own_reconstruction(self):
        """In eval mode always; statistics of latents play no part, as they come and go."""
        model, inputs = tiny_drorae(), batch()
        expected = F.l1_loss(model(inputs["pixel_values"]).sample / 2, inputs["pixel_values"] / 2)
        for objective in (DRoRAEObjective(model).eval(), DRoRAEObjective(model, decoder_noise=0.0).train()):
            torch.testing.assert_close(objective(inputs, numbers())["loss"], expected)

    def test_discriminator_learns_from_reconstructions_without_noise(self):
        model, inputs, seen = tiny_rae(), batch(), []
        discriminator = PatchDiscriminator(32)
        discriminator.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        objective = DRoRAEObjective(model, adversarial=AdversarialLoss(discriminator)).train()
        objective(inputs, numbers())
        noisy, pairs = seen
        clean = model(inputs["pixel_values"]).sample.clamp(-1, 1)
        torch.testing.assert_close(pairs[4:], clean, atol=1 / 127, rtol=0)
        assert (noisy - clean).abs().max() > 0.05

    def test_adaptive_weight_of_the_fusion_is_taken_at_the_frozen_last_layer(self):
        """Its gradient is computed and thrown away: no optimiser has the layer."""
        model = tiny_drorae()
        objective = DRoRAEObjective(model, "fusion", adversarial=AdversarialLoss(PatchDiscriminator(32), 0.75, True))
        objective.train().before_step(0)
        losses = objective(batch(), numbers())
        losses["loss"].backward()
        assert losses["adversarial/adaptive_weight"] > 0
        optimised = {id(p) for group in objective.parameter_groups() for p in group["params"]}
        assert not {id(p) for p in model.decoder.parameters()} & optimised
        assert [name for name, p in model.decoder.named_parameters() if p.grad is not None] == ["proj_out.weight"]
        objective.before_step(1)
        assert model.decoder.proj_out.weight.grad is None

    @pytest.mark.parametrize(
        "make, arguments, message",
        [
            (tiny_rae, {"trained": "fusion"}, "trained must be 'decoder' .* got 'fusion' with fusion_type 'none'"),
            (lambda: tiny_drorae(fusion_weight=0.0), {"trained": "fusion"}, "got 'fusion' .* fusion_weight 0.0"),
            (tiny_rae, {"trained": "encoder"}, "trained must be 'decoder' or 'fusion', got 'encoder'"),
            (tiny_rae, {"decoder_noise": -0.1}, "decoder_noise must be finite and not negative, got -0.1"),
            (tiny_rae, {"reconstruction_loss": "l3"}, "reconstruction_loss must be .* got 'l3'"),
        ],
    )
    def test_bad_input(self, make, arguments, message):
        with pytest.raises(ValueError, match=message):
            DRoRAEObjective(make(), **arguments)


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))

    def forward(self, features, grid):
        return self.value.expand(len(features), 3, 8 * grid[0], 8 * grid[1])
