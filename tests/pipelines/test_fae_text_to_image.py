"""What only the pipeline of a text-conditional denoiser has: masks, guidance over time with texts, a weak model."""

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler
from drawing import assert_same, count_batches, draw
from factories import tiny_fae_text_to_image_pipeline, tiny_lightning_dit, tiny_mmdit
from torch.nn import functional as F


@pytest.fixture(scope="module")
def pipe():
    return tiny_fae_text_to_image_pipeline(guidance_scale=2.0)


def test_one_step_is_the_formula(pipe):
    noise = torch.randn(2, 4, 4, 4)
    predictions = []
    for texts in (["a cat", "dog"], ["", "abc"]):
        embeds, mask = pipe.encode_prompt(texts)
        with torch.no_grad():
            predictions.append(pipe.transformer(noise, torch.tensor(1000.0), embeds, mask).sample)
    guided = predictions[1] + 2 * (predictions[0] - predictions[1])
    step = {"num_inference_steps": 1, "latents": noise, "output_type": "latent"}
    drawn = draw(pipe, ["a cat", "dog"], negative_prompt=["", "abc"], **step)
    torch.testing.assert_close(drawn, noise - guided, atol=1e-5, rtol=1e-4)


def test_schedule_of_the_checkpoint(tmp_path):
    """FAE's: 1.5 for t in 0.9 .. 0."""
    tiny_fae_text_to_image_pipeline(guidance_scale=[(0.0, 0.9, 1.5)]).save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    batches = count_batches(loaded)
    drawn = draw(loaded, "a cat", num_inference_steps=10)
    assert batches == [1] + [2] * 9 and loaded.guidance_scale is None
    assert torch.equal(draw(loaded, "a cat", num_inference_steps=10, guidance_scale=[(0.0, 0.9, 1.5)]), drawn)
    assert not torch.equal(draw(loaded, "a cat", num_inference_steps=10, guidance_scale=1.0), drawn)


def test_mask_says_where_the_text_is(pipe):
    embeds, mask = pipe.encode_prompt("cat")
    expected = draw(pipe, "cat")
    filled = torch.where(mask[..., None], embeds, 3.0)
    assert_same(draw(pipe, None, prompt_embeds=filled, prompt_attention_mask=mask), expected)
    assert_same(draw(pipe, None, prompt_embeds=filled, prompt_attention_mask=mask.long()), expected)
    assert not torch.allclose(draw(pipe, None, prompt_embeds=filled), expected, atol=1e-3)
    negative, negative_mask = pipe.encode_prompt("dog")
    given = {"negative_prompt_embeds": torch.where(negative_mask[..., None], negative, 3.0)}
    given |= {"negative_prompt_attention_mask": negative_mask}
    assert_same(draw(pipe, "cat", **given), draw(pipe, "cat", negative_prompt="dog"))


def test_embeddings_have_any_length(pipe):
    """Those of the shorter ones of prompt and negative prompt are padded."""
    embeds, _ = pipe.encode_prompt("cat")
    expected = draw(pipe, "cat")
    assert_same(draw(pipe, None, prompt_embeds=embeds[:, :3]), expected)
    assert_same(draw(pipe, None, prompt_embeds=F.pad(embeds, (0, 0, 0, 5))), expected)
    negative, _ = pipe.encode_prompt("dog")
    away = draw(pipe, "cat", negative_prompt="dog")
    assert_same(draw(pipe, "cat", negative_prompt_embeds=negative[:, :3]), away)
    assert_same(draw(pipe, None, prompt_embeds=embeds[:, :3], negative_prompt_embeds=negative), away)


def test_padding_of_all_texts_is_not_computed(pipe):
    lengths = []
    handle = pipe.transformer.caption_projection.register_forward_hook(
        lambda _, args, out: lengths.append(out.shape[1])
    )
    for prompt, negative in (("cat", ""), (["cat", "abcdefgh"], ""), ("a", "a dog"), ("", "")):
        draw(pipe, prompt, negative_prompt=negative, num_inference_steps=1)
    handle.remove()
    assert lengths == [3, 6, 5, 1]


class TestAutoGuidance:
    """A weak model in place of the prediction without text."""

    @pytest.fixture
    def guided(self):
        return tiny_fae_text_to_image_pipeline(guidance_transformer=tiny_mmdit(num_layers=1), guidance_scale=1.5)

    def test_scale_one_is_the_strong_and_zero_the_weak_model(self, guided):
        weak = tiny_fae_text_to_image_pipeline(transformer=tiny_mmdit(num_layers=1))
        assert_same(draw(guided, guidance_scale=1.0), draw(tiny_fae_text_to_image_pipeline()))
        assert_same(draw(guided, guidance_scale=0.0), draw(weak))
        assert not torch.allclose(draw(guided), draw(guided, guidance_scale=1.0), atol=1e-3)

    def test_no_negative_text_is_read(self, guided):
        calls = []
        guided.text_encoder.register_forward_hook(lambda *_: calls.append(1))
        draw(guided)
        assert len(calls) == 1
        for given in ({"negative_prompt": "a"}, {"negative_prompt_embeds": torch.ones(1, 6, 24)}):
            with pytest.raises(ValueError, match="negative_prompt must be None with a guidance_transformer, .* got"):
                draw(guided, **given)

    def test_of_other_texts(self):
        with pytest.raises(ValueError, match="must have caption_channels 24 as transformer, got 20"):
            tiny_fae_text_to_image_pipeline(guidance_transformer=tiny_mmdit(caption_channels=20))


def test_a_scheduler_of_another_kind_is_refused():
    """Also one that takes the place of the right one, as diffusers' users do it."""
    message = "must follow the linear path of flow matching, got a DDIMScheduler that does not"
    with pytest.raises(ValueError, match=message):
        tiny_fae_text_to_image_pipeline(scheduler=DDIMScheduler())
    pipe = tiny_fae_text_to_image_pipeline()
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=message):
        draw(pipe)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
    pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, **flow)
    assert draw(pipe).isfinite().all()


def test_a_denoiser_of_classes_is_refused():
    with pytest.raises(ValueError, match="transformer must have caption_channels, got a LightningDiTTransformer2DMo"):
        tiny_fae_text_to_image_pipeline(transformer=tiny_lightning_dit())


def test_texts_are_embedded_without_the_rest(pipe, tmp_path):
    """Encode, free the text encoder, generate."""
    expected = draw(pipe, "a cat")
    pipe.save_pretrained(tmp_path)
    reader = DiffusionPipeline.from_pretrained(tmp_path, transformer=None, vae=None)
    length = pipe.transformer.config.max_caption_length
    parts = [reader.encode_prompt(text, max_length=length) for text in ("a cat", "")]
    with pytest.raises(ValueError, match="max_length must be at least 1, and given without a transformer, got None"):
        reader.encode_prompt("a cat")
    drawer = DiffusionPipeline.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    (embeds, mask), (negative, negative_mask) = parts
    given = {"prompt_embeds": embeds, "prompt_attention_mask": mask}
    given |= {"negative_prompt_embeds": negative, "negative_prompt_attention_mask": negative_mask}
    assert_same(draw(drawer, None, **given), expected)


def test_guidance_cannot_begin_on_the_way(pipe):
    def switch_on(call, step, timestep, tensors):
        call._guidance_scale = 2.0
        return tensors

    with pytest.raises(ValueError, match="guidance_scale must be 1 to the end of a call that began without, got 2.0"):
        draw(pipe, "a cat", guidance_scale=1.0, callback_on_step_end=switch_on)
