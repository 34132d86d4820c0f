import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from hf_fae.training.data import DataArguments, ImageData, center_crop, decode_image, to_rgb


def numbers(batch):
    """Which synthetic pictures a batch holds."""
    red = batch["pixel_values"][:, 0, 0, 0]
    return ((red + 1) * 127.5 / 7).round().long().tolist()


def mirrored(batch):
    green = batch["pixel_values"][:, 1, 0]
    return (green[:, 0] > green[:, -1]).tolist()


def make_data(folder, seed=0, **kwargs):
    return ImageData(DataArguments(dataset_name=str(folder), resolution=32, **kwargs), seed)


def take(data, count, batch_size=8, **kwargs):
    return list(itertools.islice(data.batches(batch_size, **kwargs), count))


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

    def test_paths_and_pictures_decode_too(self, tmp_path):
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


class TestOrder:
    def test_an_epoch_has_every_picture_once_and_epochs_differ(self, image_folder):
        seen = [n for batch in take(make_data(image_folder), 8) for n in numbers(batch)]
        assert sorted(seen[:32]) == sorted(seen[32:]) == list(range(32))
        assert seen[:32] != seen[32:]

    def test_batches_may_span_epochs(self, image_folder):
        seen = [n for batch in take(make_data(image_folder), 7, batch_size=10) for n in numbers(batch)]
        assert sorted(seen[:32]) == sorted(seen[32:64]) == list(range(32))

    def test_pictures_are_in_range_and_half_of_them_mirrored(self, image_folder):
        batches = take(make_data(image_folder), 16)
        assert batches[0]["pixel_values"].shape == (8, 3, 32, 32)
        assert batches[0]["pixel_values"].dtype == torch.float32
        assert batches[0]["pixel_values"].min() >= -1 and batches[0]["pixel_values"].max() == 1
        assert 40 < sum(flip for batch in batches for flip in mirrored(batch)) < 88
        assert not any(mirrored(batch) != [False] * 8 for batch in take(make_data(image_folder, random_flip=False), 4))

    def test_seed_decides(self, image_folder):
        first, again, other = (take(make_data(image_folder, seed), 2)[0] for seed in (1, 1, 2))
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        assert numbers(first) != numbers(other)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_going_on_equals_never_having_stopped(self, image_folder, num_workers):
        data = make_data(image_folder)
        whole = take(data, 6)
        rest = take(data, 4, images_seen=16, num_workers=num_workers)
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(whole[2:], rest, strict=True))

    def test_ranks_side_by_side_are_one_process_with_larger_batches(self, image_folder):
        data = make_data(image_folder)
        whole = take(data, 3, batch_size=8)
        ranks = [take(data, 3, batch_size=4, rank=rank, world_size=2) for rank in range(2)]
        for step in range(3):
            together = torch.cat([batches[step]["pixel_values"] for batches in ranks])
            assert torch.equal(whole[step]["pixel_values"], together)

    def test_starting_a_loader_draws_no_random_numbers(self, image_folder):
        state = torch.get_rng_state()
        take(make_data(image_folder), 2)
        assert torch.equal(state, torch.get_rng_state())

    def test_max_train_samples(self, image_folder):
        data = make_data(image_folder, max_train_samples=5)
        assert len(data) == 5
        assert len({n for batch in take(data, 4) for n in numbers(batch)}) == 5


class TestStreaming:
    def test_an_epoch_has_every_picture_once_and_is_shuffled(self, parquet_folder):
        seen = [
            n for batch in take(make_data(parquet_folder, streaming=True, shuffle_block=16), 8) for n in numbers(batch)
        ]
        assert sorted(seen[:32]) == sorted(seen[32:]) == list(range(32))
        assert seen[:32] != seen[32:] != list(range(32))
        assert set(seen[:16]) == set(range(16))  # within a block of 16

    # 4 shards: 2 readers have whole shards, 3 readers every third row
    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 2)])
    def test_readers_share_the_rows(self, parquet_folder, world_size, num_workers):
        data = make_data(parquet_folder, streaming=True)
        seen = []
        for rank in range(world_size):
            batches = take(data, 32 // world_size // 2, 2, rank=rank, world_size=world_size, num_workers=num_workers)
            seen += [n for batch in batches for n in numbers(batch)]
        assert len(seen) == len(set(seen))

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_going_on_equals_never_having_stopped_twice_in_a_row(self, parquet_folder, num_workers):
        data = make_data(parquet_folder, streaming=True, shuffle_block=8)
        whole = take(data, 17, batch_size=5, num_workers=num_workers)
        for done in (3, 8, 15):  # in the first, the second and the third epoch
            rest = take(data, 17 - done, batch_size=5, images_seen=5 * done, num_workers=num_workers)
            assert [numbers(batch) for batch in rest] == [numbers(batch) for batch in whole[done:]]
            assert all(
                torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(rest, whole[done:], strict=True)
            )

    def test_more_readers_than_rows(self, parquet_folder):
        data = make_data(parquet_folder, streaming=True, max_train_samples=2)
        with pytest.raises(ValueError, match="has no rows for reader 2: use fewer workers"):
            take(data, 1, rank=2, world_size=3)


class TestLabels:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_folder_names_strings_and_numbers(self, image_folder, parquet_folder, streaming):
        kinds = {0: "circle", 1: "cross", 2: "dot", 3: "ring"}
        for folder, column, names in (
            (image_folder, "label", kinds),
            (parquet_folder, "kind", kinds),
            (parquet_folder, "number", {0: "0", 1: "10", 2: "20", 3: "30"}),
        ):
            data = make_data(folder, label_column=column, streaming=streaming)
            assert data.id2label == names
            batch = take(data, 1)[0]
            assert batch["class_labels"].dtype == torch.long
            assert batch["class_labels"].tolist() == [n % 4 for n in numbers(batch)]

    def test_label_that_training_does_not_know(self, parquet_folder):
        data = make_data(parquet_folder, label_column="kind", max_train_samples=2)
        assert data.id2label == {0: "circle", 1: "cross"}
        with pytest.raises(ValueError, match="'dot', which is none of the 2 classes of split 'train'"):
            list(data.validation_batches(4))

    @pytest.mark.parametrize("name", ["image_column", "label_column"])
    def test_missing_column(self, parquet_folder, name):
        with pytest.raises(ValueError, match="has no column 'picture'; its columns are"):
            make_data(parquet_folder, **{name: "picture"})


class TestValidation:
    @pytest.mark.parametrize("streaming", [False, True])
    def test_fixed_and_unmirrored_with_a_smaller_last_batch(self, parquet_folder, streaming):
        data = make_data(parquet_folder, streaming=streaming)
        batches = [list(data.validation_batches(3)) for _ in range(2)]
        assert [numbers(batch) for batch in batches[0]] == [[32, 33, 34], [35]]
        assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(*batches, strict=True))
        assert not any(itertools.chain(*map(mirrored, batches[0])))

    def test_limit_is_a_random_choice(self, image_folder):
        data = make_data(image_folder, validation_split="train", max_validation_samples=6)
        chosen = [n for batch in data.validation_batches(4) for n in numbers(batch)]
        assert len(chosen) == 6 and chosen != list(range(6))
