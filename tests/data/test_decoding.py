import io
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from damaged import damaged_pictures, encode, noise, odd_pictures
from PIL import Image, ImageFile

from hf_fae.data.corrupt import CorruptRow
from hf_fae.data.decoding import center_crop, decode_image, lanczos_crop, pad_to_square, random_crop, to_rgb


class TestDecoding:
    def half_transparent(self, mode):
        image = Image.new(mode, (2, 1))
        opaque, clear = {"RGBA": ((200, 0, 0, 255), (200, 0, 0, 0)), "LA": ((200, 255), (200, 0))}[mode]
        image.putpixel((0, 0), opaque)
        image.putpixel((1, 0), clear)
        return image

    @pytest.mark.parametrize(("mode", "opaque"), [("RGBA", (200, 0, 0)), ("LA", (200, 200, 200))])
    def test_transparency_is_composited_on_white(self, mode, opaque):
        image = to_rgb(self.half_transparent(mode))
        assert image.mode == "RGB"
        assert [image.getpixel((x, 0)) for x in range(2)] == [opaque, (255, 255, 255)]

    @pytest.mark.parametrize("transparency", [0, bytes([0, 255])], ids=["index", "table"])
    def test_transparent_palette_colour_becomes_white(self, transparency):
        image = Image.new("P", (2, 1))
        image.putpalette([0, 0, 0, 10, 20, 30])
        image.putpixel((0, 0), 1)
        file = io.BytesIO()
        image.save(file, "PNG", transparency=transparency)
        rgb = decode_image(file.getvalue())
        assert [rgb.getpixel((x, 0)) for x in range(2)] == [(10, 20, 30), (255, 255, 255)]

    @pytest.mark.parametrize(
        ("mode", "value", "expected"),
        [
            ("L", 77, (77, 77, 77)),
            ("1", 1, (255, 255, 255)),
            ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
            ("I;16", 257 * 90, (90, 90, 90)),
        ],
    )
    def test_other_modes(self, mode, value, expected):
        assert to_rgb(Image.new(mode, (3, 2), value)).getpixel((1, 1)) == expected

    @pytest.mark.parametrize("mode", Image.MODES)
    def test_every_mode_keeps_white_and_black(self, mode):
        """A mode is in the table of docs/reliability.md, and what Pillow converts to it is what it was."""
        assert re.sub("[BLN]$", "", mode) in self.documented_modes() or mode in self.documented_modes()
        if mode == "LAB":
            return  # below
        routes = {"RGBa": ["RGBA"], "La": ["L", "LA"], "PA": ["P"]}
        for colour in ("white", "black"):
            image = Image.new("RGB", (2, 2), colour)
            if mode.startswith(("I", "F")):
                highest = 1 if mode == "F" else 65535
                dtype = {"F": "f4", "I": "i4", "I;16B": ">u2"}.get(mode, "<u2")
                values = np.full((2, 2), highest * (colour == "white"), dtype)
                image = Image.frombytes(mode, (2, 2), values.tobytes())
            else:
                for step in (*routes.get(mode, []), mode):
                    image = image.convert(step)
            assert image.mode == mode and to_rgb(image).getpixel((1, 1)) == (255 * (colour == "white"),) * 3

    def documented_modes(self):
        """The first column of the table of modes."""
        text = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
        table = text.partition("| mode of Pillow |")[2].partition("\n\n")[0]
        modes = [line.split("|")[1] for line in table.splitlines()[2:]]
        return re.findall(r"[\w;]+", " ".join(modes))

    @pytest.mark.parametrize(
        ("mode", "value", "expected"), [("F", 0.5, 128), ("F", 1.0, 255), ("I", 65535, 255), ("I;16B", 257 * 7, 7)]
    )
    def test_numbers_of_a_documented_range_are_scaled(self, mode, value, expected):
        values = np.full((2, 2), value, {"F": np.float32, "I": np.int32, "I;16B": ">u2"}[mode])
        image = Image.fromarray(values) if mode != "I;16B" else Image.frombytes(mode, (2, 2), values.tobytes())
        assert image.mode == mode and to_rgb(image).getpixel((1, 1)) == (expected,) * 3

    @pytest.mark.parametrize(
        ("mode", "value"), [("F", 300.0), ("F", float("nan")), ("F", -0.1), ("I", 65536), ("I", -1), ("LAB", None)]
    )
    def test_other_numbers_and_colour_spaces_are_corrupt(self, mode, value):
        dtype = np.float32 if mode == "F" else np.int32
        image = Image.new(mode, (2, 2)) if value is None else Image.fromarray(np.full((2, 2), value, dtype))
        with pytest.raises(CorruptRow, match=f"mode {mode}") as raised:
            to_rgb(image)
        assert raised.value.kind == "undecodable"

    def test_12_bits_are_scaled_from_their_own_range(self):
        tags = [(256, 3), (257, 2), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 2), (279, 10)]
        entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
        data = (b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries).ljust(122, b"\0")
        # Each row has 4095, 2048, 0, and four bits that fill up.
        grey = np.asarray(decode_image(data + 2 * bytes.fromhex("fff8000000")))[..., 0]
        assert grey.tolist() == [[255, 127, 0]] * 2

    def test_a_transparent_value_of_16_bits_becomes_white(self):
        values = np.array([[257, 514], [771, 257]], np.uint16)
        decoded = decode_image(encode(Image.fromarray(values), transparency=257))
        assert np.asarray(decoded)[..., 0].tolist() == [[255, 2], [3, 255]]

    def test_exif_orientation_is_applied(self):
        image = Image.new("RGB", (4, 2), "white")
        image.putpixel((0, 0), (0, 0, 0))
        exif = Image.Exif()
        exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise
        file = io.BytesIO()
        image.save(file, "PNG", exif=exif)
        upright = decode_image({"bytes": file.getvalue(), "path": None})
        assert upright.size == (2, 4)
        assert upright.getpixel((1, 0)) == (0, 0, 0)

    def test_paths_and_images_decode_too(self, tmp_path):
        Image.new("L", (3, 3), 9).save(tmp_path / "a.png")
        path = str(tmp_path / "a.png")
        for value in (path, {"bytes": None, "path": path}, Image.open(path)):
            assert decode_image(value).getpixel((0, 0)) == (9, 9, 9)

    @pytest.mark.parametrize("size", [(64, 64), (33, 40), (200, 70), (10, 12), (1, 1)])
    def test_center_crop_gives_the_size_from_any_size(self, size):
        assert center_crop(Image.new("RGB", size), 32).size == (32, 32)

    def test_center_crop_halves_with_a_box_filter(self):
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cropped = np.asarray(center_crop(Image.fromarray(pixels), 16)).astype(float)
        means = pixels.reshape(16, 4, 16, 4, 3).mean((1, 3))
        assert np.abs(cropped - means).max() <= 2  # rounded to 8 bit along each axis, twice

    def test_center_crop_takes_the_middle(self):
        image = Image.new("RGB", (96, 32), "white")
        image.paste("black", (32, 0, 64, 32))
        assert np.asarray(center_crop(image, 32)).max() == 0

    @pytest.mark.parametrize("size", [(20_000, 17), (17, 20_000)])
    def test_a_long_image_stays_small(self, size, monkeypatch):
        resize, sizes = Image.Image.resize, []

        def measured(image, size, *args, **kwargs):
            sizes.append(size)
            return resize(image, size, *args, **kwargs)

        monkeypatch.setattr(Image.Image, "resize", measured)
        image = Image.new("RGB", size)
        image.paste("white", (size[0] // 2 - 8, size[1] // 2 - 8, size[0] // 2 + 8, size[1] // 2 + 8))
        assert np.asarray(center_crop(image, 256))[120:136, 120:136].min() == 255
        assert random_crop(image, 256, np.random.default_rng(0)).size == (256, 256)
        assert max(width * height for width, height in sizes) <= 8 * 320 * 320


def test_lanczos_crop_is_the_centre_square_made_smaller():
    image = noise(100, 61)
    expected = image.crop((19, 0, 80, 61)).resize((32, 32), Image.Resampling.LANCZOS)
    assert lanczos_crop(image, 32).tobytes() == expected.tobytes() != center_crop(image, 32).tobytes()


class TestRandomCrop:
    def test_scale_and_place_vary_within_bounds(self):
        """Red and green are the coordinates: what a crop shows can be read off its corners."""
        ramp = np.linspace(0, 255, 96)
        pixels = np.stack([*np.meshgrid(ramp, ramp), np.zeros((96, 96))], -1).round().astype(np.uint8)
        image, random = Image.fromarray(pixels), np.random.default_rng(0)
        crops = np.stack([np.asarray(random_crop(image, 32, random)).astype(float) for _ in range(200)])
        spans = crops[:, 0, -1, 0] - crops[:, 0, 0, 0]  # of 255, over 31 of `shorter_side` pixels
        assert 255 * 31 / 40 - 3 <= spans.min() < 255 * 31 / 38 and 255 * 31 / 34 < spans.max() <= 255
        left, top = crops[:, 0, 0, 0], crops[:, 0, 0, 1]
        assert max(left.max(), top.max()) <= 255 * 8 / 40 + 4 and np.ptp(left) > 30 and np.ptp(top) > 30
        assert (left != top).mean() > 0.5

    def test_random_numbers_decide(self):
        image = noise(50, 40)
        first, again, other = (random_crop(image, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
        assert first.size == (32, 32) and first.tobytes() == again.tobytes() != other.tobytes()


class TestCorruption:
    @pytest.mark.parametrize("name", list(damaged_pictures()))
    @pytest.mark.parametrize("tolerant", [False, True])
    def test_kinds(self, name, tolerant, monkeypatch):
        monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)  # as some libraries leave it
        kind, data = damaged_pictures()[name]
        with pytest.raises(CorruptRow) as raised:
            decode_image({"bytes": data, "path": None}, min_side=16)
        assert raised.value.kind == kind
        assert ImageFile.LOAD_TRUNCATED_IMAGES is tolerant

    @pytest.mark.parametrize("format", ["JPEG", "WEBP", "PNG", "GIF", "BMP", "TIFF"])
    @pytest.mark.parametrize("share", [0.5, 0.9])
    def test_no_part_of_a_image_passes_for_a_whole_one(self, format, share):
        data = encode(noise(), format)
        with pytest.raises(CorruptRow) as raised:
            decode_image(data[: int(len(data) * share)])
        assert raised.value.kind == "truncated"

    def test_limits(self, monkeypatch):
        assert decode_image(encode(noise(20, 16)), min_side=16).size == (20, 16)
        with pytest.raises(CorruptRow, match="20 x 15 pixels, below 16"):
            decode_image(encode(noise(20, 15)), min_side=16)
        monkeypatch.setattr("hf_fae.data.decoding.MAX_PIXELS", 299)
        with pytest.raises(CorruptRow, match="20 x 15 pixels, above 299"):
            decode_image(encode(noise(20, 15)))

    def test_no_file(self, tmp_path):
        with pytest.raises(CorruptRow, match="No such file") as raised:
            decode_image(str(tmp_path / "absent.png"))
        assert raised.value.kind == "missing"

    def test_urls(self):
        import fsspec

        fsspec.filesystem("memory").pipe("/pictures/a.png", encode(noise()))
        image = decode_image({"bytes": None, "path": "memory://pictures/a.png"})
        assert image.tobytes() == noise().tobytes()

    @pytest.mark.parametrize("failures", [3, 4])
    def test_a_network_that_fails_now_and_then(self, monkeypatch, failures):
        """Three errors in a row are waited out; four are not."""
        import fsspec
        from fsspec.implementations.memory import MemoryFileSystem

        fsspec.filesystem("memory").pipe("/pictures/b.png", encode(noise()))
        opened, waited, open_file = [], [], MemoryFileSystem._open

        def open_shakily(*args, **kwargs):
            opened.append(0)
            if len(opened) <= failures:
                raise ConnectionResetError("reset by peer")
            return open_file(*args, **kwargs)

        monkeypatch.setattr(MemoryFileSystem, "_open", open_shakily)
        monkeypatch.setattr("hf_fae.data.reading.time.sleep", waited.append)
        if failures == 4:
            with pytest.raises(ConnectionResetError):
                decode_image("memory://pictures/b.png")
        else:
            assert decode_image("memory://pictures/b.png").tobytes() == noise().tobytes()
        assert waited == [1, 5, 25]

    @pytest.mark.parametrize("name", list(odd_pictures()))
    def test_odd_but_good(self, name):
        data, pixels = odd_pictures()[name]
        assert np.array_equal(np.asarray(decode_image(data, min_side=16)), pixels)


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (7, 7), (400, 3)], ids=str)
def test_pad_shows_the_whole_image_on_white(size):
    padded = np.asarray(pad_to_square(Image.new("RGB", size, "black"), 32))
    assert padded.shape == (32, 32, 3)
    rows, columns = ((padded.min(axis=(axis, 2)) < 255).sum() for axis in (1, 0))
    expected = [max(1, round(side * 32 / max(size))) for side in size]
    assert [columns, rows] == expected
    assert (padded == 255).all(axis=-1).sum() == 32 * 32 - expected[0] * expected[1]


def test_pad_composites_transparency_on_white():
    assert np.asarray(pad_to_square(to_rgb(Image.new("RGBA", (9, 5))), 16)).min() == 255
