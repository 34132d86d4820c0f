import pytest
import torch
from factories import tiny_autoregressive, tiny_fae, tiny_mar, tiny_random_autoregressive

from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.generators.token_generator import gather_tokens
from hf_fae.objectives.token_diffusion import AutoregressiveObjective, MARObjective
from hf_fae.utils.randomness import ImageRandom


def batch(size=4):
    return {"pixel_values": torch.rand(size, 3, 32, 32) * 2 - 1, "class_labels": torch.arange(size)}


def numbers(seed=0):
    return ImageRandom(seed, first_image=0)


@pytest.fixture(scope="module")
def vae():
    return tiny_fae()


class Recorder:
    """Stands before a model's `forward`; predicts zeros."""

    def __init__(self, model):
        self.model, self.calls = model, []
        model.forward = self

    def __call__(self, latents, noisy, timestep, order, class_labels):
        self.calls.append((latents, noisy, timestep, class_labels, order))
        return type(self)._Output(torch.zeros(*noisy.shape[:-1], 2 * noisy.shape[-1], requires_grad=True))

    class _Output:
        def __init__(self, sample):
            self.sample = sample


@pytest.mark.parametrize(
    ("make", "objective"),
    [
        pytest.param(tiny_mar, MARObjective, id="mar"),
        pytest.param(tiny_autoregressive, AutoregressiveObjective, id="raster"),
        pytest.param(tiny_random_autoregressive, AutoregressiveObjective, id="random"),
    ],
)
class TestAll:
    def test_trains_everything_and_learns(self, make, objective, vae):
        objective = objective(make(), vae, label_dropout=0.0).train()
        optimizer = torch.optim.AdamW([p for p in objective.parameters() if p.requires_grad], 3e-3)
        inputs, losses = batch(), []
        for _ in range(25):
            loss = objective(inputs, numbers())["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert all(p.grad is not None for p in objective.model.parameters())
        assert all(p.grad is None for p in vae.parameters())
        assert losses[-1] < 0.8 * losses[0]

    def test_what_the_model_gets(self, make, objective, vae):
        objective, inputs = objective(make(), vae, num_noise_samples=3).eval(), batch()
        recorder = Recorder(objective.model)
        losses = objective(inputs, numbers(2))
        latents, noisy, timestep, labels, order = recorder.calls[0]
        torch.testing.assert_close(latents, objective.latents(inputs, numbers(2)))
        assert torch.equal(labels, inputs["class_labels"])
        count = noisy.shape[2]
        assert noisy.shape == (4, 3, count, 4) and timestep.shape == (4, 3, count)
        assert timestep.min() >= 0 and timestep.max() <= 999 and timestep.dtype == torch.int64
        # The noise is what is left of the noisy tokens; predicting none costs its mean square.
        table = head_scheduler().alphas_cumprod[timestep][..., None]
        clean = gather_tokens(objective.model.to_tokens(latents), order[:, -count:])[:, None]
        noise = (noisy - table.sqrt() * clean) / (1 - table).sqrt()
        assert losses["noise_error"].item() == pytest.approx(noise.square().mean().item(), rel=1e-3)
        assert losses["noise_error"].item() == pytest.approx(1, abs=0.3)
        assert losses["loss"].item() == pytest.approx(sum(losses[k].item() for k in losses if k != "loss"), rel=1e-5)
        draws = timestep.flatten(1)
        assert not torch.equal(draws[0], draws[1]) and not torch.equal(timestep[:, 0], timestep[:, 1])

    def test_labels_are_dropped_in_training(self, make, objective, vae):
        objective = objective(make(), vae, label_dropout=1.0).train()
        recorder = Recorder(objective.model)
        objective(batch(), numbers())
        assert recorder.calls[0][3].tolist() == [10] * 4

    def test_numbers_belong_to_the_images(self, make, objective, vae):
        """But for the share of masked tokens, which is one for all of them."""
        objective, inputs = objective(make(), vae).eval(), batch()
        recorder = Recorder(objective.model)
        objective.num_targets = lambda random: 5
        objective(inputs, numbers())
        objective({name: value[2:] for name, value in inputs.items()}, ImageRandom(0, first_image=2))
        for whole, part in zip(*recorder.calls):
            torch.testing.assert_close(whole[2:], part)


def test_mask_ratio_is_the_papers_law(vae):
    """Section 1 of the l-DeTok specification: mean 0.867."""
    objective = MARObjective(tiny_mar(sample_size=[16, 16]), vae)
    ratios = [objective.num_targets(ImageRandom(0, first_image=image)) / 256 for image in range(4000)]
    assert min(ratios) >= 0.7 and max(ratios) <= 1
    assert sum(ratios) / len(ratios) == pytest.approx(0.867, abs=0.005)


def test_all_tokens_are_learned_in_a_causal_model(vae):
    assert AutoregressiveObjective(tiny_autoregressive(), vae).num_targets(numbers()) == 16


def test_arguments(vae):
    for make, options, message in (
        (AutoregressiveObjective, {"num_noise_samples": 0}, "num_noise_samples must be at least 1, got 0"),
        (MARObjective, {"min_mask_ratio": 0.0}, r"min_mask_ratio must be in \(0, 1\], got 0.0"),
        (MARObjective, {"label_dropout": 2.0}, "label_dropout must be from 0 to 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(tiny_mar(), vae, **options)
