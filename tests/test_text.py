"""Text encoders of several families, each against itself on one text at a time."""

import pytest
import torch
from factories import tiny_text_encoder
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    SiglipTextConfig,
    SiglipTextModel,
    T5Config,
    T5EncoderModel,
)

from hf_fae.text import encode_text, load_text_encoder


SIZES = {"vocab_size": 29, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 28}
ENCODERS = {
    "BERT": lambda: tiny_text_encoder()[0],
    "CLIP": lambda: CLIPTextModel(CLIPTextConfig(**SIZES)),
    "SigLIP": lambda: SiglipTextModel(SiglipTextConfig(**SIZES)),
    "T5": lambda: T5EncoderModel(T5Config(vocab_size=29, d_model=24, d_kv=12, d_ff=32, num_layers=2, num_heads=2)),
}
TEXTS = ["a cat", "my dog is", "z"]


@pytest.fixture(params=ENCODERS)
def encoder(request):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ENCODERS[request.param]().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_text_encoder()[1]


def test_texts_are_what_each_is_alone_and_zero_behind(encoder, tokenizer):
    embeds, mask = encode_text(tokenizer, encoder, TEXTS, 12)
    assert embeds.shape == (3, 12, 24) and mask.shape == (3, 12) and mask.dtype == torch.bool
    assert embeds.dtype == torch.float32 and not embeds.requires_grad
    for text, row, length in zip(TEXTS, embeds, mask.sum(1).tolist(), strict=True):
        ids = torch.tensor([tokenizer(text).input_ids])
        assert length == ids.shape[1] == len(text)
        if encoder.config.model_type.startswith("siglip"):  # reads its padding as well, which is token 0
            ids = torch.nn.functional.pad(ids, (0, 16 - length))
        with torch.no_grad():
            alone = encoder(input_ids=ids).last_hidden_state[0, :length]
        torch.testing.assert_close(row[:length], alone, atol=1e-5, rtol=1e-4)
        assert not row[length:].any()


def test_padding_longer_changes_no_text(encoder, tokenizer):
    short, long = (encode_text(tokenizer, encoder, TEXTS, length)[0] for length in (9, 14))
    torch.testing.assert_close(long[:, :9], short, atol=1e-5, rtol=1e-4)


def test_encoder_of_fewer_places_than_wanted(encoder, tokenizer):
    embeds, mask = encode_text(tokenizer, encoder, ["abcdefghij" * 3, "ab"], 40)
    places = 30 if encoder.config.model_type == "t5" else 16
    assert embeds.shape == (2, 40, 24) and mask.sum(1).tolist() == [places, 2]
    assert not embeds[0, places:].any()


def test_long_texts_are_cut_with_a_warning(tokenizer, caplog):
    encoder = tiny_text_encoder()[0]
    cut, whole = (encode_text(tokenizer, encoder, [text, "ab"], 6)[0] for text in ("abcdefgh", "abcdef"))
    torch.testing.assert_close(cut, whole)
    assert "read up to their token 6 only: ['abcdefgh']" in caplog.text


def test_siglip_reads_lower_case(tokenizer):
    encoder = ENCODERS["SigLIP"]().eval()
    upper, lower = (encode_text(tokenizer, encoder, [text], 8)[0] for text in ("A Cat", "a cat"))
    assert torch.equal(upper, lower)


def test_empty_text_has_no_token(encoder, tokenizer):
    embeds, mask = encode_text(tokenizer, encoder, ["", "a"], 6)
    assert not mask[0].any() and not embeds[0].any() and embeds.isfinite().all()


def test_encoders_are_loaded_whole_or_not_at_all(encoder, tokenizer, tmp_path):
    for part in (encoder, tokenizer):
        part.save_pretrained(tmp_path)
    _, loaded = load_text_encoder(str(tmp_path))
    assert type(loaded) is type(encoder)
    assert torch.equal(*(encode_text(tokenizer, model, TEXTS, 12)[0] for model in (encoder, loaded.eval())))
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if "norm" in name.lower())
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"(?i)lacks 1 weights of {type(encoder).__name__}, such as .*norm"):
        load_text_encoder(str(tmp_path))


def test_real_sentence_encoder(assets):
    folder = assets / "all-minilm-l6-v2"
    encoder, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    embeds, mask = encode_text(tokenizer, encoder, ["teddy bear", "a red heart", "Teddy bear "], 16)
    assert mask.sum(1).tolist() == [4, 5, 4] and torch.equal(embeds.any(-1), mask)  # with [CLS] and [SEP]
    torch.testing.assert_close(embeds[0], embeds[2])
