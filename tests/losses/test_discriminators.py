"""Discriminators: shapes, sizes, and each layer against plain arithmetic."""

import pytest
import torch
from factories import tiny_encoder
from gan_inputs import gradients, images, tiny_discriminator

from hf_fae.losses.discriminators import NLayerDiscriminator, PatchDiscriminator, TokenDiscriminator, _TokenHead


class TestPatchDiscriminator:
    def test_logits(self):
        logits = PatchDiscriminator(32, num_stages=3)(images(2, 64))
        assert logits.shape == (2, 1, 8, 8) and logits.dtype == torch.float32 and logits.std() > 0

    def test_size(self):
        with torch.device("meta"):
            count = sum(p.numel() for p in PatchDiscriminator().parameters())
        convs = [(3, 128, 25), (128, 128, 9), (128, 256, 9), (256, 512, 9), (512, 512, 1), (512, 1, 25)]
        assert count == sum(i * o * k + o for i, o, k in convs) + 2 * (128 + 256 + 512)

    def test_downsampling_blurs(self):
        """A checkerboard, which plain strides turn into a constant of either sign, vanishes."""
        blur = PatchDiscriminator(32, 1).layers[3]
        board = ((torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1).expand(1, 2, 16, 16)
        assert blur(board)[..., 1:-1, 1:-1].abs().max() < 1e-6
        torch.testing.assert_close(blur(torch.ones(1, 2, 16, 16))[..., 1:-1, 1:-1], torch.ones(1, 2, 6, 6))

    @pytest.mark.parametrize("kwargs", [{"base_channels": 48}, {"num_stages": 0}])
    def test_bad_sizes(self, kwargs):
        ((name, value),) = kwargs.items()
        with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
            PatchDiscriminator(**kwargs)


class TestNLayerDiscriminator:
    def test_published_shape(self):
        """pix2pix's 70 x 70 PatchGAN."""
        with torch.device("meta"):
            discriminator = NLayerDiscriminator()
        assert sum(p.numel() for p in discriminator.parameters()) == 2_765_633
        assert discriminator(torch.empty(2, 3, 256, 256, device="meta")).shape == (2, 1, 30, 30)
        assert not list(discriminator.buffers())

    @pytest.mark.parametrize("kwargs", [{"base_channels": 0}, {"num_stages": 0}])
    def test_bad_input(self, kwargs):
        (name,) = kwargs
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            NLayerDiscriminator(**kwargs)


class TestTokenDiscriminator:
    def test_logits_of_five_heads(self):
        logits = tiny_discriminator("token")(images(2))
        assert logits.shape == (2, 5 * 16) and logits.dtype == torch.float32

    def test_size_of_the_heads(self):
        """7.39M in MAETok's table, of five heads on DINO ViT-S."""
        assert 5 * sum(p.numel() for p in _TokenHead(384).parameters()) == 7_386_245

    def test_layers_are_those_of_rae(self):
        """Blocks 2, 5, 8, 11 of 12, and the last once more; class token dropped."""
        network = tiny_encoder("vit", num_hidden_layers=12)
        discriminator = TokenDiscriminator(network)
        x = images(2)
        states = network(x, output_hidden_states=True).hidden_states
        discriminator.eval()
        expected = [head(states[block + 1]) for head, block in zip(discriminator.heads, (2, 5, 8, 11, 11))]
        torch.testing.assert_close(discriminator(x), torch.cat(expected, dim=1))

    def test_head_against_plain_arithmetic(self):
        head, tokens = _TokenHead(6, kernel_size=3).eval(), torch.randn(2, 5, 6)

        def spectral(conv):
            matrix = conv.parametrizations.weight.original.detach()
            return matrix / torch.linalg.matrix_norm(matrix.flatten(1), 2)

        def block(layers, x):
            kernel = spectral(layers[0])
            reach = kernel.shape[2] // 2
            shifted = [x.roll(-offset, dims=1) @ kernel[:, :, offset + reach].T for offset in range(-reach, reach + 1)]
            x = sum(shifted) + layers[0].bias
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
            return torch.where(x > 0, x, 0.2 * x)

        with torch.no_grad():
            x = block(head.input, tokens)
            x = (x + block(head.residual, x)) / 2**0.5
            expected = x @ spectral(head.output)[0] + head.output.bias
            torch.testing.assert_close(head(tokens), expected[..., 0], rtol=0.02, atol=0.02)

    def test_only_heads_are_trained(self):
        discriminator, x = tiny_discriminator("token"), images(2).requires_grad_()
        discriminator.train()(x).square().sum().backward()
        assert x.grad.abs().sum() > 0
        trained = {name for name, p in discriminator.named_parameters() if p.requires_grad}
        assert trained == set(gradients(discriminator)) and all(name.startswith("heads.") for name in trained)

    def test_spectral_norms_move_in_training_mode_only(self):
        discriminator = tiny_discriminator("token")
        before = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
        discriminator.eval()(images(2))
        assert all(torch.equal(buffer, before[name]) for name, buffer in discriminator.named_buffers())
        discriminator.train()(images(2))
        moved = {name: buffer.clone() for name, buffer in discriminator.named_buffers()}
        assert any(not torch.equal(buffer, before[name]) for name, buffer in moved.items())
        # By the weights, not by the images: what keeps processes equal.
        discriminator.load_state_dict(before, strict=False)
        discriminator(images(3))
        assert all(torch.equal(buffer, moved[name]) for name, buffer in discriminator.named_buffers())

    def test_under_bf16_autocast(self):
        discriminator, x = tiny_discriminator("token").eval(), images(2)
        with torch.autocast("cpu", torch.bfloat16):
            half = discriminator(x)
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, discriminator(x), rtol=0.1, atol=0.1)

    def test_from_pretrained(self, tmp_path):
        encoder = tiny_encoder("vit")
        encoder.save_pretrained(tmp_path)
        loaded = TokenDiscriminator.from_pretrained(tmp_path)
        assert len(loaded.heads) == 5
        for name, value in encoder.state_dict().items():
            assert torch.equal(value, loaded.network.encoder.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["patch", "token"])
def test_logits_of_an_image_do_not_depend_on_the_batch(kind):
    discriminator = tiny_discriminator(kind).eval()
    x = images(4)
    torch.testing.assert_close(discriminator(x)[:1], discriminator(x[:1]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("with_embeddings", "wanted"), [(False, [1, 2, 3, 3, 3]), (True, [0, 1, 2, 3, 3])])
def test_the_fifth_head_reads_the_last_layer_again_or_the_embeddings(with_embeddings, wanted):
    encoder, pictures, read = tiny_encoder(), images(), []
    states = encoder(pictures, output_hidden_states=True).hidden_states
    discriminator = TokenDiscriminator(encoder, with_embeddings)
    for head in discriminator.heads:
        head.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    assert discriminator(pictures).shape == (4, 5 * 16)
    assert all(torch.equal(tokens, states[layer]) for tokens, layer in zip(read, wanted, strict=True))
