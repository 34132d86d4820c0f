import math

import pytest
import torch
from factories import (
    tiny_detok,
    tiny_drorae,
    tiny_fae,
    tiny_kl,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_rae,
    tiny_starflow,
)
from torch import nn
from torch.nn import functional as F

from hf_fae.evaluation.reconstruction import feature_cosine
from hf_fae.generators.starflow import STARFlowOutput
from hf_fae.training.adversarial import AdversarialLoss, PatchDiscriminator
from hf_fae.training.objectives import (
    DRoRAEObjective,
    FeatureObjective,
    FlowMatchingObjective,
    NoisyLatentObjective,
    PixelObjective,
    STARFlowObjective,
    add_decoder_noise,
    add_noise,
    dimension_shift,
    kl_divergence,
    sample_posterior,
    shift_time,
)
from hf_fae.training.randomness import ImageRandom


def batch(size=4):
    return {"pixel_values": torch.rand(size, 3, 32, 32) * 2 - 1, "class_labels": torch.arange(size)}


def numbers(seed=0):
    return ImageRandom(seed, first_image=0)


def trained(objective):
    """The parts of the model that are trained, and whether exactly these got gradients."""
    objective.train()(batch(), numbers())["loss"].backward()
    parameters = dict(objective.named_parameters())
    assert all((p.grad is not None) == p.requires_grad for p in parameters.values())
    return {".".join(name.split(".")[:2]) for name, p in parameters.items() if p.requires_grad}


class TestClosedForms:
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

    @pytest.mark.parametrize(
        ("t", "shift", "expected"),
        [(0.1, 0.4, 0.2174), (0.25, 0.4, 0.4545), (0.5, 0.4, 0.7143), (0.7, 0.4, 0.8537), (0.9, 0.4, 0.9574)]
        + [(0.5, 0.7, 0.5882), (0.5, 0.5, 0.6667), (0.5, 0.3, 0.7692), (0.5, 0.2, 0.8333), (0.3, 1.0, 0.3)],
    )
    def test_shift(self, t, shift, expected):  # fae spec, section 1
        assert shift_time(torch.tensor(t), shift).item() == pytest.approx(expected, abs=5e-5)

    @pytest.mark.parametrize(
        ("shape", "t", "expected"),
        [((768, 16, 16), *pair) for pair in ((0.001, 0.006887), (0.1, 0.4350), (0.25, 0.6978), (0.5, 0.8739))]
        + [((768, 16, 16), 0.75, 0.9541), ((768, 16, 16), 0.9, 0.9842)]
        + [((768, 32, 32), 0.001, 0.013681), ((768, 32, 32), 0.5, 0.9327)],
    )
    def test_dimension_shift(self, shape, t, expected):  # rae_drorae spec, section 1
        assert shift_time(torch.tensor(t), dimension_shift(*shape)).item() == pytest.approx(expected, rel=1e-4)

    def test_dimension_shift_of_few_numbers_is_none(self):
        assert dimension_shift(4, 4, 4) == dimension_shift(16, 16, 16) == 1

    def test_shift_moves_towards_noise(self):
        t = (torch.arange(100_000) + 0.5) / 100_000
        assert shift_time(t, 0.4).mean().item() == pytest.approx(0.6486, abs=1e-4)

    def test_shift_is_that_of_the_scheduler(self):
        from diffusers import FlowMatchEulerDiscreteScheduler

        sigmas = torch.linspace(1, 0.1, 10)
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.4)
        scheduler.set_timesteps(sigmas=sigmas.tolist())
        torch.testing.assert_close(scheduler.sigmas[:-1], shift_time(sigmas, 0.4))


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


class Denoiser(nn.Module):
    """Records what it is called with; the answer is what a perfect model for `latents` would give."""

    def __init__(self, latents=None):
        super().__init__()
        self.config = type("Config", (), {"num_classes": 10})
        self.latents = latents

    def forward(self, hidden_states, timestep, class_labels):
        self.called_with = hidden_states, timestep, class_labels
        t = timestep.view(-1, 1, 1, 1) / 1000
        velocity = torch.zeros_like(hidden_states) if self.latents is None else (hidden_states - self.latents) / t
        return type("Output", (), {"sample": velocity})


class TestFlowMatchingObjective:
    def test_trains_the_denoiser(self):
        assert trained(FlowMatchingObjective(tiny_lightning_dit(), tiny_fae())) >= {"model.blocks", "model.proj_in"}

    def test_tokenizer_is_frozen(self):
        objective = FlowMatchingObjective(tiny_lightning_dit(), tiny_fae()).train()
        assert not any(p.requires_grad for p in objective.vae.parameters()) and not objective.vae.encoder.training

    def test_perfect_denoiser_has_no_loss(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        objective.model.latents = objective.latents(batch(), numbers())
        objective.latents = lambda batch, random: objective.model.latents
        assert objective(batch(), numbers())["loss"].item() < 1e-6

    def test_zero_denoiser_has_the_variance_of_the_target(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        latents = 3 * torch.ones(512, 4, 4, 4)
        objective.latents = lambda batch, random: latents
        loss = objective({"class_labels": torch.zeros(512, dtype=torch.long)}, numbers())["loss"]
        assert loss.item() == pytest.approx(9 + 1, rel=0.05)

    def test_path_and_times(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), shift=0.4)
        latents = 100 * torch.ones(4000, 4, 1, 1)
        objective.latents = lambda batch, random: latents
        objective({"class_labels": torch.zeros(4000, dtype=torch.long)}, numbers())
        hidden_states, timestep, _ = objective.model.called_with
        t = timestep / 1000
        assert t.mean().item() == pytest.approx(0.6486, abs=0.02)
        # 100 (1 - t) + t eps
        assert ((hidden_states.mean((1, 2, 3)) / 100 - (1 - t)).abs() < 0.03).all()

    def test_latents_are_normalised_samples(self):
        vae, inputs = tiny_fae(), batch()
        objective = FlowMatchingObjective(tiny_lightning_dit(), vae)
        latents = objective.latents(inputs, numbers(2))
        posterior = vae.encode(inputs["pixel_values"]).latent_dist
        torch.testing.assert_close(latents, sample_posterior(posterior, numbers(2)))

    def test_cached_moments_give_the_latents_of_the_images(self):
        vae, inputs = tiny_fae(), batch()
        vae.set_latent_statistics(torch.zeros_like(vae.latents_mean), torch.ones_like(vae.latents_std))
        posterior = vae.encode(inputs["pixel_values"]).latent_dist
        cached = {"moments": torch.cat([posterior.mean, posterior.logvar], dim=1)}
        vae.set_latent_statistics(torch.full_like(vae.latents_mean, 0.5), torch.full_like(vae.latents_std, 2.0))
        objective = FlowMatchingObjective(tiny_lightning_dit(), vae)
        from_images = objective.latents(inputs, numbers())
        vae.image_encoder = None
        torch.testing.assert_close(objective.latents(cached, numbers()), from_images, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("make", [tiny_fae, tiny_drorae, tiny_detok, tiny_maetok])
    def test_latents_are_those_of_encode(self, make):
        """Though they are made without looking for NaN, for which the host would wait in every step."""
        vae, inputs = make(), batch()
        latents = FlowMatchingObjective(tiny_lightning_dit(), vae).latents(inputs, numbers())
        expected = sample_posterior(vae.encode(inputs["pixel_values"]).latent_dist, numbers())
        assert torch.equal(latents, expected.float())

    def test_loss_by_noise_time(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae())
        objective.latents = lambda batch, random: 3 * torch.ones(5000, 4, 1, 1)
        losses = objective({"class_labels": torch.zeros(5000, dtype=torch.long)}, numbers())
        t = objective.model.called_with[1] / 1000
        pairs = {name: pair for name, pair in losses.items() if name.startswith("loss_t/")}
        assert list(pairs) == [f"loss_t/0.{i}" for i in range(10)]
        for i, (_, count) in enumerate(pairs.values()):
            assert count == ((t >= i / 10) & (t < (i + 1) / 10)).sum()
        total, count = torch.stack(list(pairs.values())).sum(0)
        assert count == 5000 and (total / count).item() == pytest.approx(losses["loss"].item())

    def test_label_dropout_while_training_only(self):
        objective = FlowMatchingObjective(Denoiser(), tiny_fae(), label_dropout=0.25)
        objective.latents = lambda batch, random: torch.zeros(8000, 4, 1, 1)
        inputs = {"class_labels": torch.full((8000,), 3)}
        for training, share in ((True, 0.25), (False, 0.0)):
            objective.training = training
            objective(inputs, numbers())
            labels = objective.model.called_with[2]
            assert set(labels.tolist()) == ({3, 10} if training else {3})
            assert (labels == 10).float().mean().item() == pytest.approx(share, abs=0.02)

    @pytest.mark.parametrize("shift", [0.0, 2.5])
    def test_shift_of_the_wrong_kind(self, shift):
        with pytest.raises(ValueError, match=f"shift must be in .*, got {shift}"):
            FlowMatchingObjective(tiny_lightning_dit(), tiny_fae(), shift=shift)


class Recorder(nn.Module):
    """The identity flow, which records the labels that it is called with."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"num_classes": 10, "noise_sigma": 0.3})

    def forward(self, hidden_states, class_labels, output_block_inputs):
        self.labels = class_labels
        tokens = hidden_states.flatten(2)
        return STARFlowOutput(hidden_states, torch.zeros(len(tokens)), (tokens, 2 * tokens))


class TestSTARFlowObjective:
    def test_trains_the_flow(self):
        parts = trained(STARFlowObjective(tiny_starflow(), tiny_fae()))
        assert parts == {"model.blocks", "model.class_embedding"}

    @pytest.mark.parametrize("make", [tiny_fae, tiny_kl])
    def test_terms(self, make):
        model, inputs = tiny_starflow(noise_sigma=0.5), batch()
        objective = STARFlowObjective(model, make(), latent_norm_weight=0.25).eval()
        losses = objective(inputs, numbers(3))
        random = numbers(3)
        noisy = objective.latents(inputs, random)
        noisy = noisy + 0.5 * random.normal(*noisy.shape)
        output = model(noisy, inputs["class_labels"], output_block_inputs=True)
        nll = (0.5 * output.sample.square().sum() - output.log_det.sum()) / noisy.numel()
        norm = sum(tokens.square().mean() for tokens in output.block_inputs)
        torch.testing.assert_close(losses["latent_norm"], norm)
        torch.testing.assert_close(losses["loss"], nll + 0.25 * norm)
        bits = (nll + 0.5 * math.log(2 * math.pi)) / math.log(2)
        torch.testing.assert_close(losses["bits_per_dim"], bits)

    def test_bits_of_a_standard_normal(self):
        """Its entropy is log2(sqrt(2 pi e)) = 2.0471 bits."""
        objective = STARFlowObjective(Recorder(), tiny_fae(), latent_norm_weight=0.0)
        objective.latents = lambda batch, random: math.sqrt(1 - 0.3**2) * torch.randn(4000, 4, 4, 4)
        losses = objective({"class_labels": torch.zeros(4000, dtype=torch.long)}, numbers())
        assert losses["bits_per_dim"].item() == pytest.approx(2.0471, abs=0.01)
        assert losses["loss"].item() == pytest.approx(0.5, abs=0.01)
        assert losses["latent_norm"].item() == pytest.approx(5.0, abs=0.1)

    def test_dropped_labels_reach_the_null_class(self):
        objective = STARFlowObjective(Recorder(), tiny_fae(), label_dropout=0.1)
        objective.latents = lambda batch, random: torch.zeros(8000, 4, 1, 1)
        inputs = {"class_labels": torch.full((8000,), 3)}
        for training, share in ((True, 0.1), (False, 0.0)):
            objective.training = training
            objective(inputs, numbers())
            assert set(objective.model.labels.tolist()) == ({3, 10} if training else {3})
            assert (objective.model.labels == 10).float().mean().item() == pytest.approx(share, abs=0.02)

    def test_one_step_moves_the_weights(self):
        """Against the switch that the reference code ships with, which keeps its optimiser from stepping."""
        model = tiny_starflow()
        before = model.blocks[0].proj_out.weight.detach().clone()
        objective = STARFlowObjective(model, tiny_fae()).train()
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 1e-3)
        objective(batch(), numbers())["loss"].backward()
        optimizer.step()
        assert not torch.equal(model.blocks[0].proj_out.weight, before)


def test_noise_has_its_strength_and_belongs_to_the_images():
    latents = torch.zeros(64, 4, 8, 8)
    noisy = add_noise(latents, 0.3, numbers(1))
    assert noisy.std().item() == pytest.approx(0.3, rel=0.02)
    assert torch.equal(noisy[3:], add_noise(latents[3:], 0.3, ImageRandom(1, first_image=3)))
    assert add_noise(latents, 0.0, numbers()) is latents
