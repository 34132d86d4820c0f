"""Pictures to measure on, models to be measured, and judges; all tiny, with random weights."""

import io

import numpy as np
import pytest
import torch
from clean_state import datasets_cache, fresh_accelerate  # noqa: F401 - fixtures
from factories import tiny_fae, tiny_fae_dit_pipeline
from PIL import Image


CLASSES = ["cat", "dog", "sun"]
ROWS = {"train": 90, "validation": 70}
DAMAGED = 40  # a row of validation


def picture(number: int) -> np.ndarray:
    """(32, 32, 3): noise on the colour of its class."""
    random = np.random.default_rng(number)
    colour = np.eye(3)[number % 3] * 160 + 40
    return (colour + random.normal(0, 20, (32, 32, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """Parquet files with pictures in three classes, with captions; one picture of validation is damaged."""
    from datasets import ClassLabel, Dataset, Features, Value
    from datasets import Image as ImageFeature

    folder = tmp_path_factory.mktemp("data")
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES), "caption": Value("string")})
    for split, first in (("train", 0), ("validation", 1000)):
        rows = []
        for number in range(first, first + ROWS[split]):
            file = io.BytesIO()
            Image.fromarray(picture(number)).save(file, "PNG")
            data = b"no picture" if number == 1000 + DAMAGED else file.getvalue()
            caption = f"{CLASSES[number % 3]} {chr(97 + number % 26)}"
            rows.append({"image": {"bytes": data, "path": None}, "label": number % 3, "caption": caption})
        Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="session")
def pipeline_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_fae_dit_pipeline(num_inference_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_fae().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def judge_folder(tmp_path_factory):
    """timm's own tiny network with random weights, at 32 pixels: the features are 256 wide."""
    import timm
    from timm.models import save_for_hf

    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model = timm.create_model("test_efficientnet", pretrained_cfg_overlay={"input_size": (3, 32, 32)}, num_classes=10)
    save_for_hf(model, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of Inception, as torch-fidelity keeps them."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            """Stays as it was initialised."""

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    torch.manual_seed(0)
    network = Untrained("inception", ["2048"], feature_extractor_weights_path=folder / "empty.pth")
    torch.save(network.state_dict(), folder / "inception.pth")
    return folder / "inception.pth"
