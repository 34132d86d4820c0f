import pytest
import torch
from factories import (
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_mmdit,
    tiny_text_encoder,
    tiny_text_starflow,
    tiny_text_starflow_pipeline,
)
from objective_inputs import numbers

from hf_fae.data.captions import CaptionEncoder, pack_embeds, unpack_embeds
from hf_fae.data.conditions import ClassCondition, TextCondition, prepare_condition
from hf_fae.objectives.flow_matching import FlowMatchingObjective
from hf_fae.objectives.starflow import STARFlowObjective


CAPTIONS = ["cat", "a dog", "bee", "owl"]


def encoder(max_length=6):
    text_encoder, tokenizer = tiny_text_encoder()
    return CaptionEncoder(tokenizer, text_encoder, max_length)


def kept(captions):
    """As a cache has them."""
    return unpack_embeds(pack_embeds(encoder()(captions)), 24)


class TestTextCondition:
    @pytest.mark.parametrize(
        ("make_model", "make_objective"),
        [(tiny_mmdit, FlowMatchingObjective), (tiny_text_starflow, STARFlowObjective)],
    )
    @pytest.mark.parametrize("training", [False, True])
    def test_kept_embeds_give_the_loss_of_the_captions(self, make_model, make_objective, training):
        """Though they are padded to the longest of the batch alone, and a half is dropped while training."""
        model, vae, moments = make_model(), tiny_fae(), {"moments": torch.randn(4, 8, 4, 4)}
        losses = []
        for has_embeds, batch in ((False, {"captions": CAPTIONS}), (True, {"caption_embeds": kept(CAPTIONS)})):
            condition = TextCondition(model, encoder(), has_embeds)
            objective = make_objective(model, vae, label_dropout=0.5, condition=condition).train(training)
            losses.append(objective({**moments, **batch}, numbers())["loss"])
        torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
        objective.label_dropout = 0.0
        assert torch.equal(objective({**moments, **batch}, numbers())["loss"], losses[1]) == (not training)

    def test_the_empty_text_takes_the_place(self):
        """Of a tokenizer that adds no token to it, it is nothing; of one that adds some, it may be longer than all."""
        captions = encoder()
        dropped = torch.tensor([False, True, False, True])
        condition = TextCondition(tiny_mmdit(), captions, True)({"caption_embeds": kept(CAPTIONS)}, dropped)
        assert condition["encoder_attention_mask"].sum(1).tolist() == [3, 0, 3, 0]
        captions.forward = lambda texts: torch.ones(len(texts), 6, 24)
        condition = TextCondition(tiny_mmdit(), captions, True)({"caption_embeds": kept(CAPTIONS)}, dropped)
        assert condition["encoder_attention_mask"].sum(1).tolist() == [3, 6, 3, 6]
        assert torch.equal(condition["encoder_hidden_states"][1], torch.ones(6, 24))

    def test_a_flow_sees_the_padding(self):
        condition = TextCondition(tiny_text_starflow(), encoder(), True)({"caption_embeds": kept(CAPTIONS)})
        assert condition.keys() == {"encoder_hidden_states"}
        assert condition["encoder_hidden_states"].shape == (4, 6, 24)

    def test_text_encoder_is_part_of_it_only_where_it_is_asked(self):
        model = tiny_mmdit()
        assert [len(list(TextCondition(model, encoder(), kept).parameters())) > 0 for kept in (False, True)] == [1, 0]
        objective = FlowMatchingObjective(model, tiny_fae(), condition=TextCondition(model, encoder())).train()
        assert not objective.condition.captions.text_encoder.training
        objective({"pixel_values": torch.rand(4, 3, 32, 32), "captions": CAPTIONS}, numbers())["loss"].backward()
        assert all(p.grad is None for p in objective.condition.parameters())
        assert model.caption_projection.weight.grad.any()

    @pytest.mark.parametrize("make_pipeline", [tiny_fae_text_to_image_pipeline, tiny_text_starflow_pipeline])
    def test_prompts_draw_what_their_texts_draw(self, make_pipeline):
        pipe, batches = make_pipeline(), [{"captions": CAPTIONS[:3]}, {"captions": CAPTIONS[3:]}]
        cached = [{**batch, "caption_embeds": kept(batch["captions"])} for batch in batches]
        pictures = []
        for has_embeds, examples in ((False, batches), (True, cached)):
            names, arguments = TextCondition(pipe.transformer, encoder(), has_embeds).prompts(examples, 2)
            assert names == ["cat", "bee"]
            pictures.append(arguments)
        pictures = [
            pipe(**what, generator=torch.Generator().manual_seed(0), guidance_scale=2.0, output_type="pt").images
            for what in (*pictures, {"prompt": names})
        ]
        torch.testing.assert_close(pictures[0], pictures[2], atol=1e-4, rtol=0)
        torch.testing.assert_close(pictures[1], pictures[2], atol=1e-2, rtol=0)  # kept in half precision


def test_classes():
    condition = ClassCondition(9, ["a", "b", "c"], ["c"])
    labels = torch.tensor([1, 2])
    assert torch.equal(condition({"class_labels": labels})["class_labels"], labels)
    assert condition({"class_labels": labels}, torch.tensor([True, False]))["class_labels"].tolist() == [9, 2]
    assert condition.prompts([], 2) == (["a", "b"], {"class_labels": ["a", "b"]})
    assert condition.describe() == "new classes: c; 2 that the pipeline already has"


class Rows:
    """Data, as far as their condition is concerned."""

    text_encoder = None

    def check_caption_encoder(self, captions):
        """Any text encoder fits."""

    def __init__(self, has_captions, *names):
        self.has_captions, self.id2label = has_captions, dict(enumerate(names)) or None

    def batches(self, batch_size):
        yield {"row_ids": torch.arange(batch_size)}


class TestOpen:
    def test_one_caption_for_all(self):
        data, condition = prepare_condition(tiny_fae_text_to_image_pipeline(), Rows(False), instance_prompt="my dog")
        assert next(data.batches(2))["captions"] == ["my dog"] * 2 and isinstance(condition, TextCondition)
        assert condition.describe() == "captions of up to 6 tokens, embedded in each step"

    @pytest.mark.parametrize(
        ("has_captions", "arguments", "message"),
        [
            (
                False,
                {},
                "either from caption_column or from instance_prompt, got no captions",
            ),
            (True, {"instance_prompt": "a"}, "from instance_prompt, got captions and instance_prompt 'a'"),
            (True, {"class_name": "a"}, "class_name must be None for a pipeline that reads texts, got 'a'"),
            (True, {"init_class": "a"}, "init_class must be None for a pipeline that reads texts, got 'a'"),
        ],
    )
    def test_texts(self, has_captions, arguments, message):
        with pytest.raises(ValueError, match=message):
            prepare_condition(tiny_fae_text_to_image_pipeline(), Rows(has_captions), **arguments)

    def test_classes_have_no_prompt(self):
        with pytest.raises(ValueError, match="instance_prompt must be None for a pipeline of classes, got 'a'"):
            prepare_condition(tiny_fae_dit_pipeline(), Rows(False, "class 1"), instance_prompt="a")
