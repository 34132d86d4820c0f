"""Published weights by name: they compute as the reference, are converted once, and written whole or not at all."""

import json
import re

import pytest
import torch
from diffusers import DiTTransformer2DModel
from huggingface_hub import ModelCard, constants
from parity import arrays, assert_parity
from published import GENERATORS, TOKENIZERS
from safetensors.torch import load_file

import hf_fae
from hf_fae.convert.published import convert_published, imagenet_labels
from hf_fae.zoo import ZOO


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets" / "hf_fae"


def check_denoiser(model, io, sign=1):
    time = io["t_noise"] if "t_noise" in io else 1 - io["t_data"]
    assert_parity(model(io["x"], 1000 * time, io["y"]).sample, sign * io["velocity"])


def check_mar(model, io):
    tokens, known, count = model.to_tokens(io["latents"]), int(io["known"]), int(io["count"])
    conditions = model.predict_conditions(tokens, io["order"], known, count, io["labels"])
    assert_parity(conditions, io["conditions"])
    assert_parity(model.diffusion_head(io["noisy_tokens"], io["timesteps"], io["conditions"]), io["head"])


def check_flow(model, io):
    output = model(io["x"], encoder_hidden_states=io["encoder_hidden_states"])
    assert_parity(output.sample, io["z"])
    assert_parity(output.log_det, io["logdet"])


def check_generator(name, pipe, oracle):
    model, io = pipe.transformer, arrays(oracle(GENERATORS[name]) / "oracle.npz")
    if name.startswith("mar"):
        check_mar(model, io)
    elif name.startswith("starflow"):
        check_flow(model, io)
    elif name == "raev2-dit-xl":
        assert_parity(model(io["x"], 1000 * io["t_noise"], io["y"]).sample, io["prediction"])
        assert pipe.internal_guidance.intervals == ((0.1, 1.0, 1.78),)
    elif name.startswith("sit-xl-maetok"):
        check_denoiser(model, {**io, "x": io["x"].mT[:, :, None], "velocity": io["velocity"].mT[:, :, None]})
    else:  # in data time, the velocity has the other sign
        check_denoiser(model, io, sign=-1 if "t_data" in io else 1)


@pytest.mark.parametrize("name", [name for name in GENERATORS if GENERATORS[name]])
@torch.no_grad()
def test_generators_compute_as_the_reference(name, cache, published_files, oracle):
    pipe = hf_fae.load_published(name, files=published_files(name))
    check_generator(name, pipe, oracle)
    pipe.set_progress_bar_config(disable=True)
    if name.startswith("starflow"):
        condition = {"prompt_embeds": torch.randn(1, 5, 24), "negative_prompt_embeds": torch.zeros(1, 5, 24)}
    else:
        condition = {"class_labels": 1, "num_inference_steps": 2}
        condition |= {"num_diffusion_steps": 2} if name.startswith("mar") else {}
    images = pipe(**condition, output_type="pt").images
    assert images.shape[:2] == (1, 3) and images.isfinite().all()
    assert list(cache.glob(f"{name}-*[0-9a-f]"))


@torch.no_grad()
def test_dit_in_the_format_of_diffusers(cache, published_files):
    """Its weights; the sinusoids of time differ a little there, see `convert.dit`."""
    folder = published_files("dit-xl-2-256")
    pipe = hf_fae.load_published("dit-xl-2-256", files=folder)
    theirs = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, num_layers=2, sample_size=8, out_channels=8
    ).eval()
    weights = folder / "facebook/DiT-XL-2-256/transformer/diffusion_pytorch_model.bin"
    theirs.load_state_dict(torch.load(weights, weights_only=True))
    inputs, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 1000])
    zero = torch.zeros(2)  # where all sinusoids agree
    assert_parity(pipe.transformer(inputs, zero, labels).sample, theirs(inputs, zero.long(), labels).sample)
    assert pipe.id2label[207] == "golden retriever"
    assert pipe.label_ids(["tench", "Tinca tinca"], "class_labels") == [0, 0]


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokenizers_compute_as_the_reference(name, cache, published_files, oracle):
    vae = hf_fae.load_published(name, files=published_files(name))
    if name == "vavae-f16d32":
        io = arrays(oracle("vavae") / "oracle.npz")
        assert_parity(vae.encode(io["pixels"]).latent_dist.parameters, io["moments"])
        assert_parity(vae(io["pixels"]).sample, io["reconstruction_of_mean"])
    elif name == "rae-dinov2-b":
        io = arrays(oracle("rae/dinov2") / "io.npz")
        assert_parity(vae(2 * io["pixel_values_01"] - 1).sample / 2 + 0.5, io["reconstruction_01"])
        assert vae.config.image_encoder_id == "facebook/dinov2-with-registers-base"
    elif name == "raev2-dinov3-l-k7":
        io = arrays(oracle("raev2/k2_every_other") / "io.npz")
        assert_parity(vae(2 * io["pixel_values_01"] - 1).sample / 2 + 0.5, io["reconstruction_01"])
    elif name == "detok-bb":
        io = arrays(oracle("detok") / "io.npz")
        latents = vae.encode(io["pixel_values"]).latent_dist.mode()
        assert_parity(latents, io["latents_normalised_mean"])
        assert_parity(vae.decode(latents).sample, io["decode_of_encode"])
    else:
        io = arrays(oracle("maetok") / "io.npz")
        assert_parity(vae(io["pixel_values"]).sample, io["reconstruction"])


def test_converted_once(cache, published_files):
    name, folder = "lightningdit-xl-800ep", published_files("lightningdit-xl-800ep")
    first = hf_fae.load_published(name, files=folder)
    (kept,) = cache.glob(f"{name}-*[0-9a-f]")
    written = {path: path.stat().st_mtime_ns for path in kept.rglob("*")}
    second = hf_fae.load_published(name, files=folder, dtype=torch.bfloat16)
    assert {path: path.stat().st_mtime_ns for path in kept.rglob("*")} == written
    assert (first.transformer.dtype, second.transformer.dtype) == (torch.float32, torch.bfloat16)
    # Other files are another conversion.
    checkpoint = folder / ZOO[name].source / ZOO[name].files["weights"]
    state = torch.load(checkpoint, weights_only=True)
    state["ema"]["final_layer.linear.bias"].fill_(2)
    torch.save(state, checkpoint)
    third = hf_fae.load_published(name, files=folder)
    assert (third.transformer.proj_out.bias == -2).all()
    assert len(list(cache.glob(f"{name}-*[0-9a-f]"))) == 2


def test_bare_file_names(cache, published_files, tmp_path):
    folder, bare = published_files("lightningdit-xl-800ep"), tmp_path / "bare"
    bare.mkdir()
    for path in folder.rglob("*.pt"):
        path.rename(bare / path.name)
    assert hf_fae.load_published("lightningdit-xl-800ep", files=bare).transformer.config.sample_size == 8


def test_files_of_the_same_name_need_their_folders(cache, published_files, tmp_path):
    folder, bare = published_files("dit-dh-xl-256"), tmp_path / "bare"
    bare.mkdir()
    for path in folder.rglob("stage2_model.pt"):
        path.rename(bare / path.name)
    with pytest.raises(
        FileNotFoundError, match=r"files must be a folder with 'DiTs/Dinov2/.*/stage2_model\.pt' of http"
    ):
        hf_fae.load_published("dit-dh-xl-256", files=bare)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_convert_writes_a_saved_pipeline_with_its_card(dtype, published_files, tmp_path):
    output = tmp_path / "converted"
    convert_published("mar-b-detok", output, published_files("mar-b-detok"), dtype)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["converted", "files"]
    state = load_file(output / "vae" / "diffusion_pytorch_model.safetensors")
    assert state["decoder.proj_in.weight"].dtype == (dtype or torch.float32)
    assert state["latents_std"].dtype == torch.float32
    card = ModelCard.load(output / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "diffusers")
    assert f'from_pretrained("{output.as_posix()}"' in card.text
    assert (
        "| `mar-b-detok` | `mar_base.pth` of <https://huggingface.co/jjiaweiyang/l-DeTok> | mit | gFID - / 1.55 |"
        in card.text
    )
    assert "`detok-BB-gamm3.0-m0.7-decoder_tuned.pth`, `stats.pkl` of" in card.text
    assert card.text.count("eprint = {2507.15856}") == 1
    with pytest.raises(ValueError, match="output must be a folder that is new or empty, got .*converted"):
        convert_published("mar-b-detok", output, tmp_path / "files")


def test_no_stated_licence(cache, published_files):
    with pytest.raises(ValueError, match=r"files must be a folder with 'config\.json' of https://.*, which states no"):
        hf_fae.load_published("maetok-b-256")
    with pytest.raises(
        ValueError, match=r"files must be a folder with 'last\.pt' of .*REPA .*, which is not on the Hub"
    ):
        hf_fae.load_published("repa-xl-2")
    vae = hf_fae.load_published("maetok-b-256", files=published_files("maetok-b-256"))
    card = ModelCard.load(f"{vae.config._name_or_path}/README.md")
    assert card.data.license == "unknown" and "| none stated |" in card.text


def _change(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


BROKEN = {
    "another family": (lambda state: state["ema"].pop("y_embedder.embedding_table.weight"), "y_embedder"),
    "missing": (lambda state: state["ema"].pop("blocks.1.mlp.w3.weight"), r"blocks\.1\.ff\.net\.2\.weight"),
    "extra": (lambda state: state["ema"].update({"new.weight": torch.ones(1)}), r"new\.weight"),
    "another size": (lambda state: state["ema"].update({"blocks.0.attn.proj.bias": torch.ones(3)}), r"attn\.to_out"),
    "no average": (lambda state: state.pop("ema"), "must hold averaged weights under 'ema', got 'model'"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_wrong_weights(case, published_files, tmp_path):
    name, output = "lightningdit-xl-800ep", tmp_path / "converted"
    change, message = BROKEN[case]
    folder = published_files(name)
    path = folder / ZOO[name].source / ZOO[name].files["weights"]
    _change(path, change)
    with pytest.raises(ValueError, match=message) as raised:
        convert_published(name, output, folder)
    assert str(raised.value).startswith(f"{name} cannot be converted") and str(path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["files"]


def test_files_of_another_name(published_files, tmp_path):
    folder = published_files("sit-xl-2")
    path = folder / ZOO["sit-xl-2"].source / "SiT-XL-2-256.pt"
    path.write_bytes(
        (published_files("lightningdit-xl-800ep") / ZOO["lightningdit-xl-800ep"].source)
        .joinpath(ZOO["lightningdit-xl-800ep"].files["weights"])
        .read_bytes()
    )
    with pytest.raises(ValueError, match=r"sit-xl-2 cannot be converted of .*SiT-XL-2-256\.pt: checkpoint must"):
        convert_published("sit-xl-2", tmp_path / "converted", folder)


def test_nothing_of_a_file_runs(published_files, tmp_path):
    class Planted:
        def __reduce__(self):
            return type(tmp_path).touch, (tmp_path / "touched",)

    name, folder = "detok-bb", published_files("detok-bb")
    root = folder / ZOO[name].source
    for file in ZOO[name].files.values():
        content = (root / file).read_bytes()
        torch.save({"model_ema": Planted()}, root / file, _use_new_zipfile_serialization=file.endswith("pth"))
        with pytest.raises(ValueError, match=re.escape(file)):
            convert_published(name, tmp_path / "converted", folder)
        (root / file).write_bytes(content)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["files"]


def test_left_by_a_killed_conversion(published_files, tmp_path):
    partial = tmp_path / ".converted.partial"
    (partial / "transformer").mkdir(parents=True)
    (partial / "transformer" / "config.json").write_text("{")
    convert_published("vavae-f16d32", tmp_path / "converted", published_files("vavae-f16d32"))
    assert json.loads((tmp_path / "converted" / "config.json").read_text())["_class_name"] == "AutoencoderKL"
    assert not partial.exists() and not (tmp_path / "converted" / "transformer").exists()


def test_imagenet_labels():
    labels = imagenet_labels()
    assert sorted(labels) == list(range(1000))
    assert (labels[0], labels[999]) == ("tench, Tinca tinca", "toilet tissue, toilet paper, bathroom tissue")
