"""From a cell of a data set to a square RGB image: decoding that detects all corruption, and ADM's crops."""

import contextlib
import io
import itertools
import math

import numpy as np

from .corrupt import EMPTY, TOO_LARGE, TOO_SMALL, TRUNCATED, UNDECODABLE, CorruptRow
from .reading import wait_before_retry


__all__ = ["center_crop", "decode_image", "lanczos_crop", "pad_to_square", "random_crop", "to_rgb"]

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
MAX_ASPECT = 8  # the ends of longer images are cut off before anything is enlarged


def to_rgb(image):
    """A PIL image of any mode as RGB: upright by its EXIF tag, transparency on white, 16-bit grey scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16-bit values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(value, min_side: int = 1):
    """The RGB image in a cell of a data set; the first frame of an animation.

    Args:
        value: `{"bytes", "path"}`, bytes, a local path or a URL that fsspec supports, or a PIL image.
        min_side: least length of the shorter side, in pixels.

    Raises:
        CorruptRow: there is no image, only part of one, or one that is too small or too large.
        FileNotFoundError: there is no file of that path.
    """
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    data = _read(value) if value is not None and not isinstance(value, bytes) else value
    if not data:
        raise CorruptRow(EMPTY, "there are no bytes of an image")
    try:
        with _strict_decoding():
            image = Image.open(io.BytesIO(data))
            _check_size(image.width, image.height, min_side)
            return to_rgb(image)
    except CorruptRow:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptRow(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise CorruptRow(UNDECODABLE, f"cannot identify an image in these {len(data)} bytes") from error
    except Exception as error:  # each of PIL's decoders fails in its own way
        raise CorruptRow(TRUNCATED, f"the image is truncated: {error}") from error


def center_crop(image, size: int):
    """ADM's square crop: halve with a box filter while possible, bicubic to `size`, then crop the centre."""
    return _crop(image, size, size, lambda slack: slack // 2)


def random_crop(image, size: int, random: np.random.Generator):
    """ADM's random crop: resize the shorter side to a random size up to `size` / 0.8, then crop anywhere."""
    shorter_side = int(random.integers(size, math.ceil(size / 0.8) + 1))
    return _crop(image, size, shorter_side, lambda slack: int(random.integers(slack + 1)))


def lanczos_crop(image, size: int):
    """U-ViT's square crop (arXiv 2209.12152), used for text to image on COCO: crop the centre, then Lanczos to
    `size`."""
    from PIL import Image

    side = min(image.size)
    return _window(image, side, side, lambda slack: slack // 2).resize((size, size), Image.Resampling.LANCZOS)


def pad_to_square(image, size: int):
    """The whole image, its longer side resized to `size`, centred on a white square."""
    from PIL import Image

    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    filter = Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC
    square = Image.new("RGB", (size, size), "white")
    square.paste(image.resize((width, height), filter), ((size - width) // 2, (size - height) // 2))
    return square


def _crop(image, size, shorter_side, offset):
    from PIL import Image

    longest = MAX_ASPECT * min(image.size)
    if max(image.size) > longest:
        image = _window(image, min(image.width, longest), min(image.height, longest), offset)
    while min(image.size) >= 2 * shorter_side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = shorter_side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    return _window(image, size, size, offset)


def _window(image, width, height, offset):
    left, top = offset(image.width - width), offset(image.height - height)
    return image.crop((left, top, left + width, top + height))


def _read(path):
    for failures in itertools.count():
        try:
            with _open(path) as file:
                return file.read()
        except Exception as error:  # each file system fails in its own way
            wait_before_retry(error, failures)


def _open(path):
    if "://" not in str(path):
        return open(path, "rb")
    import fsspec  # a streamed folder of images holds their URLs

    return fsspec.open(path, "rb")


def _check_size(width, height, min_side):
    if min(width, height) < min_side:
        raise CorruptRow(TOO_SMALL, f"the image has {width} x {height} pixels, below {min_side}")
    if width * height > MAX_PIXELS:
        raise CorruptRow(TOO_LARGE, f"the image has {width} x {height} pixels, above {MAX_PIXELS}")


@contextlib.contextmanager
def _strict_decoding():
    """Treat a truncated image as an error, even if another library has told PIL to fill the rest with grey."""
    from PIL import ImageFile

    previous, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = previous
