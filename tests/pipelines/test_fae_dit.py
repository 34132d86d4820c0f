"""What only pipelines with a denoiser have: steps, sigmas, guidance over time."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from drawing import SETTINGS, count_batches, draw
from factories import tiny_dit_dh, tiny_fae_dit_pipeline

from hf_fae import DiTDHTransformer2DModel, FAEDiTPipeline, FlowMatchEulerMaruyamaScheduler


@pytest.fixture(params=[FlowMatchEulerDiscreteScheduler, FlowMatchEulerMaruyamaScheduler])
def pipe(request):
    return tiny_fae_dit_pipeline(**SETTINGS, scheduler=request.param(shift=2.5))


def test_no_unconditional_pass_without_guidance(pipe):
    batches = count_batches(pipe)
    plain = draw(pipe, guidance_scale=1.0)
    assert batches == [1] * 4 and not pipe.do_classifier_free_guidance
    batches.clear()
    guided = draw(pipe, guidance_scale=[(0.9, 1.0, 3.0)])
    # Shifted by 2.5, the second of four uniform steps is at t = 0.88 for the ODE and 0.85 for the SDE.
    assert batches == [2, 1, 1, 1]
    assert not torch.equal(plain, guided)


def test_scales_below_one_guide_and_zero_is_unconditional(pipe):
    null = torch.full((1,), pipe.transformer.config.num_classes)
    assert not torch.equal(draw(pipe, guidance_scale=0.9), draw(pipe, guidance_scale=1.0))
    original = pipe.transformer.forward
    unguided = draw(pipe, guidance_scale=0.0)
    pipe.transformer.forward = lambda x, t, labels, **kw: original(x, t, null.expand(len(x)), **kw)
    torch.testing.assert_close(draw(pipe, guidance_scale=1.0), unguided, atol=1e-5, rtol=1e-4)


def test_bounds_of_intervals_are_exact():
    """On the grid 1, 0.9, ..., 0.1 a bound of 0.3 or 0.7 includes the step at that very time."""
    pipe = tiny_fae_dit_pipeline(scheduler=FlowMatchEulerDiscreteScheduler())
    batches = count_batches(pipe)
    draw(pipe, 0, num_inference_steps=10, guidance_scale=[(0.0, 0.3, 2.0), (0.6, 0.7, 2.0)])
    assert batches == [1, 1, 1, 2, 1, 1, 1, 2, 2, 2]


def test_own_sigmas(pipe):
    uniform = np.linspace(1, 0.25, 4)
    if isinstance(pipe.scheduler, FlowMatchEulerDiscreteScheduler):
        assert torch.equal(draw(pipe, sigmas=uniform), draw(pipe))
    batches = count_batches(pipe)
    draw(pipe, sigmas=[1.0, 0.5], guidance_scale=1.0)
    assert batches == [1, 1]


def test_default_steps_come_from_the_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, num_inference_steps=2)
    batches = count_batches(loaded)
    assert torch.equal(draw(loaded), draw(pipe, num_inference_steps=2))
    assert len(batches) == 2


def test_a_schedule_has_no_single_scale(pipe):
    draw(pipe, guidance_scale=[(0.0, 0.7, 2.5)])
    assert pipe.guidance_scale is None


def test_callback_gets_the_timestep(pipe):
    seen = []
    draw(pipe, callback_on_step_end=lambda pipe, step, timestep, tensors: seen.append(float(timestep)))
    assert seen == pipe.scheduler.timesteps.tolist() and seen[0] == 1000


class TestAutoGuidance:
    """A weak model in place of the unconditional prediction."""

    @pytest.fixture
    def guided(self):
        return tiny_fae_dit_pipeline(guidance_transformer=tiny_dit_dh(), guidance_scale=1.5)

    def draw(self, pipe, **kwargs):
        return pipe([1, 4], generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs).images

    def test_scale_one_is_the_strong_and_zero_the_weak_model(self, guided):
        strong, weak = tiny_fae_dit_pipeline(), tiny_fae_dit_pipeline(transformer=tiny_dit_dh())
        assert torch.equal(self.draw(guided, guidance_scale=1), self.draw(strong))
        torch.testing.assert_close(self.draw(guided, guidance_scale=0), self.draw(weak), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(self.draw(guided), self.draw(strong))

    def test_one_step_is_the_formula(self, guided):
        noise, labels = torch.randn(2, 4, 4, 4), torch.tensor([1, 4])
        with torch.no_grad():
            strong, weak = (
                model(noise, torch.tensor(1000.0), labels).sample
                for model in (guided.transformer, guided.guidance_transformer)
            )
        drawn = self.draw(guided, latents=noise, num_inference_steps=1, guidance_scale=1.42)
        torch.testing.assert_close(drawn, noise - (weak + 1.42 * (strong - weak)), atol=1e-5, rtol=1e-5)

    def test_no_weak_pass_where_the_scale_is_one(self, guided):
        calls = []
        guided.guidance_transformer.register_forward_hook(lambda *_: calls.append(1))
        self.draw(guided, guidance_scale=[(0.0, 0.6, 2.0)])
        assert len(calls) == 2  # of the four steps at 1, 0.75, 0.5 and 0.25

    def test_saved_and_loaded_with_the_pipeline(self, guided, tmp_path):
        guided.save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded.guidance_transformer) is DiTDHTransformer2DModel
        assert torch.equal(self.draw(loaded), self.draw(guided))
        without = FAEDiTPipeline.from_pretrained(tmp_path, guidance_transformer=None)
        assert without.guidance_transformer is None

    def test_what_does_not_fit(self, guided):
        with pytest.raises(ValueError, match="guidance_transformer must have num_classes 10 as transformer, got 3"):
            tiny_fae_dit_pipeline(guidance_transformer=tiny_dit_dh(num_classes=3))
        with pytest.raises(ValueError, match="negative_class_labels must be None with a guidance_transformer, .* 3"):
            guided(1, negative_class_labels=3)
        for change in (lambda: guided.add_classes({"new": torch.zeros(32)}), lambda: guided.remove_classes([1])):
            with pytest.raises(ValueError, match="guidance_transformer must be None for classes to be added or rem"):
                change()
        assert guided.transformer.config.num_classes == 10
