"""What only pipelines with a flow have: the score step, Jacobi iteration, texts."""

import pytest
import torch
from drawing import SETTINGS, assert_same, draw, seeded
from factories import tiny_fae_starflow_pipeline, tiny_starflow, tiny_text_starflow_pipeline

from hf_fae import FlowGuidance


@pytest.fixture(scope="module")
def pipe():
    return tiny_fae_starflow_pipeline(**SETTINGS)


@pytest.fixture(scope="module")
def text_pipe():
    return tiny_text_starflow_pipeline(guidance_scale=2.0)


def test_draws_what_the_flow_inverts(pipe):
    noise, labels = torch.randn(1, 4, 4, 4, generator=seeded(0)), torch.tensor([1])
    inverted = pipe.transformer.inverse(
        noise, labels, guidance=FlowGuidance(1.0), negative_class_labels=torch.tensor([10])
    )
    assert torch.equal(draw(pipe, denoise=False, output_type="latent"), inverted)
    assert torch.equal(draw(pipe, output_type="latent"), pipe.transformer.denoise(inverted, labels))


def test_score_step_is_a_setting_of_the_checkpoint(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    other = type(pipe).from_pretrained(tmp_path, denoise=False)
    other.set_progress_bar_config(disable=True)
    assert_same(draw(other), draw(pipe, denoise=False))
    assert_same(draw(other, denoise=True), draw(pipe))
    assert not torch.allclose(draw(pipe), draw(other), atol=1e-3)


def test_scales_below_one_guide_and_zero_is_unconditional_where_that_is_wider(pipe):
    assert not torch.equal(draw(pipe, guidance_scale=0.9), draw(pipe, guidance_scale=1.0))
    legacy = draw(pipe, guidance_scale=FlowGuidance(-1.0, "tarflow"))
    null = torch.tensor([10])
    noise = torch.randn(1, 4, 4, 4, generator=seeded(0))
    unconditional = pipe.transformer.inverse(noise, null)
    expected = pipe.decode(pipe.transformer.denoise(unconditional, torch.tensor([1])), "pt")
    torch.testing.assert_close(legacy, expected, atol=1e-5, rtol=1e-4)


def test_jacobi(pipe):
    close = draw(pipe, jacobi_block_size=8, jacobi_tolerance=0.0)
    torch.testing.assert_close(close, draw(pipe), atol=1e-3, rtol=1e-3)


def test_callback_gets_the_block(pipe):
    seen = []
    draw(pipe, callback_on_step_end=lambda pipe, step, block, tensors: seen.append((step, block)))
    assert seen == [(0, 3), (1, 2), (2, 1), (3, 0)]


def test_class_or_prompt_is_the_first_argument(pipe, text_pipe):
    assert torch.equal(draw(pipe, "cat"), pipe(class_labels="cat", generator=seeded(0), output_type="pt").images)
    assert torch.equal(
        text_pipe(prompt="a cat", generator=seeded(0), output_type="pt").images, draw(text_pipe, "a cat")
    )


def test_lora_of_a_flow_brings_a_class(tmp_path):
    from peft import LoraConfig

    from hf_fae.generators.lora_layers import lora_weights

    pipe = tiny_fae_starflow_pipeline(**SETTINGS, transformer=tiny_starflow())
    plain = draw(pipe, 2)
    pipe.add_classes({"my-dog": torch.randn(48)})
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    expected = draw(pipe, "my-dog")
    pipe.save_lora_weights(tmp_path, **lora_weights(pipe.transformer, ["my-dog"]))

    fresh = tiny_fae_starflow_pipeline(**SETTINGS, transformer=tiny_starflow())
    fresh.load_lora_weights(tmp_path)
    assert_same(draw(fresh, "my-dog"), expected)
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh, 2), plain) and fresh.transformer.config.num_classes == 10


def test_shorter_embeddings_are_padded(text_pipe):
    """A flow has no mask: it is to see texts as in training."""
    (embeds, _), (negative, _) = text_pipe.encode_prompt("cat"), text_pipe.encode_prompt("dog")
    expected = draw(text_pipe, "cat", negative_prompt="dog")
    short = {"prompt_embeds": embeds[:, :3], "negative_prompt_embeds": negative[:, :3]}
    assert torch.equal(draw(text_pipe, None, **short), expected)
