"""l-DeTok's loss in closed form, its mask ratio, and what each stage trains."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from factories import tiny_detok
from objective_inputs import batch, numbers, record_calls, trained
from torch import nn
from torch.nn import functional as F

from hf_fae.losses.discriminators import NLayerDiscriminator
from hf_fae.losses.gan import AdversarialLoss
from hf_fae.objectives.detok import DeTokObjective, detok_mask_ratio, select_visible_patches


GRID = (torch.arange(100_000) + 0.5) / 100_000  # uniform numbers without chance: means over them are integrals


def test_detok_law():
    ratios = detok_mask_ratio(GRID)
    assert (ratios == 0).float().mean().item() == pytest.approx(0.125, abs=1e-4)
    assert ratios.mean().item() == pytest.approx(0.30625, abs=1e-4)
    assert 0.699 < ratios.max() < 0.7
    assert not detok_mask_ratio(GRID, 0.0).any()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda u: detok_mask_ratio(u, 1.0), r"max_ratio must be in \[0, 1\), got 1.0"),
        (lambda u: select_visible_patches(u, 1.0), r"mask_ratio must be in \[0, 1\), got 1.0"),
    ],
)
def test_ratios_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.rand(2, 4))


class TestDeTokObjective:
    def test_terms(self):
        model, inputs = tiny_detok(), batch()
        objective = DeTokObjective(model, kl_weight=0.01).train()
        calls = record_calls(model)
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
        counts = torch.tensor([objective.sample_visible_patches(2, numbers(seed)).shape[1] for seed in range(400)])
        assert (counts == 16).float().mean().item() == pytest.approx(0.125 + 1 / 12.8, abs=0.05)
        assert counts.min() == 5 and (16 - counts).float().mean().item() == pytest.approx(16 * 0.306, abs=0.7)
        assert DeTokObjective(tiny_detok(), max_mask_ratio=0.0).sample_visible_patches(2, numbers()).shape == (2, 16)

    def test_stage_1_trains_everything(self):
        assert trained(DeTokObjective(tiny_detok())) >= {"model.encoder", "model.decoder"}
        # Also where nothing is hidden: other processes may have hidden some.
        assert trained(DeTokObjective(tiny_detok(), max_mask_ratio=0.0)) >= {"model.decoder"}

    def test_stage_2_trains_the_decoder_on_clean_samples(self):
        model, inputs = tiny_detok(), batch()
        objective = DeTokObjective(model, stage=2).train()
        calls = record_calls(model)
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
        parts = parts + 0.1 * losses["adversarial/decoder"] + losses["adversarial/discriminator"]
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
