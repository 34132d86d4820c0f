"""Which files are read, and which of their parts."""

import io

import pytest
from damaged import encode, noise
from PIL import Image

from hf_fae.data import image_files
from hf_fae.data.corrupt import CorruptRow
from hf_fae.data.image_files import FORMATS, check_inside, read_file, supported_formats, without_metadata


@pytest.mark.parametrize("name", ["EPS", "PSD", "WMF", "FITS"])
def test_formats_that_start_programs_or_are_no_images_are_left_out(name):
    assert name not in supported_formats()
    assert {"PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"} <= set(supported_formats()) <= set(FORMATS)


def test_files_are_regular_and_bounded(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(100))
    assert read_file(tmp_path / "a") == bytes(100)
    with pytest.raises(CorruptRow, match="/dev/zero is no regular file"):
        read_file("/dev/zero")
    monkeypatch.setattr(image_files, "MAX_BYTES", 99)
    with pytest.raises(CorruptRow, match="more than 99 bytes"):
        read_file(tmp_path / "a")


@pytest.mark.parametrize("path", ["/data/photos/a.png", "/data/photos/b/../a.png", "zip://a.png::/data/photos/a.zip"])
def test_paths_inside(path):
    check_inside(path, "/data/photos")


@pytest.mark.parametrize("path", ["hf://datasets/user/name/a.png", "zip://a.png::hf://datasets/user/name@main/a.zip"])
def test_urls_inside(path):
    check_inside(path, "user/name")


@pytest.mark.parametrize(
    "path",
    [
        "/data/photos/../secret.png",
        "/data/photos2/a.png",
        "/etc/passwd",
        "file:///data/photos/a.png",
        "http://127.0.0.1/a.png",
        "hf://datasets/user/name2/a.png",
        "hf://user/name/a.png",
        "zip://a.png::http://127.0.0.1/a.zip",
    ],
)
def test_paths_outside(path):
    for dataset_name in ("/data/photos", "user/name"):
        with pytest.raises(CorruptRow, match="outside of the data set") as raised:
            check_inside(path, dataset_name)
        assert raised.value.kind == "unsafe"


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_without_metadata_the_pixels_are_the_same(format):
    file = io.BytesIO()
    noise().save(file, format, **({"exif": noise().getexif()} if format != "PNG" else {}))
    bare = without_metadata(file.getvalue())
    assert Image.open(io.BytesIO(bare)).convert("RGB").tobytes() == Image.open(file).convert("RGB").tobytes()


def test_a_cut_file_stays_cut():
    data = encode(noise(), "PNG")
    assert without_metadata(data[: len(data) // 2]) == data[: len(data) // 2]
