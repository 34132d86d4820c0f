"""MAETok: its sequences, masks, modulation and auxiliary decoders, and section 1 of its specification."""

import pytest
import torch
from factories import tiny_fae_dit_pipeline, tiny_lightning_dit, tiny_maetok, tiny_released_maetok
from torch.nn import functional as F

from hf_fae import AutoencoderMAETok, build_preset
from hf_fae.data.latent_cache import tokenizer_fingerprint


MASK = torch.rand(2, 16, generator=torch.Generator().manual_seed(0)) < 0.5
TARGETS = {"hog": 27, "dinov2": 10}


@pytest.fixture(scope="module", params=[tiny_maetok, tiny_released_maetok])
def vae(request):
    return request.param()


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1


def inputs_of(module, call):
    """The positional arguments that `module` gets in each of its calls."""
    seen = []
    handle = module.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        call()
    handle.remove()
    return seen


def test_shapes(vae, images):
    posterior = vae.encode(images).latent_dist
    assert posterior.mode().shape == (2, 4, 1, 6)
    assert torch.equal(posterior.sample(), posterior.mode()) and not posterior.std.any()
    assert vae.decode(posterior.mode()).sample.shape == images.shape
    torch.testing.assert_close(vae(images).sample, vae.decode(posterior.mode()).sample, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, patches", [("maetok-b-128", 256), ("maetok-b-128-512", 1024)])
def test_published_sequences(name, patches):
    """The encoder reads class token, patches and 128 latent tokens; the decoder masks for all patches, and latents."""
    vae = build_preset(name, device="meta")
    side = vae.config.sample_size
    images, latents = torch.empty(1, 3, side, side, device="meta"), torch.empty(1, 32, 1, 128, device="meta")
    ((encoded, *_),) = inputs_of(vae.encoder.blocks[0], lambda: vae.encode(images))
    ((decoded, *_),) = inputs_of(vae.decoder.blocks[0], lambda: vae.decode(latents))
    assert encoded.shape == (1, 1 + patches + 128, 768) and decoded.shape == (1, patches + 128, 768)
    assert vae.decoder.proj_out.out_features == 768 and vae.decoder(latents.flatten(2).mT).shape == (1, patches, 768)


@pytest.mark.parametrize("side, patches", [(256, 256), (512, 1024)])
def test_auxiliary_targets_of_the_paper(side, patches):
    """HOG of 9 bins, 3 colours and 2 x 2 cells, DINOv2-L and SigLIP SO400M."""
    with torch.device("meta"):
        vae = AutoencoderMAETok(side, auxiliary_targets={"hog": 108, "dinov2": 1024, "siglip": 1152})
    output = vae(torch.empty(1, 3, side, side, device="meta"), predict_targets=True)
    widths = {target: prediction.shape for target, prediction in output.predictions.items()}
    assert widths == {"hog": (1, patches, 108), "dinov2": (1, patches, 1024), "siglip": (1, patches, 1152)}


class TestSequence:
    def test_encoder_reads_class_patches_latents(self, vae, images):
        encoder = vae.encoder
        ((tokens, *_),) = inputs_of(encoder.blocks[0], lambda: encoder(images, MASK))
        assert tokens.shape == (2, 1 + 16 + 6, 32)
        torch.testing.assert_close(tokens[:, 0], encoder.class_token.expand(2, -1))
        patches = torch.where(MASK[..., None], encoder.mask_token, encoder.proj_in(images).flatten(2).mT)
        torch.testing.assert_close(tokens[:, 1:17], patches + encoder.positions)
        torch.testing.assert_close(tokens[1, 17:], encoder.latent_tokens + encoder.latent_positions)

    def test_decoder_reads_masks_latents(self, vae):
        decoder, latents = vae.decoder, torch.randn(2, 6, 4)
        ((tokens, *_),) = inputs_of(decoder.blocks[0], lambda: decoder(latents))
        assert tokens.shape == (2, 16 + 6, 48) and (tokens[:, :16] == decoder.mask_token).all()
        torch.testing.assert_close(tokens[:, 16:], decoder.proj_in(latents) + decoder.latent_positions)

    def test_class_token_of_the_decoder(self):
        """It comes first, is not rotated, and is dropped from the output."""
        decoder, latents = tiny_released_maetok(decoder_class_token=True).decoder, torch.randn(2, 6, 4)
        ((tokens, (cos, _), *_), *_) = inputs_of(decoder.blocks[0], lambda: decoder(latents))
        assert tokens.shape == (2, 1 + 16 + 6, 48) and cos[:, 0].eq(1).all()
        assert (tokens[:, 0] == decoder.class_token).all() and (tokens[:, 1:17] == decoder.mask_token).all()
        with torch.no_grad():
            patches = decoder(latents)
            decoder.class_token.add_(torch.randn(48))
            assert patches.shape == (2, 16, 192) and not torch.allclose(decoder(latents), patches, atol=1e-3)

    def test_patches_alone_are_rotated(self, vae, images):
        (_, (cos, sin)), *_ = inputs_of(vae.encoder.blocks[1], lambda: vae.encoder(images))
        other = torch.tensor([0, *range(17, 23)])
        assert (cos[:, other] == 1).all() and (sin[:, other] == 0).all()
        assert cos[:, 1].flatten().eq(1).all() and not cos[:, 2:17].eq(1).all(-1).any()  # the first one is at (0, 0)

    def test_cells_differ_by_their_rotation_alone(self):
        """Without rotation all cells have the same mask token, and become the same patch."""
        vae = tiny_released_maetok()
        with torch.no_grad():
            vae.decoder.rotary.frequencies.zero_()
            patches = vae.decoder(torch.randn(2, 6, 4))
        torch.testing.assert_close(patches, patches[:, :1].expand_as(patches), atol=1e-5, rtol=1e-4)


class TestMasks:
    def test_encoder_does_not_see_masked_patches(self, vae, images):
        changed = images + F.interpolate(MASK.view(2, 1, 4, 4).float(), size=32)
        with torch.no_grad():
            assert torch.equal(vae(images, MASK).sample, vae(changed, MASK).sample)
            assert not torch.allclose(vae(images).sample, vae(changed).sample, atol=1e-4)

    def test_no_mask_is_an_empty_one(self, vae, images):
        with torch.no_grad():
            assert torch.equal(vae(images).sample, vae(images, torch.zeros(2, 16, dtype=torch.bool)).sample)

    def test_image_depends_on_all_pixels_without_a_mask(self, vae, images):
        images.requires_grad_()
        vae(images).sample.square().sum().backward()
        assert (images.grad != 0).all()


class TestModulation:
    def test_latents_start_at_zero(self):
        """The factor is not 1 + scale: what the blocks read of latent tokens is 0 at first."""
        vae = AutoencoderMAETok(**{**tiny_released_maetok().config, "decoder_num_layers": 1})
        block, latents = vae.decoder.blocks[0], torch.randn(2, 6, 4)
        ((tokens, *_),) = inputs_of(block, lambda: vae.decoder(latents))
        for part in (block.attn, block.ff):
            ((normed, *_),) = inputs_of(part, lambda: vae.decoder(latents))
            assert not normed[:, 16:].any()
        ((normed, *_),) = inputs_of(block.attn, lambda: vae.decoder(latents))
        torch.testing.assert_close(normed[:, :16], F.layer_norm(tokens[:, :16], (48,), eps=1e-6))

    def test_equals_plain_formulas(self):
        vae = tiny_released_maetok()
        block, latents = vae.decoder.blocks[0], torch.randn(2, 6, 4)
        ((tokens, _, raw),) = inputs_of(block, lambda: vae.decoder(latents))
        ((normed, *_),) = inputs_of(block.attn, lambda: vae.decoder(latents))
        shift, scale, _, _ = (F.silu(latents) @ block.modulation.weight.T + block.modulation.bias).chunk(4, dim=-1)
        assert torch.equal(raw, latents)
        expected = F.layer_norm(tokens, (48,), eps=1e-6)[:, 16:] * scale + shift
        torch.testing.assert_close(normed[:, 16:], expected, atol=1e-5, rtol=1e-4)


class TestAuxiliaryDecoders:
    @pytest.fixture
    def rich(self):
        return tiny_maetok(auxiliary_targets=TARGETS, caption_vocab_size=11, caption_length=5)

    def test_predictions(self, rich, images):
        output = rich(images, MASK, predict_targets=True)
        shapes = {name: tuple(value.shape) for name, value in output.predictions.items()}
        assert shapes == {"hog": (2, 16, 27), "dinov2": (2, 16, 10), "caption": (2, 5, 11)}
        sample, predictions = rich(images, MASK, predict_targets=True, return_dict=False)
        assert torch.equal(sample, output.sample) and predictions.keys() == shapes.keys()

    def test_they_teach_the_encoder(self, rich, images):
        predictions = rich(images, MASK, predict_targets=True).predictions
        sum(value.square().mean() for value in predictions.values()).backward()
        parameters = [*rich.encoder.parameters(), *rich.auxiliary_decoders.parameters()]
        assert all(parameter.grad is not None for parameter in parameters)
        assert all(parameter.grad is None for parameter in rich.decoder.parameters())

    def test_saved_and_removed(self, rich, images, tmp_path):
        rich.save_pretrained(tmp_path)
        loaded = AutoencoderMAETok.from_pretrained(tmp_path)
        expected = rich(images, predict_targets=True)
        found = loaded(images, predict_targets=True)
        for name, prediction in expected.predictions.items():
            assert torch.equal(found.predictions[name], prediction)
        loaded.remove_auxiliary_decoders()
        assert torch.equal(loaded(images).sample, expected.sample)
        loaded.save_pretrained(tmp_path / "light")
        light = AutoencoderMAETok.from_pretrained(tmp_path / "light")
        assert not light.auxiliary_decoders and torch.equal(light(images).sample, expected.sample)

    def test_nothing_to_predict(self, images):
        with pytest.raises(ValueError, match="predict_targets must be False for a model without auxiliary decoders"):
            tiny_maetok()(images, predict_targets=True)


def test_slices_but_no_tiles(images):
    vae = tiny_maetok()
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode()
        vae.enable_slicing()
        torch.testing.assert_close(vae.encode(images).latent_dist.mode(), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(NotImplementedError, match="AutoencoderMAETok"):
        vae.enable_tiling()


def test_pipeline_knows_the_size_of_its_images():
    vae = tiny_maetok()
    pipe = tiny_fae_dit_pipeline(vae=vae, transformer=tiny_lightning_dit(sample_size=[1, 6]))
    assert pipe.image_size == (32, 32)
    draw = {"class_labels": 1, "num_inference_steps": 1, "output_type": "latent"}
    assert pipe(**draw).images.shape == pipe(**draw, height=32, width=32).images.shape == (1, 4, 1, 6)
    with pytest.raises(ValueError, match="height and width must be 32 x 32, got 64 x 32"):
        pipe(**draw, height=64)


def test_fingerprint_is_that_of_the_encoder():
    vae = tiny_maetok()
    fingerprint = tokenizer_fingerprint(vae)
    with torch.no_grad():
        vae.decoder.proj_out.weight.add_(1)
        assert tokenizer_fingerprint(vae) == fingerprint
        assert tokenizer_fingerprint(tiny_maetok(rope_theta=10.0)) != fingerprint
        vae.encoder.latent_tokens.add_(1)
        assert tokenizer_fingerprint(vae) != fingerprint
