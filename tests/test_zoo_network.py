"""The real files, one name a family: gigabytes, so only with `-m network` (see docs/zoo.md).

What is on the Hub is fetched into the usual cache; the rest is looked for in the folder `HF_FAE_PUBLISHED`. Converted
weights go to a temporary folder.
"""

import os
import socket

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from huggingface_hub import constants
from PIL import Image

import hf_fae
from hf_fae.latents import decode_latents, encode_images
from hf_fae.zoo import ZOO


# Tokenizer -> parameters as published, without a frozen encoder, and a PSNR in dB of a photograph that it surpasses.
# ImageNet's mean is 18.9 for RAE; those of the others are higher.
TOKENIZERS = {
    "vavae-f16d32": (69.84e6, 23),
    "kl16": (None, 21),
    "rae-dinov2-b": (None, 15),
    "detok-bb": (171_712_628, 18),
    "maetok-b-256": (None, 18),
}
# Generator -> parameters as published.
GENERATORS = {
    "lightningdit-xl-800ep": 674.96e6,
    "dit-dh-xl-256": 839e6,
    "mar-b-detok": 208e6,
    "mar-b": 208e6,
    "sit-xl-maetok-256": 675e6,
    "sit-xl-2": 675e6,
    "repa-xl-2": 675e6,
    "dit-xl-2-256": 675e6,
    "starflow-3b-text": None,
}

pytestmark = pytest.mark.network


@pytest.fixture
def load(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path))

    def load(name, dtype=None):
        files = os.environ.get("HF_FAE_PUBLISHED")
        if any(ZOO[part].needs_files for part in (name, ZOO[name].tokenizer) if part):
            if files is None:
                pytest.skip(f"needs the files of {name}: set HF_FAE_PUBLISHED to their folder")
            return hf_fae.load_published(name, dtype=dtype, files=files)
        try:
            socket.create_connection(("huggingface.co", 443), timeout=5).close()
        except OSError as error:
            pytest.skip(f"needs a network: {error}")
        return hf_fae.load_published(name, dtype=dtype)

    return load


def check_size(model, published):
    count = sum(tensor.numel() for name, tensor in model.named_parameters() if not name.startswith("image_encoder."))
    assert published is None or count == pytest.approx(published, rel=1e-3)


@pytest.fixture(scope="module")
def photograph():
    """Scikit-image's astronaut (1, 3, 256, 256) in [-1, 1]."""
    data = pytest.importorskip("skimage.data")
    image = Image.fromarray(data.astronaut()).resize((256, 256), Image.Resampling.BICUBIC)
    return VaeImageProcessor(do_resize=False).preprocess(image)


@pytest.mark.parametrize("name", TOKENIZERS)
@torch.no_grad()
def test_tokenizer(name, load, photograph):
    published, least = TOKENIZERS[name]
    vae = load(name)
    check_size(vae, published)
    latents = encode_images(vae, photograph).mode()
    assert 0.3 < latents.std() < 3  # 1 over ImageNet
    error = (decode_latents(vae, latents).clamp(-1, 1) - photograph).square().mean()
    assert 10 * torch.log10(4 / error) > least


@pytest.mark.parametrize("name", GENERATORS)
@torch.no_grad()
def test_generator(name, load):
    pipe = load(name, dtype=torch.bfloat16)
    check_size(pipe.transformer, GENERATORS[name])
    if pipe.reads_text:
        pipe.load_text_encoder()
        images = pipe("a golden retriever in the snow", output_type="pt").images
    else:
        assert pipe.id2label[207] == "golden retriever"
        steps = {"num_diffusion_steps": 25} if name.startswith("mar") else {}
        images = pipe("golden retriever", num_inference_steps=25, output_type="pt", **steps).images
    assert images.isfinite().all() and 0.05 < images.std() < 0.5
