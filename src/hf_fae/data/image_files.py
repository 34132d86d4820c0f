"""The bytes of an image: which files are read, which formats are decoded, and metadata that only get in the way."""

import itertools
import os
import stat
import struct

from .corrupt import EMPTY, TOO_LARGE, UNDECODABLE, UNSAFE, CorruptRow
from .reading import wait_before_retry


__all__ = ["FORMATS", "check_inside", "read_file", "supported_formats", "without_metadata"]

# Pillow's names. Its other formats are left out: EPS and PDF start programs, others are no images or hardly tested.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
MAX_BYTES = 2**28  # 256 MiB: as much as the largest image has as RGB

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the chunks that a decoder may skip those that change pixels, orientation or the frame: everything else is text.
PNG_KEPT = (b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT")
JPEG_SIGNATURE, JPEG_SCAN, JPEG_KEPT = b"\xff\xd8\xff", 0xDA, (0xE0, 0xEE)  # JFIF, Adobe (colours)
JPEG_SEGMENTS = (*range(0xE0, 0xF0), 0xFE)  # metadata and comments


def supported_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow decodes."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def read_file(path) -> bytes:
    """The bytes of a regular file or of a URL that fsspec supports; transient errors are retried.

    Raises:
        CorruptRow: no regular file, such as a device, or more than 256 MiB.
        FileNotFoundError: there is no such file.
    """
    for failures in itertools.count():
        try:
            with _open(path) as file:
                data = file.read(MAX_BYTES + 1)
            break
        except CorruptRow:
            raise
        except Exception as error:  # each file system fails in its own way
            wait_before_retry(error, failures)
    if len(data) > MAX_BYTES:
        raise CorruptRow(TOO_LARGE, f"the file has more than {MAX_BYTES} bytes")
    return data


def _open(path):
    if "://" in str(path):
        import fsspec  # a streamed folder of images holds their URLs

        return fsspec.open(path, "rb")
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CorruptRow(UNDECODABLE, f"{path} is no regular file")
    return open(path, "rb")


def check_inside(path: str | None, dataset_name: str) -> None:
    """Check that a path that a row of a data set names belongs to this data set, or to the cache of `datasets`.

    Local paths are compared as they are written: links inside a folder of images may lead anywhere, as whoever made
    the folder wanted.

    Args:
        dataset_name: a local folder or file, or a Hub id.

    Raises:
        CorruptRow: it does not. The rows of a data set shall not read a user's other files, or fetch URLs.
    """
    if path is None:
        raise CorruptRow(EMPTY, "there is neither an image nor the path of one")
    outer = path.split("::")[-1]  # of zip://image.png::hf://datasets/user/name/images.zip
    if "://" in outer:
        repository = outer.removeprefix("hf://datasets/")
        is_inside = repository != outer and repository.startswith((f"{dataset_name}/", f"{dataset_name}@"))
    else:
        from datasets import config
        from huggingface_hub.constants import HF_HUB_CACHE

        roots = (dataset_name, HF_HUB_CACHE, config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH)
        place = os.path.abspath(outer)
        is_inside = any(
            place == root or place.startswith(root.rstrip(os.sep) + os.sep)
            for root in (os.path.abspath(os.path.expanduser(root)) for root in roots)
        )
    if not is_inside:
        shown = path if len(path) <= 80 else f"{path[:77]}..."
        raise CorruptRow(UNSAFE, f"{shown} is outside of the data set {dataset_name!r}")


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without texts, colour profiles and comments, and a JPEG without EXIF; other files as is."""
    if data.startswith(PNG_SIGNATURE):
        return PNG_SIGNATURE + b"".join(_png_chunks(data, len(PNG_SIGNATURE)))
    if data.startswith(JPEG_SIGNATURE):
        return data[:2] + b"".join(_jpeg_segments(data, 2))
    return data


def _png_chunks(data, position):
    while position + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        end = position + 12 + length
        if kind[:1].isupper() or kind in PNG_KEPT:
            yield data[position:end]
        position = end


def _jpeg_segments(data, position):
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != JPEG_SCAN:
        marker, (length,) = data[position + 1], struct.unpack_from(">H", data, position + 2)
        end = position + 2 + length
        if marker not in JPEG_SEGMENTS or marker in JPEG_KEPT:
            yield data[position:end]
        position = end
    yield data[position:]
