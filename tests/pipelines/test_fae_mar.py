"""What only pipelines that generate token by token have: inpainting, partial results, temperature, steps."""

import numpy as np
import pytest
import torch
from drawing import SETTINGS, assert_same, draw, seeded
from factories import (
    tiny_autoregressive,
    tiny_fae_mar_pipeline,
    tiny_kl,
    tiny_maetok,
    tiny_mar,
    tiny_random_autoregressive,
)
from PIL import Image

from hf_fae import TokenGuidance
from hf_fae.generators.diffusion_head import head_scheduler
from hf_fae.latents import encode_images


MODELS = {"mar": tiny_mar, "raster": tiny_autoregressive, "random": tiny_random_autoregressive}


@pytest.fixture(scope="module", params=MODELS)
def pipe(request):
    return tiny_fae_mar_pipeline(**SETTINGS, with_encoder=True, transformer=MODELS[request.param]())


@pytest.fixture(scope="module")
def mar():
    return tiny_fae_mar_pipeline(**SETTINGS, with_encoder=True)


LOWER_HALF = torch.cat([torch.zeros(16, 32), torch.ones(16, 32)])


def random_image(seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


class TestKeptTokens:
    def test_are_those_of_the_image(self, pipe):
        image = random_image()
        latents = draw(pipe, image=image, mask_image=LOWER_HALF, output_type="latent")
        pixel_values = pipe.image_processor.preprocess(image)
        with torch.no_grad():
            expected = encode_images(pipe.vae, pixel_values).mean
        assert torch.equal(latents[:, :, :2], expected[:, :, :2])
        assert not torch.isclose(latents[:, :, 2:], expected[:, :, 2:]).any()
        again = draw(pipe, image_latents=expected, mask_image=LOWER_HALF, output_type="latent")
        assert torch.equal(again, latents)

    def test_decide_about_the_others(self, pipe):
        one, other = (
            draw(pipe, image=random_image(seed), mask_image=LOWER_HALF, output_type="latent")[:, :, 2:]
            for seed in (1, 2)
        )
        assert not torch.allclose(one, other, rtol=1e-2)

    def test_take_no_steps(self, pipe):
        draw(pipe, image=random_image(), mask_image=LOWER_HALF, num_inference_steps=None)
        assert pipe.num_timesteps == (4 if type(pipe.transformer).__name__.startswith("MAR") else 8)

    def test_in_a_batch(self, pipe):
        """An image and a mask for each output, or one for all."""
        latents = torch.randn(2, 4, 4, 4)
        masks = LOWER_HALF.expand(2, 1, 32, 32)
        both = draw(
            pipe, [1, 2], image_latents=latents, mask_image=masks, generator=seeded(1, 2), output_type="latent"
        )
        for row, label in enumerate((1, 2)):
            one = draw(
                pipe, label, image_latents=latents[[row]], mask_image=LOWER_HALF, seed=row + 1, output_type="latent"
            )
            torch.testing.assert_close(both[[row]], one, rtol=1e-3, atol=1e-3 * one.abs().max().item())
        same = draw(pipe, [1, 2], image_latents=latents[:1], mask_image=LOWER_HALF, output_type="latent")
        assert torch.equal(same[0, :, :2], same[1, :, :2])


class TestMasks:
    def test_a_token_with_one_white_pixel_is_generated(self, mar):
        mask = torch.zeros(32, 32)
        mask[9, 17] = 1.0
        assert mar.prepare_mask(1, mask).view(4, 4).nonzero().tolist() == [[1, 2]]

    def test_forms(self, mar):
        image = Image.fromarray((LOWER_HALF.numpy() * 255).astype(np.uint8))
        expected = mar.prepare_mask(2, LOWER_HALF)
        assert expected.shape == (2, 16) and expected[0].tolist() == [False] * 8 + [True] * 8
        tokens = LOWER_HALF[::8, ::8]
        forms = [image, image.convert("RGB"), [image] * 2, LOWER_HALF.numpy(), LOWER_HALF.bool(), tokens]
        forms += [LOWER_HALF[None], LOWER_HALF[None, None], [LOWER_HALF] * 2, tokens.expand(2, 4, 4)]
        forms += [(LOWER_HALF,), [image, LOWER_HALF.numpy()]]
        for form in forms:
            assert torch.equal(mar.prepare_mask(2, form), expected)

    def test_of_each_image(self, mar):
        masks = torch.stack([LOWER_HALF, LOWER_HALF.flip(0)])
        assert mar.prepare_mask(2, masks).long().sum(0).tolist() == [1] * 16

    def test_of_a_tokenizer_without_a_grid(self):
        """The tokens of MAETok have no positions in the image: a mask is of tokens."""
        pipe = tiny_fae_mar_pipeline(vae=tiny_maetok(), transformer=tiny_mar(sample_size=[1, 6]))
        latents, mask = torch.randn(1, 4, 1, 6), torch.tensor([[1, 0, 0, 1, 1, 0]])
        generated = draw(pipe, 1, image_latents=latents, mask_image=mask, output_type="latent")
        assert (generated == latents).all(1).view(-1).tolist() == [False, True, True, False, False, True]
        with pytest.raises(ValueError, match=r"mask_image must be 1 or 1 of \(height, width\) \(1, 6\), got \(1, 32"):
            draw(pipe, 1, image_latents=latents, mask_image=LOWER_HALF)

    def test_of_diffusers_own_autoencoder(self):
        pipe = tiny_fae_mar_pipeline(vae=tiny_kl(), transformer=tiny_random_autoregressive(patch_size=2))
        generated = draw(pipe, 1, image=random_image(), mask_image=LOWER_HALF, output_type="latent")
        with torch.no_grad():
            expected = encode_images(pipe.vae, pipe.image_processor.preprocess(random_image())).mean
        assert torch.equal(generated[:, :, :2], expected[:, :, :2])


LATENTS = torch.zeros(1, 4, 4, 4)
BAD = {
    "image alone": ({"image": random_image()}, "image must come with a mask_image"),
    "latents alone": ({"image_latents": LATENTS}, "image_latents must come with a mask_image"),
    "mask alone": (
        {"mask_image": LOWER_HALF},
        "either image or image_latents must be given with mask_image or strength, got neither",
    ),
    "both": (
        {"mask_image": LOWER_HALF, "image": random_image(), "image_latents": LATENTS},
        "either image or image_latents must be given with mask_image or strength, got both",
    ),
    "image's size": (
        {"mask_image": LOWER_HALF, "image": random_image().resize((40, 32))},
        r"image must be 32 x 32 \(height x width\) as the output, got 32 x 40",
    ),
    "latents' shape": (
        {"mask_image": LOWER_HALF, "image_latents": torch.zeros(1, 4, 4, 5)},
        r"image_latents must have shape \(1 or 1, 4, 4, 4\), got \(1, 4, 4, 5\)",
    ),
    "latents' number": (
        {"mask_image": LOWER_HALF, "image_latents": torch.zeros(3, 4, 4, 4)},
        r"image_latents must have shape .* got \(3, 4, 4, 4\)",
    ),
    "images' number": (
        {"mask_image": LOWER_HALF, "image": [random_image()] * 3},
        r"latents of image must have shape \(1 or 1, 4, 4, 4\), got \(3, 4, 4, 4\)",
    ),
    "NaN": (
        {"mask_image": LOWER_HALF, "image_latents": LATENTS + float("nan")},
        "image_latents must be finite, got 64 NaN",
    ),
    "mask's size": (
        {"mask_image": torch.ones(8, 8), "image_latents": LATENTS},
        r"mask_image must be 1 or 1 of \(height, width\) \(4, 4\) or \(32, 32\), got \(1, 8, 8\)",
    ),
    "mask's number": (
        {"mask_image": torch.ones(3, 4, 4), "image_latents": LATENTS},
        r"mask_image must be 1 or 1 of .* got \(3, 4, 4\)",
    ),
    "mask of words": (
        {"mask_image": "mask.png", "image_latents": LATENTS},
        "mask_image must be images, arrays or tensors, got a str",
    ),
    "mask of lists": (
        {"mask_image": [[0, 1], [1, 1]], "image_latents": LATENTS},
        "mask_image must be images, arrays or tensors, got a list",
    ),
    "no masks": (
        {"mask_image": [], "image_latents": LATENTS},
        r"mask_image must have masks of one \(height, width\), got \[\]",
    ),
    "masks of two sizes": (
        {"mask_image": [torch.ones(4, 4), torch.ones(32, 32)], "image_latents": LATENTS},
        r"mask_image must have masks of one \(height, width\), got \[\(4, 4\), \(32, 32\)\]",
    ),
    "flat mask": ({"mask_image": torch.ones(16), "image_latents": LATENTS}, r"mask_image must be .* got \(1, 1, 16\)"),
    "empty mask": (
        {"mask_image": torch.zeros(4, 4), "image_latents": LATENTS},
        r"mask_image must mark equally many tokens in all images, at least one, got \[0\]",
    ),
    "temperature": ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be a positive whole number, got 0"),
    "half steps": ({"num_inference_steps": 2.5}, "num_inference_steps must be a positive whole number, got 2.5"),
    "one diffusion step": ({"num_diffusion_steps": 1}, "num_diffusion_steps must be .* from 2 to 1000, got 1"),
    "guidance schedule": ({"guidance_scale": {"scale": 2, "schedule": "cosine"}}, "schedule must be .* got 'cosine'"),
}


@pytest.mark.parametrize("arguments, message", BAD.values(), ids=BAD)
def test_bad_input(mar, arguments, message):
    with pytest.raises(ValueError, match=message):
        mar(**{"class_labels": 1} | arguments)


def test_masks_with_unequal_numbers_of_tokens(mar):
    masks = torch.stack([LOWER_HALF, torch.ones(32, 32)])
    with pytest.raises(ValueError, match=r"mask_image must mark equally many tokens in all images, .* got \[8, 16\]"):
        mar([1, 2], mask_image=masks, image_latents=LATENTS)


def test_raster_order_keeps_what_lies_above():
    pipe = tiny_fae_mar_pipeline(transformer=tiny_autoregressive())
    with pytest.raises(ValueError, match="mask_image must mark the last tokens, row by row, for a transformer of ras"):
        draw(pipe, 1, image_latents=LATENTS, mask_image=LOWER_HALF.flip(0))


def test_bad_components():
    with pytest.raises(ValueError, match="num_inference_steps must be None for Autoregressive.*, got 4"):
        tiny_fae_mar_pipeline(transformer=tiny_autoregressive(), num_inference_steps=4)
    for settings, message in (
        ({"temperature": -1.0}, "temperature must be finite and not negative, got -1.0"),
        ({"num_diffusion_steps": 1}, "num_diffusion_steps must be a whole number from 2 to 1000, got 1"),
        ({"num_inference_steps": 1.5}, "num_inference_steps must be a positive whole number, got 1.5"),
    ):
        with pytest.raises(ValueError, match=message):
            tiny_fae_mar_pipeline(**settings)
    with pytest.raises(ValueError, match="scheduler must have clip_sample False, got True"):
        tiny_fae_mar_pipeline(scheduler=type(head_scheduler())(variance_type="learned_range"))
    pipe = tiny_fae_mar_pipeline(vae=None)
    with pytest.raises(ValueError, match="image must be None for a pipeline without vae, which accepts image_latents"):
        draw(pipe, 1, image=random_image(), mask_image=LOWER_HALF, output_type="latent")
    with pytest.raises(ValueError, match="load_encoder"):
        draw(tiny_fae_mar_pipeline(), 1, image=random_image(), mask_image=LOWER_HALF)


def test_interrupted_generation_is_a_partial_result(pipe):
    def stop(pipe, step, left, tensors):
        pipe._interrupt = step == 1
        return tensors

    latents = draw(pipe, callback_on_step_end=stop, output_type="latent")
    generated = latents.ne(0).all(1)
    assert torch.equal(generated, latents.ne(0).any(1))
    assert int(generated.sum()) == (5 if type(pipe.transformer).__name__.startswith("MAR") else 2)
    assert draw(pipe, callback_on_step_end=stop).isfinite().all()


def test_callback_counts_the_tokens_that_are_left(pipe):
    seen = []
    draw(pipe, callback_on_step_end=lambda pipe, step, left, tensors: seen.append(left))
    assert seen == ([14, 11, 6, 0] if len(seen) == 4 else list(range(15, -1, -1)))


def test_guidance_of_the_first_step(pipe):
    """Linear guidance starts at scale 1 for causal models, and above it for MAR."""

    def steps(scale):
        seen = []
        draw(pipe, guidance_scale=scale, callback_on_step_end=lambda *args: seen.append(args[-1]["latents"]))
        return seen

    plain, guided = steps(1.0), steps(3.0)
    is_plain = torch.allclose(guided[0], plain[0], rtol=1e-3, atol=1e-4 * plain[0].abs().max().item())
    assert is_plain == (type(pipe.transformer).__name__ != "MARTransformer2DModel")
    assert not torch.allclose(guided[-1], plain[-1], rtol=1e-2)


def test_settings_of_the_checkpoint(mar, tmp_path):
    mar.save_pretrained(tmp_path)
    settings = {"temperature": 0.5, "num_inference_steps": 2, "num_diffusion_steps": 5}
    other = type(mar).from_pretrained(tmp_path, **settings)
    other.set_progress_bar_config(disable=True)
    assert_same(draw(other), draw(mar, **settings))
    assert not torch.allclose(draw(other), draw(mar), atol=1e-3)
    latents = [draw(mar, **{name: value}, output_type="latent") for name, value in settings.items()]
    assert all(not torch.equal(one, draw(mar, output_type="latent")) for one in latents)


def test_guidance_forms(mar):
    expected = draw(mar, guidance_scale=3.0)
    for form in (3, TokenGuidance(3.0), {"scale": 3.0, "schedule": "linear"}):
        assert torch.equal(draw(mar, guidance_scale=form), expected)
    assert not torch.equal(draw(mar, guidance_scale=TokenGuidance(3.0, "constant")), expected)


def test_lora_brings_a_class(pipe, tmp_path):
    from peft import LoraConfig

    from hf_fae.generators.lora_layers import LORA_TARGETS, lora_weights

    make = MODELS[pipe.transformer.config.get("order", "mar")]
    trained, fresh = (tiny_fae_mar_pipeline(**SETTINGS, transformer=make()) for _ in range(2))
    plain = draw(fresh, 2)
    trained.add_classes({"my-dog": torch.randn(32)})
    trained.transformer.add_adapter(LoraConfig(r=2, target_modules=LORA_TARGETS, init_lora_weights=False))
    expected = draw(trained, "my-dog")
    trained.save_lora_weights(tmp_path, **lora_weights(trained.transformer, ["my-dog"]))
    fresh.load_lora_weights(tmp_path)
    assert_same(draw(fresh, "my-dog"), expected)
    fresh.unload_lora_weights()
    assert torch.equal(draw(fresh, 2), plain) and fresh.transformer.config.num_classes == 10
