"""Synthetic data for the training tests: 32 images that can be told apart, in 4 classes."""

import importlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from damaged import CLASSES, damaged_rows
from factories import tiny_encoder
from PIL import Image
from text_models import save_sentence_encoder


SCRIPTS = Path(__file__).parents[1] / "training_scripts"
CONFIGS = Path(__file__).parent / "configs"


def numbered_image(number: int, size: int = 32) -> Image.Image:
    """Red says which one it is, green rises from left to right, so that a mirrored one is seen; blue differs, too."""
    pixels = np.zeros((size, size, 3), np.uint8)
    pixels[..., 0] = 7 * number
    pixels[..., 1] = np.linspace(0, 255, size)
    pixels[..., 2] = 255 - 5 * number
    return Image.fromarray(pixels)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """An imagefolder: 32 train and 8 validation images, in folders named by class."""
    folder = tmp_path_factory.mktemp("imagefolder")
    for split, numbers in (("train", range(32)), ("validation", range(32, 36))):
        for number in numbers:
            path = folder / split / CLASSES[number % 4]
            path.mkdir(parents=True, exist_ok=True)
            numbered_image(number).save(path / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def parquet_folder(tmp_path_factory):
    """The same images as parquet files (4 of train), with a column of strings and one of numbers."""
    folder = tmp_path_factory.mktemp("parquet")
    write_parquet(folder)
    return folder


def write_parquet(folder: Path) -> None:
    """Write the files of `parquet_folder`."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    features = Features({"image": ImageFeature(), "kind": Value("string"), "number": Value("int64")})

    def write(numbers, name):
        columns = {
            "image": [numbered_image(number) for number in numbers],
            "kind": [CLASSES[number % 4] for number in numbers],
            "number": [10 * (number % 4) for number in numbers],
        }
        Dataset.from_dict(columns, features=features).to_parquet(folder / name)

    for shard in range(4):
        write(range(8 * shard, 8 * shard + 8), f"train-{shard:05d}-of-00004.parquet")
    write(range(32, 36), "validation-00000-of-00001.parquet")


@pytest.fixture(scope="session")
def damaged_parquet(tmp_path_factory):
    """`damaged.damaged_rows` as 4 parquet files of train; of validation the last 70 rows."""
    import pyarrow
    import pyarrow.parquet
    from datasets import ClassLabel, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("damaged-parquet")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES), "caption": Value("string")})
    rows, _ = damaged_rows()
    for shard in range(4):
        part = [{**row, "image": {"bytes": row["image"], "path": None}} for row in rows[70 * shard : 70 * shard + 70]]
        # Without `datasets`, which would refuse the label 99.
        table = pyarrow.Table.from_pylist(part, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, folder / f"train-{shard:05d}-of-00004.parquet")
    pyarrow.parquet.write_table(table, folder / "validation-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def damaged_webdataset(tmp_path_factory):
    """The same train rows as 4 tar files with columns jpg (which holds every format), cls, txt and json."""
    folder = tmp_path_factory.mktemp("damaged-webdataset")
    rows, _ = damaged_rows()
    for shard in range(4):
        with tarfile.open(folder / f"train-{shard:04d}.tar", "w") as tar:
            for number in range(70 * shard, 70 * shard + 70):
                row = rows[number]
                label, caption = row["label"], row["caption"]
                files = {
                    "jpg": row["image"],
                    "cls": None if label is None else str(label).encode(),
                    "txt": None if caption is None else caption.encode(),
                    "json": None if caption is None else json.dumps({"key": number, "caption": caption}).encode(),
                }
                for extension, data in files.items():
                    if data is not None:
                        member = tarfile.TarInfo(f"{number:04d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
    return folder


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A frozen encoder as it is saved."""
    folder = tmp_path_factory.mktemp("encoder")
    tiny_encoder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_encoder(tmp_path_factory):
    """A text encoder as it is saved, of width 24."""
    folder = tmp_path_factory.mktemp("text-encoder")
    save_sentence_encoder(folder)
    return folder


@pytest.fixture
def train_here(monkeypatch):
    """Runs a training script of the smoke configs in this process: (script, config, output folder, *flags)."""
    monkeypatch.syspath_prepend(SCRIPTS)

    def train(script, config, folder, *flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        config = str(CONFIGS / config)
        importlib.import_module(script).main(["--config", config, "--output_dir", str(folder), *flags])

    return train
