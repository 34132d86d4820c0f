import math

import pytest
import torch
from factories import tiny_starflow, tiny_text_starflow

from hf_fae import PRESETS, FlowGuidance, STARFlowTransformer2DModel


CLASSES = torch.tensor([3, 10])


def latents(batch_size=2, channels=4, side=4):
    return torch.randn(batch_size, channels, side, side, generator=torch.Generator().manual_seed(7))


def trained(**config):
    """A tiny flow after a few steps of maximum likelihood on correlated data, so that no weight is as it was made."""
    model = tiny_starflow(**config).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    condition = {"class_labels": CLASSES} if model.config.num_classes is not None else {}
    for _ in range(5):
        optimizer.zero_grad()
        (-model(latents().cumsum(-1), **condition).log_prob().mean() / 64).backward()
        optimizer.step()
    return model.eval()


class TestNumbersOfTheSpecification:
    """Section 1 of specs/starflow.md."""

    @pytest.mark.parametrize("count", [3, 6])
    def test_the_first_block_and_every_other_one_read_backwards(self, count):
        model = tiny_starflow(num_layers=[1] * count)
        tokens = torch.arange(3.0).view(1, 3, 1)
        flipped = [bool(model._ordered(tokens, index)[0, 0, 0]) for index in range(count)]
        assert flipped == [True, False, True, False, True, False][:count]

    def test_channels_of_a_head(self):
        """48 of 64 turn with row and column, from 0, and 16 with the position in the caption, in widths of image."""
        with torch.device("meta"):
            model = STARFlowTransformer2DModel(
                sample_size=4, num_layers=[1], num_classes=None, caption_channels=8, max_caption_length=10
            )
        cos, sin = model._rotary_emb((2, 3), torch.empty(1, 5, 8), torch.device("cpu"))
        angles = torch.atan2(sin, cos)
        assert cos.shape == (5 + 6, 32)
        assert not angles[:5, :24].any() and not angles[5:, 24:].any()  # the prefix is at row and column 0
        unit = 4 / 6**0.5  # as many tokens as a square of sqrt(6), scaled to the side of 4
        assert angles[5:, 0].tolist() == pytest.approx([0, 0, 0, unit, unit, unit])
        assert angles[5:, 12].tolist() == pytest.approx([0, unit, 2 * unit - 2 * math.pi] * 2)
        assert angles[:5, 24].tolist() == pytest.approx([0, 0.4, 0.8, 1.2, 1.6])


class TestIdentity:
    def test_fresh_model(self):
        model = STARFlowTransformer2DModel(
            sample_size=4, in_channels=4, num_layers=[1, 2], num_attention_heads=2, attention_head_dim=24
        )
        output = model.eval()(latents(), CLASSES)
        torch.testing.assert_close(output.sample, latents(), atol=1e-6, rtol=0)
        torch.testing.assert_close(output.log_det, torch.zeros(2), atol=1e-5, rtol=0)
        expected = torch.distributions.Normal(0, 1).log_prob(latents()).sum((1, 2, 3))
        torch.testing.assert_close(output.log_prob(), expected)


class TestInverse:
    @pytest.mark.parametrize("name", [name for name in PRESETS if PRESETS[name][0] == "STARFlowTransformer2DModel"])
    def test_every_preset_at_tiny_width(self, name):
        config = {**PRESETS[name][1], "num_attention_heads": 1, "attention_head_dim": 24, "sample_size": 4}
        text = config.get("caption_channels") is not None
        config |= {"caption_channels": 8, "max_caption_length": 5} if text else {"num_classes": 10}
        model = tiny_starflow(**config)
        condition = {"encoder_hidden_states": torch.randn(2, 5, 8)} if text else {"class_labels": CLASSES}
        x = latents(channels=config["in_channels"])
        with torch.no_grad():
            z = model(x, **condition).sample
            assert (z - x).abs().max() > 0.1
            assert (model.inverse(z, **condition) - x).abs().max() < 1e-4
            assert (model(model.inverse(x, **condition), **condition).sample - x).abs().max() < 1e-4

    def test_after_training(self):
        model = trained()
        z = model(latents(), CLASSES).sample
        assert (model.inverse(z, CLASSES) - latents()).abs().max() < 1e-4

    @pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 1, 7), (3, 4, 6, 2)])
    def test_other_grids(self, shape):
        """Also one row of tokens, as a 1-D tokenizer has them, and a single token."""
        model, x, labels = tiny_starflow(), torch.randn(shape), torch.arange(shape[0])
        z = model(x, labels).sample
        assert z.shape == shape and (model.inverse(z, labels) - x).abs().max() < 1e-4

    def test_patches(self):
        model = tiny_starflow(patch_size=2)
        z = model(latents(), CLASSES).sample
        assert model.blocks[0].proj_in.in_features == 16
        assert (model.inverse(z, CLASSES) - latents()).abs().max() < 1e-4

    def test_without_condition(self):
        model = tiny_starflow(num_classes=None)
        assert (model.inverse(model(latents()).sample) - latents()).abs().max() < 1e-4

    def test_latents_in_bf16_are_rounded_once(self):
        model, z = tiny_starflow(), latents().bfloat16()
        expected = model.inverse(z.float(), CLASSES)
        assert torch.equal(model.inverse(z, CLASSES), expected.bfloat16())

    def test_network_in_bf16_keeps_the_arithmetic_in_fp32(self):
        """What is lost is what a pass over all tokens and one over a cache differ by in bf16, 2^-8 for each number."""
        model = tiny_starflow().to(torch.bfloat16)
        output = model(latents(), CLASSES)
        assert output.sample.dtype == output.log_det.dtype == torch.float32
        difference = (model.inverse(output.sample, CLASSES) - latents()).abs()
        assert difference.median() < 0.02 and difference.max() < 0.15

    def test_cached_equals_full_recompute(self):
        """Without a cache: one full pass of a block for every token."""
        model, z = tiny_starflow(), latents()
        expected = z
        for index in reversed(range(len(model.blocks))):
            tokens, grid = model._to_tokens(expected)
            noise = model._ordered(tokens, index)
            prefix = model._prefix(CLASSES, None, 2) if index == len(model.blocks) - 1 else None
            rotary_emb = model._rotary_emb(grid, prefix, z.device)
            x = torch.zeros_like(noise)
            for n in range(noise.shape[1]):
                mean, scale = model.blocks[index](x[:, :-1], rotary_emb, prefix)
                x[:, n] = noise[:, n] * scale[:, n] + mean[:, n]
            expected = model._to_latents(model._ordered(x, index), grid)
        torch.testing.assert_close(model.inverse(z, CLASSES), expected, atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("block_size", [2, 5, 16, 100])
    def test_jacobi(self, block_size):
        model, z = trained(), latents()
        sequential = model.inverse(z, CLASSES)
        exact = model.inverse(z, CLASSES, jacobi_block_size=block_size, jacobi_tolerance=0.0)
        torch.testing.assert_close(exact, sequential, atol=1e-4, rtol=1e-4)
        close = model.inverse(z, CLASSES, jacobi_block_size=block_size, jacobi_tolerance=1e-6)
        assert ((close - sequential).square().mean() / sequential.square().mean()) < 1e-4

    def test_jacobi_saves_passes_and_does_not_depend_on_the_batch(self):
        model, z = trained(), latents(8)
        labels, passes = torch.arange(8), []
        model.blocks[-1].register_forward_hook(lambda *args: passes.append(1))
        options = {"jacobi_block_size": 16, "jacobi_tolerance": 1e-3}
        together = model.inverse(z, labels, **options)
        assert len(passes) < 16
        alone = torch.cat([model.inverse(z[i : i + 1], labels[i : i + 1], **options) for i in range(8)])
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)

    def test_batch_doubles_in_the_deep_block_alone_and_the_prefix_is_read_once(self):
        model, sizes = tiny_starflow(), []
        for block in model.blocks:
            block.layers[0].register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[:2])))
        negative = {"negative_class_labels": torch.tensor([10, 10])}
        model.inverse(latents(), CLASSES, guidance=FlowGuidance(2.0), **negative)
        deep, shallow = [(4, 2)] + [(4, 1)] * 15, [(2, 1)] * 16
        assert sizes == deep + shallow * 3
        sizes.clear()
        model.inverse(latents(), CLASSES, guidance=FlowGuidance(0.0), **negative)
        assert sizes == [(2, 2)] + [(2, 1)] * 15 + shallow * 3


class TestDensity:
    @pytest.mark.parametrize("config", [{}, {"patch_size": 2}, {"num_classes": None}])
    def test_log_det_is_that_of_the_jacobian(self, config):
        model, x = tiny_starflow(**config), latents(1)
        condition = {"class_labels": CLASSES[:1]} if model.config.num_classes is not None else {}

        def flow(values):
            return model(values.view_as(x), **condition).sample.flatten()

        jacobian = torch.autograd.functional.jacobian(flow, x.flatten())
        sign, log_det = torch.linalg.slogdet(jacobian)
        assert sign == 1
        torch.testing.assert_close(model(x, **condition).log_det, log_det[None], atol=1e-4, rtol=1e-5)

    def test_known_gaussian_of_two_tokens(self):
        """A flow that has learned a Gaussian has its entropy as the expected negative log-density (within 1 %)."""
        covariance = torch.tensor([[1.0, 0.8], [0.8, 2.0]])
        entropy = 0.5 * torch.logdet(2 * math.pi * math.e * covariance).item()
        factor = torch.linalg.cholesky(covariance)
        config = {"sample_size": [1, 2], "in_channels": 1, "num_classes": None, "num_layers": [1, 1]}
        model = tiny_starflow(**config).train()
        optimizer = torch.optim.Adam(model.parameters(), 5e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
        for _ in range(400):
            x = torch.randn(512, 2) @ factor.T
            optimizer.zero_grad()
            (-model(x.view(-1, 1, 1, 2)).log_prob().mean()).backward()
            optimizer.step()
            schedule.step()
        x = torch.randn(50_000, 2) @ factor.T
        with torch.no_grad():
            found = -model.eval()(x.view(-1, 1, 1, 2)).log_prob()
        # The sample's own deviation from the entropy is known: compare without it.
        exact = -torch.distributions.MultivariateNormal(torch.zeros(2), covariance).log_prob(x)
        assert abs((found - exact).mean().item()) < 0.01 * entropy
        assert found.mean().item() == pytest.approx(entropy, rel=0.01)
        samples = model.inverse(torch.randn(20_000, 1, 1, 2)).flatten(1)
        torch.testing.assert_close(samples.T.cov(), covariance, atol=0.1, rtol=0.05)

    def test_score_step_is_exact_for_a_gaussian(self):
        """An untrained flow models a standard normal, so that y = x + sigma * eps has the mean (1 - sigma^2) y."""
        model = STARFlowTransformer2DModel(
            sample_size=4, in_channels=4, num_layers=[1, 1], num_attention_heads=1, attention_head_dim=24
        ).eval()
        torch.testing.assert_close(model.denoise(latents(), CLASSES), (1 - 0.3**2) * latents(), atol=1e-6, rtol=1e-5)

    def test_score_step_without_gradients_around_it(self):
        model = tiny_starflow()
        expected = model.denoise(latents(), CLASSES)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert torch.equal(model.denoise(latents() * 1, CLASSES * 1), expected)

    def test_score_is_the_gradient_of_each_image_and_leaves_no_trace(self):
        model, x = tiny_starflow(noise_sigma=0.5), latents()
        denoised = model.denoise(x, CLASSES)
        assert not denoised.requires_grad and all(p.grad is None for p in model.parameters())
        step = torch.zeros_like(x)
        step[1, 2, 0, 3] = 1e-2  # a difference quotient of the log-density of the second image
        with torch.no_grad():
            up, down = (model(x + sign * step, CLASSES).log_prob()[1] for sign in (1, -1))
        expected = x[1, 2, 0, 3] + 0.25 * (up - down) / 2e-2
        assert denoised[1, 2, 0, 3].item() == pytest.approx(expected.item(), rel=1e-2)
        alone = model.denoise(x[1:], CLASSES[1:])
        torch.testing.assert_close(denoised[1:], alone, atol=1e-5, rtol=1e-5)


class TestStructure:
    @pytest.mark.parametrize("index", range(4))
    def test_causality(self, index):
        """A token moves the means and scales of those behind it, and of no other, in the order of its block."""
        model, x = tiny_starflow(), torch.randn(1, 16, 4)
        block, rotary_emb = model.blocks[index], model._rotary_emb((4, 4), None, x.device)
        changed = x.clone()
        changed[:, 5] += 1.0
        for before, after in zip(block(x[:, :-1], rotary_emb), block(changed[:, :-1], rotary_emb), strict=True):
            assert torch.equal(before[:, :6], after[:, :6])
            assert (before[:, 6:] != after[:, 6:]).any(dim=-1).all()

    def test_condition_reaches_the_deep_block_alone(self):
        for model, condition in (
            (tiny_starflow(), [{"class_labels": torch.tensor([k, k])} for k in (1, 2)]),
            (tiny_text_starflow(), [{"encoder_hidden_states": torch.randn(2, 6, 24)} for _ in range(2)]),
        ):
            one, other = (model(latents(), **values, output_block_inputs=True) for values in condition)
            assert all(torch.equal(*pair) for pair in zip(one.block_inputs, other.block_inputs, strict=True))
            assert not torch.equal(one.sample, other.sample)

    def test_block_inputs_start_with_the_data(self):
        output = tiny_starflow()(latents(), CLASSES, output_block_inputs=True)
        assert len(output.block_inputs) == 4
        assert torch.equal(output.block_inputs[0], latents().flatten(2).transpose(1, 2))

    def test_class_prefix_is_a_linear_map_of_the_one_hot_vector(self):
        model = tiny_starflow()
        one_hot = torch.nn.functional.one_hot(CLASSES, 11).float()
        expected = one_hot @ model.class_embedding.weight + model.class_embedding.bias
        torch.testing.assert_close(model._prefix(CLASSES, None, 2), expected[:, None])

    def test_shorter_captions(self):
        model, embeds = tiny_text_starflow(), torch.randn(2, 3, 24)
        z = model(latents(), encoder_hidden_states=embeds).sample
        assert (model.inverse(z, encoder_hidden_states=embeds) - latents()).abs().max() < 1e-4

    def test_classes_come_and_go(self):
        model = tiny_starflow()
        expected = model(latents(), CLASSES).sample
        assert model.add_classes(torch.randn(2, 48)) == [10, 11]
        moved = torch.tensor([3, 12])  # the null class is the last row
        assert torch.equal(model(latents(), moved).sample, expected)
        model.remove_classes([10, 11])
        assert torch.equal(model(latents(), CLASSES).sample, expected)

    @pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
    def test_sampling_with_compiled_layers(self, backend):
        """100 tokens, guided and not, by iteration, and the score step: within the compiler's eight graphs."""
        torch._dynamo.reset()
        model, z = tiny_starflow(num_layers=[1, 2]), latents(side=10)
        options = [
            {"guidance": FlowGuidance(2.0), "negative_class_labels": torch.tensor([10, 10])},
            {},
            {"jacobi_block_size": 9},
        ]
        expected = [model.inverse(z, CLASSES, **kwargs) for kwargs in options] + [model.denoise(z, CLASSES)]
        model.compile_repeated_blocks(fullgraph=True, backend=backend)
        found = [model.inverse(z, CLASSES, **kwargs) for kwargs in options] + [model.denoise(z, CLASSES)]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)
