"""STARFlow's published flows: what the reference code computes with them, and files in their layout back."""

import numpy as np
import pytest
import torch
from factories import tiny_kl

from hf_fae import FlowGuidance, build_preset
from hf_fae.convert.starflow import load_starflow, starflow_config, starflow_table


# Settings that the oracles' weights do not show.
SETTINGS = {
    "starflow_class": {"sample_size": 4, "num_classes": 10},
    "starflow_text": {"sample_size": 4, "max_caption_length": 5},
}


@pytest.fixture(params=SETTINGS)
def name(request):
    return request.param


def load(folder, **kwargs):
    return load_starflow(folder / "checkpoint.pt", tiny_kl(), **SETTINGS[folder.name], **kwargs)


@pytest.fixture
def case(name, oracle):
    """A flow, its condition and negative condition, and what the reference code computes."""
    flow = load(oracle(name)).transformer
    expected = {key: torch.from_numpy(value) for key, value in np.load(oracle(name) / "oracle.npz").items()}
    if name == "starflow_class":
        condition, negative = {"class_labels": expected["labels"]}, {"negative_class_labels": torch.tensor([10, 10])}
    else:
        condition = {"encoder_hidden_states": expected["encoder_hidden_states"]}
        negative = {"negative_encoder_hidden_states": expected["null_hidden_states"]}
    return flow, condition, negative, expected


def assert_close(ours, theirs, tolerance):
    """To a share of the largest number."""
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_noise_and_density_are_those_of_the_reference(case):
    flow, condition, _, expected = case
    with torch.no_grad():
        output = flow(expected["x"], **condition)
    assert_close(output.sample, expected["z"], 1e-5)
    assert_close(output.log_det, expected["logdet"], 1e-5)
    assert_close(flow.denoise(expected["x"], **condition), expected["denoised_0p3"], 1e-5)


@pytest.mark.parametrize("jacobi", [{}, {"jacobi_block_size": 16, "jacobi_tolerance": 0.0}], ids=["tokens", "jacobi"])
def test_samples_are_those_of_the_reference(case, jacobi):
    flow, condition, negative, expected = case
    assert_close(flow.inverse(expected["noise"], **condition, **jacobi), expected["sample_w0"], 1e-4)
    guided = flow.inverse(expected["noise"], **condition, **negative, guidance=FlowGuidance(3.6), **jacobi)
    assert_close(guided, expected["sample_w3p6"], 1e-4)


def test_round_trip(name, oracle):
    published = torch.load(oracle(name) / "checkpoint.pt", weights_only=True)
    flow = load(oracle(name)).transformer
    table = starflow_table(2, 4, has_classes=flow.config.num_classes is not None)
    back = table.to_published(flow.state_dict())
    fixed = {key for key in published if key == "var" or key.startswith("feat_rope") or key.endswith("attn_mask")}
    assert back.keys() == published.keys() - fixed
    for key, value in table.to_ours(back).items():
        assert torch.equal(value, flow.state_dict()[key]), key


def test_patches(oracle):
    """Tokens of 2 x 2 latents have their channels last there, and first in ours."""
    table = starflow_table(2, 3, patch_size=2)
    position = torch.arange(12.0).view(2, 2, 3)  # p1, p2, channel
    assert torch.equal(
        table.to_ours({"blocks.0.sos_embed": position.view(1, 1, 12)})["blocks.0.start_token"],
        position.permute(2, 0, 1).flatten(),
    )
    scale, mean = position.flatten(), 100 + position.flatten()
    bias = table.to_ours({"blocks.1.proj_out.bias": torch.cat([scale, mean])})["blocks.1.proj_out.bias"]
    ours = position.permute(2, 0, 1).flatten()
    assert torch.equal(bias, torch.cat([100 + ours, ours]))


def test_published_size():
    """The 3 B text model: its state dict, made of our weights' shapes, has the config of the preset."""
    flow = build_preset("starflow-text-256-sd-vae", device="meta")
    published = starflow_table(6, 4).to_published(flow.state_dict())
    assert published["blocks.5.proj_txt.weight"].shape == (3072, 2048)
    assert published["blocks.0.attn_blocks.1.attention.qkv.weight"].shape == (9216, 3072)
    found = starflow_config(published)
    assert {name: flow.config[name] for name in found} == found
    assert sum(value.numel() for value in published.values()) == sum(p.numel() for p in flow.parameters())


def test_pipeline_names_its_text_encoder(oracle):
    pipe = load(oracle("starflow_text"))
    assert pipe.config.text_encoder_id == "google/flan-t5-xl" and pipe.text_encoder is None
    assert pipe.guidance_scale == pytest.approx(4.6) and pipe.config.denoise
    assert load(oracle("starflow_class")).config.text_encoder_id is None
    pipe.set_progress_bar_config(disable=True)
    embeds = torch.randn(1, 5, 24)
    images = pipe(prompt_embeds=embeds, negative_prompt_embeds=0 * embeds, output_type="pt").images
    assert images.shape[:2] == (1, 3) and images.isfinite().all()


def test_half_precision(oracle):
    flow = load(oracle("starflow_class"), dtype=torch.bfloat16).transformer
    assert {parameter.dtype for parameter in flow.parameters()} == {torch.bfloat16}


def test_another_family():
    with pytest.raises(ValueError, match=r"must be a conditional STARFlow, got keys such as \['decoder.weight'\]"):
        starflow_config({"decoder.weight": torch.ones(1)})
