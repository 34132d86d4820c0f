"""Weights that no model can compute with are refused when they are loaded, and images that are not finite are no
images."""

import pytest
import torch
from factories import tiny_detok, tiny_encoder, tiny_fae, tiny_fae_dit_pipeline, tiny_lightning_dit, tiny_starflow
from safetensors.torch import load_file, save_file

from hf_fae.encoders import VisionEncoder


MODELS = {"fae": tiny_fae, "detok": tiny_detok, "dit": tiny_lightning_dit, "flow": tiny_starflow}
NAN, INF = float("nan"), float("inf")


def spoil(folder, spoil_tensor, name=None):
    """Change one weight of a saved model; returns its name."""
    (path,) = folder.glob("*model.safetensors")
    weights = load_file(path)
    name = name or max((key for key in weights if weights[key].is_floating_point()), key=lambda key: weights[key].ndim)
    weights[name] = spoil_tensor(weights[name])
    save_file(weights, path, metadata={"format": "pt"})
    return name


def with_value(value):
    def spoil_tensor(tensor):
        tensor.flatten()[-1] = value
        return tensor

    return spoil_tensor


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("value", [NAN, INF])
def test_weights_that_are_not_finite(tmp_path, make, value):
    model = make()
    model.save_pretrained(tmp_path)
    name = spoil(tmp_path, with_value(value))
    with pytest.raises(ValueError, match=f"weight '{name}' at .* must be finite, got 1 NaN or infinite values"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "cast", [lambda x: x.to(torch.complex64), lambda x: x.to(torch.int64), lambda x: x > 0], ids=["C64", "I64", "BOOL"]
)
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_weights_that_are_no_floating_point_numbers(tmp_path, make, cast):
    model = make()
    model.save_pretrained(tmp_path)
    name = spoil(tmp_path, cast)
    with pytest.raises(ValueError, match=f"weight '{name}' at .* must be floating point, got"):
        type(model).from_pretrained(tmp_path)


@pytest.mark.parametrize("value, message", [(NAN, "must be finite"), (0.0, "must be positive, got 0.0")])
@pytest.mark.parametrize("make", [tiny_fae, tiny_detok])
def test_statistics(tmp_path, make, value, message):
    model = make()
    model.save_pretrained(tmp_path)
    spoil(tmp_path, with_value(value), "latents_std")
    with pytest.raises(ValueError, match=f"weight 'latents_std' at .* {message}"):
        type(model).from_pretrained(tmp_path)


def test_encoders(tmp_path):
    tiny_encoder().save_pretrained(tmp_path)
    spoil(tmp_path, with_value(NAN))
    with pytest.raises(ValueError, match="must be finite, got 1 NaN"):
        VisionEncoder.from_pretrained(tmp_path)


def test_large_finite_weights_load(tmp_path):
    """Their sum is infinite, they are not."""
    model = tiny_lightning_dit()
    model.save_pretrained(tmp_path)
    spoil(tmp_path, lambda tensor: torch.full_like(tensor, 3e38))
    assert type(model).from_pretrained(tmp_path) is not None


@pytest.mark.parametrize(
    "part, named", [("transformer", "latents that the transformer"), ("vae", "images that the vae")]
)
def test_images_that_are_not_finite(part, named):
    pipe = tiny_fae_dit_pipeline()
    with torch.no_grad():
        for parameter in getattr(pipe, part).parameters():
            parameter.fill_(NAN)
    with pytest.raises(ValueError, match=f"{named} .* must be finite, got"):
        pipe(1, num_inference_steps=2)
