"""Synthetic data for the training tests: 32 pictures that can be told apart, in 4 classes."""

import numpy as np
import pytest
from PIL import Image


CLASSES = ["circle", "cross", "dot", "ring"]


def picture(number: int, size: int = 32) -> Image.Image:
    """Red says which one it is, green rises from left to right, so that a mirrored one is seen; blue differs, too."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0] = 7 * number
    pixels[..., 1] = np.linspace(0, 255, size)
    pixels[..., 2] = 255 - 5 * number
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An imagefolder: 32 train and 8 validation pictures, in folders named by class."""
    folder = tmp_path_factory.mktemp("imagefolder")
    for split, numbers in (("train", range(32)), ("validation", range(32, 36))):
        for number in numbers:
            path = folder / split / CLASSES[number % 4]
            path.mkdir(parents=True, exist_ok=True)
            picture(number).save(path / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory):
    """The same pictures as parquet files (4 of train), with a column of strings and one of numbers."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("parquet")
    features = Features({"image": ImageFeature(), "kind": Value("string"), "number": Value("int64")})

    def write(numbers, name):
        columns = {
            "image": [picture(number) for number in numbers],
            "kind": [CLASSES[number % 4] for number in numbers],
            "number": [10 * (number % 4) for number in numbers],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / name)

    for shard in range(4):
        write(range(8 * shard, 8 * shard + 8), f"train-{shard:05d}-of-00004.parquet")
    write(range(32, 36), "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory):
    """`datasets` keeps what it prepares here rather than in the user's cache."""
    import datasets

    previous, datasets.config.HF_DATASETS_CACHE = (
        datasets.config.HF_DATASETS_CACHE,
        tmp_path_factory.mktemp("datasets-cache"),
    )
    yield
    datasets.config.HF_DATASETS_CACHE = previous


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate allows one precision a process; every test may choose its own."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
