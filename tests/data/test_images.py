import io
import itertools
import json
import shutil
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from damaged import NUM_ROWS, bomb, damaged_rows, encode, noise, odd_pictures

from hf_fae.data.corrupt import BROKEN_SHARD, CORRUPTION_KINDS, MISSING, UNSAFE, CorruptionReport
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.splits import find_splits


def numbers(batch):
    """Which synthetic images a batch holds."""
    red = batch["pixel_values"][:, 0, 0, 0]
    return ((red + 1) * 127.5 / 7).round().long().tolist()


def mirrored(batch):
    green = batch["pixel_values"][:, 1, 0]
    return (green[:, 0] > green[:, -1]).tolist()


def make_data(folder, seed=0, **kwargs):
    return ImageData(DataArguments(dataset_name=str(folder), resolution=32, **kwargs), seed)


def take(data, count, batch_size=8, **kwargs):
    return list(itertools.islice(data.batches(batch_size, **kwargs), count))


class TestOrder:
    def test_an_epoch_has_every_image_once_and_epochs_differ(self, image_folder):
        seen = [n for batch in take(make_data(image_folder), 8) for n in numbers(batch)]
        assert sorted(seen[:32]) == sorted(seen[32:]) == list(range(32))
        assert seen[:32] != seen[32:]

    def test_batches_may_span_epochs(self, image_folder):
        seen = [n for batch in take(make_data(image_folder), 7, batch_size=10) for n in numbers(batch)]
        assert sorted(seen[:32]) == sorted(seen[32:64]) == list(range(32))

    def test_images_are_in_range_and_half_of_them_mirrored(self, image_folder):
        batches = take(make_data(image_folder), 16)
        assert batches[0]["pixel_values"].shape == (8, 3, 32, 32)
        assert batches[0]["pixel_values"].dtype == torch.float32
        assert batches[0]["pixel_values"].min() >= -1 and batches[0]["pixel_values"].max() == 1
        assert 40 < sum(flip for batch in batches for flip in mirrored(batch)) < 88
        assert not any(mirrored(batch) != [False] * 8 for batch in take(make_data(image_folder, random_flip=False), 4))

    def test_balanced_epochs_have_one_row_of_each_value(self, parquet_folder):
        data = make_data(parquet_folder, balance_column="number", label_column="kind")
        assert [sorted(rows.tolist()) for rows in data.groups] == [list(range(k, 32, 4)) for k in range(4)]
        epochs = [batch["row_ids"].tolist() for batch in take(data, 40, batch_size=4)]
        assert all(sorted(row % 4 for row in epoch) == [0, 1, 2, 3] for epoch in epochs)
        assert {row for epoch in epochs for row in epoch} == set(range(32))  # in time all have their turn
        assert epochs[2:] == [batch["row_ids"].tolist() for batch in take(data, 38, batch_size=4, images_seen=8)]
        flips = [flip for batch in take(data, 40, batch_size=4) for flip in mirrored(batch)]
        assert 50 < sum(flips) < 110
        assert data.signature(4) != make_data(parquet_folder).signature(4)
        assert "32 rows (4 of them in an epoch)" in data.describe()

    def test_batches_tell_what_is_mirrored(self, image_folder):
        for batch in take(make_data(image_folder), 4):
            assert batch["mirrored"].tolist() == mirrored(batch)
        assert not take(make_data(image_folder, random_flip=False), 1)[0]["mirrored"].any()

    def test_balance_of_streamed_data(self, parquet_folder):
        with pytest.raises(ValueError, match="balance_column must be None for streamed data, got 'number'"):
            make_data(parquet_folder, balance_column="number", streaming=True)

    def test_seed_decides(self, image_folder):
        first, again, other = (take(make_data(image_folder, seed), 2)[0] for seed in (1, 1, 2))
        assert torch.equal(first["pixel_values"], again["pixel_values"])
        assert numbers(first) != numbers(other)

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_continuing_equals_never_having_stopped(self, image_folder, num_workers):
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
    def test_an_epoch_has_every_image_once_and_is_shuffled(self, parquet_folder):
        seen = [
            n for batch in take(make_data(parquet_folder, streaming=True, shuffle_block=16), 8) for n in numbers(batch)
        ]
        assert sorted(seen[:32]) == sorted(seen[32:]) == list(range(32))
        assert seen[:32] != seen[32:] != list(range(32))
        shards = [{n // 8 for n in seen[start : start + 16]} for start in range(0, 64, 16)]  # a block has 2 shards
        assert all(len(pair) == 2 for pair in shards)
        assert shards[0] | shards[1] == shards[2] | shards[3] == set(range(4))

    def test_shards_come_in_another_order_in_every_epoch(self, parquet_folder):
        batches = take(make_data(parquet_folder, streaming=True, shuffle_block=8), 24)
        assert all(len({n // 8 for n in numbers(batch)}) == 1 for batch in batches)
        orders = [tuple(numbers(batch)[0] // 8 for batch in batches[epoch : epoch + 4]) for epoch in range(0, 24, 4)]
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders) and len(set(orders)) > 2

    def test_row_ids_name_shard_and_row(self, parquet_folder):
        data = make_data(parquet_folder, streaming=True)
        for rank, world_size in ((0, 1), (2, 3)):
            for batch in take(data, 5, rank=rank, world_size=world_size):
                shards, rows = np.divmod(batch["row_ids"].numpy(), 10**9)
                assert (8 * shards + rows).tolist() == numbers(batch)

    def test_the_first_rows_do_not_depend_on_the_readers(self, parquet_folder):
        data = make_data(parquet_folder, streaming=True, max_train_samples=10)
        ranks = [take(data, 5, 1, rank=rank, world_size=2) for rank in range(2)]
        assert {n for batches in ranks for batch in batches for n in numbers(batch)} == set(range(10))

    def test_resuming_does_not_decode(self, parquet_folder, monkeypatch):
        data, decoded = make_data(parquet_folder, streaming=True), []
        make = data.example
        monkeypatch.setattr(data, "example", lambda row, random: decoded.append(0) or make(row, random))
        take(data, 1, 8, images_seen=40)
        assert len(decoded) == 8

    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_continuing_equals_never_having_stopped_twice_in_a_row(self, parquet_folder, num_workers):
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


class TestLedger:
    """Which rows are read over two epochs of a run that is stopped and resumed twice."""

    @staticmethod
    def row_ids(data, rank, world_size, num_workers):
        """Row ids of the batches of 4 of one rank."""
        steps = [0, 1, 4, 16 // world_size + 3]
        batches = []
        for start, stop in itertools.pairwise(steps):
            place = {"images_seen": start * 4 * world_size, "rank": rank, "world_size": world_size}
            batches += take(data, stop - start, 4, **place, num_workers=num_workers)
        return [batch["row_ids"].tolist() for batch in batches]

    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (2, 2)])
    def test_indexed(self, parquet_folder, world_size, num_workers):
        data = make_data(parquet_folder)
        ranks = [self.row_ids(data, rank, world_size, num_workers) for rank in range(world_size)]
        rows = [row for step in zip(*ranks, strict=True) for batch in step for row in batch]
        assert sorted(rows[:32]) == sorted(rows[32:64]) == list(range(32))

    # 2 readers have 2 of the 4 shards each, of 3 one has 2 shards, 6 readers have every third row of 2 shards
    @pytest.mark.parametrize(("world_size", "num_workers"), [(1, 0), (2, 0), (3, 0), (1, 2), (3, 2)])
    def test_streamed(self, parquet_folder, world_size, num_workers):
        data = make_data(parquet_folder, streaming=True, shuffle_block=4)
        workers, readers = max(1, num_workers), []
        for rank in range(world_size):
            batches = self.row_ids(data, rank, world_size, num_workers)
            readers += [list(itertools.chain(*batches[worker::workers])) for worker in range(workers)]
        lengths = {1: [32], 2: [16, 16], 3: [16, 8, 8], 6: [6, 6, 5, 5, 5, 5]}[len(readers)]
        everything = [shard * 10**9 + row for shard in range(4) for row in range(8)]
        for epoch in range(2):
            parts = [rows[epoch * n : epoch * n + n] for rows, n in zip(readers, lengths, strict=True)]
            assert sorted(itertools.chain(*parts)) == everything


def damaged_ids(streaming):
    """Row id -> kind."""
    _, kinds = damaged_rows()
    return {row // 70 * 10**9 + row % 70 if streaming else row: kind for row, kind in kinds.items()}


class TestCorruptRows:
    COLUMNS = {"label_column": "label", "caption_column": "caption"}

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("num_workers", [0, 2])
    def test_an_epoch_has_full_batches_and_reports_every_corrupt_row(self, damaged_parquet, streaming, num_workers):
        data = make_data(damaged_parquet, streaming=streaming, shuffle_block=32, **self.COLUMNS)
        self.check_epoch(streaming, take(data, NUM_ROWS // 10, 10, num_workers=num_workers))

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("caption", ["txt", "json.caption"])
    def test_webdataset(self, damaged_webdataset, streaming, caption):
        columns = {"image_column": "jpg", "label_column": "cls", "caption_column": caption, "num_classes": 4}
        data = make_data(damaged_webdataset, streaming=streaming, **columns)
        assert data.id2label == {0: "0", 1: "1", 2: "2", 3: "3"}
        self.check_epoch(streaming, take(data, NUM_ROWS // 10, 10))

    def check_epoch(self, streaming, batches):
        rows, _ = damaged_rows()
        kinds, report, used = damaged_ids(streaming), CorruptionReport(), []
        for batch in batches:
            assert batch["pixel_values"].shape == (10, 3, 32, 32) and batch["class_labels"].shape == (10,)
            used += batch["row_ids"].tolist()
            report.add(batch["corrupt"])
            for row_id, label, caption in zip(
                batch["row_ids"].tolist(), batch["class_labels"].tolist(), batch["captions"], strict=True
            ):
                row = rows[row_id // 10**9 * 70 + row_id % 10**9]
                assert (label, caption) == (row["label"], row["caption"])
        assert report.counts() == Counter(kinds.values())
        assert {*report.counts(), BROKEN_SHARD, MISSING, UNSAFE} == set(CORRUPTION_KINDS)
        assert {row for ids in report.state().values() for row in ids} == set(kinds)
        assert not set(used) & set(kinds)
        good = {row // 70 * 10**9 + row % 70 if streaming else row for row in range(NUM_ROWS)} - set(kinds)
        assert set(used) == good

    def test_odd_images_come_out_right(self, damaged_parquet):
        data = make_data(damaged_parquet, random_flip=False, **self.COLUMNS)
        rows, _ = damaged_rows()
        numbers = {row["image"]: number for number, row in enumerate(rows)}
        odd = {numbers[image]: pixels for image, pixels in odd_pictures().values()}
        found = 0
        for batch in take(data, NUM_ROWS // 10, 10):
            for pixels, row_id in zip(batch["pixel_values"], batch["row_ids"].tolist(), strict=True):
                if row_id in odd:
                    found += 1
                    assert torch.equal(pixels, torch.tensor(odd[row_id].copy()).permute(2, 0, 1) / 127.5 - 1)
        assert found >= len(odd)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_resuming_is_exact(self, damaged_parquet, streaming):
        data = make_data(damaged_parquet, streaming=streaming, shuffle_block=16, crop="random", **self.COLUMNS)
        whole = take(data, 32, 10)  # more than an epoch
        for done in (20, 30):
            for expected, batch in zip(whole[done:], take(data, 32 - done, 10, images_seen=10 * done), strict=True):
                assert torch.equal(expected["pixel_values"], batch["pixel_values"])
                assert torch.equal(expected["row_ids"], batch["row_ids"])
                assert expected["corrupt"] == batch["corrupt"]

    def test_all_other_places_stay(self, damaged_parquet):
        """With the columns whose damage is looked for, more rows are replaced; the others are where they were."""
        few, many = (
            [row for batch in take(make_data(damaged_parquet, **columns), 28, 10) for row in batch["row_ids"].tolist()]
            for columns in ({}, self.COLUMNS)
        )
        moved = [a for a, b in zip(few, many, strict=True) if a != b]
        kinds = damaged_ids(streaming=False)
        assert moved and all(kinds.get(row) in ("no_caption", "bad_label") for row in moved)

    @pytest.mark.parametrize("streaming", [False, True])
    def test_image_folder(self, tmp_path, streaming):
        for number in range(20):
            (tmp_path / "train" / "ab"[number % 2]).mkdir(parents=True, exist_ok=True)
            noise(seed=number).save(tmp_path / "train" / "ab"[number % 2] / f"{number:02d}.png")
        (tmp_path / "train/a/02.png").write_bytes(b"")
        (tmp_path / "train/b/03.png").write_text("Not found")
        (tmp_path / "train/b/05.png").write_bytes(encode(noise())[:1000])
        data = make_data(tmp_path, streaming=streaming, label_column="label", validation_split="train")
        report = CorruptionReport()
        for batch in take(data, 4, 5):
            report.add(batch["corrupt"])
        assert report.counts() == {"empty": 1, "undecodable": 1, "truncated": 1}
        assert sum(len(batch["row_ids"]) for batch in data.validation_batches(4)) == 17
        assert data.corrupt_validation_rows.counts() == report.counts()

    @pytest.mark.parametrize("streaming", [False, True])
    def test_validation_leaves_damaged_rows_out(self, damaged_parquet, streaming):
        data = make_data(damaged_parquet, streaming=streaming, **self.COLUMNS)
        batches = list(data.validation_batches(10))
        kinds = {row - 210: kind for row, kind in damaged_ids(streaming=False).items() if row >= 210}
        used = [row for batch in batches for row in batch["row_ids"].tolist()]
        assert kinds and used == [row for row in range(70) if row not in kinds]
        assert data.corrupt_validation_rows.counts() == Counter(kinds.values())
        assert all("corrupt" not in batch for batch in batches)

    def write(self, folder, pictures, split="train"):
        from datasets import Dataset, Features
        from datasets import Image as ImageFeature

        features = Features({"image": ImageFeature()})
        Dataset.from_dict({"image": pictures}, features=features).to_parquet(folder / f"{split}.parquet")
        return folder

    def test_a_block_that_is_all_corrupt(self, tmp_path):
        """Its rows are replaced by earlier ones, the same ones after a restart in a later epoch."""
        good = [encode(noise(seed=number)) for number in range(12)]
        data = make_data(self.write(tmp_path, good + [b""] * 4), streaming=True, shuffle_block=4)
        whole = take(data, 12, 4)
        for number, batch in enumerate(whole):
            damaged = {row for row, _ in batch["corrupt"]}
            assert damaged == ({12, 13, 14, 15} if number % 4 == 3 else set())
        for batch, again in zip(whole[6:], take(data, 6, 4, images_seen=24), strict=True):
            assert torch.equal(batch["row_ids"], again["row_ids"]) and batch["row_ids"].max() < 12

    @pytest.mark.parametrize("streaming", [False, True])
    def test_giving_up(self, tmp_path, streaming):
        data = make_data(self.write(tmp_path, [b"", b"text", bomb(30_000, 30_000)]), streaming=streaming)
        with pytest.raises(ValueError, match=r"100 rows.*corrupt: 1 empty.*; 1 undecodable \(rows 1\); 1 too_large"):
            take(data, 1, 1)

    def test_no_validation_row_left(self, tmp_path):
        self.write(tmp_path, [b""], "validation")
        data = make_data(self.write(tmp_path, [encode(noise())]))
        with pytest.raises(ValueError, match=r"validation_split='validation' has no row .*: 1 empty \(rows 0\)"):
            next(data.validation_batches(4))


class TestBrokenShards:
    """Of 4 shards the second one breaks off."""

    @pytest.fixture
    def parquet(self, tmp_path, parquet_folder):
        shutil.copytree(parquet_folder, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "train-00001-of-00004.parquet"
        path.write_bytes(path.read_bytes()[:-100])
        return tmp_path

    @pytest.fixture
    def webdataset(self, tmp_path, damaged_webdataset):
        shutil.copytree(damaged_webdataset, tmp_path, dirs_exist_ok=True)
        path = tmp_path / "train-0001.tar"
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 700])
        shutil.copy(path, tmp_path / "validation-0001.tar")
        return tmp_path

    def test_parquet(self, parquet):
        data, report = make_data(parquet, streaming=True), CorruptionReport()
        batches = take(data, 6)
        for batch in batches:
            report.add(batch["corrupt"])
        assert report.state() == {"broken_shard": [10**9]}
        assert sorted(n for batch in batches[:3] for n in numbers(batch)) == [*range(8), *range(16, 32)]
        assert [numbers(batch) for batch in take(data, 2, images_seen=32)] == [numbers(batch) for batch in batches[4:]]

    def test_tar(self, webdataset):
        data, report, rows = make_data(webdataset, streaming=True, image_column="jpg"), CorruptionReport(), set()
        for batch in take(data, 30, num_workers=1):
            report.add(batch["corrupt"])
            rows |= set(batch["row_ids"].tolist())
        (broken,) = report.state()["broken_shard"]
        assert 10**9 + 20 < broken < 10**9 + 60
        assert max(row for row in rows if row < 2 * 10**9) == broken - 1 and max(rows) > 3 * 10**9
        validated = [row for batch in data.validation_batches(10) for row in batch["row_ids"].tolist()]
        assert max(validated) == broken - 10**9 - 1
        assert data.corrupt_validation_rows.state()["broken_shard"] == [broken - 10**9]

    def test_labels_of_the_others_are_read(self, parquet):
        data = make_data(parquet, streaming=True, label_column="kind")
        assert len(data.id2label) == 4

    def test_nothing_left(self, parquet):
        data = make_data(parquet, streaming=True)
        with pytest.raises(ValueError, match=r"no rows for reader 1: its shards are broken: 1 broken_shard"):
            take(data, 1, rank=1, world_size=4)


class TestSharing:
    @pytest.mark.parametrize("world_size", [1, 2, 3, 4])
    def test_no_shard_is_read_twice(self, parquet_folder, world_size):
        data = make_data(parquet_folder, streaming=True)
        for rank in range(world_size):
            batches = take(data, 8, rank=rank, world_size=world_size)
            shards = {row // 10**9 for batch in batches for row in batch["row_ids"].tolist()}
            assert shards == set(range(rank, 4, world_size))


class TestFolders:
    """Of images in a local folder: what is the train split, whatever files and folders are called."""

    def write(self, root, *names):
        for number, name in enumerate(names):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            noise(seed=number).save(root / name)
        return root

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("name", ["steam-train-1.png", "dog_test_1.png", "train.png", "val-1.png"])
    def test_words_in_file_names_mean_nothing(self, tmp_path, streaming, name):
        self.write(tmp_path, *(f"IMG_{number:04d}.png" for number in range(9)), name)
        data = make_data(tmp_path, streaming=streaming, validation_split="train")
        assert len({row for batch in take(data, 2, 5) for row in batch["row_ids"].tolist()}) == 10

    @pytest.mark.parametrize("other", ["train", "test", "val 1"])
    def test_classes_named_like_splits(self, tmp_path, other):
        self.write(tmp_path, *(f"{name}/{number}.png" for name in ("dog", other) for number in range(3)))
        data = make_data(tmp_path, label_column="label")
        assert len(data) == 6 and data.id2label == {0: "dog", 1: other}

    @pytest.mark.parametrize("above", ["", "pictures/", "a[1]/b/"])
    def test_folders_that_are_splits(self, tmp_path, above):
        for split, count in {"Train": 4, "val_images": 3, "test": 2}.items():
            for name in ("test", "ant"):
                self.write(tmp_path, *(f"{above}{split}/{name}/train-{number}.png" for number in range(count)))
        data = make_data(tmp_path, label_column="label")
        assert len(data) == 8 and data.id2label == {0: "ant", 1: "test"}
        assert len(data.rows("validation")[1]) == 6
        assert len(make_data(tmp_path, train_split="test")) == 4
        if not above:
            self.write(tmp_path, "preview.png")
            assert len(make_data(tmp_path)) == 8

    def test_one_folder_or_none(self, tmp_path):
        assert len(make_data(self.write(tmp_path / "a", "cat/test.png", "cat/train.png"))) == 2
        assert len(make_data(self.write(tmp_path / "b", "train/1.png", "train/2.png"))) == 2
        with pytest.raises(ValueError, match="no split 'train', only validation: add it"):
            make_data(self.write(tmp_path / "c", "1.png", "validation/2.png"))

    def test_unclear(self, tmp_path):
        self.write(tmp_path, "train/1.png", "validation/2.png", "extra/3.png")
        with pytest.raises(ValueError, match="like splits, train, validation, and others, extra: remove the others"):
            make_data(tmp_path)

    def test_data_files_and_readmes_decide_themselves(self, tmp_path, parquet_folder, damaged_webdataset):
        for folder in (parquet_folder, damaged_webdataset, "user/name"):
            assert find_splits(str(folder)) is None
        self.write(tmp_path, "x/1.png", "x/2.png", "y/3.png")
        readme = "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: x/*\n---\n"
        (tmp_path / "README.md").write_text(readme)
        assert len(make_data(tmp_path)) == 2

    def test_captions_beside_images(self, tmp_path):
        self.write(tmp_path, "train_1.png", "2.png")
        lines = [{"file_name": name, "text": name[:-4]} for name in ("train_1.png", "2.png")]
        (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
        data = make_data(tmp_path, caption_column="text")
        assert sorted(take(data, 1, 2)[0]["captions"]) == ["2", "train_1"]


class TestDescription:
    def test_indexed(self, image_folder):
        text = make_data(image_folder, label_column="label", max_train_samples=20).describe()
        assert text == f"20 rows in 4 classes of '{image_folder}' (train); validation: 4 rows of validation"

    def test_streamed(self, parquet_folder):
        data = make_data(parquet_folder, streaming=True, validation_split="train", max_validation_samples=5)
        text = f"4 streamed shards of '{parquet_folder}' (train); validation: the first 5 rows of train"
        assert data.describe() == text


class TestSignature:
    def test_indexed_is_of_the_rows_alone(self, image_folder):
        data, fewer = make_data(image_folder), make_data(image_folder, max_train_samples=31)
        assert data.signature(8, 2, 4) == data.signature(4) == {"rows": 32, "split": "train", "seed": 0}
        assert data.signature(8) != fewer.signature(8)
        assert data.signature(8) != make_data(image_folder, seed=1).signature(8)

    def test_streamed_is_of_the_readers_too(self, parquet_folder):
        data = make_data(parquet_folder, streaming=True)
        signature = data.signature(8, 2, 3)
        assert json.loads(json.dumps(signature)) == signature
        for other in (data.signature(4, 2, 3), data.signature(8, 3, 3), data.signature(8, 2, 2)):
            assert len(other.items() - signature.items()) == 1
        assert data.signature(8, 1, 0) == data.signature(8, 1, 1)
        other = make_data(parquet_folder, streaming=True, shuffle_block=4).signature(8, 2, 3)
        assert other.items() - signature.items() == {("shuffle_block", 4)}


class TestCrop:
    def test_random_crops_are_of_training_only(self, damaged_parquet):
        center, random = (
            make_data(damaged_parquet, crop=crop, random_flip=False, validation_split="train[:4]")
            for crop in ("center", "random")
        )
        a, b = take(center, 1)[0], take(random, 1)[0]
        assert torch.equal(a["row_ids"], b["row_ids"]) and not torch.equal(a["pixel_values"], b["pixel_values"])
        a, b = next(center.validation_batches(4)), next(random.validation_batches(4))
        assert torch.equal(a["pixel_values"], b["pixel_values"])


class TestArguments:
    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("crop", "corner", "crop must be 'center', 'random', 'lanczos' or 'pad', got 'corner'"),
            ("min_image_side", 0, "min_image_side must be at least 1, got 0"),
            ("max_train_samples", 0, "max_train_samples must be at least 1, got 0"),
            ("num_classes", 5, "num_classes=5, but column 'label' has 4 classes"),
        ],
    )
    def test_out_of_range(self, image_folder, name, value, message):
        with pytest.raises(ValueError, match=message):
            make_data(image_folder, label_column="label", **{name: value})


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
        assert [numbers(batch) for batch in data.validation_batches(4)] == [[32, 33]]
        assert data.corrupt_validation_rows.state() == {"bad_label": [2, 3]}

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("num_classes", [None, 3])
    def test_lists(self, tmp_path, streaming, num_classes):
        from datasets import Dataset

        columns = {"image": [{"bytes": encode(noise()), "path": None}] * 2, "tags": [[0], [1, 2]]}
        Dataset.from_dict(columns).to_parquet(tmp_path / "train.parquet")
        with pytest.raises(ValueError, match="label_column must hold one value per row, but 'tags' holds"):
            make_data(tmp_path, label_column="tags", streaming=streaming, num_classes=num_classes)

    @pytest.mark.parametrize("name", ["image_column", "label_column", "caption_column"])
    def test_missing_column(self, parquet_folder, name):
        with pytest.raises(ValueError, match="has no column 'picture'; its columns are"):
            make_data(parquet_folder, **{name: "picture"})


class TestCaptionFields:
    """Several captions of a image in one WebDataset file: files with extensions of their own, and fields of JSON."""

    @pytest.fixture
    def shards(self, tmp_path):
        for split, numbers in (("train", range(6)), ("validation", range(2))):
            with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as tar:
                for number in numbers:
                    meta = {"status": "success", "error_message": None, "llava": f"long {number}"}
                    files = {
                        "jpg": encode(noise(seed=number)),
                        "blip.txt": b"short",
                        "json": json.dumps(meta).encode(),
                    }
                    for extension, data in files.items():
                        member = tarfile.TarInfo(f"{number:04d}.{extension}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        return tmp_path

    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("column", ["blip.txt", "json.llava"])
    def test_by_name(self, shards, streaming, column):
        data = make_data(shards, streaming=streaming, image_column="jpg", caption_column=column)
        (batch,) = take(data, 1, 6)
        numbers = [row % 10**9 for row in batch["row_ids"].tolist()]
        assert batch["captions"] == ["short" if column == "blip.txt" else f"long {number}" for number in numbers]

    def read_with(self, shards, text):
        """A batch of the six rows and of a seventh one with this JSON."""
        with tarfile.open(shards / "train-0000.tar", "a") as tar:
            for extension, data in {"jpg": encode(noise()), "json": text.encode()}.items():
                member = tarfile.TarInfo(f"0006.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        data = make_data(shards, streaming=True, image_column="jpg", caption_column="json.llava")
        return take(data, 1, 7)[0]

    def test_json_of_another_form_ends_a_shard(self, shards):
        assert (6, BROKEN_SHARD) in self.read_with(shards, "[1, 2]")["corrupt"]

    def test_half_a_surrogate_pair_is_replaced(self, shards):
        assert "a bear ?" in self.read_with(shards, json.dumps({"llava": "a bear \ud83d"}))["captions"]

    @pytest.mark.parametrize(
        ("column", "message"),
        [
            ("json.blip", "no field 'json.blip'; the fields of 'json' are .'status', 'error_message', 'llava'.$"),
            ("jpg.llava", "no field 'jpg.llava'; the fields of 'jpg' are ..$"),
            ("llava.txt", "no column 'llava.txt'; its columns are .'jpg', 'blip.txt', 'json'"),
        ],
    )
    def test_missing(self, shards, column, message):
        with pytest.raises(ValueError, match=message):
            make_data(shards, streaming=True, image_column="jpg", caption_column=column)


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
