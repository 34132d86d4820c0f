"""Average velocities in pipelines: straight steps from time to time."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from factories import tiny_fae_dit_pipeline, tiny_fae_text_to_image_pipeline, tiny_lightning_dit, tiny_mmdit

from hf_fae import FlowMatchEulerMaruyamaScheduler


NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def transformer():
    """With intervals that count."""
    model = tiny_lightning_dit(use_meanflow=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@torch.no_grad()
def follow(transformer, times):
    """x_{i+1} = x_i - (t_i - t_{i+1}) u(x_i, t_{i+1}, t_i)"""
    sample = NOISE
    for t, r in zip(times, times[1:], strict=False):
        ends = torch.tensor([1000 * t]), torch.tensor([1000 * r])
        sample = sample - (t - r) * transformer(sample, ends[0], torch.tensor([1]), timestep_r=ends[1]).sample
    return sample


@pytest.mark.parametrize(
    ("num_inference_steps", "shift", "final_sigma", "times"),
    [
        (1, 1.0, 0.0, [1.0, 0.0]),
        (1, 4.0, 0.0, [1.0, 0.0]),
        (2, 1.0, 0.0, [1.0, 0.5, 0.0]),
        (2, 3.0, 0.0, [1.0, 0.75, 0.0]),
        (4, 1.0, 0.0, [1.0, 0.75, 0.5, 0.25, 0.0]),
        (2, 1.0, 0.2, [1.0, 0.6, 0.2]),
    ],
)
def test_steps(transformer, num_inference_steps, shift, final_sigma, times, tmp_path):
    pipe = tiny_fae_dit_pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
        final_sigma=final_sigma,
        num_inference_steps=num_inference_steps,
    )
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)  # its steps are the default
    latents = loaded(1, latents=NOISE, output_type="latent").images
    torch.testing.assert_close(latents, follow(transformer, times), atol=1e-4, rtol=1e-4)


def test_image_to_image_starts_within_the_path(transformer):
    pipe = tiny_fae_dit_pipeline(transformer=transformer)
    calls = []
    hook = transformer.register_forward_hook(lambda *args: calls.append(args[2]), with_kwargs=True)
    pipe(1, image_latents=torch.zeros(1, 4, 4, 4), strength=0.5, num_inference_steps=4, output_type="latent")
    hook.remove()
    assert [kwargs["timestep_r"].item() for kwargs in calls] == [250.0, 0.0]


def test_guidance_of_both_passes_has_the_same_interval(transformer):
    pipe, calls = tiny_fae_dit_pipeline(transformer=transformer), []
    hook = transformer.register_forward_hook(lambda *args: calls.append(args[2]), with_kwargs=True)
    pipe(1, guidance_scale=2.0, num_inference_steps=2, output_type="latent")
    hook.remove()
    assert [kwargs["timestep_r"].tolist() for kwargs in calls] == [[500.0, 500.0], [0.0, 0.0]]


@pytest.mark.parametrize("make", [tiny_fae_dit_pipeline, tiny_fae_text_to_image_pipeline])
def test_other_schedulers_are_refused(make):
    model = tiny_lightning_dit if make is tiny_fae_dit_pipeline else tiny_mmdit
    others = (
        FlowMatchEulerMaruyamaScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    )
    for scheduler in others:
        with pytest.raises(
            ValueError, match="scheduler must be a FlowMatchEulerDiscreteScheduler for a transformer with"
        ):
            make(transformer=model(use_meanflow=True), scheduler=scheduler)
