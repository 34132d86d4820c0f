"""Which files are read, and which formats are decoded."""

import os

import pytest

from hf_fae.data import image_files
from hf_fae.data.corrupt import CorruptRow
from hf_fae.data.image_files import FORMATS, read_file, supported_formats


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


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to a device"])
def test_other_files_are_not_opened(kind, tmp_path):
    path = tmp_path / "a.png"
    {"pipe": os.mkfifo, "folder": os.mkdir, "link to a device": lambda path: path.symlink_to("/dev/zero")}[kind](path)
    with pytest.raises(CorruptRow, match="no regular file") as raised:
        read_file(path)
    assert raised.value.kind == "undecodable"


@pytest.mark.parametrize("path", ["gone.png", "a\0b.png", "\ud800.png", "x" * 5000, "a.png/b.png"], ids=range(5))
def test_what_can_be_no_file_is_missing_at_once(path, tmp_path, monkeypatch):
    (tmp_path / "a.png").touch()
    monkeypatch.setattr("hf_fae.data.reading.time.sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(CorruptRow, match="No such file") as raised:
        read_file(f"{tmp_path}/{path}")
    assert raised.value.kind == "missing" and len(str(raised.value)) < 120 and str(raised.value).isprintable()
