"""Texts and their embeddings, as every pipeline that reads them takes them."""

import pytest
import torch
from diffusers import DiffusionPipeline
from drawing import assert_same, draw, seeded
from factories import tiny_fae_text_to_image_pipeline, tiny_text_encoder, tiny_text_starflow_pipeline
from transformers import BertConfig, BertModel


PIPELINES = {"MMDiT": tiny_fae_text_to_image_pipeline, "STARFlow": tiny_text_starflow_pipeline}


@pytest.fixture(scope="module", params=PIPELINES)
def make(request):
    return PIPELINES[request.param]


@pytest.fixture(scope="module")
def pipe(make):
    return make(guidance_scale=2.0)


def test_embeddings_are_zero_behind_the_text(pipe):
    embeds, mask = pipe.encode_prompt(["ab", "abcdefghij"])
    assert mask.tolist() == [[True, True, False, False, False, False], [True] * 6]
    assert embeds.shape == (2, 6, 24) and torch.equal(embeds.any(-1), mask)


def test_prompt_decides(pipe):
    assert not torch.equal(draw(pipe, "a cat"), draw(pipe, "a dog"))


def test_embeddings_replace_the_text(make, pipe):
    embeds, _ = pipe.encode_prompt(["a cat", "a dog"])
    expected = draw(pipe, ["a cat", "a dog"], generator=seeded(1, 2))
    assert torch.equal(draw(pipe, None, prompt_embeds=embeds, generator=seeded(1, 2)), expected)
    bare = make(text_encoder=None, tokenizer=None, guidance_scale=2.0)
    negative, _ = pipe.encode_prompt("")
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(draw(bare, None, **given, generator=seeded(1, 2)), expected)


def test_empty_text_is_guided_away_from(pipe):
    assert torch.equal(draw(pipe, "a cat", negative_prompt=""), draw(pipe, "a cat"))
    assert not torch.equal(draw(pipe, "a cat", negative_prompt="a dog"), draw(pipe, "a cat"))


def test_negative_texts_are_not_read_without_guidance(pipe):
    calls = []
    handle = pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    draw(pipe, "a cat", negative_prompt="a dog", guidance_scale=1.0)
    assert len(calls) == 1
    draw(pipe, "a cat", negative_prompt="a dog")
    assert len(calls) == 3
    handle.remove()


def test_long_texts_are_cut(pipe, caplog):
    assert torch.equal(draw(pipe, "abcdefgh"), draw(pipe, "abcdefxy"))
    assert "up to their token 6 only: ['abcdefxy']" in caplog.text


def test_loads_with_another_text_encoder(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    text_encoder, _ = tiny_text_encoder()
    for cls in (type(pipe), DiffusionPipeline):
        loaded = cls.from_pretrained(tmp_path, text_encoder=text_encoder)
        assert type(loaded) is type(pipe) and loaded.text_encoder is text_encoder and loaded.tokenizer is not None


@pytest.mark.parametrize("is_named", [False, True])
def test_loads_without_text_encoder(pipe, tmp_path, is_named):
    pipe.save_pretrained(tmp_path)
    cls = type(pipe) if is_named else DiffusionPipeline
    bare = cls.from_pretrained(tmp_path, text_encoder=None, tokenizer=None)
    assert bare.text_encoder is None and bare.tokenizer is None
    embeds, _ = pipe.encode_prompt("a cat")
    negative, _ = pipe.encode_prompt("")
    given = {"prompt_embeds": embeds, "negative_prompt_embeds": negative}
    bare.set_progress_bar_config(disable=True)
    assert_same(draw(bare, None, **given), draw(pipe, "a cat"))


def test_text_encoder_is_fetched(make, pipe, tmp_path):
    for part in (pipe.text_encoder, pipe.tokenizer):
        part.save_pretrained(tmp_path / "text")
    name = str(tmp_path / "text")
    make(text_encoder=None, tokenizer=None, text_encoder_id=name, guidance_scale=2.0).save_pretrained(
        tmp_path / "bare"
    )
    bare = DiffusionPipeline.from_pretrained(tmp_path / "bare")
    bare.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match=f"prompt cannot be read without .* load_text_encoder.. to fetch '{name}'"):
        draw(bare, "a cat")
    bare.load_text_encoder()
    assert_same(draw(bare, "a cat"), draw(pipe, "a cat"))


def test_text_encoder_of_another_width_is_not_taken(make, tmp_path):
    bare = make(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="config.text_encoder_id is None: pass a Hub id or folder"):
        bare.load_text_encoder()
    text_encoder, tokenizer = tiny_text_encoder()
    wide = BertModel(BertConfig(**{**text_encoder.config.to_diff_dict(), "hidden_size": 32}))
    for part in (wide, tokenizer):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="caption_channels 32, as the text_encoder has hidden_size, got 24"):
        bare.load_text_encoder(str(tmp_path))
    assert bare.text_encoder is None and bare.tokenizer is None


def test_lora_with_classes_is_refused(pipe):
    weights = {f"transformer.to_q.lora_{part}.weight": torch.zeros(2, 2) for part in "AB"}
    with pytest.raises(ValueError, match=r"has new classes \['my-dog'\], but this pipeline is not class-conditional"):
        pipe.load_lora_weights({**weights, "new_classes.my-dog": torch.zeros(32)})
    assert not getattr(pipe.transformer, "peft_config", None)
