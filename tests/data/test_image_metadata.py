"""Broken metadata do not stop pixels, and the orientation is kept where it can be read."""

import io
import struct
import zlib

import numpy as np
import pytest
from damaged import encode, noise
from PIL import Image

from hf_fae.data.corrupt import CorruptRow
from hf_fae.data.decoding import decode_image
from hf_fae.data.image_metadata import read_orientation, without_metadata


IMAGE = noise(32, 20)
TURN = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
ODD = {  # tags of EXIF
    "far": struct.pack(">HHII", 0x010F, 2, 9, 0xFFFFFFF0),
    "a zero denominator": struct.pack(">HHII", 0x011A, 5, 1, 38),
    "an unknown type": struct.pack(">HHII", 0x011A, 99, 1, 3),
    "a loop": struct.pack(">HHII", 0x8769, 4, 1, 8),
}


def exif(*tags, count=None):
    return b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", count or len(tags)) + b"".join(tags) + bytes(16)


def chunk(kind, content, checksum=None):
    checksum = zlib.crc32(kind + content) if checksum is None else checksum
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)


def with_chunk(*args):
    """A PNG with one more chunk after its header."""
    data = encode(IMAGE)
    return data[:33] + chunk(*args) + data[33:]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("odd", list(ODD))
@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
def test_orientation_beside_odd_tags(format, odd, first):
    tags = (ODD[odd], TURN) if first else (TURN, ODD[odd])
    for count in (2, 9):  # as many as there are, and a list that is cut
        data = encode(IMAGE, format, exif=exif(*tags, count=count), **({"lossless": True} if format == "WEBP" else {}))
        expected = Image.open(io.BytesIO(data)).convert("RGB").transpose(Image.Transpose.ROTATE_270)
        assert decode_image(data).tobytes() == expected.tobytes()


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize(
    ("mode", "format"), [("RGB", "PNG"), ("I;16", "PNG"), ("RGB", "TIFF"), ("I;16", "TIFF"), ("F", "TIFF")]
)
def test_orientation_is_applied_once(orientation, mode, format):
    """Pillow turns TIFF files itself."""
    values = np.arange(6).reshape(2, 3)
    image = {
        "RGB": Image.fromarray(np.repeat(values.astype(np.uint8)[..., None], 3, -1)),
        "I;16": Image.fromarray((values * 257).astype(np.uint16)),
        "F": Image.fromarray((values / 255).astype(np.float32)),
    }[mode]
    tags = Image.Exif()
    tags[0x0112] = orientation
    right = [values, values, values[:, ::-1], values[::-1, ::-1], values[::-1], values.T, np.rot90(values, -1)]
    right += [np.rot90(values, 2).T, np.rot90(values)]
    decoded = decode_image(encode(image, format, exif=tags))
    assert np.array_equal(np.asarray(decoded)[..., 0], right[orientation])


@pytest.mark.parametrize("data", [b"", b"garbage", b"MM\0*", b"II*\0\xff\xff\xff\xff", exif(count=9)], ids=range(5))
def test_without_a_readable_orientation_an_image_is_upright(data):
    image = noise()
    image.info["exif"] = data
    assert read_orientation(image) == 1


@pytest.mark.parametrize("kind", ["eXIf", "tEXt", "zTXt", "iTXt", "iCCP", "pHYs", "gAMA", "cHRM", "acTL", "fcTL"])
@pytest.mark.parametrize("checksum", [None, 0], ids=["right checksum", "wrong checksum"])
def test_broken_chunks_of_png_are_left_out(kind, checksum):
    assert decode_image(with_chunk(kind.encode(), b"x", checksum)).tobytes() == IMAGE.tobytes()


def test_text_above_pillows_limit():
    text = b"comment\0\0" + zlib.compress(bytes(2**21))
    assert decode_image(with_chunk(b"zTXt", text)).tobytes() == IMAGE.tobytes()


def test_broken_transparency_is_corrupt():
    """It decides about pixels."""
    with pytest.raises(CorruptRow):
        decode_image(with_chunk(b"tRNS", bytes(6), 0))


def test_a_jpeg_without_metadata_keeps_its_orientation():
    data = encode(IMAGE, "JPEG", exif=exif(TURN, ODD["far"]), comment="a")
    filled = data[:2] + b"\xff\xfe\0\3a" + b"\xff" + data[2:]  # a comment, and a byte that fills up
    bare = Image.open(io.BytesIO(without_metadata(filled)))
    assert dict(bare.getexif()) == {0x0112: 6} and "comment" not in bare.info
    assert bare.tobytes() == Image.open(io.BytesIO(data)).tobytes()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_without_metadata_the_pixels_are_the_same(format):
    data = encode(IMAGE, format, exif=exif(TURN))
    bare = Image.open(io.BytesIO(without_metadata(data)))
    assert bare.tobytes() == Image.open(io.BytesIO(data)).tobytes()


def test_a_cut_file_stays_cut():
    data = encode(noise(), "PNG")
    assert without_metadata(data[: len(data) // 2]) == data[: len(data) // 2]
