"""The bytes of an image: which files are read, and which formats are decoded."""

import itertools
import os
import stat

from .corrupt import MISSING, TOO_LARGE, UNDECODABLE, CorruptRow
from .reading import FINAL_ERRNOS, wait_before_retry


__all__ = ["FORMATS", "open_regular", "read_file", "shorten", "supported_formats"]

# Pillow's names. Its other formats are left out: EPS and PDF start programs, others are no images or hardly tested.
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "QOI", "TIFF", "WEBP")
MAX_BYTES = 2**28  # 256 MiB: as much as the largest image has as RGB
MAX_SHOWN = 80  # characters of a path in a message: it may be anything that a row holds


def supported_formats() -> list[str]:
    """Those of `FORMATS` that this Pillow decodes."""
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def shorten(path) -> str:
    """A path for a message: on one line, and not without end."""
    text = str(path)
    shown = text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."
    return shown if shown.isprintable() else repr(shown)


def open_regular(path):
    """Open a regular local file for reading bytes.

    Raises:
        CorruptRow: there is no such file, nor could be, or it is a device, a pipe or a folder.
    """
    try:
        is_regular = stat.S_ISREG(os.stat(path).st_mode)
    except (OSError, ValueError) as error:  # the latter for characters that no path has
        is_path = isinstance(error, OSError) and error.errno not in FINAL_ERRNOS
        if is_path and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise
        raise CorruptRow(MISSING, f"No such file: {shorten(path)}") from error
    if not is_regular:
        raise CorruptRow(UNDECODABLE, f"{shorten(path)} is no regular file")
    return open(path, "rb")


def read_file(path) -> bytes:
    """The bytes of a regular file or of a URL that fsspec supports; transient errors are retried.

    Raises:
        CorruptRow: as `open_regular`, or more than 256 MiB.
    """
    for failures in itertools.count():
        try:
            with _open(path) as file:
                data = file.read(MAX_BYTES + 1)
            break
        except CorruptRow:
            raise
        except FileNotFoundError as error:
            raise CorruptRow(MISSING, f"No such file: {shorten(path)}") from error
        except Exception as error:  # each file system fails in its own way
            wait_before_retry(error, failures)
    if len(data) > MAX_BYTES:
        raise CorruptRow(TOO_LARGE, f"the file has more than {MAX_BYTES} bytes")
    return data


def _open(path):
    if "://" not in str(path):
        return open_regular(path)
    import fsspec  # a streamed folder of images holds their URLs

    return fsspec.open(path, "rb")
