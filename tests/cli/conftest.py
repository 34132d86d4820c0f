"""The fixtures of the command line's tests."""

from pathlib import Path

import numpy as np
import pytest
from evaluation_fixtures import *  # noqa: F403 - fixtures
from factories import (
    tiny_encoder,
    tiny_fae,
    tiny_fae_dit_pipeline,
)
from PIL import Image


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a pipeline, a tokenizer without encoder, that encoder, and pictures of several modes."""
    folder = tmp_path_factory.mktemp("saved")
    tiny_fae_dit_pipeline(with_encoder=True).save_pretrained(folder / "pipeline")
    tiny_fae(with_encoder=False).save_pretrained(folder / "tokenizer")
    tiny_encoder().save_pretrained(folder / "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    Image.fromarray(pixels, "RGBA").save(folder / "transparent.png")
    Image.fromarray(pixels[..., 0], "L").save(folder / "grey.png")
    Image.fromarray(pixels, "CMYK").save(folder / "print.jpg")
    (folder / "no_picture.png").write_text("hello")
    return folder
