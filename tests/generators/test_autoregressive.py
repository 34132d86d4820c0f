import pytest
import torch
from factories import tiny_autoregressive, tiny_mar, tiny_random_autoregressive

from hf_fae import TokenGuidance
from hf_fae.generators.diffusion_head import head_scheduler


KINDS = {"raster": tiny_autoregressive, "random": tiny_random_autoregressive}


@pytest.fixture(params=KINDS)
def model(request):
    return KINDS[request.param]()


@pytest.fixture
def order(model):
    return model.sample_order(torch.rand(2, 16, generator=torch.Generator().manual_seed(0)))


LABELS = torch.tensor([1, 2])


@torch.no_grad()
def conditions(model, tokens, order, known=0, count=16, cache=None):
    return model.predict_conditions(tokens, order, known, count, LABELS, cache=cache)


def test_orders():
    scores = torch.rand(500, 16)
    raster = tiny_autoregressive().sample_order(scores)
    assert torch.equal(raster, torch.arange(16).expand(500, -1))
    for make in (tiny_random_autoregressive, tiny_mar):
        random = make().sample_order(scores)
        assert torch.equal(random.sort(1).values, raster) and not torch.equal(random[0], random[1])
        assert random.float().mean(0).sub(7.5).abs().max() < 1


def test_is_causal_in_its_order(model, order):
    """Each token reaches the conditions of those behind it, and no other."""
    tokens = torch.randn(2, 16, 4)
    expected = conditions(model, tokens, order)
    for position in (0, 1, 7, 14, 15):
        changed = tokens.scatter(1, order[:, position, None, None].expand(-1, 1, 4), 3.0)
        moved = (conditions(model, changed, order) - expected).abs().amax((0, 2)) > 1e-5
        assert moved.tolist() == [index > position for index in range(16)]


def test_knows_what_comes_next(model):
    """The condition of the last token depends on its position, as all others are known."""
    tokens = torch.randn(2, 16, 4)
    order = torch.arange(16).expand(2, -1)
    other = torch.cat([order[:, :14], order[:, 14:].flip(1)], dim=1)
    before, after = conditions(model, tokens, order), conditions(model, tokens, other)
    torch.testing.assert_close(before[:, :14], after[:, :14], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(before[:, 14], after[:, 14], atol=1e-3)


@pytest.mark.parametrize("static", [False, True])
def test_cached_conditions_are_those_of_a_whole_pass(model, order, static):
    if static:
        for block in model.blocks:
            block._compiled_call_impl = block._call_impl
    tokens = torch.randn(2, 16, 4)
    whole = conditions(model, tokens, order)
    for start in (0, 5):  # with 5 known tokens, read at once
        cache = model.make_cache(2, "cpu")
        steps = [conditions(model, tokens, order, known, 1, cache=cache) for known in range(start, 16)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole[:, start:], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_cached_generation_is_that_of_full_recompute(model, order, scale):
    """Without a cache each step computes the conditions of all tokens so far, and keeps the last one."""
    known, options = 3, {"num_diffusion_steps": 3, "guidance": TokenGuidance(scale)}
    latents, noise = torch.randn(2, 2, 4, 4, 4)

    def generate():
        return model.generate(
            latents,
            noise,
            order,
            LABELS,
            head_scheduler(),
            num_known=known,
            negative_class_labels=LABELS + 3,
            generator=torch.Generator().manual_seed(0),
            **options,
        )

    cached, calls, predict = generate(), [], model.predict_conditions

    def recompute(tokens, order, known, count, labels, cache=None):
        calls.append(cache)
        return predict(tokens, order, 0, known + 1, labels)[:, -1:]

    model.predict_conditions, model.make_cache = recompute, lambda batch_size, device: object()
    found = generate()
    assert len(calls) == 13
    torch.testing.assert_close(found, cached, rtol=1e-3, atol=1e-3)
    kept, expected = model.to_tokens(cached), model.to_tokens(latents)
    positions = order[:, :known, None].expand(-1, -1, 4)
    assert torch.equal(kept.gather(1, positions), expected.gather(1, positions))
    assert not torch.isclose(kept, expected).gather(1, order[:, known:, None].expand(-1, -1, 4)).any()


def test_first_token_is_not_guided(model, order):
    noise = torch.randn(2, 4, 4, 4)

    def first(scale):
        found = []
        model.generate(
            torch.zeros_like(noise),
            noise,
            order,
            LABELS,
            head_scheduler(),
            num_diffusion_steps=2,
            guidance=TokenGuidance(scale),
            negative_class_labels=LABELS + 3,
            generator=torch.Generator().manual_seed(0),
            on_step=lambda step, latents: (found.append(latents) or latents, step == 1),
        )
        return found

    (plain, second), (guided, other) = first(1.0), first(4.0)
    torch.testing.assert_close(guided, plain, rtol=1e-4, atol=1e-2)
    assert not torch.allclose(second, other, rtol=1e-4)


def test_guided_share(model):
    """The share that is known before a step (l-DeTok spec, section 1): the scale is 1 + (cfg - 1) * step / N."""
    assert [model.guided_share(step, 1) for step in range(16)] == [step / 16 for step in range(16)]


def test_input_is_normed_and_the_class_alone_modulates_the_output(model, order):
    """Shifts of all channels of the start token vanish; the last modulation does not see the step."""
    tokens = torch.randn(2, 16, 4)
    expected = conditions(model, tokens, order)
    with torch.no_grad():
        model.start_token.weight.add_(1)
        torch.testing.assert_close(conditions(model, tokens, order), expected, atol=1e-5, rtol=1e-4)
        for block in model.blocks:
            torch.nn.init.zeros_(block.modulation.weight)
        before = conditions(model, tokens, order)
        model.step_embedding.weight.add_(1)
        torch.testing.assert_close(conditions(model, tokens, order), before)
        model.class_embedding.weight.add_(torch.randn_like(model.class_embedding.weight))
        assert not torch.allclose(conditions(model, tokens, order), before, atol=1e-3)


def test_number_of_steps_is_that_of_the_tokens(model):
    assert model.tokens_per_step(16) == [1] * 16
    with pytest.raises(ValueError, match="num_inference_steps must be None for Autoregressive.*, got 4"):
        model.tokens_per_step(16, 4)
