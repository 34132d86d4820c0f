"""From the cell of a data set to a square RGB picture: decoding that finds every damage, and ADM's crops."""

import contextlib
import io
import itertools
import math

import numpy as np

from . import corrupt as damage
from .reading import wait_before_retry


__all__ = ["center_crop", "decode_image", "lanczos_crop", "random_crop", "to_rgb"]

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
MAX_ASPECT = 8  # of longer pictures the ends are cut off before anything is enlarged


def to_rgb(image):
    """A PIL picture of any mode as RGB: upright by its EXIF tag, transparency on white, 16-bit grey scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16-bit values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(value, min_side: int = 1):
    """The RGB picture in a cell of a data set, of an animation the first frame.

    Args:
        value: `{"bytes", "path"}`, bytes, a local path or a URL that fsspec knows, or a PIL picture.
        min_side: pixels that the shorter side must have.

    Raises:
        DamagedRow: there is no picture, not all of it, or one that is too small or too large.
        FileNotFoundError: there is no file of that path.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    data = _read(value) if value is not None and not isinstance(value, bytes) else value
    if not data:
        raise damage.DamagedRow(damage.EMPTY, "there are no bytes of a picture")
    try:
        with _strict_decoding():
            image = Image.open(io.BytesIO(data))
            _check_size(image.width, image.height, min_side)
            return to_rgb(image)
    except damage.DamagedRow:
        raise
    except Image.DecompressionBombError as error:
        raise damage.DamagedRow(damage.TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise damage.DamagedRow(damage.UNDECODABLE, f"cannot identify a picture in these {len(data)} bytes") from error
    except Exception as error:  # each of PIL's decoders has its own way to fail
        raise damage.DamagedRow(damage.TRUNCATED, f"the picture breaks off: {error}") from error


def center_crop(image, size: int):
    """ADM's square crop: halve with a box filter while possible, bicubic to `size`, then cut out the centre."""
    return _crop(image, size, size, lambda room: room // 2)


def random_crop(image, size: int, random: np.random.Generator):
    """ADM's random crop: the shorter side becomes a random size up to `size` / 0.8, the place is random, too."""
    shorter_side = int(random.integers(size, math.ceil(size / 0.8) + 1))
    return _crop(image, size, shorter_side, lambda room: int(random.integers(room + 1)))


def lanczos_crop(image, size: int):
    """U-ViT's square crop (arXiv 2209.12152), by which text to image is compared on COCO: cut out the centre, then
    Lanczos to `size`."""
    from PIL import Image

    side = min(image.size)
    return _window(image, side, side, lambda room: room // 2).resize((size, size), Image.Resampling.LANCZOS)


def _crop(image, size, shorter_side, place):
    from PIL import Image

    longest = MAX_ASPECT * min(image.size)
    if max(image.size) > longest:
        image = _window(image, min(image.width, longest), min(image.height, longest), place)
    while min(image.size) >= 2 * shorter_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _window(image, size, size, place)


def _window(image, width, height, place):
    left, top = place(image.width - width), place(image.height - height)
    return image.crop((left, top, left + width, top + height))


def _read(path):
    for failures in itertools.count():
        try:
            with _open(path) as file:
                return file.read()
        except Exception as error:  # each file system has its own way to fail
            wait_before_retry(error, failures)


def _open(path):
    if "://" not in str(path):
        return open(path, "rb")
    import fsspec  # a streamed folder of images has the pictures' URLs

    return fsspec.open(path, "rb")


def _check_size(width, height, min_side):
    if min(width, height) < min_side:
        raise damage.DamagedRow(damage.TOO_SMALL, f"the picture has {width} x {height} pixels, below {min_side}")
    if width * height > MAX_PIXELS:
        raise damage.DamagedRow(damage.TOO_LARGE, f"the picture has {width} x {height} pixels, above {MAX_PIXELS}")


@contextlib.contextmanager
def _strict_decoding():
    """Half a picture is an error, even where another library has told PIL to fill up the rest with grey."""
    from PIL import ImageFile

    previous, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = previous
