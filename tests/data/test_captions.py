import pytest
import torch
from factories import tiny_text_encoder
from transformers import (
    AutoModel,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_fae.data.captions import CaptionEncoder, load_caption_encoder, pack_embeds, unpack_embeds
from hf_fae.text import encode_text


SIZES = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {**SIZES, "vocab_size": 29, "max_position_embeddings": 16}
TWO_TOWERS = {"text_config": TEXT, "vision_config": {**SIZES, "image_size": 16, "patch_size": 8}}
T5 = {"vocab_size": 29, "d_model": 24, "d_kv": 12, "d_ff": 32, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("model_class", "config", "loaded"),
    [
        (BertModel, BertConfig(**TEXT), "BertModel"),
        (T5ForConditionalGeneration, T5Config(**T5), "T5EncoderModel"),
        (CLIPModel, CLIPConfig(**TWO_TOWERS), "CLIPTextModel"),
        (SiglipModel, SiglipConfig(**TWO_TOWERS), "SiglipTextModel"),
    ],
    ids=["bert", "t5", "clip", "siglip"],
)
def test_text_encoders_of_several_families(tmp_path, model_class, config, loaded):
    """Of a model that knows more than texts the encoder of texts alone."""
    model, (_, tokenizer) = model_class(config).eval(), tiny_text_encoder()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    captions = load_caption_encoder(str(tmp_path), 8)
    assert type(captions.text_encoder).__name__ == loaded and captions.source == str(tmp_path)
    embeds = captions(["cat", "a dog"])
    assert embeds.shape == (2, 8, 24) and embeds.dtype == torch.float32 and captions.width == 24
    assert embeds.any(dim=-1).sum(1).tolist() == [3, 5]
    assert not any(p.requires_grad for p in captions.parameters()) and not captions.text_encoder.training
    # It is the encoder of a pipeline: it is saved and found again by its class.
    captions.text_encoder.save_pretrained(tmp_path / "text_encoder")
    again = type(captions.text_encoder).from_pretrained(tmp_path / "text_encoder")
    torch.testing.assert_close(encode_text(tokenizer, again, ["cat", "a dog"], 8)[0], embeds)


def test_embeds_are_packed_without_their_padding():
    text_encoder, tokenizer = tiny_text_encoder()
    embeds = CaptionEncoder(tokenizer, text_encoder, 10)(["cat", "", "a dog"])
    cells = pack_embeds(embeds)
    assert [len(cell) for cell in cells] == [3 * 24 * 2, 0, 5 * 24 * 2]
    again = unpack_embeds(cells, 24)
    assert again.shape == (3, 5, 24) and not embeds[:, 5:].any()
    torch.testing.assert_close(again, embeds[:, :5], rtol=2**-10, atol=1e-6)


def test_fingerprint():
    text_encoder, tokenizer = tiny_text_encoder()
    first = CaptionEncoder(tokenizer, text_encoder, 10).fingerprint()
    assert CaptionEncoder(tokenizer, text_encoder, 12).fingerprint() == first
    assert CaptionEncoder(tokenizer, tiny_text_encoder()[0], 10).fingerprint() == first
    pooled = AutoModel.from_config(text_encoder.config)  # the same with a pooler, which nobody reads
    pooled.load_state_dict(text_encoder.state_dict(), strict=False)
    assert pooled.pooler is not None and CaptionEncoder(tokenizer, pooled, 10).fingerprint() == first
    tokenizer.add_tokens(["cat"])
    assert CaptionEncoder(tokenizer, text_encoder, 10).fingerprint() != first
    text_encoder.encoder.layer[0].output.dense.bias += 1e-3
    assert CaptionEncoder(tiny_text_encoder()[1], text_encoder, 10).fingerprint() != first


def test_max_length():
    text_encoder, tokenizer = tiny_text_encoder()
    with pytest.raises(ValueError, match="max_caption_length must be at least 1, got 0"):
        CaptionEncoder(tokenizer, text_encoder, 0)
