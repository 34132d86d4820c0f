"""What a folder of images holds."""

import json

import pytest
from training_fixtures import numbered_image

from hf_fae.own_images.folder import read_folder


def save(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        numbered_image(number).save(folder / name)


def test_classes_are_folders_and_faults_are_named(tmp_path):
    save(tmp_path, "cats/1.png", "cats/deep/2.png", "dogs/3.JPG", ".hidden/4.png")
    (tmp_path / "dogs" / "text.png").write_text("no image")
    (tmp_path / "dogs" / "empty.png").touch()
    numbered_image(1, size=8).save(tmp_path / "dogs" / "small.png")
    found = read_folder(str(tmp_path))
    assert [(image.name, image.label) for image in found.images] == [
        ("cats/1.png", "cats"),
        ("cats/deep/2.png", "cats"),
        ("dogs/3.JPG", "dogs"),
    ]
    assert found.corrupt.keys() == {"dogs/text.png", "dogs/empty.png", "dogs/small.png"}
    assert found.classes == {"cats": 2, "dogs": 1}
    assert "2 classes, from 1 images (dogs) to 2 (cats)" in found.describe()


def test_splits_are_no_classes(tmp_path):
    save(tmp_path, "train/cats/1.png", "train/dogs/2.png", "validation/cats/3.png")
    assert read_folder(str(tmp_path)).classes == {"cats": 2, "dogs": 1}
    save(tmp_path / "flat", "train/1.png", "val/2.png")
    assert not read_folder(str(tmp_path / "flat")).classes


def test_captions_are_in_tables_or_text_files(tmp_path):
    save(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "1.png", "text": "one "}) + "\n")
    (tmp_path / "2.txt").write_text("two\nnot this\n")
    assert [image.caption for image in read_folder(str(tmp_path)).images] == ["one", "two", ""]


def test_a_folder_without_usable_images_is_refused(tmp_path):
    with pytest.raises(ValueError, match="folder must be a folder of images, got"):
        read_folder(str(tmp_path / "none"))
    (tmp_path / "bad.png").write_text("no image")
    with pytest.raises(ValueError, match="no image that can be used: 1 of its files are corrupt"):
        read_folder(str(tmp_path))
