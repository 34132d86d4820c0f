import pytest
import torch
from factories import tiny_drorae, tiny_rae
from objective_inputs import batch, numbers, trained
from torch.nn import functional as F

from hf_fae.losses.discriminators import PatchDiscriminator
from hf_fae.losses.gan import AdversarialLoss
from hf_fae.objectives.drorae import DRoRAEObjective, add_decoder_noise


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
