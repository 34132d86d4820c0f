"""Base heads, and what a denoiser predicts, for every denoiser."""

from functools import partial

import pytest
import torch
from factories import tiny_dit, tiny_dit_dh, tiny_lightning_dit, tiny_mmdit, tiny_raev2_dit, tiny_sit

from hf_fae.generators.prediction import to_velocity


DENOISERS = {
    "LightningDiT": tiny_lightning_dit,
    "SiT": tiny_sit,
    "DiT": tiny_dit,
    "DiT^DH": tiny_dit_dh,
    "MMDiT": tiny_mmdit,
    "RAEv2": tiny_raev2_dit,
    "RAEv2 without a head": partial(tiny_raev2_dit, head_num_layers=0),
}


@pytest.fixture(params=DENOISERS)
def make(request):
    return DENOISERS[request.param]


def run(model, **kwargs):
    generator = torch.Generator().manual_seed(1)
    condition = {"class_labels": torch.tensor([1, 2])}
    if model.config.get("caption_channels") is not None:
        condition = {"encoder_hidden_states": torch.randn(2, 6, 24, generator=generator)}
    latents = torch.randn(2, 4, 4, 4, generator=generator)
    return model(latents, torch.tensor([100.0, 900.0]), **condition, **kwargs)


@torch.no_grad()
def test_base_head_reads_its_block_alone(make):
    """A change of a later block changes the whole prediction, not that of the base head."""
    model = make(num_layers=3, base_head_layer=2)
    before = run(model, output_base_sample=True)
    assert before.base_sample.shape == before.sample.shape
    assert torch.equal(run(model).sample, before.sample) and run(model).base_sample is None
    as_tuple = run(model, output_base_sample=True, return_dict=False)
    assert all(torch.equal(one, other) for one, other in zip(as_tuple, before.values(), strict=True))
    for parameter in model.blocks[2].parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    after = run(model, output_base_sample=True)
    assert torch.equal(after.base_sample, before.base_sample)
    assert not torch.allclose(after.sample, before.sample, atol=1e-3)
    for parameter in model.blocks[1].parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)
    assert not torch.allclose(run(model, output_base_sample=True).base_sample, before.base_sample, atol=1e-3)


@torch.no_grad()
def test_base_head_changes_nothing_of_the_model(make):
    model, plain = make(base_head_layer=1), make(base_head_layer=None)
    state = model.state_dict()
    assert {key for key in state if key not in plain.state_dict()} == {
        key for key in state if key.startswith("base_head.")
    }
    plain.load_state_dict({key: value for key, value in state.items() if not key.startswith("base_head.")})
    assert torch.equal(run(plain).sample, run(model).sample)
    with pytest.raises(ValueError, match="output_base_sample must be False for a model without base_head_layer, got"):
        run(plain, output_base_sample=True)
    with pytest.raises(ValueError, match="base_head_layer must be None or from 1 to num_layers 2, got 3"):
        make(base_head_layer=3)


def test_old_configs_are_of_velocities_without_a_base_head():
    for make in (tiny_lightning_dit, tiny_sit, tiny_dit_dh, tiny_mmdit):
        new = ("prediction_type", "base_head_layer", "use_meanflow")
        model = type(make()).from_config({key: value for key, value in make().config.items() if key not in new})
        assert (model.config.prediction_type, model.config.base_head_layer) == ("velocity", None)
        assert not model.config.use_meanflow and model.interval_embedding is None


class TestMeanFlow:
    """A second time, that of the end of an interval."""

    @pytest.fixture(params=[name for name in DENOISERS if name != "DiT"])
    def make(self, request):
        return partial(DENOISERS[request.param], base_head_layer=None)

    @torch.no_grad()
    def test_a_trained_model_becomes_one_of_average_velocities_that_are_the_same(self, make, tmp_path):
        model, end = make(), torch.tensor([0.0, 300.0])
        velocities = run(model).sample
        with pytest.raises(ValueError, match="timestep_r must be None for a model without use_meanflow, got a tensor"):
            run(model, timestep_r=end)
        model.enable_meanflow()
        assert torch.equal(run(model).sample, velocities)
        assert torch.equal(run(model, timestep_r=end).sample, velocities)
        model.save_pretrained(tmp_path)
        loaded = type(model).from_pretrained(tmp_path)
        assert loaded.config.use_meanflow
        state = model.state_dict()
        model.enable_meanflow()  # again: nothing happens
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())

    @torch.no_grad()
    def test_the_interval_counts_and_without_an_end_it_is_a_point(self, make):
        model = make(use_meanflow=True)
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        instant = run(model).sample
        assert torch.equal(run(model, timestep_r=torch.tensor([100.0, 900.0])).sample, instant)
        for row, end in enumerate(([0.0, 900.0], [100.0, 300.0])):
            changed = run(model, timestep_r=torch.tensor(end)).sample
            assert not torch.allclose(changed[row], instant[row], atol=1e-4)
            torch.testing.assert_close(changed[1 - row], instant[1 - row])

    def test_a_base_head_is_dropped(self):
        model = tiny_raev2_dit()
        before = run(model).sample
        model.enable_meanflow()
        assert model.base_head is None and torch.equal(run(model).sample, before)
        with pytest.raises(ValueError, match="base_head_layer must be None with use_meanflow, got 1"):
            tiny_lightning_dit(use_meanflow=True, base_head_layer=1)

    def test_models_of_the_noise_have_none(self):
        with pytest.raises(ValueError, match="prediction_type must be 'velocity' or 'sample', got 'epsilon'"):
            tiny_dit(use_meanflow=True)
        model = tiny_dit()
        with pytest.raises(ValueError, match="prediction_type must be 'velocity' or 'sample', got 'epsilon'"):
            model.enable_meanflow()
        assert not model.config.use_meanflow


def test_velocity_of_clean_latents():
    """v = (x_t - x) / max(t, 0.05), which is eps - x from 0.05 on."""
    x, eps, t = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0.01, 0.05, 0.8])
    noisy = torch.lerp(x, eps, t.view(-1, 1, 1, 1))
    velocity = to_velocity("sample", x, noisy, t)
    torch.testing.assert_close(velocity[1:], (eps - x)[1:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(velocity[0], 0.2 * (eps - x)[0], atol=1e-5, rtol=1e-5)
    assert to_velocity("velocity", x, noisy, t) is x
