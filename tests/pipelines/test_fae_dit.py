"""What only pipelines with a denoiser have: steps, sigmas, guidance over time."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from drawing import SETTINGS, count_batches, draw
from factories import tiny_dit, tiny_dit_dh, tiny_dit_pipeline, tiny_fae_dit_pipeline, tiny_lightning_dit

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
    pipe.transformer.forward = lambda x, t, class_labels, **kw: original(x, t, null.expand(len(x)), **kw)
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
    seen, grids = [], []

    def note(pipe, step, timestep, tensors):
        seen.append(float(timestep))
        grids.append(pipe.scheduler.timesteps.tolist())

    draw(pipe, callback_on_step_end=note)
    assert grids == [seen] * len(seen) and seen[0] == 1000


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


def test_grid_of_lightning_dit():
    """l-DeTok spec, section 1: 250 points are 249 steps of Euler; the shift 0.3 moves each of them once."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1 / 0.3)
    pipe = tiny_fae_dit_pipeline(scheduler=scheduler)
    assert len(pipe.prepare_timesteps(249, None)) == 249
    points = torch.linspace(1, 0, 250)
    torch.testing.assert_close(scheduler.sigmas, points / (0.3 + 0.7 * points), atol=1e-6, rtol=1e-5)


class TestFinalSigma:
    """RAE's grid: 50 points from 1 to 0.001 before the shift, so that 49 steps end above 0."""

    def test_grid(self):
        shift = 6.9282
        pipe = tiny_fae_dit_pipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=shift), final_sigma=0.001)
        times = pipe.prepare_timesteps(49, None)
        points = torch.linspace(1, 0.001, 50)
        points = shift * points / (1 + (shift - 1) * points)
        torch.testing.assert_close(times / 1000, points[:49], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(pipe.scheduler.sigmas[:50], points, atol=1e-6, rtol=1e-5)
        assert points[-1] == pytest.approx(0.00689, abs=1e-5)

    def test_steps_stop_there(self):
        """One step from 1 to 0.25, and two by way of 0.75."""
        pipe = tiny_fae_dit_pipeline(final_sigma=0.25)
        noise, labels = torch.randn(1, 4, 4, 4), torch.tensor([1])

        def velocity(latents, sigma):
            with torch.no_grad():
                return pipe.transformer(latents, torch.tensor(1000 * sigma), labels).sample

        whole = pipe(1, latents=noise, num_inference_steps=1, output_type="latent").images
        torch.testing.assert_close(whole, noise - 0.75 * velocity(noise, 1.0), atol=1e-5, rtol=1e-5)
        between = noise - 0.25 * velocity(noise, 1.0)
        expected = between - 0.5 * velocity(between, 0.75)
        steps = pipe(1, latents=noise, sigmas=[1.0, 0.75], output_type="latent").images
        torch.testing.assert_close(steps, expected, atol=1e-5, rtol=1e-5)

    def test_saved_with_the_pipeline(self, tmp_path):
        tiny_fae_dit_pipeline(final_sigma=0.001).save_pretrained(tmp_path)
        loaded = DiffusionPipeline.from_pretrained(tmp_path)
        assert loaded.config.final_sigma == 0.001
        assert FAEDiTPipeline.from_pretrained(tmp_path, final_sigma=0.0).config.final_sigma == 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match="final_sigma must be at least 0 and below 1, got 1"):
            tiny_fae_dit_pipeline(final_sigma=1)
        message = "final_sigma must be 0 for a FlowMatchEulerMaruyamaScheduler, .*, got 0.1"
        with pytest.raises(ValueError, match=message):
            tiny_fae_dit_pipeline(final_sigma=0.1, scheduler=FlowMatchEulerMaruyamaScheduler())(1)
        with pytest.raises(ValueError, match="sigmas must fall strictly within .*, got .*0.1"):
            tiny_fae_dit_pipeline(final_sigma=0.1)(1, sigmas=[1.0, 0.1])


class TestDiT:
    def test_steps_are_those_of_ddpm(self):
        """250 of 1000 times, both ends included; the last step adds no noise."""
        pipe = tiny_dit_pipeline(**SETTINGS)
        times = []
        draw(
            pipe,
            num_inference_steps=250,
            callback_on_step_end=lambda pipe, step, time, tensors: times.append(int(time)),
            guidance_scale=1.0,
        )
        assert times[::-1] == [round(index * 999 / 249) for index in range(250)]

    def test_guidance_is_of_the_noise_alone(self):
        pipe = tiny_dit_pipeline(**SETTINGS)
        outputs, step = [], pipe.scheduler.step

        def record(output, timestep, latents, **kwargs):
            outputs.append((output, timestep, latents))
            return step(output, timestep, latents, **kwargs)

        pipe.scheduler.step = record
        draw(pipe, guidance_scale=3.0)
        output, timestep, latents = outputs[0]
        with torch.no_grad():
            conditional, negative = (
                pipe.transformer(latents, timestep[None], torch.tensor([label])).sample for label in (1, 10)
            )
        guided = negative[:, :4] + 3 * (conditional[:, :4] - negative[:, :4])
        torch.testing.assert_close(output[:, :4], guided, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(output[:, 4:], conditional[:, 4:], atol=1e-5, rtol=1e-4)

    def test_bad_input(self):
        pipe = tiny_dit_pipeline()
        with pytest.raises(ValueError, match="sigmas must be None for a DDPMScheduler, .* got"):
            pipe(1, sigmas=[1.0, 0.5])
        with pytest.raises(ValueError, match="num_inference_steps must be at least 2 for a DDPMScheduler, got 1"):
            pipe(1, num_inference_steps=1)
        message = "transformer must have prediction_type 'epsilon' for a DDPMScheduler, got 'velocity'"
        for transformer in (tiny_lightning_dit(), tiny_dit_dh()):
            with pytest.raises(ValueError, match=message):
                tiny_dit_pipeline(transformer=transformer)
        with pytest.raises(
            ValueError, match="transformer must have prediction_type 'velocity' or 'sample' for a Flow"
        ):
            tiny_fae_dit_pipeline(transformer=tiny_dit())
        with pytest.raises(ValueError, match="guidance_transformer must have prediction_type 'epsilon' for a DDPM"):
            tiny_dit_pipeline(guidance_transformer=tiny_lightning_dit())
        with pytest.raises(ValueError, match="prediction_type must be 'velocity', 'sample' or 'epsilon', got 'x'"):
            tiny_lightning_dit(prediction_type="x")
