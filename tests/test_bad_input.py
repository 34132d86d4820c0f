"""Bad input gets one clear sentence that names the argument and its value. (Checkpoints that do not fit: see
test_contract_models.py; guidance and schedulers: in their own files.)"""

import json

import pytest
import torch
from factories import (
    tiny_autoregressive,
    tiny_detok,
    tiny_fae,
    tiny_fae_dit_pipeline,
    tiny_fae_mar_pipeline,
    tiny_fae_starflow_pipeline,
    tiny_fae_text_to_image_pipeline,
    tiny_lightning_dit,
    tiny_maetok,
    tiny_mar,
    tiny_mmdit,
    tiny_raev2_dit,
    tiny_starflow,
    tiny_text_raev2_dit,
    tiny_text_starflow,
    tiny_text_starflow_pipeline,
)

from hf_fae import AutoencoderFAE, FAEDiTPipeline, FlowGuidance


NAN = float("nan")
LABELS = {0: "tench, Tinca tinca", 1: "cat", 2: "dog", 3: "golden retriever"}


@pytest.fixture(scope="module")
def pipe():
    return tiny_fae_dit_pipeline(id2label=LABELS)


@pytest.fixture(scope="module")
def vae():
    return tiny_fae()


# What every class-conditional pipeline refuses.
LABEL = {
    "unknown label": ({"class_labels": "golden retreiver"}, "class_labels .*'golden retreiver'; did you mean 'golden"),
    "unrelated label": ({"class_labels": "zzzz"}, "class_labels has the unknown name 'zzzz'; see `pipe.id2label`"),
    "label too large": ({"class_labels": 10}, "class_labels must be from 0 to 9, got 10"),
    "negative label": ({"class_labels": [1, -1]}, "class_labels must be from 0 to 9, got -1"),
    "fractional label": ({"class_labels": 1.5}, "class_labels must be numbers or names of classes, got 1.5"),
    "truth value": ({"class_labels": True}, "class_labels must be numbers or names of classes, got True"),
    "no label": ({"class_labels": []}, r"class_labels must name at least one class, got \[\]"),
    "unknown negative": ({"negative_class_labels": "zzzz"}, "negative_class_labels has the unknown name 'zzzz'"),
    "negative count": ({"negative_class_labels": [1, 2, 3]}, "negative_class_labels must be one class or 1 .* got 3"),
}
# What every pipeline refuses.
PIPELINE = {
    "odd height": ({"height": 30}, "height must be a positive multiple of 8, got 30"),
    "no width": ({"width": 0}, "width must be a positive multiple of 8, got 0"),
    "no images": ({"num_images_per_prompt": 0}, "num_images_per_prompt must be a positive whole number, got 0"),
    "output type": ({"output_type": "jpeg"}, "output_type must be .* got 'jpeg'"),
    "latents shape": (
        {"latents": torch.zeros(1, 4, 5, 4)},
        r"latents must have shape \(1, 4, 4, 4\), got \(1, 4, 5, 4",
    ),
    "latents NaN": ({"latents": torch.full((1, 4, 4, 4), NAN)}, "latents must be finite, got 64 NaN"),
    "generators": ({"generator": [torch.Generator()] * 2}, "generator must be a list of 1, one for each image, got 2"),
    "guidance": ({"guidance_scale": "strong"}, "guidance_scale must be a .*number.* got 'strong'"),
    "tensor inputs": (
        {"callback_on_step_end_tensor_inputs": ["noise"]},
        r"callback_on_step_end_tensor_inputs must be among \['latents'\], got \['noise'\]",
    ),
}


@pytest.fixture(scope="module")
def flow_pipe():
    return tiny_fae_starflow_pipeline(id2label=LABELS)


@pytest.fixture(scope="module")
def raev2_pipe():
    return tiny_fae_dit_pipeline(id2label=LABELS, transformer=tiny_raev2_dit(), internal_guidance_scale=1.5)


@pytest.fixture(scope="module")
def raev2_text_pipe():
    return tiny_fae_text_to_image_pipeline(transformer=tiny_text_raev2_dit())


@pytest.fixture(scope="module")
def mar_pipe():
    return tiny_fae_mar_pipeline(id2label=LABELS)


@pytest.fixture(scope="module")
def text_flow_pipe():
    return tiny_text_starflow_pipeline()


@pytest.fixture(scope="module")
def text_pipe():
    return tiny_fae_text_to_image_pipeline()


@pytest.mark.parametrize("arguments, message", LABEL.values(), ids=LABEL)
@pytest.mark.parametrize("kind", ["pipe", "raev2_pipe", "flow_pipe", "mar_pipe"])
def test_class_labels(request, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)(**{"class_labels": 1} | arguments)


@pytest.mark.parametrize("arguments, message", PIPELINE.values(), ids=PIPELINE)
@pytest.mark.parametrize("kind", ["pipe", "raev2_pipe", "flow_pipe", "mar_pipe", "text_pipe", "text_flow_pipe"])
def test_pipeline_call(request, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)("cat", **arguments)


DENOISING = {
    "no steps": ({"num_inference_steps": 0}, "num_inference_steps must be a positive whole number, got 0"),
    "half steps": ({"num_inference_steps": 2.5}, "num_inference_steps must be a positive whole number, got 2.5"),
    "guidance bounds": ({"guidance_scale": [(0.7, 0.2, 2.0)]}, r"got \(0.7, 0.2, 2.0\)"),
    "rising sigmas": ({"sigmas": [0.5, 1.0]}, r"sigmas must fall strictly within \(0, 1\], got \[0.5, 1.0\]"),
    "no sigmas": ({"sigmas": []}, r"sigmas must fall strictly .* got \[\]"),
    "NaN sigma": ({"sigmas": [1.0, NAN]}, "sigmas must fall strictly"),
}


@pytest.mark.parametrize("arguments, message", DENOISING.values(), ids=DENOISING)
@pytest.mark.parametrize("kind", ["pipe", "raev2_pipe", "text_pipe", "raev2_text_pipe"])
def test_call_of_a_pipeline_with_a_denoiser(request, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)("cat", **arguments)


FLOW = {
    "guidance schedule": ({"guidance_scale": [(0.0, 1.0, 2.0)]}, "guidance_scale must be a finite number from 0"),
    "guidance below 0": ({"guidance_scale": -1}, "guidance_scale must be a finite number from 0, .* got -1"),
    "half a Jacobi block": ({"jacobi_block_size": 2.5}, "jacobi_block_size must be a positive whole number, got 2.5"),
    "no Jacobi block": ({"jacobi_block_size": 0}, "jacobi_block_size must be a positive whole number, got 0"),
    "Jacobi tolerance": ({"jacobi_tolerance": NAN}, "jacobi_tolerance finite and not negative, got 1 and nan"),
    "text": ({"negative_prompt": "dogs"}, "negative_prompt must be None for a flow of classes"),
    "both": ({"prompt": "cat"}, "prompt must be None for a flow of classes, which requires class_labels"),
    "nothing": ({"class_labels": None}, "class_labels must be numbers or names of classes, got None"),
}


@pytest.mark.parametrize("arguments, message", FLOW.values(), ids=FLOW)
def test_call_of_a_pipeline_with_a_flow(flow_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        flow_pipe(**{"class_labels": 1} | arguments)


# What every pipeline that reads texts refuses.
TEXT = {
    "number": ({"prompt": 3}, "prompt must be a text or a list of texts, got 3"),
    "bytes": ({"prompt": b"a cat"}, "prompt must be a text or a list of texts, got b'a cat'"),
    "no prompt": ({"prompt": []}, r"prompt must be a text or a list of texts, got \[\]"),
    "numbers": ({"prompt": ["a", 1]}, r"prompt must be a text or a list of texts, got \['a', 1\]"),
    "nothing": ({"prompt": None}, "either prompt or prompt_embeds must be given, got neither"),
    "both": ({"prompt_embeds": torch.zeros(1, 6, 24)}, "either prompt or prompt_embeds must be given, got both"),
    "flat embeddings": (
        {"prompt": None, "prompt_embeds": torch.zeros(6, 24)},
        r"prompt_embeds must have shape \(prompts, length, 24\), got \(6, 24\)",
    ),
    "embeddings width": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 6, 25)},
        r"prompt_embeds must have shape \(prompts, length, 24\), got \(1, 6, 25\)",
    ),
    "no embeddings": (
        {"prompt": None, "prompt_embeds": torch.zeros(0, 6, 24)},
        r"prompt_embeds must have shape \(prompts, length, 24\), got \(0, 6, 24\)",
    ),
    "embeddings with their mask": (
        {"prompt": None, "prompt_embeds": (torch.zeros(1, 6, 24), torch.ones(1, 6))},
        "prompt_embeds must be a tensor, got a tuple",
    ),
    "NaN embeddings": (
        {"prompt": None, "prompt_embeds": torch.full((1, 6, 24), NAN)},
        "prompt_embeds must be finite, got 144 NaN",
    ),
    "both negatives": (
        {"negative_prompt": "a", "negative_prompt_embeds": torch.zeros(1, 6, 24), "guidance_scale": 2.0},
        "negative_prompt or negative_prompt_embeds may be given, got both",
    ),
    "no negative": ({"negative_prompt": [], "guidance_scale": 2.0}, "negative_prompt must be a text or a list .* got"),
    "negative width": (
        {"negative_prompt_embeds": torch.zeros(1, 6, 25), "guidance_scale": 2.0},
        r"negative_prompt_embeds must have shape \(prompts, length, 24\), got \(1, 6, 25\)",
    ),
    "negative count": (
        {"negative_prompt": ["a", "b"], "guidance_scale": 2.0},
        "negative_prompt must be one or 1 as there are prompts, got 2",
    ),
}


@pytest.mark.parametrize("arguments, message", TEXT.values(), ids=TEXT)
@pytest.mark.parametrize("kind", ["text_pipe", "text_flow_pipe"])
def test_call_of_a_pipeline_with_text(request, kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        request.getfixturevalue(kind)(**{"prompt": "a cat"} | arguments)


TEXT_FLOW = {
    "class": ({"class_labels": 1}, "class_labels must be None for a flow of captions, which requires a prompt"),
    "too long": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 7, 24)},
        "^prompt_embeds must have at most 6 tokens, got 7",
    ),
    "negative too long": (
        {"negative_prompt_embeds": torch.zeros(1, 7, 24), "guidance_scale": 2.0},
        "^negative_prompt_embeds must have at most 6 tokens, got 7",
    ),
}


@pytest.mark.parametrize("arguments, message", TEXT_FLOW.values(), ids=TEXT_FLOW)
def test_call_of_a_flow_with_text(text_flow_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_flow_pipe(**{"prompt": "a cat"} | arguments)


MASKS = {
    "shape": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 6, 24), "prompt_attention_mask": torch.ones(1, 5)},
        r"prompt_attention_mask must have shape \(1, 6\) as prompt_embeds, got \(1, 5\)",
    ),
    "list": (
        {"prompt": None, "prompt_embeds": torch.zeros(1, 6, 24), "prompt_attention_mask": [[1] * 6]},
        "prompt_attention_mask must be a tensor, got a list",
    ),
    "of a text": (
        {"prompt_attention_mask": torch.ones(1, 6)},
        "prompt_attention_mask must be None without prompt_embeds, got Tensor",
    ),
    "of a negative text": (
        {"negative_prompt_attention_mask": torch.ones(1, 6), "guidance_scale": 2.0},
        "negative_prompt_attention_mask must be None without negative_prompt_embeds, got Tensor",
    ),
}


@pytest.mark.parametrize("arguments, message", MASKS.values(), ids=MASKS)
def test_masks_of_embeddings(text_pipe, arguments, message):
    with pytest.raises(ValueError, match=message):
        text_pipe(**{"prompt": "a cat"} | arguments)


@pytest.mark.parametrize("kind", ["text_pipe", "text_flow_pipe"])
def test_empty_and_very_long_texts_are_drawn(request, kind, caplog):
    pipe = request.getfixturevalue(kind)
    images = pipe(["", "abc " * 5000], output_type="pt", guidance_scale=2.0).images
    assert images.shape == (2, 3, 32, 32) and images.isfinite().all()
    assert "read up to their token 6 only" in caplog.text


def test_pipeline_without_what_it_needs():
    with pytest.raises(ValueError, match="transformer must have num_classes or caption_channels"):
        tiny_fae_starflow_pipeline(transformer=tiny_starflow(num_classes=None), id2label=None)
    for other in (tiny_fae_starflow_pipeline(vae=None), tiny_fae_dit_pipeline(vae=None)):
        with pytest.raises(ValueError, match="output_type must be 'latent' for a pipeline without vae, got 'pil'"):
            other(1)


@pytest.mark.parametrize("make", [tiny_text_starflow_pipeline, tiny_fae_text_to_image_pipeline])
def test_text_without_an_encoder(make):
    pipe = make(text_encoder=None, tokenizer=None)
    with pytest.raises(ValueError, match="^prompt cannot be read .* load_text_encoder.*, or pass prompt_embeds"):
        pipe("a cat")
    with pytest.raises(ValueError, match="^negative_prompt cannot be read .*, or pass negative_prompt_embeds"):
        pipe(prompt_embeds=torch.zeros(1, 6, 24), guidance_scale=2.0)


def test_text_encoder_of_another_width():
    with pytest.raises(ValueError, match="transformer must have caption_channels 24, .* got 20"):
        tiny_text_starflow_pipeline(transformer=tiny_text_starflow(caption_channels=20))
    with pytest.raises(ValueError, match="transformer must have caption_channels 24, .* got 20"):
        tiny_fae_text_to_image_pipeline(transformer=tiny_mmdit(caption_channels=20))


def test_names_without_id2label():
    with pytest.raises(ValueError, match="class_labels must be numbers, as this pipeline has no id2label; got 'cat'"):
        tiny_fae_dit_pipeline(id2label=None)("cat")


def test_id2label_beyond_the_classes():
    with pytest.raises(ValueError, match="id2label must have keys below 10, got 10"):
        tiny_fae_dit_pipeline(id2label={10: "cat"})


def test_id2label_of_other_kinds():
    for labels in (["cat", "dog"], {0: 5}):
        with pytest.raises(ValueError, match="id2label must be a dict of class ids and names"):
            tiny_fae_dit_pipeline(id2label=labels)


def test_transformer_of_other_channels():
    with pytest.raises(ValueError, match="transformer must have in_channels 4, .* got 6"):
        tiny_fae_dit_pipeline(transformer=tiny_lightning_dit(in_channels=6))


TOKENIZER = {
    "image side": (lambda vae: vae.encode(torch.zeros(1, 3, 30, 32)), "multiples of 8, got 1 of height 30, width 32"),
    "no pixels": (lambda vae: vae.encode(torch.zeros(1, 3, 0, 32)), "multiples of 8, got 1 of height 0"),
    "no image": (lambda vae: vae.encode(torch.zeros(0, 3, 32, 32)), "multiples of 8, got 0 of height 32"),
    "no latents": (lambda vae: vae.decode(torch.zeros(0, 4, 4, 4)), r"latents must have .* got \(0, 4, 4, 4\)"),
    "negative grid": (lambda vae: vae.encode_features(torch.zeros(1, 16, 32), (-4, -4)), r"got \(-4, -4\)"),
    "grey image": (lambda vae: vae.encode(torch.zeros(1, 1, 32, 32)), r"pixel_values must .* got \(1, 1, 32, 32\)"),
    "single image": (lambda vae: vae.encode(torch.zeros(3, 32, 32)), r"pixel_values must .* got \(3, 32, 32\)"),
    "bytes": (lambda vae: vae.encode(torch.zeros(1, 3, 32, 32).byte()), "pixel_values must .* got torch.uint8"),
    "NaN image": (lambda vae: vae.encode(torch.full((1, 3, 32, 32), NAN)), "pixel_values must be finite, got 3072"),
    "infinite": (lambda vae: vae(torch.full((1, 3, 32, 32), float("inf"))), "pixel_values must be finite"),
    "channels": (
        lambda vae: vae.decode(torch.zeros(1, 5, 4, 4)),
        r"latents must have .*\(batch, 4,.* got \(1, 5, 4, 4",
    ),
    "flat latents": (lambda vae: vae.decode_features(torch.zeros(1, 16, 4)), r"latents must have .* got \(1, 16, 4\)"),
    "feature width": (lambda vae: vae.encode_features(torch.zeros(1, 16, 31)), r"features must .* got \(1, 16, 31\)"),
    "feature count": (
        lambda vae: vae.encode_features(torch.zeros(1, 15, 32)),
        r"grid must have 15 cells .* got \(3, 3",
    ),
    "feature grid": (lambda vae: vae.decode_pixels(torch.zeros(1, 16, 32), (3, 4)), r"16 cells .* got \(3, 4\)"),
    "mean shape": (lambda vae: vae.set_latent_statistics(torch.zeros(4), torch.ones(4)), r"mean must .* got \(4,\)"),
    "zero std": (
        lambda vae: vae.set_latent_statistics(torch.zeros(4, 1, 1), torch.zeros(4, 1, 1)),
        "std must be positive, got 0.0",
    ),
    "NaN mean": (
        lambda vae: vae.set_latent_statistics(torch.full((4, 1, 1), NAN), torch.ones(4, 1, 1)),
        "mean must be finite",
    ),
    "feature statistics": (
        lambda vae: vae.set_feature_statistics(torch.zeros(3), torch.ones(32)),
        r"mean .* got \(3,",
    ),
    "zero feature std": (
        lambda vae: vae.set_feature_statistics(torch.zeros(32), torch.zeros(32)),
        "std positive, got a std of 0.0",
    ),
}


@pytest.mark.parametrize("call, message", TOKENIZER.values(), ids=TOKENIZER)
def test_tokenizer(vae, call, message):
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        call(vae)
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())


IMAGE = torch.zeros(1, 3, 32, 32)
NOISE = torch.zeros(1, 4, 4, 4)
# What l-DeTok and MAETok both refuse.
PIXEL_TOKENIZER = {
    "integers": (lambda vae: vae.encode(IMAGE.to(torch.uint8)), r"pixel_values must be floating point .* torch.uint8"),
    "grey": (
        lambda vae: vae.encode(IMAGE[:, :1]),
        r"pixel_values must have shape \(batch, 3, .* got \(1, 1, ",
    ),
    "odd size": (lambda vae: vae.encode(torch.zeros(1, 3, 36, 32)), "multiples of 8, got 1 of height 36, width 32"),
    "odd size, training": (lambda vae: vae(torch.zeros(1, 3, 32, 33)), "multiples of 8, got 1 of height 32, width 33"),
    "another size": (lambda vae: vae.encode(torch.zeros(1, 3, 40, 32)), "images of 32 x 32.*, got 40 x 32"),
    "large": (lambda vae: vae(torch.zeros(1, 3, 64, 64)), "images of 32 x 32, got 64 x 64"),
    "small": (lambda vae: vae(torch.zeros(1, 3, 24, 32)), "images of 32 x 32.*, got 24 x 32"),
    "no image": (lambda vae: vae.encode(IMAGE[:0]), "got 0 of height 32, width 32"),
    "NaN": (lambda vae: vae.encode(IMAGE * NAN), "pixel_values must be finite, got 3072 NaN"),
    "channels": (
        lambda vae: vae.decode(torch.zeros(1, 5, 4, 4)),
        r"latents must have shape \(batch, 4, .* \(1, 5,",
    ),
    "latent sides": (lambda vae: vae.decode(torch.zeros(1, 4, 3, 5)), "latents must have sides .*, got 3 x 5"),
    "statistics": (lambda vae: vae.set_latent_statistics(torch.zeros(4), torch.ones(4)), r"\(4, 1, 1\), got \(4,\)"),
}


@pytest.mark.parametrize("call, message", PIXEL_TOKENIZER.values(), ids=PIXEL_TOKENIZER)
@pytest.mark.parametrize("make", [tiny_detok, tiny_maetok])
def test_tokenizer_of_pixels(make, call, message):
    with pytest.raises(ValueError, match=message):
        call(make())


DETOK = {
    "too many patches": ({"visible_patches": torch.zeros(1, 17, dtype=torch.long)}, r"\(1, 1 to 16\), .* \(1, 17\)"),
    "no patch": ({"visible_patches": torch.zeros(1, 0, dtype=torch.long)}, r"visible_patches must .* of \(1, 0\)"),
    "mask": ({"visible_patches": torch.ones(1, 16, dtype=torch.bool)}, "visible_patches must be long .* torch.bool"),
    "level alone": ({"noise_level": torch.zeros(1)}, "latent_noise and noise_level must be given together, got None"),
    "noise alone": ({"latent_noise": NOISE}, "must be given together, got Tensor and NoneType"),
    "levels": (
        {"latent_noise": NOISE, "noise_level": torch.zeros(2)},
        r"noise_level must have shape \(1,\), got \(2,\)",
    ),
    "noise": (
        {"posterior_noise": NOISE[:, :3]},
        r"posterior_noise must have shape \(1, 4, .* got \(1, 3, 4, 4\)",
    ),
}


@pytest.mark.parametrize("arguments, message", DETOK.values(), ids=DETOK)
def test_corruption_of_detok(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_detok()(IMAGE, **arguments)


@pytest.mark.parametrize("mask", [torch.zeros(1, 16), torch.zeros(2, 16, dtype=torch.bool)])
def test_masks_of_maetok(mask):
    with pytest.raises(ValueError, match=r"patch_mask must be bool of shape \(1, 16\), got torch.\w+ of \(\d, 16\)"):
        tiny_maetok()(IMAGE, mask)


PIXEL_TOKENIZERS_THAT_CANNOT_BE = {
    "size": (tiny_detok, {"sample_size": 36}, "sample_size must be a positive multiple of patch_size 8, got 36"),
    "no size": (
        tiny_maetok,
        {"sample_size": 0},
        "sample_size in the config of AutoencoderMAETok must be from 1 to .* got 0",
    ),
    "no patch": (
        tiny_detok,
        {"patch_size": 0},
        "patch_size in the config of AutoencoderDeTok must be from 1 to .* got 0",
    ),
    "no heads": (
        tiny_maetok,
        {"encoder_num_attention_heads": 0},
        "encoder_num_attention_heads in .* must be from 1 to .* got 0",
    ),
    "heads": (
        tiny_detok,
        {"encoder_num_attention_heads": 3},
        "encoder_num_attention_heads must split .* 32 .* got 3",
    ),
    "noise": (tiny_detok, {"noise_type": "salt"}, r"noise_type must be one of \['interpolate', 'add'\], got 'salt'"),
    "gamma": (tiny_detok, {"noise_gamma": -1.0}, "noise_gamma must be finite and not negative, got -1.0"),
    "1-D size": (
        tiny_maetok,
        {"sample_size": [32, 36]},
        r"sample_size must be a positive multiple .* \[32, 36\]",
    ),
    "narrow": (tiny_maetok, {"decoder_num_attention_heads": 24}, "decoder_num_attention_heads must split .* got 24"),
    "decoder": (
        tiny_maetok,
        {"decoder_type": "gan"},
        r"decoder_type must be one of \['plain', .*, got 'gan'",
    ),
    "rope": (tiny_maetok, {"rope_type": "none"}, r"rope_type must be one of \['axial', 'learned'\], got 'none'"),
    "target": (tiny_maetok, {"auxiliary_targets": {"caption": 3}}, "auxiliary_targets must not be named 'caption'"),
    "half a caption": (tiny_maetok, {"caption_length": 3}, "caption_length must be given together, got None and 3"),
}


@pytest.mark.parametrize(
    "make, config, message", PIXEL_TOKENIZERS_THAT_CANNOT_BE.values(), ids=PIXEL_TOKENIZERS_THAT_CANNOT_BE
)
def test_tokenizer_of_pixels_that_cannot_be(make, config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


def test_encode_without_encoder_names_the_remedy():
    vae = tiny_fae(with_encoder=False, image_encoder_id="facebook/dinov2-small")
    with pytest.raises(ValueError, match=r"call load_encoder\(\) to fetch 'facebook/dinov2-small'"):
        vae.encode(torch.zeros(1, 3, 32, 32))


def test_encoder_of_another_width():
    other = AutoencoderFAE(feature_dim=64, decoder_num_layers=1, pixel_num_layers=1, pixel_hidden_size=64)
    with pytest.raises(ValueError, match="image_encoder has hidden_size 32, .* feature_dim 64"):
        other.attach_encoder(tiny_fae().image_encoder)


def test_sizes_that_do_not_divide():
    with pytest.raises(ValueError, match="sample_size must be a positive multiple of patch_size 8, got 36"):
        tiny_fae(sample_size=36)
    with pytest.raises(ValueError, match="sample_size must be a positive multiple of patch_size 2, got 5"):
        tiny_lightning_dit(sample_size=5, patch_size=2)
    with pytest.raises(ValueError, match="pixel_num_attention_heads must divide the width 32, got 3"):
        tiny_fae(pixel_num_attention_heads=3)
    with pytest.raises(ValueError, match="attention_head_dim must be a multiple of 4 for use_rope, got 6"):
        tiny_lightning_dit(attention_head_dim=6)


def test_heads_that_do_not_divide_the_width():
    with pytest.raises(ValueError, match="decoder_attention_head_dim must divide the width 32, got 64"):
        AutoencoderFAE(feature_dim=32, encoder_attention_head_dim=32)
    with pytest.raises(ValueError, match="encoder_attention_head_dim must divide the width 160, got 256"):
        AutoencoderFAE(feature_dim=40, decoder_attention_head_dim=20)


def test_unknown_encoder_type():
    with pytest.raises(ValueError, match="encoder_type must be 'attention', 'linear' or 'identity', got 'cubic'"):
        AutoencoderFAE(encoder_type="cubic")


DENOISER = {
    "channels": ((1, 5, 4, 4), r"hidden_states must have shape \(batch, 4, .* got \(1, 5, 4, 4\)"),
    "flat": ((1, 16, 4), r"hidden_states must .* got \(1, 16, 4\)"),
    "odd side": ((1, 4, 5, 4), "multiples of 2, got 5x4"),
}


@pytest.mark.parametrize("shape, message", DENOISER.values(), ids=DENOISER)
def test_denoiser(shape, message):
    with pytest.raises(ValueError, match=message):
        tiny_lightning_dit(patch_size=2)(torch.zeros(shape), torch.tensor(1.0), torch.tensor([0]))


TOKEN_GENERATOR = {
    "channels": ({"hidden_states": torch.zeros(1, 5, 4, 4)}, r"hidden_states must have shape \(batch, 4, 4, 4\), got"),
    "size": ({"hidden_states": torch.zeros(1, 4, 4, 5)}, r"hidden_states must have shape .* got \(1, 4, 4, 5\)"),
    "no tokens": ({"noisy_tokens": torch.zeros(1, 2, 0, 4)}, r"noisy_tokens must .* 1 to 16, 4\), got \(1, 2, 0, 4\)"),
    "too many tokens": ({"noisy_tokens": torch.zeros(1, 2, 17, 4)}, r"noisy_tokens must .* got \(1, 2, 17, 4\)"),
    "one draw": ({"noisy_tokens": torch.zeros(1, 16, 4)}, r"noisy_tokens must .* got \(1, 16, 4\)"),
}


@pytest.mark.parametrize("arguments, message", TOKEN_GENERATOR.values(), ids=TOKEN_GENERATOR)
@pytest.mark.parametrize("make", [tiny_mar, tiny_autoregressive])
def test_token_generator(make, arguments, message):
    arguments = {
        "hidden_states": torch.zeros(1, 4, 4, 4),
        "noisy_tokens": torch.zeros(1, 2, 16, 4),
        "timestep": torch.zeros(1, 2, 16, dtype=torch.long),
        "class_labels": torch.tensor([0]),
        "order": torch.arange(16)[None],
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        make()(**arguments)


TOKEN_GENERATORS_THAT_CANNOT_BE = {
    "size": (tiny_mar, {"sample_size": 5, "patch_size": 2}, "sample_size must be a positive multiple of patch_size 2"),
    "buffer": (tiny_mar, {"num_buffer_tokens": 0}, "num_buffer_tokens must be at least 1, got 0"),
    "dropout": (tiny_mar, {"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
    "order": (tiny_autoregressive, {"order": "spiral"}, "order must be 'raster' or 'random', got 'spiral'"),
}


@pytest.mark.parametrize(
    "make, config, message", TOKEN_GENERATORS_THAT_CANNOT_BE.values(), ids=TOKEN_GENERATORS_THAT_CANNOT_BE
)
def test_token_generator_that_cannot_be(make, config, message):
    with pytest.raises(ValueError, match=message):
        make(**config)


EMBEDS = torch.zeros(1, 6, 24)
MMDIT = {
    "channels": ({"hidden_states": torch.zeros(1, 5, 4, 4)}, r"hidden_states must have shape \(batch, 4, .* \(1, 5,"),
    "odd side": ({"hidden_states": torch.zeros(1, 4, 5, 4)}, "multiples of 2, got 5x4"),
    "flat text": ({"encoder_hidden_states": EMBEDS[0]}, r"encoder_hidden_states must have shape .* got \(6, 24\)"),
    "text width": (
        {"encoder_hidden_states": EMBEDS[..., :23]},
        r"encoder_hidden_states must have shape \(1, length, 24\), got \(1, 6, 23\)",
    ),
    "text count": ({"encoder_hidden_states": torch.zeros(2, 6, 24)}, r"\(1, length, 24\), got \(2, 6, 24\)"),
    "mask shape": (
        {"encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool)},
        r"encoder_attention_mask must be bool of shape \(1, 6\), got torch.bool of \(1, 5\)",
    ),
    "mask type": ({"encoder_attention_mask": torch.ones(1, 6)}, r"must be bool .* got torch.float32 of \(1, 6\)"),
}


@pytest.mark.parametrize("arguments, message", MMDIT.values(), ids=MMDIT)
def test_denoiser_of_texts(arguments, message):
    inputs = {"hidden_states": torch.zeros(1, 4, 4, 4), "encoder_hidden_states": EMBEDS} | arguments
    with pytest.raises(ValueError, match=message):
        tiny_mmdit(patch_size=2)(timestep=torch.tensor(1.0), **inputs)


MMDIT_CONFIGS = {
    "head": ({"attention_head_dim": 18}, "attention_head_dim must be a multiple of 4, got 18"),
    "no layer": ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
    "no width": ({"caption_channels": 0}, "caption_channels in .* must be from 1 to .* got 0"),
    "no length": ({"max_caption_length": 0}, "max_caption_length in .* must be from 1 to .* got 0"),
    "size": ({"sample_size": 5, "patch_size": 2}, "sample_size must be a positive multiple of patch_size 2, got 5"),
}


@pytest.mark.parametrize("config, message", MMDIT_CONFIGS.values(), ids=MMDIT_CONFIGS)
def test_denoiser_of_texts_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_mmdit(**config)


STARFLOW = {
    "channels": (
        {"hidden_states": torch.zeros(1, 5, 4, 4)},
        r"hidden_states must have shape \(batch, 4, .* got \(1, 5",
    ),
    "flat": ({"hidden_states": torch.zeros(1, 16, 4)}, r"hidden_states must .* got \(1, 16, 4\)"),
    "no image": ({"hidden_states": torch.zeros(0, 4, 4, 4)}, r"hidden_states must .* got \(0, 4, 4, 4\)"),
    "odd side": (
        {"hidden_states": torch.zeros(1, 4, 5, 4)},
        r"sides of hidden_states must be a positive multiple of patch_size 2, got \(5, 4\)",
    ),
    "NaN": ({"hidden_states": torch.full((1, 4, 4, 4), NAN)}, "hidden_states must be finite, got 64 NaN"),
    "no label": ({"class_labels": None}, "class_labels must be given, got NoneType"),
    "label axes": ({"class_labels": torch.tensor([[0]])}, r"class_labels must have 1 axes .* got shape \(1, 1\)"),
    "labels": (
        {"class_labels": torch.zeros(2, dtype=torch.long)},
        r"class_labels must have 1 axes and 1 rows .* got shape \(2,\)",
    ),
    "text": (
        {"encoder_hidden_states": torch.zeros(1, 6, 24)},
        "encoder_hidden_states must be None for a flow that was",
    ),
}


@pytest.mark.parametrize("arguments, message", STARFLOW.values(), ids=STARFLOW)
@pytest.mark.parametrize("direction", ["forward", "inverse", "denoise"])
def test_flow(direction, arguments, message):
    model = tiny_starflow(patch_size=2)
    inputs = {"hidden_states": torch.zeros(1, 4, 4, 4), "class_labels": torch.tensor([0])} | arguments
    with pytest.raises(ValueError, match=message):
        getattr(model, direction)(**inputs)


def test_flow_of_captions():
    model, x = tiny_text_starflow(), torch.zeros(1, 4, 4, 4)
    with pytest.raises(ValueError, match="must have 1 to 6 tokens of width 24, got 7 of 24"):
        model(x, encoder_hidden_states=torch.zeros(1, 7, 24))
    with pytest.raises(ValueError, match="encoder_hidden_states must be given, got NoneType"):
        model(x)
    with pytest.raises(ValueError, match=r"encoder_hidden_states must have 3 axes and 1 rows .* got shape \(6, 24\)"):
        model(x, encoder_hidden_states=torch.zeros(6, 24))
    with pytest.raises(ValueError, match="class_labels must be None for a flow that was not made for it, got Tensor"):
        model(x, torch.tensor([1]), torch.zeros(1, 6, 24))


FLOW_CONFIGS = {
    "head": ({"attention_head_dim": 18}, "attention_head_dim must be a multiple of 4 above 16, got 18"),
    "narrow head": ({"attention_head_dim": 16}, "attention_head_dim must be a multiple of 4 above 16, got 16"),
    "no block": ({"num_layers": []}, r"num_layers must list at least one layer for each block, got \[\]"),
    "empty block": ({"num_layers": [1, 0]}, r"num_layers must list at least one layer .* got \[1, 0\]"),
    "two conditions": ({"caption_channels": 8}, "num_classes must be None for a flow with caption_channels 8, got 10"),
    "no channels": ({"in_channels": 0}, "in_channels in .* must be from 1 to .* got 0"),
    "no patch": ({"patch_size": 0}, "patch_size in .* must be from 1 to .* got 0"),
    "noise": ({"noise_sigma": -0.1}, "noise_sigma must be finite and not negative, got -0.1"),
    "size": ({"sample_size": 5, "patch_size": 2}, "sample_size must be a positive multiple of patch_size 2, got 5"),
}


@pytest.mark.parametrize("config, message", FLOW_CONFIGS.values(), ids=FLOW_CONFIGS)
def test_flow_that_cannot_be(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_starflow(**config)


def test_inverse_of_a_block_out_of_range():
    model, z, labels = tiny_starflow(), torch.zeros(1, 4, 4, 4), torch.tensor([0])
    with pytest.raises(ValueError, match="index must be that of one of 4 blocks, got 4"):
        model.inverse_block(z, 4, labels)
    with pytest.raises(ValueError, match="jacobi_block_size must be a whole number from 1 .* got 0 and 0.001"):
        model.inverse(z, labels, jacobi_block_size=0)
    with pytest.raises(ValueError, match="negative_class_labels must be given, got NoneType"):
        model.inverse(z, labels, guidance=FlowGuidance(1.0))


def test_missing_checkpoint(tmp_path):
    for cls in (AutoencoderFAE, FAEDiTPipeline):
        with pytest.raises((OSError, ValueError), match=str(tmp_path / "nowhere")):
            cls.from_pretrained(str(tmp_path / "nowhere"), local_files_only=True)


def test_lora_for_another_model(tmp_path):
    from peft import LoraConfig
    from safetensors.torch import save_file

    save_file({"unet.to_q.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "pytorch_lora_weights.safetensors")
    pipe = tiny_fae_dit_pipeline()
    for adapter in ("first", "second"):
        with pytest.raises(ValueError, match="has no LoRA layers named 'transformer"):
            pipe.load_lora_weights(str(tmp_path))
        # That another adapter is there is no excuse.
        pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=adapter)


def test_pipeline_of_unknown_settings(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config | {"depth": 2}))
    with pytest.raises(ValueError, match=r"unknown keys \['depth'\]"):
        FAEDiTPipeline.from_pretrained(tmp_path)
