"""Losses of l-DeTok and MAETok in closed form, and the schedules of their masks and discriminators."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from factories import tiny_detok, tiny_encoder, tiny_maetok
from objective_inputs import batch, numbers, trained
from torch import nn
from torch.nn import functional as F

from hf_fae.losses.discriminators import NLayerDiscriminator
from hf_fae.losses.gan import AdversarialLoss
from hf_fae.objectives.detok import DeTokObjective
from hf_fae.objectives.maetok import MAETokObjective
from hf_fae.objectives.maetok_targets import FeatureTarget, HOGTarget
from hf_fae.objectives.masking import truncated_normal_mask_ratio


def images_given_to(model):
    """The arguments of the model's calls."""
    calls = []
    model.register_forward_pre_hook(lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
    return calls


class TestDeTokObjective:
    def test_terms(self):
        model, inputs = tiny_detok(), batch()
        objective = DeTokObjective(model, kl_weight=0.01).train()
        calls = images_given_to(model)
        losses = objective(inputs, numbers(3))
        (images, visible), noise = calls[0]
        assert visible.shape[0] == 4 and 5 <= visible.shape[1] <= 16  # ceil(16 (1 - 0.7)) = 5
        assert set(noise) == {"posterior_noise", "latent_noise", "noise_level"}
        assert noise["noise_level"].unique().numel() == 4  # one tau for each image
        with torch.no_grad():
            sample, moments = model(images, visible, **noise, return_dict=False)
        # By hand: a sum over the visible patches' latents, a mean over images.
        mean, logvar = moments.chunk(2, dim=1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        torch.testing.assert_close(losses["kl"], kl)
        torch.testing.assert_close(losses["kl"], DiagonalGaussianDistribution(moments).kl().mean())
        reconstruction = F.mse_loss(sample / 2, images / 2)  # on the [0, 1] scale
        torch.testing.assert_close(losses["loss"], reconstruction + 0.01 * kl)

    def test_kl_of_a_standard_normal_is_zero(self):
        model = tiny_detok()
        nn.init.zeros_(model.encoder.proj_out.weight)
        nn.init.zeros_(model.encoder.proj_out.bias)
        assert DeTokObjective(model).train()(batch(), numbers())["kl"] == 0

    def test_one_share_for_a_batch_by_the_papers_law(self):
        objective = DeTokObjective(tiny_detok())
        counts = torch.tensor([objective.draw_patches(2, numbers(seed)).shape[1] for seed in range(400)])
        assert (counts == 16).float().mean().item() == pytest.approx(0.125 + 1 / 12.8, abs=0.05)
        assert counts.min() == 5 and (16 - counts).float().mean().item() == pytest.approx(16 * 0.306, abs=0.7)
        assert DeTokObjective(tiny_detok(), max_mask_ratio=0.0).draw_patches(2, numbers()).shape == (2, 16)

    def test_stage_1_trains_everything(self):
        assert trained(DeTokObjective(tiny_detok())) >= {"model.encoder", "model.decoder"}
        # Also where nothing is hidden: other processes may have hidden some.
        assert trained(DeTokObjective(tiny_detok(), max_mask_ratio=0.0)) >= {"model.decoder"}

    def test_stage_2_trains_the_decoder_on_clean_samples(self):
        model, inputs = tiny_detok(), batch()
        objective = DeTokObjective(model, stage=2).train()
        calls = images_given_to(model)
        losses = objective(inputs, numbers(3))
        noise = numbers(3).normal(4, 4, 4, 4)
        assert calls[0][1].keys() == {"posterior_noise"} and torch.equal(calls[0][1]["posterior_noise"], noise)
        sample = model(inputs["pixel_values"], posterior_noise=noise).sample
        torch.testing.assert_close(losses["loss"], F.mse_loss(sample / 2, inputs["pixel_values"] / 2))
        assert losses.keys() == {"loss", "reconstruction"}
        assert trained(objective) == {"model.decoder"}
        assert not model.encoder.training and not model.decoder.mask_token.requires_grad
        optimised = {id(p) for p in objective.parameter_groups()[0]["params"]}
        assert optimised == {id(p) for n, p in model.decoder.named_parameters() if n != "mask_token"}

    def test_in_eval_mode_it_is_the_tokenizers_own_reconstruction(self):
        model, inputs = tiny_detok(), batch()
        expected = F.mse_loss(model(inputs["pixel_values"]).sample / 2, inputs["pixel_values"] / 2)
        torch.testing.assert_close(DeTokObjective(model).eval()(inputs, numbers())["loss"], expected)

    def test_the_discriminator_starts_when_it_should(self):
        game = AdversarialLoss(NLayerDiscriminator(8), weight=0.1, discriminator_start=30)
        objective = DeTokObjective(tiny_detok(), adversarial=game).train()
        objective.before_step(29)
        names = objective(batch(), numbers()).keys()
        assert not any(name.startswith("adversarial/") for name in names)
        objective.before_step(30)
        losses = objective(batch(), numbers())
        parts = losses["reconstruction"] + 1e-6 * losses["kl"]
        parts = parts + 0.1 * losses["adversarial/generator"] + losses["adversarial/discriminator"]
        torch.testing.assert_close(losses["loss"], parts)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"stage": 3}, "stage must be 1 or 2, got 3"),
            ({"max_mask_ratio": 1.0}, r"max_mask_ratio must be in \[0, 1\), got 1.0"),
            ({"kl_weight": float("inf")}, "kl_weight must be finite and not negative, got inf"),
            ({"reconstruction_loss": "l3"}, "reconstruction_loss must be .* got 'l3'"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            DeTokObjective(tiny_detok(), **arguments)


class TestMAETokObjective:
    def rich(self, **kwargs):
        model = tiny_maetok(auxiliary_targets={"hog": 27, "dinov2": 32})
        targets = nn.ModuleDict({"hog": HOGTarget(8), "dinov2": FeatureTarget(tiny_encoder())})
        weights = {"hog": 2.0, "dinov2": 0.5}
        return MAETokObjective(model, targets=targets, target_weights=weights, **kwargs).train()

    def test_terms(self):
        objective, inputs = self.rich(), batch()
        calls = images_given_to(objective.model)
        losses = objective(inputs, numbers(3))
        (images, mask), _ = calls[0]
        assert mask.shape == (4, 16) and mask.sum(1).unique().numel() == 1 and 6 <= mask[0].sum() <= 9
        output = objective.model(images, mask, predict_targets=True)
        torch.testing.assert_close(losses["reconstruction"], F.mse_loss(output.sample, images))  # [-1, 1], all pixels
        for name, target in objective.targets.items():
            expected = target(output.predictions[name], inputs, (4, 4), mask)
            torch.testing.assert_close(losses[f"auxiliary/{name}"], expected)
        expected = losses["reconstruction"] + 2 * losses["auxiliary/hog"] + 0.5 * losses["auxiliary/dinov2"]
        torch.testing.assert_close(losses["loss"], expected)

    def test_targets_of_all_patches(self):
        objective, inputs = self.rich(masked_targets=False), batch()
        calls = images_given_to(objective.model)
        losses = objective(inputs, numbers(3))
        (images, mask), _ = calls[0]
        predictions = objective.model(images, mask, predict_targets=True).predictions
        expected = objective.targets["hog"](predictions["hog"], inputs, (4, 4), None)
        torch.testing.assert_close(losses["auxiliary/hog"], expected)

    def test_stage_1_trains_everything_but_the_teachers(self):
        objective = self.rich()
        assert trained(objective) == {"model.encoder", "model.decoder", "model.auxiliary_decoders"}
        assert not objective.targets["dinov2"].encoder.training

    @pytest.mark.parametrize("scope", ["batch", "image"])
    def test_shares_follow_the_papers_law(self, scope):
        objective = MAETokObjective(tiny_maetok(sample_size=128), mask_scope=scope)
        masks = torch.cat([objective.draw_mask(8, numbers(seed)) for seed in range(40)])  # of 256 patches
        ratios = masks.float().mean(1)
        assert 0.39 < ratios.min() and ratios.max() <= 0.6
        assert ratios.mean().item() == pytest.approx(0.505, abs=0.03)
        per_batch = [part.unique().numel() for part in ratios.split(8)]
        assert max(per_batch) == 1 if scope == "batch" else min(per_batch) > 2
        if scope == "image":
            random = numbers(0)
            random.uniform(8, 256)
            wanted = truncated_normal_mask_ratio(random.uniform(8))
            assert (ratios[:8] - wanted).abs().max() <= 1 / 256

    def test_stage_2_masks_fewer_and_fewer_patches(self):
        model = tiny_maetok()
        objective = MAETokObjective(model, stage=2, mask_steps=50_000).train()
        for step, share in ((0, 0.6), (25_000, 0.3), (50_000, 0.0), (60_000, 0.0)):
            objective.before_step(step)
            assert objective.falling_ratio == pytest.approx(share)
            masked = objective.draw_mask(4, numbers()).sum(1)
            assert (masked == int(16 * share)).all()  # 16 - ceil(16 (1 - share))
        assert trained(objective) == {"model.decoder"}
        assert not model.encoder.training and all(p.grad is None for p in model.encoder.parameters())
        # The smallest share is one of stage 1.
        objective = MAETokObjective(model, stage=2, min_mask_ratio=0.4, max_mask_ratio=0.3)
        assert objective.draw_mask(4, numbers()).sum() == 4 * 4

    def test_no_masks(self):
        objective = MAETokObjective(tiny_maetok(), min_mask_ratio=0.0, max_mask_ratio=0.0)
        assert not objective.draw_mask(4, numbers()).any()
        assert trained(objective) >= {"model.encoder", "model.decoder"}

    def test_in_eval_mode_it_is_the_tokenizers_own_reconstruction(self):
        model, inputs = tiny_maetok(), batch()
        expected = F.mse_loss(model(inputs["pixel_values"]).sample, inputs["pixel_values"])
        torch.testing.assert_close(MAETokObjective(model).eval()(inputs, numbers())["loss"], expected)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"stage": 0}, "stage must be 1 or 2, got 0"),
            ({"min_mask_ratio": 0.7}, r"must rise within \[0, 1\), got 0.7 and 0.6"),
            ({"mask_std": 0.0}, "mask_std must be positive and finite, got 0.0"),
            ({"mask_scope": "patch"}, "mask_scope must be 'batch' or 'image', got 'patch'"),
            ({"mask_steps": 0}, "mask_steps must be at least 1, got 0"),
            ({"targets": nn.ModuleDict({"hog": HOGTarget(8)})}, r"targets must be .* \[\], got \['hog'\]"),
        ],
    )
    def test_bad_input(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            MAETokObjective(tiny_maetok(), **arguments)

    def test_targets_need_masks_and_stage_1(self):
        with pytest.raises(ValueError, match="masked_targets must be False where max_mask_ratio is 0, got True"):
            self.rich(min_mask_ratio=0.0, max_mask_ratio=0.0)
        with pytest.raises(ValueError, match="targets must be none in stage 2, got .*'dinov2', 'hog'"):
            self.rich(stage=2)
