"""Pipelines with a denoiser that start from an image, with or without a mask."""

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from drawing import SETTINGS, count_batches, draw
from factories import tiny_dit_pipeline, tiny_fae_dit_pipeline, tiny_fae_text_to_image_pipeline
from PIL import Image

from hf_fae import FlowMatchEulerMaruyamaScheduler


SCHEDULERS = {
    "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=2.5),
    "euler-maruyama": lambda: FlowMatchEulerMaruyamaScheduler(shift=2.5),
    "dpm-solver": lambda: DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.5
    ),
}
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
LOWER_HALF = torch.cat([torch.zeros(16, 32), torch.ones(16, 32)])


@pytest.fixture(params=SCHEDULERS)
def pipe(request):
    return tiny_fae_dit_pipeline(**SETTINGS, with_encoder=True, scheduler=SCHEDULERS[request.param]())


def generate(pipe, **options):
    return draw(pipe, output_type="latent", guidance_scale=1.0, **options)


def test_strength_is_the_share_of_steps(pipe):
    batches, latents = count_batches(pipe), pipe.encode_image(IMAGE)
    results = []
    for strength, steps in ((0.25, 2), (0.5, 4), (1.0, 8), (0.01, 1)):
        batches.clear()
        results.append(generate(pipe, image=IMAGE, strength=strength, num_inference_steps=8))
        assert len(batches) == steps
    distances = [(result - latents).square().mean() for result in results]
    assert distances[0] < distances[1] < distances[2]


def test_at_full_strength_the_image_has_no_effect(pipe):
    # DPM-Solver's first noise level is 0.9996.
    torch.testing.assert_close(generate(pipe, image=IMAGE, strength=1.0), generate(pipe), atol=1e-2, rtol=0)


def test_latents_serve_as_image(pipe):
    latents = pipe.encode_image(IMAGE)
    assert torch.equal(generate(pipe, image=IMAGE), generate(pipe, image_latents=latents, strength=0.8))


def test_a_mask_keeps_the_rest(pipe):
    latents = pipe.encode_image(IMAGE)
    result = generate(pipe, image=IMAGE, mask_image=LOWER_HALF)
    assert torch.equal(result[:, :, :2], latents[:, :, :2])
    assert not torch.isclose(result[:, :, 2:], latents[:, :, 2:]).any()


def test_kept_latents_follow_the_path_of_the_noise():
    """Each step's kept latents are (1 - t) x + t eps, with the noise of the call."""
    pipe = tiny_fae_dit_pipeline(**SETTINGS, with_encoder=True, scheduler=SCHEDULERS["euler"]())
    noise, seen = torch.randn(1, *pipe.encode_image(IMAGE).shape[1:]), []
    times = pipe.prepare_timesteps(4, None) / 1000

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"][:, :, :2])
        return {}

    generate(pipe, image=IMAGE, mask_image=LOWER_HALF, latents=noise, callback_on_step_end=keep)
    for t, found in zip([*times[1:], torch.tensor(0.0)], seen, strict=True):
        expected = (1 - t) * pipe.encode_image(IMAGE) + t * noise
        torch.testing.assert_close(found, expected[:, :, :2])


def test_of_a_noise_predicting_denoiser():
    pipe = tiny_dit_pipeline(**SETTINGS)
    shape = (1, pipe.transformer.config.in_channels, *[pipe.transformer.config.sample_size] * 2)
    known, mask = torch.randn(shape), torch.zeros(shape[2:])
    mask[1:] = 1
    result = generate(pipe, image_latents=known, mask_image=mask)
    assert torch.equal(result[:, :, :1], known[:, :, :1])
    assert not torch.isclose(result[:, :, 1:], known[:, :, 1:]).any()
    assert not torch.equal(generate(pipe, image_latents=known, strength=0.5), result)


def test_of_texts():
    pipe = tiny_fae_text_to_image_pipeline()
    shape = (1, pipe.transformer.config.in_channels, *(side // pipe.vae_scale_factor for side in pipe.image_size))
    known, mask = torch.randn(shape), torch.zeros(shape[2:])
    mask[1:] = 1
    embeds = torch.randn(1, 3, pipe.transformer.config.caption_channels)
    options = {"prompt_embeds": embeds, "output_type": "latent", "num_inference_steps": 4, "guidance_scale": 1.0}
    result = pipe(image_latents=known, mask_image=mask, **options).images
    assert torch.equal(result[:, :, :1], known[:, :, :1])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"strength": 0.5}, "either image or image_latents must be given with mask_image or strength, got neither"),
        ({"mask_image": LOWER_HALF}, "either image or image_latents must be given .* got neither"),
        ({"image": IMAGE, "strength": 0.0}, "strength must be above 0 and at most 1, got 0.0"),
        ({"image": IMAGE, "strength": 1.5}, "strength must be above 0 and at most 1, got 1.5"),
        ({"image": IMAGE.resize((64, 64))}, "image must be 32 x 32 .* got 64 x 64"),
        ({"image": IMAGE, "mask_image": torch.ones(5, 5)}, "mask_image must be 1 or 1 of"),
        ({"image_latents": torch.zeros(1, 2, 3, 3)}, "image_latents must have shape"),
    ],
    ids=["no image", "mask alone", "no strength", "too strong", "size", "mask size", "latents"],
)
def test_bad_inputs(arguments, message):
    pipe = tiny_fae_dit_pipeline(**SETTINGS, with_encoder=True)
    with pytest.raises(ValueError, match=message):
        generate(pipe, **arguments)
