import re

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature

from hf_fae.data.decoding import decode_image, lanczos_crop
from hf_fae.evaluation.inputs.numbered_images import ImageArguments, NumberedImages


def open_pictures(folder, seed=0, **options):
    arguments = ImageArguments(dataset_name=str(folder), label_column="label", caption_column="caption", **options)
    return NumberedImages(arguments.open(32, seed))


def test_pictures_are_those_of_the_split_in_their_order(data_folder):
    pictures = open_pictures(data_folder)
    batch = pictures.read(range(30, 45))
    assert len(pictures) == 70
    assert batch["images"].shape == (15, 3, 32, 32) and batch["images"].dtype == torch.uint8
    assert batch["class_labels"].tolist() == [0 if number == 40 else (1000 + number) % 3 for number in range(30, 45)]
    assert batch["captions"][0] == "dog q"


def test_pictures_come_through_to_the_bit(data_folder):
    from datasets import load_dataset

    rows = load_dataset(str(data_folder), split="validation[:3]")
    expected = torch.stack([torch.tensor(np.array(row["image"])).long() for row in rows])
    assert torch.equal(open_pictures(data_folder).read(range(3))["images"].permute(0, 2, 3, 1).long(), expected)


def test_a_damaged_picture_holds_its_place(data_folder):
    batch = open_pictures(data_folder).read(range(38, 43))
    assert batch["is_good"].tolist() == [True, True, False, True, True]
    assert batch["images"][2].max() == 0 and batch["images"].float().mean((1, 2, 3))[[0, 1, 3, 4]].min() > 20


def test_max_samples_is_a_fixed_choice(data_folder):
    chosen, again, other = (open_pictures(data_folder, seed, max_samples=20) for seed in (0, 0, 1))
    assert len(chosen) == 20 and chosen.rows["caption"][:] == again.rows["caption"][:] != other.rows["caption"][:]
    assert chosen.fingerprint == again.fingerprint != other.fingerprint


def test_hash_tells_splits_apart(data_folder):
    assert open_pictures(data_folder).fingerprint != open_pictures(data_folder, split="train").fingerprint


def test_crop_is_chosen(data_folder):
    adm, uvit = (
        NumberedImages(ImageArguments(dataset_name=str(data_folder), crop=crop).open(24))
        for crop in ("center", "lanczos")
    )
    assert adm.describe() == {**uvit.describe(), "crop": "center"}
    expected = lanczos_crop(decode_image(uvit.rows[0]["image"]), 24)
    assert torch.equal(uvit.read(range(1))["images"][0].permute(1, 2, 0), torch.from_numpy(np.array(expected)))
    assert not torch.equal(uvit.read(range(1))["images"], adm.read(range(1))["images"])


def test_captions_in_json(tmp_path):
    """As in WebDataset files; rows without one are left out."""
    texts = ["a cat", None, " a dog ", "", "a sun"]
    rows = [{"image": {"bytes": b"", "path": None}, "json": {"caption": text, "number": 1}} for text in texts]
    features = Features({"image": ImageFeature(), "json": {"caption": Value("string"), "number": Value("int64")}})
    Dataset.from_list(rows, features=features).to_parquet(tmp_path / "validation.parquet")
    arguments = ImageArguments(dataset_name=str(tmp_path), caption_column="json.caption")
    pictures = NumberedImages(arguments.open(32))
    assert pictures.captions() == ["a cat", "a dog", "a sun"] and len(pictures) == 5
    assert pictures.fingerprint == pictures.select(range(5)).fingerprint != pictures.select(range(4)).fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset_name": None}, "dataset_name must name the images to measure on, got None"),
        ({"dataset_name": "VIRTUAL_imagenet256_labeled.npz"}, "an npz is a reference for generated images"),
        ({"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ({"label_column": "colour"}, "has no column 'colour'"),
        ({"split": "train[:0]"}, r"train\[:0\]"),
        ({"split": "test"}, "dataset_name .*, split 'test', cannot be read: .* has no split 'test'"),
        ({"label_column": "image"}, "image_column, label_column and caption_column must differ, got image, image"),
    ],
)
def test_errors(data_folder, options, message):
    options = {"dataset_name": str(data_folder), **options}
    with pytest.raises(ValueError, match=message):
        NumberedImages(ImageArguments(**options).open(32))


@pytest.mark.parametrize(
    ("train_split", "split", "shares"),
    [
        ("train", "validation", False),
        ("train[:80]", "train[80:]", False),
        ("train[:90%]", "train[90%:]", False),
        ("train", "train", True),
        ("train", "train[:50%]", True),
        ("validation+train[:10]", "train[9:20]", True),
    ],
)
def test_nothing_is_measured_on_what_was_learned(data_folder, train_split, split, shares):
    pictures = ImageArguments(dataset_name=str(data_folder), split=split)
    if not shares:
        assert len(pictures.open(32, train_split=train_split).train)
        return
    with pytest.raises(ValueError, match=re.escape(f"train_split {train_split!r} must be disjoint from split, got")):
        pictures.open(32, train_split=train_split)


def test_an_empty_folder(tmp_path):
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        ImageArguments(dataset_name=str(tmp_path)).open(32)
