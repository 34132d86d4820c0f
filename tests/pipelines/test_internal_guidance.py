"""Guidance by a base head, and prediction of clean latents, in pipelines."""

import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from factories import (
    tiny_dit,
    tiny_dit_dh,
    tiny_dit_pipeline,
    tiny_fae_dit_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
    tiny_mmdit,
    tiny_raev2_dit,
    tiny_text_raev2_dit,
)

from hf_fae import FlowMatchEulerMaruyamaScheduler
from hf_fae.generators.prediction import to_velocity


GENERATORS = {
    "LightningDiT": (tiny_lightning_dit, tiny_fae_dit_pipeline),
    "DiT": (tiny_dit, tiny_dit_pipeline),
    "DiT^DH": (tiny_dit_dh, tiny_fae_dit_pipeline),
    "RAEv2": (tiny_raev2_dit, tiny_fae_dit_pipeline),
    "MMDiT": (tiny_mmdit, tiny_fae_text_to_image_pipeline),
    "RAEv2 of texts": (tiny_text_raev2_dit, tiny_fae_text_to_image_pipeline),
}
SHIFT_8 = FlowMatchEulerDiscreteScheduler(shift=8.0)
NOISE = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


def generate(pipe, **kwargs):
    prompt = ["a cat"] if pipe.reads_text else [1]
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, latents=NOISE, generator=generator, output_type="latent", **kwargs).images


def first_output(pipe, monkeypatch, **kwargs):
    """What the scheduler is given in its first step, at t = 1, and how often the transformer ran for it."""
    outputs, calls = [], []
    step = type(pipe.scheduler).step
    with monkeypatch.context() as patch:
        patch.setattr(
            type(pipe.scheduler), "step", lambda *args, **kw: (outputs.append(args[1]), step(*args, **kw))[1]
        )
        hook = pipe.transformer.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
        generate(pipe, num_inference_steps=2, **kwargs)
        hook.remove()
    return outputs[0], calls[: len(calls) // 2]


def predictions(pipe, label=1):
    """Of the whole model and of its base head at t = 1, as velocities."""
    model = pipe.transformer
    with torch.no_grad():
        output = model(NOISE, torch.tensor([1000.0]), torch.tensor([label]), output_base_sample=True)
    kind = model.config.prediction_type
    return [to_velocity(kind, value, NOISE, torch.ones(1)) for value in output.values()]


@pytest.mark.parametrize("name", GENERATORS)
def test_saved_with_the_pipeline_and_off_by_default(name, tmp_path):
    make, make_pipeline = GENERATORS[name]
    transformer = make(base_head_layer=1)
    plain = make_pipeline(transformer=transformer)
    guided = make_pipeline(transformer=transformer, internal_guidance_scale=[(0.1, 1.0, 1.78)])
    expected = generate(guided)
    assert not torch.allclose(expected, generate(plain), atol=1e-3)
    assert torch.equal(generate(plain, internal_guidance_scale=[(0.1, 1.0, 1.78)]), expected)
    assert torch.equal(generate(guided, internal_guidance_scale=1.0), generate(plain))
    guided.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    torch.testing.assert_close(generate(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [tiny_lightning_dit, tiny_raev2_dit])
def test_one_pass_alone_two_with_classifier_free_guidance(make, monkeypatch):
    pipe = tiny_fae_dit_pipeline(transformer=make(base_head_layer=1))
    whole, base = predictions(pipe)
    output, calls = first_output(pipe, monkeypatch, internal_guidance_scale=1.78)
    torch.testing.assert_close(output, base + 1.78 * (whole - base), atol=1e-4, rtol=1e-4)
    assert calls == [1]

    # Each branch by its own base head, then one away from the other.
    away, away_base = predictions(pipe, label=10)
    conditional, negative = base + 1.5 * (whole - base), away_base + 1.5 * (away - away_base)
    output, calls = first_output(pipe, monkeypatch, internal_guidance_scale=1.5, guidance_scale=3.0)
    torch.testing.assert_close(output, negative + 3 * (conditional - negative), atol=1e-4, rtol=1e-4)
    assert calls == [2]


def test_with_autoguidance(monkeypatch):
    """The strong model is guided by its base head, the weak one is not, and may predict something else."""
    weak = tiny_raev2_dit(base_head_layer=None)
    pipe = tiny_fae_dit_pipeline(transformer=tiny_lightning_dit(base_head_layer=1), guidance_transformer=weak)
    whole, base = predictions(pipe)
    with torch.no_grad():
        clean = weak(NOISE, torch.tensor([1000.0]), torch.tensor([1])).sample
    strong, weak = base + 1.5 * (whole - base), NOISE - clean
    output, calls = first_output(pipe, monkeypatch, internal_guidance_scale=1.5, guidance_scale=2.0)
    torch.testing.assert_close(output, weak + 2 * (strong - weak), atol=1e-4, rtol=1e-4)
    assert calls == [1]


def test_outside_of_its_interval_the_base_head_is_not_run():
    pipe = tiny_fae_dit_pipeline(transformer=tiny_raev2_dit(), num_inference_steps=10)
    times, forward = [], pipe.transformer.base_head.norm_out.register_forward_hook
    hook = pipe.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1].item() / 1000))
    ran = []
    other = forward(lambda *args: ran.append(times[-1]))
    generate(pipe, internal_guidance_scale=[(0.3, 0.7, 1.78)])
    hook.remove()
    other.remove()
    assert ran == pytest.approx([0.7, 0.6, 0.5, 0.4])  # of 1, 0.9, ..., 0.1
    assert len(times) == 10


def test_variance_of_dit_is_that_of_the_whole_model(monkeypatch):
    pipe = tiny_dit_pipeline(transformer=tiny_dit(base_head_layer=1))
    outputs, step = [], type(pipe.scheduler).step
    monkeypatch.setattr(
        type(pipe.scheduler), "step", lambda *args, **kw: (outputs.append(args[1]), step(*args, **kw))[1]
    )
    generate(pipe, num_inference_steps=2, internal_guidance_scale=2.0)
    with torch.no_grad():
        output = pipe.transformer(NOISE, torch.tensor([999]), torch.tensor([1]), output_base_sample=True)
    whole, base = output.sample, output.base_sample
    guided = base[:, :4] + 2 * (whole[:, :4] - base[:, :4])
    torch.testing.assert_close(outputs[0], torch.cat([guided, whole[:, 4:]], dim=1), atol=1e-4, rtol=1e-4)


class TestPredictionOfCleanLatents:
    def test_last_step_is_the_prediction(self):
        """Euler's step to 0 from t with velocity (x_t - x) / t ends at x."""
        pipe = tiny_fae_dit_pipeline(
            transformer=tiny_raev2_dit(), scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0)
        )
        seen = []
        pipe.transformer.register_forward_hook(lambda module, args, output: seen.append(output[0]))
        latents = generate(pipe, num_inference_steps=6)
        torch.testing.assert_close(latents, seen[-1], atol=1e-5, rtol=1e-5)

    def test_is_the_same_as_the_velocity_that_follows(self):
        """A model that predicts x and one that predicts (x_t - x) / t generate the same."""
        clean, velocity = tiny_lightning_dit(prediction_type="sample"), tiny_lightning_dit()
        forward = clean.forward

        def converted(hidden_states, timestep, **kwargs):
            prediction = forward(hidden_states, timestep, **kwargs)[0]
            return ((hidden_states - prediction) / (timestep / 1000).view(-1, 1, 1, 1),)

        velocity.forward = converted
        samples = [
            generate(tiny_fae_dit_pipeline(transformer=model, num_inference_steps=5), guidance_scale=[(0.3, 1, 2.0)])
            for model in (clean, velocity)
        ]
        torch.testing.assert_close(*samples, atol=1e-4, rtol=1e-4)

    def test_sde(self):
        pipe = tiny_fae_dit_pipeline(transformer=tiny_raev2_dit(), scheduler=FlowMatchEulerMaruyamaScheduler())
        assert torch.isfinite(generate(pipe, num_inference_steps=30)).all()

    @pytest.mark.parametrize(
        ("steps", "index", "expected"), [(50, 1, 0.997455), (50, 49, 0.140351), (100, 99, 0.0747664)]
    )
    def test_grid(self, steps, index, expected):
        """Section 1 of the specification: at 100 steps the clamp at 0.05 never acts."""
        pipe = tiny_fae_dit_pipeline(
            transformer=tiny_raev2_dit(), scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0)
        )
        pipe.prepare_timesteps(steps, None)
        sigmas = pipe.scheduler.sigmas
        assert len(sigmas) == steps + 1 and (sigmas[0], sigmas[-1]) == (1, 0)
        assert sigmas[index].item() == pytest.approx(expected, abs=1e-6)

    @pytest.mark.parametrize(
        ("t", "shifted"), [(0.1, 0.470588), (0.25, 0.727273), (0.5, 0.888889), (0.75, 0.96), (0.9, 0.986301)]
    )
    def test_shift(self, t, shifted):
        from hf_fae.objectives.flow_matching import dimension_shift, shift_time

        assert dimension_shift(1024, 16, 16) == 1 / 8
        assert shift_time(torch.tensor(t), 1 / 8).item() == pytest.approx(shifted, abs=1e-6)


class TestBadInput:
    def test_no_base_head(self):
        message = (
            r"internal_guidance_scale must be 1 for a transformer without base_head_layer, got \(\(0.0, 1.0, 1.5\),\)"
        )
        with pytest.raises(ValueError, match=message):
            tiny_fae_dit_pipeline(internal_guidance_scale=1.5)
        with pytest.raises(ValueError, match=message):
            generate(tiny_fae_dit_pipeline(), internal_guidance_scale=1.5)

    def test_no_number(self):
        pipe = tiny_fae_dit_pipeline(transformer=tiny_raev2_dit())
        with pytest.raises(ValueError, match="guidance_scale must be a number or a list of"):
            generate(pipe, internal_guidance_scale="strong")
