"""What diffusers' common tests check of a pipeline, for every pipeline class. A new class is one more line."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from drawing import SETTINGS, assert_same, draw, seeded
from factories import (
    tiny_autoregressive,
    tiny_dit_pipeline,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_kl,
    tiny_lightning_dit,
    tiny_raev2_dit,
    tiny_random_autoregressive,
    tiny_starflow,
    tiny_text_raev2_dit,
    tiny_text_starflow_pipeline,
)

from hf_fae import FAEMARPipeline, FlowMatchEulerMaruyamaScheduler
from hf_fae.latents import decode_latents


CASES = {
    "FAEDiT": lambda: tiny_fae_dit_pipeline(**SETTINGS, scheduler=FlowMatchEulerDiscreteScheduler(shift=2.5)),
    "FAEDiT-SDE": lambda: tiny_fae_dit_pipeline(**SETTINGS, scheduler=FlowMatchEulerMaruyamaScheduler(shift=2.5)),
    "FAEDiT-KL": lambda: tiny_fae_dit_pipeline(**SETTINGS, vae=tiny_kl()),
    "RAEv2": lambda: tiny_fae_dit_pipeline(**SETTINGS, transformer=tiny_raev2_dit(), internal_guidance_scale=1.5),
    "MeanFlow": lambda: tiny_fae_dit_pipeline(**SETTINGS, transformer=tiny_lightning_dit(use_meanflow=True)),
    "DiT": lambda: tiny_dit_pipeline(**SETTINGS),
    "FAEMAR": lambda: tiny_fae_mar_pipeline(**SETTINGS),
    "FAEMAR-raster-KL": lambda: tiny_fae_mar_pipeline(
        **SETTINGS, vae=tiny_kl(), transformer=tiny_autoregressive(patch_size=2)
    ),
    "FAEMAR-random": lambda: tiny_fae_mar_pipeline(**SETTINGS, transformer=tiny_random_autoregressive(patch_size=2)),
    "FAEStarFlow": lambda: tiny_fae_starflow_pipeline(**SETTINGS),
    "FAEStarFlow-KL": lambda: tiny_fae_starflow_pipeline(
        **SETTINGS, vae=tiny_kl(), transformer=tiny_starflow(patch_size=2)
    ),
}
# Of these the classes' names are texts.
TEXT_CASES = {
    "FAETextToImage": lambda: tiny_fae_text_to_image_pipeline(guidance_scale=2.0),
    "RAEv2 of texts": lambda: tiny_fae_text_to_image_pipeline(
        guidance_scale=2.0, transformer=tiny_text_raev2_dit(), internal_guidance_scale=1.5
    ),
    "FAETextToImage-SDE-KL": lambda: tiny_fae_text_to_image_pipeline(
        guidance_scale=2.0, vae=tiny_kl(), scheduler=FlowMatchEulerMaruyamaScheduler(shift=2.5)
    ),
    "FAEStarFlow-text": lambda: tiny_text_starflow_pipeline(guidance_scale=2.0),
}
CASES |= TEXT_CASES


# One config of each class, and each kind of condition: for what neither scheduler, order nor autoencoder can change.
ONE_A_CLASS = ["FAEDiT", "FAEMAR", "FAEStarFlow", "FAETextToImage", "FAEStarFlow-text"]


@pytest.fixture(params=CASES)
def make(request):
    return CASES[request.param]


@pytest.fixture
def pipe(make):
    return make()


def test_save_and_load_are_equal_to_the_bit(pipe, tmp_path):
    check_save_and_load(pipe, tmp_path)


@pytest.mark.parametrize("kwargs", [{"variant": "fp16"}, {"max_shard_size": "30KB"}], ids=["variant", "shards"])
@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_variants_and_shards_are_equal_to_the_bit(pipe, tmp_path, kwargs):
    check_save_and_load(pipe, tmp_path, **kwargs)


def check_save_and_load(pipe, tmp_path, **kwargs):
    pipe.save_pretrained(tmp_path, **kwargs)
    for cls in (type(pipe), DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path, variant=kwargs.get("variant"))
        loaded.set_progress_bar_config(disable=True)
        assert type(loaded) is type(pipe)
        assert getattr(loaded, "id2label", None) == getattr(pipe, "id2label", None)
        assert torch.equal(draw(loaded, ["dog", "crane"]), draw(pipe, ["dog", "crane"]))


def test_components_are_recorded_by_public_name(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = type(pipe).load_config(tmp_path)
    for name in ("vae", "transformer"):
        cls = type(getattr(pipe, name))
        assert index[name] == [cls.__module__.partition(".")[0], cls.__name__]
    assert index["_class_name"] == type(pipe).__name__


def test_loads_in_bf16(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.vae.dtype == loaded.transformer.dtype == torch.bfloat16
    for name, buffer in pipe.vae.named_buffers(recurse=False):  # latent statistics are not rounded
        assert torch.equal(loaded.vae.get_buffer(name), buffer)
    torch.testing.assert_close(draw(loaded).float(), draw(pipe), atol=0.1, rtol=0.1)


def test_seed_decides(pipe):
    assert torch.equal(draw(pipe, seed=0), draw(pipe, seed=0))
    assert not torch.equal(draw(pipe, seed=0), draw(pipe, seed=1))


def test_images_do_not_depend_on_their_batch(pipe):
    batch = draw(pipe, ["cat", "dog", "crane"], generator=seeded(5, 6, 7))
    for image, label, seed in zip(batch, ["cat", "dog", "crane"], (5, 6, 7)):
        torch.testing.assert_close(draw(pipe, label, seed=seed)[0], image, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_generators_in_a_tuple(pipe):
    several = [draw(pipe, ["cat", "dog"], generator=form(seeded(5, 6))) for form in (list, tuple)]
    assert torch.equal(*several)


def test_images_per_prompt(pipe):
    many = draw(pipe, ["cat", "dog"], num_images_per_prompt=2, generator=seeded(1, 2, 3, 4))
    each = draw(pipe, ["cat", "cat", "dog", "dog"], generator=seeded(1, 2, 3, 4))
    assert torch.equal(many, each)


@pytest.mark.parametrize("make", [name for name in CASES if name not in TEXT_CASES], indirect=True)
def test_labels_by_name_synonym_and_number(pipe):
    expected = draw(pipe, 0)
    for label in ("tench, Tinca tinca", "tench", "Tinca tinca", ["tench"], torch.tensor([0])):
        assert torch.equal(draw(pipe, label), expected)
    assert not torch.equal(draw(pipe, 1), expected)


def test_output_types(pipe):
    tensor = draw(pipe)
    assert tensor.shape == (1, 3, 32, 32) and 0 <= tensor.min() and tensor.max() <= 1
    array = draw(pipe, output_type="np")
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    picture = draw(pipe, output_type="pil")[0]
    assert picture.size == (32, 32) and np.abs(np.asarray(picture) - array[0] * 255).max() <= 0.51
    latents = draw(pipe, output_type="latent")
    decoded = decode_latents(pipe.vae, latents).div(2).add(0.5).clamp(0, 1).detach()
    torch.testing.assert_close(decoded, tensor)


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_return_dict(pipe):
    images = pipe("cat", generator=seeded(0), output_type="pt", return_dict=False)
    assert isinstance(images, tuple) and torch.equal(images[0], draw(pipe))


def test_latents_replace_the_noise(pipe):
    noise = torch.randn(1, 4, 4, 4, generator=seeded(0))
    generator = torch.Generator().manual_seed(0)
    torch.randn(1, 4, 4, 4, generator=generator)  # what the pipeline would have drawn
    assert torch.equal(draw(pipe, latents=noise, generator=generator), draw(pipe, seed=0))


def test_other_sizes(pipe):
    if isinstance(pipe, FAEMARPipeline):
        with pytest.raises(ValueError, match="height must be 32, as the transformer's positions are learned, got 48"):
            draw(pipe, height=48, width=16)
        return
    assert draw(pipe, height=48, width=16).shape == (1, 3, 48, 16)


def test_callback_sees_and_changes_latents(pipe):
    seen = []

    def zero_at_the_end(pipe, step, timestep, tensors):
        seen.append((step, float(timestep), tensors["latents"].shape))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == pipe.num_timesteps - 1 else {}

    latents = draw(pipe, callback_on_step_end=zero_at_the_end, output_type="latent")
    assert not latents.any()
    assert [step for step, _, _ in seen] == list(range(4))
    assert [t for _, t, _ in seen] == sorted((t for _, t, _ in seen), reverse=True)
    assert not draw(pipe, callback_on_step_end=lambda *args: None).isnan().any()


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_interrupt_stops(pipe):
    steps = []

    def stop(pipe, step, timestep, tensors):
        steps.append(step)
        pipe._interrupt = step == 1
        return tensors

    draw(pipe, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert torch.equal(draw(pipe), draw(pipe))  # the next call runs to its end


def test_what_is_guided_away_from_replaces_the_null_class(make, pipe):
    negative = "negative_prompt" if make in TEXT_CASES.values() else "negative_class_labels"
    away = draw(pipe, "cat", **{negative: "dog"}, guidance_scale=3.0)
    assert not torch.equal(away, draw(pipe, "cat", guidance_scale=3.0))
    same = draw(pipe, "cat", **{negative: "cat"}, guidance_scale=3.0)
    torch.testing.assert_close(same, draw(pipe, "cat", guidance_scale=1.0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_defaults_come_from_the_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, guidance_scale=3.0)
    assert_same(draw(loaded), draw(pipe, guidance_scale=3.0))


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_guidance_scale_of_the_call(pipe):
    assert pipe.guidance_scale == 2.0
    draw(pipe, guidance_scale=3.0)
    assert pipe.guidance_scale == 3.0
    assert pipe.do_classifier_free_guidance
    draw(pipe, guidance_scale=1.0)
    assert not pipe.do_classifier_free_guidance


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_from_pipe_shares_the_components(pipe):
    other = type(pipe).from_pipe(pipe)
    assert other.vae is pipe.vae and other.transformer is pipe.transformer
    other.set_progress_bar_config(disable=True)
    assert torch.equal(draw(other), draw(pipe))


def test_loads_without_vae_for_latents(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, vae=None)
    loaded.set_progress_bar_config(disable=True)
    assert_same(draw(loaded, output_type="latent"), draw(pipe, output_type="latent"))


def test_lora_weights_are_saved_loaded_and_unloaded(make, pipe, tmp_path):
    from peft import LoraConfig, get_peft_model_state_dict

    plain = draw(pipe)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    adapted = draw(pipe)
    pipe.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=pipe.transformer.peft_config["default"].to_dict(),
    )

    fresh = make()
    fresh.load_lora_weights(tmp_path, adapter_name="style")
    assert fresh.get_list_adapters() == {"transformer": ["style"]}
    assert_same(draw(fresh), adapted)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    assert_same(draw(fresh, attention_kwargs={"scale": 0.0}), plain)
    fresh.unload_lora_weights()
    assert_same(draw(fresh), plain)


def test_group_offload(pipe):
    expected = draw(pipe)
    cpu = torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    assert torch.equal(draw(pipe), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="model offload moves models to a GPU")
def test_model_offload(pipe):
    expected = draw(pipe)
    pipe.enable_model_cpu_offload()
    torch.testing.assert_close(draw(pipe), expected, atol=1e-3, rtol=1e-3)


def test_every_component_has_its_turn_in_model_offload(pipe):
    models = {name for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    turns = set(pipe.model_cpu_offload_seq.split("->"))
    assert models <= turns <= pipe.components.keys()


@pytest.mark.parametrize("make", ONE_A_CLASS, indirect=True)
def test_progress_bar_counts_the_steps(pipe, capfd):
    pipe.set_progress_bar_config(disable=False)
    draw(pipe)
    assert "4/4" in capfd.readouterr().err
