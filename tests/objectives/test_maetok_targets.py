"""Auxiliary targets of MAETok: their losses by hand, on masked patches alone, and how they are named."""

import pytest
import torch
from factories import tiny_encoder
from text_models import tiny_text_encoder
from torch.nn import functional as F

from hf_fae.losses.hog import hog_features
from hf_fae.objectives.maetok_targets import (
    CaptionTarget,
    FeatureTarget,
    HOGTarget,
    load_targets,
    masked_mean,
    target_names,
)


MASK = torch.tensor([[True, False, True, False], [False, False, False, True]])


@pytest.fixture
def images():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_masked_mean():
    values = torch.tensor([[1.0, 10.0, 2.0, 10.0], [10.0, 10.0, 10.0, 6.0]])
    assert masked_mean(values, MASK) == 3  # (1 + 2 + 6) / 3
    assert masked_mean(values, torch.ones_like(MASK)) == masked_mean(values, None) == values.mean()
    assert masked_mean(values, torch.zeros_like(MASK)) == 0


@pytest.mark.parametrize("loss", ["hog", "cosine", "l2"])
def test_unmasked_patches_have_no_gradient(loss, images):
    target = HOGTarget(8) if loss == "hog" else FeatureTarget(tiny_encoder(), loss)
    prediction = torch.randn(2, 4, target.width, requires_grad=True)
    batch = {"pixel_values": images}
    target(prediction, batch, (2, 2), MASK).backward()
    reached = prediction.grad.abs().sum(-1) > 0
    assert torch.equal(reached, MASK)
    everywhere = target(prediction, batch, (2, 2), torch.ones_like(MASK))
    torch.testing.assert_close(everywhere, target(prediction, batch, (2, 2), None))


def test_hog_by_hand(images):
    prediction = torch.randn(2, 4, 27)
    error = (prediction - hog_features(images, 8)).square()
    loss = HOGTarget(8)(prediction, {"pixel_values": images}, (2, 2), MASK)
    torch.testing.assert_close(loss, error[MASK].sum() / (3 * 27))
    assert HOGTarget(16).width == 108  # maetok spec, section 1


def test_features_by_hand(images):
    encoder, prediction = tiny_encoder(), torch.randn(2, 4, 32)
    tokens = encoder(images, grid=(2, 2)).last_hidden_state
    cosine = FeatureTarget(encoder, "cosine")(prediction, {"pixel_values": images}, (2, 2), MASK)
    expected = 1 - (F.normalize(prediction, dim=-1) * F.normalize(tokens, dim=-1)).sum(-1)[MASK].mean()
    torch.testing.assert_close(cosine, expected)
    squared = FeatureTarget(encoder, "l2")(prediction, {"pixel_values": images}, (2, 2), MASK)
    torch.testing.assert_close(squared, (prediction - tokens).square()[MASK].mean())
    with pytest.raises(ValueError, match="loss must be 'cosine' or 'l2', got 'l1'"):
        FeatureTarget(encoder, "l1")


def test_captions_by_hand():
    tokenizer = tiny_text_encoder()[1]
    target = CaptionTarget(tokenizer, length=4)
    logits = torch.randn(2, 4, target.width)
    first, second = (tokenizer(text)["input_ids"] for text in ("ab", "abcdef"))
    assert (len(first), len(second)) == (2, 6)
    terms = [-logits[0].log_softmax(-1)[place, token] for place, token in enumerate(first)]
    terms += [-logits[1].log_softmax(-1)[place, token] for place, token in enumerate(second[:4])]
    loss = target(logits, {"captions": ["ab", "abcdef"]}, (2, 2), MASK)
    torch.testing.assert_close(loss, torch.stack(terms).mean())
    assert target(logits, {"captions": ["", ""]}, (2, 2), MASK) == 0


def test_loading(tmp_path):
    tiny_encoder("siglip").save_pretrained(tmp_path / "siglip")
    tiny_text_encoder()[1].save_pretrained(tmp_path / "words")
    terms = ["hog=1", f"siglip:{tmp_path / 'siglip'}=0.5", f"caption:{tmp_path / 'words'}=0.1"]
    assert target_names(terms, 16) == ["hog", "siglip", "caption"]
    targets, weights = load_targets(terms, 16, "l2", caption_length=7)
    assert weights == {"hog": 1.0, "siglip": 0.5, "caption": 0.1}
    assert {name: target.width for name, target in targets.items()} == {"hog": 108, "siglip": 32, "caption": 29}
    assert targets["siglip"].loss == "l2" and targets["caption"].length == 7
    assert not any(p.requires_grad for p in targets.parameters())


@pytest.mark.parametrize("term", ["hog", "hog=0", "hog=x", "hog:x=1", "x=1", ":x=1", "a.b:x=1", "pop:x=1", "x:=1"])
def test_terms_of_another_form(term):
    with pytest.raises(ValueError, match="auxiliary_targets must be hog=WEIGHT, .* got '"):
        target_names([term], 16)
