"""Models of images and texts, and sentence encoders, against transformers."""

import pytest
import torch
from factories import tiny_encoder, tiny_text_encoder
from text_models import save_image_text_model, save_sentence_encoder
from torch.nn import functional as F

from hf_fae.evaluation.inputs.text_models import ImageTextModel, SentenceEncoder, load_text_model


KINDS = ["clip", "siglip", "siglip2"]
TEXTS = ["a cat", "Two Dogs", "", "a text that is longer than the sixteen letters that the model reads"]


@pytest.fixture(scope="module", params=KINDS)
def joint(request, tmp_path_factory):
    """(kind, transformers' model, ours)."""
    folder = tmp_path_factory.mktemp(f"{request.param}-Tiny")
    model = save_image_text_model(folder, request.param)
    return request.param, model, ImageTextModel.from_pretrained(str(folder))


def test_image_embeds(joint):
    kind, model, ours = joint
    images = torch.randint(256, (35, 3, 32, 32), dtype=torch.uint8)
    statistics = tiny_encoder()
    pixels = (images / 255 - torch.tensor(statistics.image_mean).view(3, 1, 1)) / torch.tensor(
        statistics.image_std
    ).view(3, 1, 1)
    inputs = {"pixel_values": pixels}
    if kind == "siglip2":
        patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).reshape(35, 16, 192)
        mask = torch.ones(35, 16, dtype=torch.long)
        inputs = {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((35, 2), 4)}
    with torch.no_grad():
        expected = F.normalize(model.get_image_features(**inputs).pooler_output, dim=-1)
    embeds = ours.image_embeds(images)
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(ours.image_embeds(images[32:]), embeds[32:])
    assert ours.image_embeds(images[:2].repeat(1, 1, 2, 2)).shape == expected[:2].shape
    assert ours.name.startswith(f"{kind}-tiny") and ours.settings["class"] == type(model).__name__
    assert ours.settings["resize"].endswith("to 32 x 32")


def test_text_embeds(joint):
    kind, model, ours = joint
    alphabet = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz ", start=2)}
    texts = TEXTS if kind == "clip" else [text.lower() for text in TEXTS]
    # SigLIP 2's tokenizer of newer transformers replaces spaces by a mark that is none of the letters.
    if alphabet[" "] not in ours.tokenizer("a b")["input_ids"]:
        del alphabet[" "]
    ids = torch.tensor([([alphabet.get(letter, 1) for letter in text] + [0] * 16)[:16] for text in texts])
    inputs = {"input_ids": ids} | ({"attention_mask": (ids != 0).long()} if kind == "clip" else {})
    with torch.no_grad():
        expected = F.normalize(model.get_text_features(**inputs).pooler_output, dim=-1)
    embeds = ours.text_embeds(TEXTS)
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=1e-4)
    many = ours.text_embeds(TEXTS * 9)
    torch.testing.assert_close(many, embeds.repeat(9, 1))
    assert torch.equal(ours.text_embeds(TEXTS * 8), many[:32])
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(4))


def test_pooling_head(joint):
    kind, _, ours = joint
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    tokens = ours.encoder(images / 127.5 - 1).last_hidden_state
    if kind == "clip":
        with pytest.raises(ValueError, match="a CLIPModel has a class token for the image"):
            ours.pool(tokens)
        return
    torch.testing.assert_close(ours.pool(tokens), ours.image_embeds(images))
    assert not torch.allclose(ours.pool(tokens + torch.randn_like(tokens)), ours.image_embeds(images), atol=0.01)
    with pytest.raises(ValueError, match=r"tokens must have width 32, got \(4, 16, 8\)"):
        ours.pool(tokens[..., :8])


def test_sentence_encoder(tmp_path):
    save_sentence_encoder(tmp_path / "Tiny")
    ours = load_text_model(str(tmp_path / "Tiny"))
    assert isinstance(ours, SentenceEncoder) and ours.name == "tiny"
    embeds = ours.text_embeds(TEXTS[:2])
    model, tokenizer = tiny_text_encoder()
    with torch.no_grad():
        for text, embed in zip(TEXTS, embeds):
            states = model(**tokenizer([text], return_tensors="pt")).last_hidden_state
            torch.testing.assert_close(embed, F.normalize(states[0].mean(0), dim=0), atol=1e-5, rtol=1e-4)
    assert torch.isfinite(ours.text_embeds(TEXTS * 20)).all()


def test_other_models_are_refused(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="model_type must be one of clip, siglip, siglip2, got 'dinov2'"):
        ImageTextModel.from_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("save", "name"),
    [(save_image_text_model, "text_model.head.weight"), (save_sentence_encoder, "embeddings.LayerNorm.bias")],
)
def test_lacking_weights_are_refused(tmp_path, save, name):
    from safetensors.torch import load_file, save_file

    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights[name]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 weights of its model, such as {name}"):
        load_text_model(str(tmp_path))
