"""A data set of which 5 % of the rows are damaged in every way that is known, and odd pictures that are good."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image


CLASSES = ["circle", "cross", "dot", "ring"]
NUM_ROWS = 280


def encode(image: Image.Image, format: str = "PNG", **kwargs) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **kwargs)
    return file.getvalue()


def noise(width: int = 32, height: int = 32, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def bomb(width: int, height: int) -> bytes:
    """The start of a PNG file that promises so many pixels."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(header) - 4) + header + struct.pack(">I", zlib.crc32(header))
    data = b"IDAT" + zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", len(data) - 4) + data + struct.pack(">I", zlib.crc32(data))


def damaged_pictures() -> dict[str, tuple[str, bytes | None]]:
    """Name -> (kind, bytes)."""
    jpeg, webp, png = (encode(noise(), format) for format in ("JPEG", "WEBP", "PNG"))
    return {
        "missing": ("empty", None),
        "zero_bytes": ("empty", b""),
        "text": ("undecodable", b"<html>404 Not Found</html>"),
        "truncated_jpeg": ("truncated", jpeg[: len(jpeg) * 2 // 3]),
        "truncated_webp": ("truncated", webp[: len(webp) * 2 // 3]),
        "truncated_png": ("truncated", png[: len(png) * 2 // 3]),
        "1x1": ("too_small", encode(noise(1, 1))),
        "20000x1": ("too_small", encode(noise(20_000, 1))),
        "bomb": ("too_large", bomb(30_000, 30_000)),
    }


def odd_pictures() -> dict[str, tuple[bytes, np.ndarray]]:
    """Name -> (bytes, the RGB pixels (32, 32, 3) that they stand for)."""
    grey = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    rgb = np.asarray(noise(seed=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
    palette = Image.fromarray((np.arange(32 * 32).reshape(32, 32) % 3).astype(np.uint8), mode="P")
    palette.putpalette([0, 0, 0, 10, 20, 30, 200, 100, 0])
    colours = np.array([[255, 255, 255], [10, 20, 30], [200, 100, 0]], np.uint8)
    cmyk = np.zeros((32, 32, 4), np.uint8)
    cmyk[..., 1:3] = 255  # magenta and yellow
    red = np.broadcast_to(np.array([255, 0, 0], np.uint8), (32, 32, 3))
    return {
        "16-bit": (encode(Image.fromarray(grey)), np.repeat((grey // 257).astype(np.uint8)[..., None], 3, -1)),
        "cmyk": (encode(Image.fromarray(cmyk, mode="CMYK"), "TIFF"), red),
        "palette": (encode(palette, transparency=0), colours[np.asarray(palette)]),
        "animated": (
            encode(Image.fromarray(rgb), "WEBP", save_all=True, append_images=[noise(seed=2)], lossless=True),
            rgb,
        ),
        "exif": (encode(Image.fromarray(rgb), exif=exif), np.rot90(rgb, -1)),
    }


@functools.cache
def damaged_rows() -> tuple[list[dict], dict[int, str]]:
    """280 rows {"image": bytes, "label", "caption"} in random places of which are damaged, and row number -> kind."""
    rows = [
        {"image": encode(noise(seed=number)), "label": number % 4, "caption": f"picture {number}"}
        for number in range(NUM_ROWS)
    ]
    broken = [(kind, {"image": data}) for kind, data in damaged_pictures().values()]
    broken += [("no_caption", {"caption": caption}) for caption in (None, " \n")]
    broken += [("bad_label", {"label": label}) for label in (None, -1, 99)]
    odd = [(None, {"image": data}) for data, _ in odd_pictures().values()]
    kinds = {}
    # The first rows are whole: from them `datasets` takes which columns a WebDataset has.
    places = 5 + np.random.default_rng(0).permutation(NUM_ROWS - 5)[: len(broken + odd)]
    for place, (kind, change) in zip(places.tolist(), broken + odd, strict=True):
        rows[place].update(change)
        if kind:
            kinds[place] = kind
    return rows, kinds
