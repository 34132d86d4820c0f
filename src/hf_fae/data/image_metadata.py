"""Metadata of image files: the orientation, also where other tags are broken; all else can be left out."""

import struct
import zlib


__all__ = ["read_orientation", "without_metadata"]

ORIENTATION = 0x0112  # of EXIF
EXIF = b"Exif\0\0"
SHORT = 3  # EXIF's type of unsigned 16-bit numbers
# EXIF with nothing but an orientation, before its value.
EXIF_TO_VALUE = EXIF + b"MM\0*\0\0\0\x08" + struct.pack(">HHHI", 1, ORIENTATION, SHORT, 1)

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Of the chunks that a decoder may skip those that change the pixels or the orientation of the first frame.
PNG_KEPT = (b"tRNS", b"eXIf")
JPEG_SIGNATURE, JPEG_SCAN, JPEG_EXIF, JPEG_KEPT = b"\xff\xd8\xff", 0xDA, 0xE1, (0xE0, 0xEE)  # JFIF, Adobe (colours)
JPEG_SEGMENTS = (*range(0xE0, 0xF0), 0xFE)  # metadata and comments


def read_orientation(image) -> int:
    """The EXIF orientation of a PIL image, 1 to 8; 1 (upright) where none can be read."""
    try:
        orientation = int(image.getexif().get(ORIENTATION) or 0)
    except Exception:  # metadata can be broken in any way
        orientation = 0
    orientation = orientation or _exif_orientation(image.info.get("exif", b""))
    return orientation if 1 <= orientation <= 8 else 1


def _exif_orientation(data):
    """The orientation in EXIF data of which no other tag is read: Pillow reads none after a broken one."""
    data = data.removeprefix(EXIF)
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", data, position)
            if (tag, kind) == (ORIENTATION, SHORT):
                return value
    except struct.error:  # another byte order, or the end of the data
        pass
    return 1


def without_metadata(data: bytes) -> bytes:
    """A PNG or JPEG file without texts, colour profiles, comments and animation, and a JPEG with no more EXIF than its
    orientation; other files as is."""
    if data.startswith(PNG_SIGNATURE):
        return PNG_SIGNATURE + b"".join(_png_chunks(data, len(PNG_SIGNATURE)))
    if data.startswith(JPEG_SIGNATURE):
        return data[:2] + b"".join(_jpeg_segments(data, 2))
    return data


def _png_chunks(data, position):
    while position + 8 <= len(data):
        (length,), kind = struct.unpack_from(">I", data, position), data[position + 4 : position + 8]
        end = position + 12 + length
        is_broken_exif = kind == b"eXIf" and data[end - 4 : end] != _checksum(data[position + 4 : end - 4])
        if kind[:1].isupper() or (kind in PNG_KEPT and not is_broken_exif):
            yield data[position:end]
        position = end


def _checksum(data):
    return struct.pack(">I", zlib.crc32(data))


def _jpeg_segments(data, position):
    while position + 4 <= len(data) and data[position] == 0xFF and data[position + 1] != JPEG_SCAN:
        marker, (length,) = data[position + 1], struct.unpack_from(">H", data, position + 2)
        if marker == 0xFF:  # fills up
            position += 1
            continue
        end = position + 2 + length
        if marker == JPEG_EXIF and data[position + 4 :].startswith(EXIF):
            content = EXIF_TO_VALUE + struct.pack(">H", _exif_orientation(data[position + 4 : end])) + bytes(6)
            yield struct.pack(">BBH", 0xFF, JPEG_EXIF, len(content) + 2) + content
        elif marker not in JPEG_SEGMENTS or marker in JPEG_KEPT:
            yield data[position:end]
        position = end
    yield data[position:]
