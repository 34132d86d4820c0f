"""l-DeTok: its parts by plain formulas, what dropped patches and noise do, and section 1 of its specification."""

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from factories import tiny_detok
from torch.nn import functional as F

from hf_fae.autoencoders.detok import add_latent_noise
from hf_fae.data.latent_cache import tokenizer_fingerprint
from hf_fae.layers.positions import unit_rotary_angles


CPU = torch.device("cpu")
GENERATOR = torch.Generator().manual_seed(0)
VISIBLE = torch.rand(2, 16, generator=GENERATOR).argsort(dim=1)[:, :9]
NOISE = torch.randn(2, 2, 4, 4, 4, generator=GENERATOR)


@pytest.fixture(scope="module")
def vae():
    return tiny_detok()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def rms_norm(x, norm):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight


def rotate(x, grid, released):
    """Plain formulas of section 2 of the specification, for queries or keys (B, heads, N, head_dim)."""
    quarter = x.shape[-1] // 4
    frequencies = 2 * torch.pi * 7 * 1e-4 ** (torch.arange(quarter) / (quarter - 1))
    rows = torch.linspace(0, 1, grid[0]).repeat_interleave(grid[1])[:, None] * frequencies
    columns = torch.linspace(0, 1, grid[1]).repeat(grid[0])[:, None] * frequencies
    if released:
        angles = torch.cat([rows, rows, columns, columns], dim=-1)
    else:
        angles = torch.cat([rows, columns], dim=-1).repeat_interleave(2, dim=-1)
    turned = torch.empty_like(x)
    turned[..., 0::2] = x[..., 0::2] * angles.cos()[:, 0::2] - x[..., 1::2] * angles.sin()[:, 0::2]
    turned[..., 1::2] = x[..., 1::2] * angles.cos()[:, 1::2] + x[..., 0::2] * angles.sin()[:, 1::2]
    return turned


def run(stack, x, released):
    x = rms_norm(x, stack.norm_in)
    for block in stack.blocks:
        normed, attn = rms_norm(x, block.norm1), block.attn
        q, k, v = (
            layer(normed).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer in (attn.to_q, attn.to_k, attn.to_v)
        )
        q, k = rotate(q, (4, 4), released), rotate(k, (4, 4), released)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))
        value, gate = block.ff.net[0].proj(rms_norm(x, block.norm2)).chunk(2, dim=-1)
        x = x + block.ff.net[2](value * F.silu(gate))
    return rms_norm(x, stack.norm_out)


@pytest.mark.parametrize("released", [False, True])
def test_equals_plain_formulas(images, released):
    vae = tiny_detok(rotary_as_released=released)
    encoder, decoder = vae.encoder, vae.decoder
    patches = images.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    tokens = patches @ encoder.proj_in.weight.flatten(1).T + encoder.proj_in.bias + encoder.positions
    mean, logvar = encoder.proj_out(run(encoder, tokens, released)).chunk(2, dim=-1)
    posterior = vae.encode(images).latent_dist
    expected = mean.mT.unflatten(2, (4, 4))
    torch.testing.assert_close(vae.denormalize_latents(posterior.mode()), expected, atol=1e-4, rtol=1e-4)
    std = (0.5 * logvar).exp().mT.unflatten(2, (4, 4)) / vae.latents_std
    torch.testing.assert_close(posterior.std, std, atol=1e-4, rtol=1e-4)

    tokens = run(decoder, decoder.proj_in(mean) + decoder.positions, released)
    pixels = decoder.proj_out(tokens).view(2, 4, 4, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, 32, 32)
    torch.testing.assert_close(vae.decode(posterior.mode()).sample, decoder.conv_out(pixels), atol=1e-4, rtol=1e-4)


def test_shapes(vae, images):
    posterior = vae.encode(images).latent_dist
    assert posterior.sample().shape == posterior.mode().shape == (2, 4, 4, 4)
    output = vae(images)
    assert output.sample.shape == images.shape and output.moments.shape == (2, 8, 1, 16)
    assert vae(images, VISIBLE).moments.shape == (2, 8, 1, 9)


class TestCorruption:
    def test_nothing_missing_and_no_noise_is_the_plain_path(self, vae, images):
        plain = vae.decode(vae.encode(images).latent_dist.mode()).sample
        everything = torch.arange(16).expand(2, -1)
        torch.testing.assert_close(vae(images).sample, plain, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(vae(images, everything).sample, plain, atol=1e-5, rtol=1e-4)
        quiet = tiny_detok(noise_gamma=0.0)
        noise = {"latent_noise": NOISE[0], "noise_level": torch.tensor([0.3, 1.0])}
        torch.testing.assert_close(quiet(images, everything, **noise).sample, plain, atol=1e-5, rtol=1e-4)

    def test_order_of_the_visible_patches_means_nothing(self, vae, images):
        noise = {"posterior_noise": NOISE[0], "latent_noise": NOISE[1], "noise_level": torch.tensor([0.2, 0.7])}
        shuffled = VISIBLE.flip(1)
        first, second = vae(images, VISIBLE, **noise), vae(images, shuffled, **noise)
        torch.testing.assert_close(first.sample, second.sample, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(first.moments.flip(-1), second.moments, atol=1e-5, rtol=1e-4)

    def test_encoder_does_not_see_hidden_patches(self, vae, images):
        hidden = torch.ones(2, 16, dtype=torch.bool).scatter(1, VISIBLE, False).view(2, 1, 4, 4).float()
        other = images + F.interpolate(hidden, size=32)
        assert torch.equal(vae(images, VISIBLE).sample, vae(other, VISIBLE).sample)
        assert not torch.allclose(vae(images).sample, vae(other).sample, atol=1e-3)

    def test_visible_patches_keep_the_angles_of_their_positions(self, vae, images):
        seen = []
        handle = vae.encoder.blocks[0].register_forward_pre_hook(lambda module, args: seen.append(args[1]))
        vae(images, VISIBLE)
        handle.remove()
        for values, table in zip(seen[0], unit_rotary_angles(16, (4, 4), CPU), strict=True):
            assert values.shape == (2, 9, 1, 8)
            assert torch.equal(values[1, :, 0], table[VISIBLE[1]])

    def test_decoder_sees_each_token_at_its_position_and_the_mask_token_elsewhere(self, vae, images):
        decoder, seen = vae.decoder, []
        handle = decoder.norm_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        mean = vae(images, VISIBLE).moments[:, :4, 0].mT
        handle.remove()
        tokens = seen[0] - decoder.positions
        for image in range(2):
            visible = dict(zip(VISIBLE[image].tolist(), decoder.proj_in(mean[image]), strict=True))
            for position in range(16):
                expected = visible.get(position, decoder.mask_token)
                torch.testing.assert_close(tokens[image, position], expected, atol=1e-5, rtol=1e-4)

    def test_noise_of_a_patch_is_that_of_its_position(self, vae, images):
        """So that an image's noise is the same whatever is hidden."""
        changed = NOISE[0].flatten(2).clone()
        changed[0, :, VISIBLE[0, 0]] += 1
        latents = []
        handle = vae.decoder.register_forward_pre_hook(lambda module, args: latents.append(args[0]))
        for noise in (NOISE[0], changed.view_as(NOISE[0])):
            vae(images, VISIBLE, latent_noise=noise, noise_level=torch.full((2,), 0.5))
        handle.remove()
        difference = latents[1] - latents[0]
        torch.testing.assert_close(difference[0, 0], torch.full((4,), 0.5 * 3), atol=1e-4, rtol=1e-4)
        assert not difference[0, 1:].any() and not difference[1].any()

    def test_samples_are_those_of_the_posterior(self, vae, images):
        posterior = vae.encode(images).latent_dist
        sample = posterior.mean + posterior.std * NOISE[0]
        torch.testing.assert_close(
            vae(images, posterior_noise=NOISE[0]).sample, vae.decode(sample).sample, atol=1e-4, rtol=1e-3
        )


class TestNoise:
    X, EPS = torch.randn(2, 3, 5, 4, generator=GENERATOR)

    def test_ends(self):
        for noise_type in ("interpolate", "add"):
            quiet = add_latent_noise(self.X, self.EPS, torch.zeros(3), 3.0, noise_type)
            assert torch.equal(quiet, self.X)
        assert torch.equal(add_latent_noise(self.X, self.EPS, torch.ones(3), 3.0, "interpolate"), 3 * self.EPS)
        assert torch.equal(add_latent_noise(self.X, self.EPS, torch.ones(3), 0.0, "interpolate"), self.X)

    def test_one_level_an_image(self):
        tau = torch.tensor([0.25, 0.5, 1.0])
        between = add_latent_noise(self.X, self.EPS, tau, 3.0, "interpolate")
        added = add_latent_noise(self.X, self.EPS, tau, 3.0, "add")
        for image in range(3):
            noise = 3 * tau[image] * self.EPS[image]
            torch.testing.assert_close(between[image], (1 - tau[image]) * self.X[image] + noise)
            torch.testing.assert_close(added[image], self.X[image] + noise)

    def test_type_and_scale_are_those_of_the_config(self, images):
        noise = {"latent_noise": NOISE[0], "noise_level": torch.full((2,), 0.5)}
        default, added, weak = (
            tiny_detok(**config)(images, **noise).sample
            for config in ({}, {"noise_type": "add"}, {"noise_gamma": 1.0})
        )
        assert not torch.allclose(default, added, atol=1e-3) and not torch.allclose(default, weak, atol=1e-3)


def test_kl_of_moments(vae, images):
    """0.5 sum(mu^2 + var - 1 - logvar) over tokens and channels, of what is visible."""
    moments = vae(images, VISIBLE).moments
    mean, logvar = moments.chunk(2, dim=1)
    expected = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3))
    torch.testing.assert_close(DiagonalGaussianDistribution(moments).kl(), expected)
    assert not DiagonalGaussianDistribution(torch.zeros(2, 8, 1, 9)).kl().any()
    extreme = torch.cat([torch.zeros(1, 4, 1, 1), torch.tensor([-99.0, -30, 20, 99]).view(1, 4, 1, 1)], dim=1)
    assert DiagonalGaussianDistribution(extreme).logvar.flatten().tolist() == [-30, -30, 20, 20]


def test_slices_and_tiles(images):
    vae = tiny_detok()
    expected = vae.encode(images).latent_dist.mode()
    vae.enable_slicing()
    torch.testing.assert_close(vae.encode(images).latent_dist.mode(), expected, atol=1e-5, rtol=1e-4)
    vae.enable_tiling()
    assert torch.equal(vae.encode(images[:1]).latent_dist.mode(), expected[:1])  # one tile is enough
    large = torch.rand(1, 3, 72, 32) * 2 - 1
    latents = vae.encode(large).latent_dist.mode()
    assert latents.shape == (1, 4, 9, 4) and vae.decode(latents).sample.shape == large.shape
    with pytest.raises(ValueError, match="images of 32 x 32, got 72 x 32"):  # training knows no tiles
        vae(large)
    torch.testing.assert_close(latents[:, :, 0], vae.encode(large[:, :, :32]).latent_dist.mode()[:, :, 0])


def test_fingerprint_is_that_of_the_encoder():
    vae = tiny_detok()
    fingerprint = tokenizer_fingerprint(vae)
    assert fingerprint["image_encoder"] is None
    vae.decoder.conv_out.weight.add_(1)
    assert tokenizer_fingerprint(vae) == fingerprint
    assert tokenizer_fingerprint(tiny_detok(rotary_as_released=True)) != fingerprint
    vae.encoder.positions.add_(1)
    assert tokenizer_fingerprint(vae) != fingerprint
