"""From a cell of a data set to a square RGB image: decoding that detects all corruption, and ADM's crops."""

import contextlib
import io
import math

import numpy as np

from .corrupt import EMPTY, TOO_LARGE, TOO_SMALL, TRUNCATED, UNDECODABLE, CorruptRow
from .image_files import read_file, supported_formats
from .image_metadata import read_orientation, without_metadata


__all__ = ["center_crop", "decode_image", "lanczos_crop", "pad_to_square", "random_crop", "to_rgb"]

MAX_PIXELS = 89_478_485  # where Pillow begins to warn of decompression bombs: 256 MiB as RGB
MAX_ASPECT = 8  # the ends of longer images are cut off before anything is enlarged
BITS_PER_SAMPLE = 258  # a tag of TIFF


def to_rgb(image):
    """A PIL image of any mode as 8-bit RGB: upright by its EXIF tag, transparency on white.

    12-bit and 16-bit grey is scaled to 8 bits, also where Pillow reads it as 32-bit integers; floats are scaled from
    [0, 1].

    Raises:
        CorruptRow: numbers of an undocumented range (32-bit integers above 65535, floats outside [0, 1]), or a colour
            space without a conversion (LAB).
    """
    from PIL import Image

    image.load()  # turns a TIFF, and removes its tag
    if image.mode.startswith("I") or image.mode == "F":
        return _upright(Image.fromarray(_scale_grey(image)), image).convert("RGB")
    image = _upright(image, image)
    if image.mode == "La":
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    if image.mode == "LAB":  # Pillow would copy the channels
        raise CorruptRow(UNDECODABLE, "images of mode LAB are not supported")
    return image.convert("RGB")


def _upright(image, source):
    """The image turned by the EXIF tag of its source, where that can be read."""
    from PIL import Image

    turns = Image.Transpose
    by_tag = (None, turns.FLIP_LEFT_RIGHT, turns.ROTATE_180, turns.FLIP_TOP_BOTTOM, turns.TRANSPOSE)
    by_tag += (turns.ROTATE_270, turns.TRANSVERSE, turns.ROTATE_90)
    turn = by_tag[read_orientation(source) - 1]
    return image if turn is None else image.transpose(turn)


def _scale_grey(image):
    """Grey values of documented range as 8-bit ones; those of a transparent colour become white."""
    values, mode = np.asarray(image), image.mode
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))[0]  # Pillow does not scale 12 bits to 16
    highest = 1 if mode == "F" else 2 ** min(bits, 16) - 1
    if not (np.isfinite(values).all() and 0 <= values.min() and values.max() <= highest):
        raise CorruptRow(
            UNDECODABLE,
            f"values of mode {mode} must be within [0, {highest}], got [{values.min():g}, {values.max():g}]",
        )
    grey = (values * 255).round() if mode == "F" else values.astype(np.uint32) * 255 // highest
    if "transparency" in image.info:
        grey[values == image.info["transparency"]] = 255
    return grey.astype(np.uint8)


def decode_image(value, min_side: int = 1):
    """The RGB image in a cell of a data set, or in a file; the first frame of an animation.

    Metadata that cannot be read are ignored. Only `image_files.FORMATS` are decoded.

    Args:
        value: `{"bytes", "path"}`, bytes, a local path or a URL that fsspec supports, or a PIL image.
        min_side: least length of the shorter side, in pixels.

    Raises:
        CorruptRow: there is no image, only part of one, or one that is too small or too large.
    """
    from PIL import Image

    if isinstance(value, Image.Image):
        return to_rgb(value)
    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    data = read_file(value) if value is not None and not isinstance(value, bytes) else value
    if not data:
        raise CorruptRow(EMPTY, "there are no bytes of an image")
    try:
        return _decode(data, min_side)
    except CorruptRow as error:
        bare = without_metadata(data)
        if error.kind not in (UNDECODABLE, TRUNCATED) or bare == data:
            raise
        return _decode(bare, min_side)


def _decode(data, min_side):
    from PIL import Image, UnidentifiedImageError

    try:
        with _strict_decoding():
            image = Image.open(io.BytesIO(data), formats=supported_formats())
            _check_size(image.width, image.height, min_side)
            return to_rgb(image)
    except CorruptRow:
        raise
    except Image.DecompressionBombError as error:
        raise CorruptRow(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise CorruptRow(UNDECODABLE, f"these {len(data)} bytes are no image of a supported format") from error
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
