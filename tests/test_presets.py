"""The published sizes: the rows of section 1 of the FAE specification that are about parameters and shapes."""

import pytest
import torch

from hf_fae import PRESETS, AutoencoderMAETok, VisionEncoder, build_preset
from hf_fae.autoencoders.layer_fusion import LayerFusion
from hf_fae.autoencoders.rae_decoder import RAEDecoder
from hf_fae.inspection import count_parameters, inspect, inspect_model
from hf_fae.latents import encode_images


@pytest.fixture(scope="module")
def fae():
    return build_preset("fae-dinov2-g", device="meta")


@pytest.fixture(scope="module")
def report(fae):
    return inspect_model("fae-dinov2-g", fae)


@pytest.mark.parametrize(
    ("part", "exact", "published"),
    [
        ("encoder", 38_166_592, 38.17),
        ("feature_decoder", 170_428_416, 170.43),
        ("pixel_decoder", 305_360_896, 305.36),
        ("total", 38_166_592 + 170_428_416 + 305_360_896, 513.96),
    ],
)
def test_fae_parameters(report, part, exact, published):
    assert report["parameters"][part] == exact
    assert round(exact / 1e6, 2) == published


def test_frozen_encoder_stands_apart(report):
    assert report["frozen"] == {"image_encoder": 1_136_480_768}  # DINOv2-g, as transformers counts it
    assert "image_encoder" not in report["parameters"]


def test_fae_shapes(report):
    assert report["shapes"] == {
        "features": [256, 1536],
        "moments": [64, 16, 16],
        "latents": [32, 16, 16],
        "decoded_features": [256, 1536],
        "image": [3, 256, 256],
    }
    assert inspect("fae-siglip2-g-opt")["shapes"] == report["shapes"]


def test_384_shapes():
    shapes = inspect("fae-siglip2-g-opt-384")["shapes"]
    assert shapes["latents"] == [64, 24, 24]
    assert shapes["image"] == [3, 384, 384]


@pytest.mark.parametrize(
    ("kind", "exact", "published"), [("lightningdit", 675_256_736, 675.26), ("sit", None, 675.15)]
)
def test_xl_parameters(kind, exact, published):
    model = build_preset(f"{kind}-xl-1", device="meta")
    assert exact in (None, count_parameters(model))
    assert round(count_parameters(model) / 1e6, 2) == published


@pytest.mark.parametrize(
    ("name", "exact", "grid", "published"),
    [
        ("lightningdit-xl-1", 674_961_824, (16, 16), 675),  # arXiv 2501.01423
        ("sit-xl-2", 674_816_272, (16, 16), 675),  # arXiv 2401.08740, Table 1
        ("dit-xl-2", 674_834_720, (16, 16), 675),  # arXiv 2212.09748, Table 1
        ("dit-xl-2-512", 674_834_720, (32, 32), 675),
        ("dit-l-2", 457_840_672, (16, 16), 458),
        ("dit-b-2", 130_315_808, (16, 16), 130),
        ("dit-s-2", 32_865_056, (16, 16), 33),
    ],
)
def test_denoisers_as_published(name, exact, grid, published):
    """Trainable parameters, without the fixed table of positions."""
    model = build_preset(name, device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    assert round(exact / 1e6) == published
    assert model.pos_embed.grid == grid


def test_autoencoders_of_diffusers():
    """VA-VAE and KL-16: their size, and the latents that their denoisers are for."""
    vavae, kl16 = (build_preset(name, device="meta") for name in ("vavae-f16d32", "kl-f16d16"))
    assert round(count_parameters(vavae) / 1e6, 2) == 69.84
    assert inspect("vavae-f16d32")["parameters"]["total"] == count_parameters(vavae)
    image = torch.empty(1, 3, 256, 256, device="meta")
    for vae, shape in ((vavae, (1, 32, 16, 16)), (kl16, (1, 16, 16, 16))):
        latents = encode_images(vae, image).mean
        assert latents.shape == shape and vae.decode(latents).sample.shape == image.shape
    # Attention at 16 x 16: of VA-VAE on both sides, of KL-16 in the encoder alone, and in the middle of all.
    attention = [
        [len(block.attentions) if hasattr(block, "attentions") else 0 for block in blocks]
        for vae in (vavae, kl16)
        for blocks in (vae.encoder.down_blocks, vae.decoder.up_blocks)
    ]
    assert attention == [[0, 0, 0, 0, 2], [3, 0, 0, 0, 0], [0, 0, 0, 0, 2], [0, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("name", "exact", "published", "latents"),
    [
        ("mmdit-256", 603_586_592, 603.46, [32, 16, 16]),
        ("mmdit-384", 2_017_837_120, 2017.84, [64, 24, 24]),
    ],
)
def test_mmdit_parameters(name, exact, published, latents):
    """The wiring is not published; that of both counts must be one and the same."""
    report = inspect(name)
    assert report["parameters"]["total"] == exact
    assert exact / 1e6 == pytest.approx(published, abs=0.13)
    assert report["shapes"]["sample"] == latents and report["shapes"]["encoder_hidden_states"] == [128, 2048]
    ff = build_preset(name, device="meta").blocks[0].ff
    assert ff.net[0].proj.bias is ff.net[2].bias is None and ff.net[2].in_features % 256 == 0


def test_rae_and_drorae():
    """Section 1 of their specification."""
    report = inspect("drorae-dinov2-b")
    assert report["parameters"]["fusion"] == 56_779_788 and report["parameters"]["decoder"] == 415_056_640
    assert report["shapes"]["features"] == [12, 256, 768] and report["shapes"]["latents"] == [768, 16, 16]
    assert report["shapes"]["image"] == [3, 256, 256]
    plain = inspect("rae-dinov2-b")
    assert plain["parameters"]["total"] == 415_056_640 and plain["shapes"]["features"] == [1, 256, 768]


@pytest.mark.parametrize(
    ("name", "latents", "prefix"),
    [
        ("rae-dinov2-s", [384, 16, 16], 5),
        ("rae-dinov2-b", [768, 16, 16], 5),
        ("rae-dinov2-b-512", [768, 32, 32], 5),
        ("rae-dinov2-l", [1024, 16, 16], 5),
        ("rae-siglip2-b", [768, 16, 16], 0),
        ("rae-mae-b", [768, 16, 16], 1),
    ],
)
def test_encoders_of_rae(name, latents, prefix):
    """Section 2 of its specification; decoder patches are 16 pixels wide."""
    shapes = inspect(name)["shapes"]
    assert shapes["latents"] == latents and shapes["image"] == [3, 16 * latents[1], 16 * latents[2]]
    with torch.device("meta"):
        encoder = VisionEncoder.from_config(PRESETS[name][1]["image_encoder_config"])
    assert (encoder.hidden_size, encoder.num_prefix_tokens) == (latents[0], prefix)


@pytest.mark.parametrize(
    ("hidden_size", "layers", "exact"),
    [(3072, 12, 56_779_788), (1536, 12, 28_449_804), (128, 12, 2_480_652), (3072, 6, 28_362_246)],
)
def test_fusion_parameters(hidden_size, layers, exact):
    with torch.device("meta"):
        fusion = LayerFusion(768, layers, hidden_size, "gelu")
    assert sum(parameter.numel() for parameter in fusion.parameters()) == exact


@pytest.mark.parametrize(
    ("width", "layers", "heads", "inner", "exact"),
    [(768, 12, 12, 3072, 86_237_952), (1024, 24, 16, 4096, 303_887_104), (1152, 28, 16, 4096, 415_056_640)],
)
def test_rae_decoder_parameters(width, layers, heads, inner, exact):
    with torch.device("meta"):
        decoder = RAEDecoder(768, width, layers, heads, inner, 16, (16, 16))
    assert sum(parameter.numel() for parameter in decoder.parameters()) == exact


@pytest.mark.parametrize(
    ("size", "exact"), [("s", 196_357_204), ("b", 294_099_028), ("l", 621_482_036), ("xl", 838_380_628)]
)
def test_dit_dh(size, exact):
    """Section 1 of the RAE specification: without the fixed table of positions."""
    report = inspect(f"dit-dh-{size}")
    assert report["parameters"]["total"] == exact
    assert report["shapes"]["sample"] == report["shapes"]["hidden_states"] == [768, 16, 16]
    head = build_preset(f"dit-dh-{size}", device="meta").head_blocks
    assert [(block.attn.heads, block.attn.head_dim) for block in head] == [(16, 128)] * 2


@pytest.mark.parametrize("size", ["s", "xl"])
def test_dit_dh_at_512(size):
    """Only the grid is another one."""
    large, small = (build_preset(name, device="meta") for name in (f"dit-dh-{size}-512", f"dit-dh-{size}"))
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (large, small)]
    assert shapes[0] == shapes[1]
    assert inspect(f"dit-dh-{size}-512")["shapes"]["sample"] == [768, 32, 32]


@pytest.mark.parametrize(
    ("name", "exact", "layers", "width", "channels"),
    [
        ("starflow-imagenet-256", 1_413_288_512, [2, 2, 2, 2, 2, 18], 2048, 32),
        ("starflow-imagenet-256-sd-vae", 1_412_698_400, [2, 2, 2, 2, 2, 18], 2048, 16),
        ("starflow-text-256", 3_859_830_336, [2, 2, 2, 2, 2, 24], 3072, 32),
        ("starflow-text-256-sd-vae", 3_858_281_544, [2, 2, 2, 2, 2, 24], 3072, 4),
    ],
)
def test_starflow(name, exact, layers, width, channels):
    """Section 1 of the STARFlow specification; of the text model, which the paper gives as 3.8 B, counted here."""
    report = inspect(name)
    assert report["parameters"]["total"] == exact
    blocks = build_preset(name, device="meta").blocks
    assert [len(block.layers) for block in blocks] == layers
    assert all(block.proj_in.weight.shape == (width, channels) for block in blocks)
    attention = blocks[0].layers[0].attn
    assert (attention.heads, attention.head_dim) == (width // 64, 64)
    assert report["shapes"]["sample"] == report["shapes"]["hidden_states"]
    if name.startswith("starflow-text-256"):
        assert report["shapes"]["encoder_hidden_states"] == [128, 2048]
    else:
        table = build_preset(name, device="meta").class_embedding.weight
        assert table.shape == (1001, width)


@pytest.mark.parametrize(
    ("pair", "published"),
    [("bb", 171.71), ("ss", 51.50), ("sb", 111.61), ("bs", 111.61), ("sl", 329.1), ("ls", 329.1)]
    + [("bl", 389.2), ("lb", 389.2), ("ll", 606.6), ("xlxl", 895.0)],
)
def test_detok(pair, published):
    """Section 1 of the l-DeTok specification."""
    report = inspect(f"detok-{pair}")
    assert report["parameters"]["total"] / 1e6 == pytest.approx(published, abs=0.05)
    assert report["shapes"] == {"moments": [32, 16, 16], "latents": [16, 16, 16], "image": [3, 256, 256]}
    if pair == "bb":
        assert report["parameters"] == {"encoder": 85_861_664, "decoder": 85_850_964, "total": 171_712_628}


@pytest.mark.parametrize("size", [256, 512])
def test_maetok(size):
    """The published tokenizer; its positions grow with the image."""
    report = inspect("maetok-b-128" if size == 256 else "maetok-b-128-512")
    assert report["parameters"]["decoder"] == 86_958_336
    assert report["parameters"]["encoder"] == 85_896_992 + 768 * (size // 16) ** 2
    assert report["shapes"] == {"moments": [64, 1, 128], "latents": [32, 1, 128], "image": [3, size, size]}


def test_paper_maetok():
    """Section 1 of the MAETok specification: with its three auxiliary decoders the plain tokenizer has 176 M."""
    with torch.device("meta"):
        model = AutoencoderMAETok(auxiliary_targets={"hog": 108, "dinov2": 1024, "siglip": 1152})
    assert round(count_parameters(model) / 1e6) == 176


@pytest.mark.parametrize(
    ("name", "exact"),
    [
        ("sit-b-1-detok", 130_303_504),
        ("dit-b-1-detok", 130_315_808),  # SiT and 16 more channels of the output, 769 parameters each
        ("dit-l-1-detok", 457_840_672),
        ("dit-xl-1-detok", 674_834_720),
        ("sit-l-1-detok", 457_824_272),
        ("sit-xl-1-detok", 674_816_272),
        ("sit-l-1-maetok", 457_857_056),
        ("sit-xl-1-maetok", 674_853_152),
        ("lightningdit-xl-1-maetok", 674_961_824),
    ],
)
def test_denoisers_of_detok_and_maetok(name, exact):
    """Section 1 of their specifications, without the fixed table of positions: for MAETok's SiT one of 1-D."""
    model = build_preset(name, device="meta")
    assert (model.config.pos_embed_type == "sincos_1d") == (name in ("sit-l-1-maetok", "sit-xl-1-maetok"))
    assert (model.config.ff_type == "exact_gelu") == name.endswith("detok")
    assert sum(parameter.numel() for parameter in model.parameters()) == exact
    expected = [32, 1, 128] if name.endswith("maetok") else [32 if name.startswith("dit") else 16, 16, 16]
    assert inspect(name)["shapes"]["sample"] == expected


@pytest.mark.parametrize(("size", "exact"), [("b", 130_531_600), ("l", 458_120_176), ("xl", 675_219_856)])
def test_lightning_dit_of_detok(size, exact):
    """The reference trains its table of positions, so these counts include it."""
    model = build_preset(f"lightningdit-{size}-1-detok", device="meta")
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model) == exact


@pytest.mark.parametrize(
    ("name", "exact", "head"),
    [
        ("mar-b", 207_924_768, 35_749_920),
        ("mar-l", 478_326_304, 72_230_432),
        ("raster-ar-b", 150_095_136, 19_999_776),
        ("random-ar-b", 150_095_136, 19_999_776),
    ],
)
def test_autoregressive_generators(name, exact, head):
    """Section 1 of the l-DeTok specification, which gives 150.1 M for the causal ones."""
    report = inspect(name)
    assert report["parameters"]["total"] == exact and report["parameters"]["diffusion_head"] == head
    width = 1024 if name == "mar-l" else 768
    assert report["shapes"] == {
        "hidden_states": [16, 16, 16],
        "tokens": [256, 16],
        "conditions": [256, width],
        "prediction": [256, 32],
    }


@pytest.mark.parametrize(
    ("name", "num_layers", "width", "heads"),
    [("mar-b", 12, 768, 12), ("mar-l", 16, 1024, 16), ("mar-h", 20, 1280, 16)]
    + [("random-ar-b", 12, 768, 12), ("random-ar-l", 24, 1024, 16)]
    + [("raster-ar-xl", 28, 1152, 16), ("raster-ar-h", 32, 1280, 16)],
)
def test_sizes_of_autoregressive_generators(name, num_layers, width, heads):
    """Section 7 of the l-DeTok specification."""
    model = build_preset(name, device="meta")
    stacks = [model.encoder_blocks, model.decoder_blocks] if name.startswith("mar") else [model.blocks]
    for blocks in stacks:
        assert len(blocks) == num_layers and blocks[0].attn.heads == heads
        assert blocks[0].attn.to_q.weight.shape == (width, width)
    if not name.startswith("mar"):
        assert model.config.order == name.split("-")[0]


def test_swiglu_widths(fae):
    width = {block.ff.net[2].in_features for block in fae.feature_decoder.blocks}
    assert width == {4096}  # for 1536
    assert {block.ff.net[2].in_features for block in fae.pixel_decoder.blocks} == {2736}  # for 1024
    blocks = build_preset("lightningdit-xl-1", device="meta").blocks
    assert {block.ff.net[2].in_features for block in blocks} == {3072}  # for 1152


def test_attention_widths(fae):
    """Appendix D: heads and their widths."""
    parts = (fae.encoder, *fae.feature_decoder.blocks, *fae.pixel_decoder.blocks)
    heads = [(part.attn.heads, part.attn.head_dim) for part in parts]
    assert heads == [(24, 256), *[(24, 64)] * 6, *[(16, 64)] * 24]


@pytest.mark.parametrize(
    ("size", "num_layers", "width", "heads"),
    [("s", 12, 384, 6), ("b", 12, 768, 12), ("l", 24, 1024, 16), ("xl", 28, 1152, 16)],
)
@pytest.mark.parametrize("kind", ["lightningdit", "sit"])
def test_denoiser_sizes(kind, size, num_layers, width, heads):
    model = build_preset(f"{kind}-{size}-1", device="meta")
    assert len(model.blocks) == num_layers
    assert model.proj_in.out_channels == width
    assert model.blocks[0].attn.heads == heads


@pytest.mark.parametrize(
    ("name", "width", "inner"),
    [("fae-dinov2-b", 768, 3072), ("fae-dinov2-s", 384, 1536), ("fae-dinov2-g", 1536, 6144)],
)
def test_small_encoders_keep_the_ratio(name, width, inner):
    """FAE spec, section 14: head width 256 and inner width 4 * C, decoder width C."""
    encoder = build_preset(name, device="meta").encoder
    assert encoder.attn.head_dim == 256
    assert encoder.to_skip.weight.shape == (inner, width)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_described_without_memory(name):
    report = inspect(name)
    assert report["parameters"]["total"] == sum(n for part, n in report["parameters"].items() if part != "total")
    assert report["class"] == PRESETS[name][0]


def test_build_preset_on_a_real_device():
    model = build_preset("lightningdit-s-1")
    assert {parameter.device for parameter in model.parameters()} == {torch.device("cpu")}
    assert not model.pos_embed.table.is_meta


def test_unknown_preset_names_close_ones():
    with pytest.raises(ValueError, match="'fae-dino2-g' is no preset; did you mean fae-dinov2-g"):
        build_preset("fae-dino2-g")
