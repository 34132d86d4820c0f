import pytest
import torch
from factories import tiny_mar

from hf_fae import TokenGuidance
from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.generators.token_generator import gather_tokens


@pytest.fixture(scope="module")
def model():
    return tiny_mar()


def orders(batch_size=2, tokens=16):
    return torch.rand(batch_size, tokens, generator=torch.Generator().manual_seed(0)).argsort(1)


@torch.no_grad()
def conditions(model, tokens, order, known, count, labels=(1, 2)):
    return model.predict_conditions(tokens, order, known, count, torch.tensor(labels))


class TestSteps:
    """Section 1 of the l-DeTok specification."""

    @pytest.mark.parametrize("tokens", [1, 2, 16, 128, 256])
    @pytest.mark.parametrize("steps", [1, 2, 7, 64, 256, 1000, None])
    def test_each_token_once(self, model, tokens, steps):
        counts = model.tokens_per_step(tokens, steps)
        assert sum(counts) == tokens and min(counts) >= 1
        assert len(counts) == min(tokens, steps or tokens)

    def test_cosine(self, model):
        """256 cos(pi/2 k/8), rounded down, is what is left after step k of 8."""
        counts = model.tokens_per_step(256, 8)
        left = [256 - sum(counts[:step]) for step in range(1, 9)]
        assert left == [251, 236, 212, 181, 142, 97, 49, 0]

    def test_as_many_steps_as_tokens_are_one_each(self, model):
        assert model.tokens_per_step(256, 256) == model.tokens_per_step(256) == [1] * 256

    @pytest.mark.parametrize("steps", [0, -1, 2.5])
    def test_no_steps(self, model, steps):
        with pytest.raises(ValueError, match=f"num_inference_steps must be a positive whole number, got {steps}"):
            model.tokens_per_step(16, steps)


def test_unknown_tokens_are_not_seen(model):
    tokens, order = torch.randn(2, 16, 4), orders()
    expected = conditions(model, tokens, order, 5, 11)
    changed = tokens.scatter(1, order[:, 5:, None].expand(-1, -1, 4), 9.0)
    assert torch.equal(conditions(model, changed, order, 5, 11), expected)
    for position in range(5):
        changed = tokens.scatter(1, order[:, position, None, None].expand(-1, 1, 4), 9.0)
        assert not torch.allclose(conditions(model, changed, order, 5, 11), expected, atol=1e-4)


def test_conditions_belong_to_positions(model):
    """In which order tokens are known or wanted does not matter, only where they lie."""
    tokens, order = torch.randn(2, 16, 4), orders()
    whole = conditions(model, tokens, order, 5, 11)
    shuffled = torch.cat([order[:, :5].flip(1), order[:, 5:].flip(1)], dim=1)
    torch.testing.assert_close(conditions(model, tokens, shuffled, 5, 11).flip(1), whole, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(conditions(model, tokens, order, 5, 3), whole[:, :3], atol=1e-5, rtol=1e-4)


def test_classes_fill_the_buffer(model):
    """Where no token is known, the class is all that decides, and it is there without tokens."""
    order = torch.arange(16).expand(2, -1)
    one, same = conditions(model, torch.randn(2, 16, 4), order, 0, 16, labels=(3, 3))
    torch.testing.assert_close(same, one, atol=1e-5, rtol=1e-4)
    _, other = conditions(model, torch.randn(2, 16, 4), order, 0, 16, labels=(3, 4))
    assert not torch.allclose(other, one, atol=1e-3)


def test_dropout_is_of_attention_and_only_in_training():
    model = tiny_mar(dropout=0.5)
    tokens, order = torch.randn(2, 16, 4), orders()
    expected = conditions(model, tokens, order, 5, 11)
    torch.testing.assert_close(expected, conditions(tiny_mar(), tokens, order, 5, 11))
    model.train()
    one, other = (conditions(model, tokens, order, 5, 11) for _ in range(2))
    assert not torch.allclose(one, other, atol=1e-3)
    attention = {part.dropout for part in model.modules() if hasattr(part, "heads")}
    assert attention == {0.5} and not any(isinstance(part, torch.nn.Dropout) and part.p for part in model.modules())


def recorded(model, **options):
    """What `generate` has asked for: the known and the wanted tokens, rows of the batch, in each step."""
    calls, predict = [], model.predict_conditions

    def record(tokens, order, known, count, labels, cache=None):
        calls.append((known, count, len(labels)))
        return predict(tokens, order, known, count, labels, cache=cache)

    model.predict_conditions = record
    try:
        zeros = torch.zeros(2, 4, 4, 4)
        generated = model.generate(
            zeros,
            torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)),
            orders(),
            torch.tensor([1, 2]),
            head_scheduler(),
            num_diffusion_steps=2,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
    finally:
        del model.predict_conditions
    return generated, calls


def test_steps_of_generation(model):
    generated, calls = recorded(model, num_inference_steps=4)
    assert calls == [(0, 2, 2), (2, 3, 2), (5, 5, 2), (10, 6, 2)]
    assert generated.ne(0).all()


def test_all_steps_are_guided(model):
    """Guidance goes by the share that is known after a step, so there are two passes also in the first one."""
    guided, calls = recorded(model, num_inference_steps=4, guidance=TokenGuidance(3.0))
    assert [rows for _, _, rows in calls] == [4, 4, 4, 4]
    plain, calls = recorded(model, num_inference_steps=4)
    assert [rows for _, _, rows in calls] == [2, 2, 2, 2]
    first, _ = recorded(model, num_inference_steps=4, guidance=TokenGuidance(1 + 2.0 * 2 / 16, "constant"))
    one, other, unguided = (
        gather_tokens(model.to_tokens(latents), orders()[:, :2]) for latents in (guided, first, plain)
    )
    assert torch.equal(one, other) and not torch.allclose(one, unguided, rtol=1e-4)


def test_guided_share(model):
    """(N - max(1, left)) / N with what is left after the step (l-DeTok spec, section 1)."""
    counts = model.tokens_per_step(16, 4)
    known = [sum(counts[:step]) for step in range(4)]
    shares = [model.guided_share(*step) for step in zip(known, counts, strict=True)]
    assert shares == [2 / 16, 5 / 16, 10 / 16, 15 / 16]
    assert model.guided_share(15, 1) == model.guided_share(0, 16) == 15 / 16


def test_the_null_class_is_guided_away_from(model):
    guidance = TokenGuidance(3.0)
    plain, _ = recorded(model, num_inference_steps=4, guidance=guidance)
    for labels, same in (([10, 10], True), ([3, 3], False)):
        negative = torch.tensor(labels)
        generated, _ = recorded(model, num_inference_steps=4, guidance=guidance, negative_class_labels=negative)
        assert torch.equal(generated, plain) == same


def test_on_step_sees_the_tokens_come(model):
    seen = []

    def on_step(step, latents):
        seen.append(int(latents.ne(0).all(1).sum()))
        return latents, step == 2

    generated, calls = recorded(model, num_inference_steps=4, on_step=on_step)
    assert seen == [4, 10, 20] and len(calls) == 3
    assert int(generated.ne(0).all(1).sum()) == 20


def test_known_tokens_are_kept_to_the_bit(model):
    latents, order = torch.randn(2, 4, 4, 4), orders()
    generated = model.generate(
        latents,
        torch.randn(2, 4, 4, 4),
        order,
        torch.tensor([1, 2]),
        head_scheduler(),
        num_known=6,
        num_inference_steps=3,
        num_diffusion_steps=2,
    )
    tokens, expected = model.to_tokens(generated), model.to_tokens(latents)
    assert torch.equal(gather_tokens(tokens, order[:, :6]), gather_tokens(expected, order[:, :6]))
    assert gather_tokens(tokens - expected, order[:, 6:]).ne(0).all()
