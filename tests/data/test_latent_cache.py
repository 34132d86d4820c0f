"""The cache of latents: what it holds, how it is resumed and shared, and how training reads it."""

import io
import itertools
import json
import math
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from accelerate import Accelerator
from factories import tiny_detok, tiny_drorae, tiny_fae, tiny_identity_fae, tiny_maetok, tiny_raev2
from PIL import Image

from hf_fae import AutoencoderFAE
from hf_fae.autoencoders.initialization import load_trained_fae
from hf_fae.data.captions import load_caption_encoder
from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents, is_latent_cache, tokenizer_fingerprint
from hf_fae.data.opening import latent_sample_size
from hf_fae.latents import normalized_posterior


SCRIPTS = Path(__file__).parents[2] / "training_scripts"
CONFIGS = Path(__file__).parents[1] / "configs"
CONFIG = str(CONFIGS / "smoke_cache_latents.yaml")


@pytest.fixture(scope="module")
def fae(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fae")
    tiny_fae().save_pretrained(folder)
    return folder


def make_data(dataset, seed=0, **kwargs):
    return ImageData(DataArguments(dataset_name=str(dataset), resolution=32, **kwargs), seed)


def encode(folder, fae, data, **kwargs):
    sizes = {"batch_size": 4, "rows_per_shard": 10, **kwargs}
    vae = load_trained_fae(str(fae), None, 32)
    return encode_dataset(folder, vae, data, Accelerator(cpu=True), source="x", **sizes)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, fae, image_folder):
    folder = tmp_path_factory.mktemp("latents")
    encode(folder, fae, make_data(image_folder, label_column="label"))
    return folder


def direct_moments(vae, pixel_values):
    """What the tokenizer says of images, taken back to the unnormalised scale."""
    with torch.no_grad():
        posterior = vae.encode(pixel_values).latent_dist
    mean = posterior.mean * vae.latents_std + vae.latents_mean
    return torch.cat([mean, posterior.logvar + 2 * vae.latents_std.log()], dim=1)


def take(data, count, batch_size=8, **kwargs):
    return list(itertools.islice(data.batches(batch_size, **kwargs), count))


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) if torch.is_tensor(first[name]) else first[name] == second[name]
        for name in first
    )


def shard_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.parquet"))}


@pytest.mark.parametrize("make, size", [(tiny_detok, [4, 4]), (tiny_maetok, [1, 6])])
def test_tokenizers_without_a_frozen_encoder(make, size, tmp_path, image_folder):
    vae, data = make(), make_data(image_folder, label_column="label", random_flip=False)
    pixels = torch.stack([data.example(data.train[row])["pixel_values"] for row in range(8)])
    expected = direct_moments(vae, pixels)
    encode_dataset(tmp_path, vae, data, Accelerator(cpu=True), source="x", batch_size=8)
    latents = CachedLatents(tmp_path, random_flip=False)
    stored = latents.read(latents.train, list(range(8)), [False] * 8)["moments"]
    assert list(latents.shape) == [8, *size]
    mean, expected_mean = stored.chunk(2, dim=1)[0], expected.chunk(2, dim=1)[0]
    torch.testing.assert_close(mean, expected_mean, rtol=2**-10, atol=1e-4)
    tokenizer = latents.load_tokenizer(None)
    assert type(tokenizer) is type(vae)
    latents.check_tokenizer(tokenizer)
    sides = latent_sample_size(latents, tokenizer)
    assert sides == latent_sample_size(data, tokenizer) == (4 if size == [4, 4] else size)
    posterior = normalized_posterior(
        latents.read(latents.train, list(range(32)), [False] * 32)["moments"],
        tokenizer.latents_mean,
        tokenizer.latents_std,
    )
    torch.testing.assert_close(posterior.mean.mean((0, 2, 3)), torch.zeros(4), atol=1e-2, rtol=0)


@pytest.mark.parametrize("make", [tiny_maetok, tiny_drorae, tiny_raev2, tiny_identity_fae, tiny_fae, tiny_detok])
def test_posteriors_that_are_points_take_half_of_the_disk(make, tmp_path, image_folder):
    vae, data = make(), make_data(image_folder, random_flip=False)
    pixels = torch.stack([data.example(data.train[row])["pixel_values"] for row in range(8)])
    encode_dataset(tmp_path, vae, data, Accelerator(cpu=True), source="x", batch_size=8)
    latents = CachedLatents(tmp_path, random_flip=False)
    cells = latents.train[:8]["moments"].to_pylist()
    halves = 1 if vae.is_deterministic else 2
    assert vae.is_deterministic == (make not in (tiny_fae, tiny_detok))
    assert {len(cell) for cell in cells} == {math.prod(latents.shape) // 2 * halves * torch.half.itemsize}
    moments = latents.read(latents.train, list(range(8)), [False] * 8)["moments"]
    tokenizer = latents.load_tokenizer(None)
    vae.set_latent_statistics(torch.zeros_like(tokenizer.latents_mean), torch.ones_like(tokenizer.latents_std))
    torch.testing.assert_close(moments, direct_moments(vae, pixels), rtol=2**-10, atol=1e-4)


def test_caches_with_the_log_variances_of_points_are_read(tmp_path, image_folder):
    """As they were written before these were left out."""
    encode_dataset(
        tmp_path, tiny_maetok(), make_data(image_folder, random_flip=False), Accelerator(cpu=True), source="x"
    )
    new = CachedLatents(tmp_path, random_flip=False)
    rows = list(range(len(new)))
    expected = new.read(new.train, rows, [False] * len(rows))["moments"]
    for file in (tmp_path / "train").glob("*.parquet"):
        table = parquet.read_table(file)
        full = pa.array([moments.numpy().tobytes() for moments in expected.half()], pa.binary())
        parquet.write_table(table.set_column(table.column_names.index("moments"), "moments", full), file)
        Path(f"{file}.sha256").unlink(missing_ok=True)
    old = CachedLatents(tmp_path, random_flip=False)
    assert old.train[0]["moments"].to_pylist() != new.train[0]["moments"].to_pylist()
    assert torch.equal(old.read(old.train, rows, [False] * len(rows))["moments"], expected)


class TestContents:
    def test_moments_are_those_of_the_tokenizer_in_both_copies(self, cache, fae, image_folder):
        vae, data = AutoencoderFAE.from_pretrained(fae), make_data(image_folder)
        for mirrored in (False, True):
            pixels = torch.stack([data.example(data.train[row])["pixel_values"] for row in range(len(data))])
            expected = direct_moments(vae, pixels.flip(-1) if mirrored else pixels)
            latents = CachedLatents(cache)
            stored = latents.read(latents.train, list(range(32)), [mirrored] * 32)
            assert stored["moments"].shape == (32, 8, 4, 4) and stored["moments"].dtype == torch.float32
            assert stored["row_ids"].tolist() == list(range(32))
            torch.testing.assert_close(stored["moments"], expected, rtol=2**-10, atol=1e-5)  # float16's rounding

    def test_statistics_are_those_of_samples(self, cache, fae):
        vae = AutoencoderFAE.from_pretrained(cache / "tokenizer")
        latents = CachedLatents(cache)
        both = [latents.read(latents.train, list(range(32)), [mirrored] * 32)["moments"] for mirrored in (0, 1)]
        mean, logvar = torch.cat(both).double().chunk(2, dim=1)
        torch.testing.assert_close(vae.latents_mean.double().flatten(), mean.mean((0, 2, 3)))
        std = (mean.var((0, 2, 3), correction=0) + logvar.exp().mean((0, 2, 3))).sqrt()
        torch.testing.assert_close(vae.latents_std.double().flatten(), std)
        # and so, normalised with them, samples have mean 0 and variance 1
        samples = normalized_posterior(torch.cat(both * 20), vae.latents_mean, vae.latents_std).sample()
        assert samples.mean((0, 2, 3)).abs().max() < 0.03
        assert (samples.std((0, 2, 3)) - 1).abs().max() < 0.03

    def test_the_tokenizer_differs_in_its_statistics_only(self, cache, fae):
        before, after = (AutoencoderFAE.from_pretrained(folder).state_dict() for folder in (fae, cache / "tokenizer"))
        assert before.keys() == after.keys()
        changed = {name for name in before if not torch.equal(before[name], after[name])}
        assert changed == {"latents_mean", "latents_std"}

    def test_index(self, cache, fae):
        index = json.loads((cache / "index.json").read_text())
        shards = {"train/00000.parquet": 10, "train/00001.parquet": 10, "train/00002.parquet": 10}
        assert index["splits"]["train"] == {"rows": 32, "damaged": {}, "shards": {**shards, "train/00003.parquet": 2}}
        assert index["splits"]["validation"]["rows"] == 4
        assert index["shape"] == [8, 4, 4]
        assert index["fingerprint"] == tokenizer_fingerprint(AutoencoderFAE.from_pretrained(fae))
        assert not list(cache.rglob("*.part"))

    def test_shards_are_plain_parquet(self, cache):
        from datasets import load_dataset

        rows = load_dataset("parquet", data_files=str(cache / "train" / "*.parquet"), split="train")
        assert rows.column_names == ["row_id", "label", "moments", "moments_flipped"]
        assert rows["row_id"] == list(range(32))
        assert np.frombuffer(rows[0]["moments"], np.float16).size == 8 * 4 * 4

    @pytest.mark.parametrize(("label", "caption"), [("kind", None), ("number", "kind")])
    def test_labels_and_captions_of_other_columns(self, tmp_path, fae, parquet_folder, label, caption):
        data = make_data(parquet_folder, label_column=label, caption_column=caption, random_flip=False)
        encode(tmp_path, fae, data)
        latents = CachedLatents(tmp_path, random_flip=False)
        assert latents.id2label == data.id2label
        for ours, theirs in zip(take(latents, 3), take(data, 3), strict=True):
            assert torch.equal(ours["class_labels"], theirs["class_labels"])
            assert ours.get("captions") == theirs.get("captions") and ("captions" in ours) == (caption is not None)

    def test_without_labels(self, tmp_path, fae, image_folder):
        encode(tmp_path, fae, make_data(image_folder, max_train_samples=4, random_flip=False))
        latents = CachedLatents(tmp_path, random_flip=False)
        assert latents.id2label is None and take(latents, 1, 2)[0].keys() == {"moments", "row_ids", "mirrored"}
        with pytest.raises(ValueError, match="random_flip must be False: .* has no mirrored copies"):
            CachedLatents(tmp_path)


class TestCaptions:
    """Captions and their embeddings, next to the moments."""

    @pytest.fixture(scope="class")
    def captioned(self, tmp_path_factory, fae, parquet_folder, text_encoder):
        folder = tmp_path_factory.mktemp("captioned")
        data = make_data(parquet_folder, caption_column="kind", label_column="number")
        encode(folder, fae, data, captions=load_caption_encoder(str(text_encoder), 5))
        return folder

    def test_batches_have_the_embeddings_of_their_captions(self, captioned, text_encoder, parquet_folder):
        captions, latents = load_caption_encoder(str(text_encoder), 5), CachedLatents(captioned)
        latents.check_caption_encoder(captions)
        assert latents.text_encoder == {"source": str(text_encoder), "max_length": 5, "width": 24}
        data = make_data(parquet_folder, caption_column="kind", label_column="number")
        for ours, theirs in zip(take(latents, 5), take(data, 5), strict=True):
            assert ours["captions"] == theirs["captions"]
            longest = max(map(len, ours["captions"]))  # a token a letter
            assert ours["caption_embeds"].shape == (8, min(5, longest), 24)
            expected = captions(theirs["captions"])[:, :longest]
            torch.testing.assert_close(ours["caption_embeds"], expected, rtol=2**-10, atol=1e-5)
        (batch,) = latents.validation_batches(8)
        assert batch["caption_embeds"].shape[:2] == (4, 5)

    def test_moments_are_the_same(self, captioned, fae, parquet_folder, tmp_path):
        encode(tmp_path, fae, make_data(parquet_folder, label_column="number"))
        for ours, theirs in zip(*(take(CachedLatents(folder), 4) for folder in (captioned, tmp_path)), strict=True):
            assert torch.equal(ours["moments"], theirs["moments"])
            assert torch.equal(ours["class_labels"], theirs["class_labels"])

    def test_another_text_encoder_or_length(self, captioned, text_encoder):
        latents = CachedLatents(captioned)
        with pytest.raises(ValueError, match="max_caption_length must be that of the latents in .*, 5, got 6"):
            latents.check_caption_encoder(load_caption_encoder(str(text_encoder), 6))
        other = load_caption_encoder(str(text_encoder), 5)
        other.text_encoder.embeddings.word_embeddings.weight += 1
        with pytest.raises(ValueError, match="text_encoder must be that of the captions in .*, whose fingerprint is"):
            latents.check_caption_encoder(other)

    def test_resuming_with_another_one(self, captioned, fae, parquet_folder, text_encoder, tmp_path):
        folder = shutil.copytree(captioned, tmp_path / "latents")
        data = make_data(parquet_folder, caption_column="kind", label_column="number")
        with pytest.raises(ValueError, match="max_caption_length was 5, now 4"):
            encode(folder, fae, data, captions=load_caption_encoder(str(text_encoder), 4))
        with pytest.raises(ValueError, match="text_encoder was '.*', now None; .*max_caption_length was 5, now None"):
            encode(folder, fae, data)
        (folder / "train" / "00001.parquet").unlink()
        encode(folder, fae, data, captions=load_caption_encoder(str(text_encoder), 5))
        assert shard_bytes(folder) == shard_bytes(captioned)

    def test_no_captions_to_read(self, fae, image_folder, text_encoder, tmp_path):
        captions = load_caption_encoder(str(text_encoder), 5)
        with pytest.raises(ValueError, match="caption_column must name the captions for text_encoder, got None"):
            encode(tmp_path / "latents", fae, make_data(image_folder), captions=captions)
        assert not (tmp_path / "latents").exists()

    def test_values_beyond_float16(self, fae, parquet_folder, text_encoder, tmp_path):
        captions = load_caption_encoder(str(text_encoder), 5)
        captions.text_encoder.encoder.layer[-1].output.LayerNorm.bias += 1e6
        with pytest.raises(ValueError, match="embeddings in float16 must be finite"):
            encode(tmp_path, fae, make_data(parquet_folder, caption_column="kind"), captions=captions)


class TestReading:
    def test_batches_are_those_of_the_images(self, cache, fae, image_folder):
        """The same rows in the same order, the same ones of them mirrored, over two epochs."""
        vae = AutoencoderFAE.from_pretrained(fae)
        latents = CachedLatents(cache, seed=3)
        data = make_data(image_folder, seed=3, label_column="label")
        assert len(latents) == len(data) and latents.id2label == data.id2label
        for ours, theirs in zip(take(latents, 7, 10), take(data, 7, 10), strict=True):
            assert torch.equal(ours["class_labels"], theirs["class_labels"])
            assert torch.equal(ours["row_ids"], theirs["row_ids"])
            expected = direct_moments(vae, theirs["pixel_values"])
            torch.testing.assert_close(ours["moments"], expected, rtol=2**-10, atol=1e-5)

    def test_a_balanced_data_set_stays_balanced(self, tmp_path, fae, parquet_folder):
        data = make_data(parquet_folder, label_column="kind", balance_column="number")
        encode(tmp_path, fae, data)
        latents = CachedLatents(tmp_path)
        assert latents.signature(8) == data.signature(8) and "(4 of them in an epoch)" in latents.describe()
        for ours, theirs in zip(take(latents, 9), take(data, 9), strict=True):
            assert torch.equal(ours["row_ids"], theirs["row_ids"])
            assert torch.equal(ours["class_labels"], theirs["class_labels"])

    def test_validation_batches_are_those_of_the_images(self, cache, fae, image_folder):
        vae = AutoencoderFAE.from_pretrained(fae)
        ours = list(CachedLatents(cache).validation_batches(3))
        theirs = list(make_data(image_folder, label_column="label").validation_batches(3))
        assert [len(batch["moments"]) for batch in ours] == [3, 1]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a["row_ids"], b["row_ids"]) and torch.equal(a["class_labels"], b["class_labels"])
            expected = direct_moments(vae, b["pixel_values"])
            torch.testing.assert_close(a["moments"], expected, rtol=2**-10, atol=1e-5)

    @pytest.mark.parametrize("world_size", [2, 3])
    def test_ranks_side_by_side_are_one_process_with_larger_batches(self, cache, world_size):
        latents = CachedLatents(cache)
        whole = take(latents, 4, batch_size=4 * world_size)
        ranks = [take(latents, 4, batch_size=4, rank=rank, world_size=world_size) for rank in range(world_size)]
        for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
            assert same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})

    def test_continuing_with_workers_equals_never_having_stopped(self, cache):
        latents = CachedLatents(cache)
        whole, rest = take(latents, 6), take(latents, 4, images_seen=16, num_workers=2)
        assert all(same(*pair) for pair in zip(whole[2:], rest, strict=True))

    def test_starting_a_loader_draws_no_random_numbers(self, cache):
        state = torch.get_rng_state()
        take(CachedLatents(cache), 1)
        assert torch.equal(state, torch.get_rng_state())

    def test_max_train_samples_and_no_flip(self, cache):
        latents = CachedLatents(cache, random_flip=False, max_train_samples=5)
        assert len(latents) == 5
        seen = {}
        for batch in take(latents, 4, batch_size=5):
            assert sorted(batch["row_ids"].tolist()) == list(range(5))
            for row, moments in zip(batch["row_ids"].tolist(), batch["moments"], strict=True):
                assert torch.equal(moments, seen.setdefault(row, moments))

    def test_tokenizers_that_fit_and_one_that_does_not(self, cache, fae):
        latents = CachedLatents(cache)
        vae = AutoencoderFAE.from_pretrained(cache / "tokenizer")
        latents.check_tokenizer(vae)
        vae.pixel_decoder.requires_grad_(False).proj_out.weight.zero_()  # another decoder
        vae.image_encoder = None  # as in a generator's pipeline
        latents.check_tokenizer(vae)
        with torch.no_grad():
            vae.encoder.proj_out.bias[0] += 1e-3
        with pytest.raises(ValueError, match="vae must be the tokenizer of .*whose encoder has the fingerprint"):
            latents.check_tokenizer(vae)
        vae = AutoencoderFAE.from_pretrained(fae)
        vae.image_encoder.image_mean = [0.5, 0.5, 0.5]
        with pytest.raises(ValueError, match="whose image_encoder has the fingerprint"):
            latents.check_tokenizer(vae)

    def test_folders_that_are_no_finished_cache(self, tmp_path):
        for foreign in (None, "[]", '{"vae": "x"}', "no json"):
            if foreign:
                (tmp_path / "index.json").write_text(foreign)
            assert not is_latent_cache(tmp_path)
            with pytest.raises(ValueError, match="is no latent cache: it has no index.json of one"):
                CachedLatents(tmp_path)
        (tmp_path / "index.json").write_text('{"vae": "x", "fingerprint": {}, "settings": {}}')
        with pytest.raises(ValueError, match="is an unfinished latent cache"):
            CachedLatents(tmp_path)

    def test_description_and_signature(self, cache, image_folder):
        latents, data = CachedLatents(cache, seed=3), make_data(image_folder, seed=3)
        text = (
            f"32 rows in 4 classes of '{cache}', latents of '{image_folder}' (train); validation: 4 rows of validation"
        )
        assert latents.describe() == text
        assert latents.signature(8, 2, 1) == data.signature(4)  # the same rows in the same order


class TestArguments:
    def arguments(self, cache, **kwargs):
        return DataArguments(dataset_name=str(cache), **kwargs)

    def test_what_applies(self, cache):
        latents = CachedLatents.from_arguments(self.arguments(cache, random_flip=False, max_train_samples=7), 5)
        assert (len(latents), latents.random_flip, latents.seed) == (7, False, 5)
        # what the cache was made with may be said again
        assert len(CachedLatents.from_arguments(self.arguments(cache, label_column="label", resolution=32))) == 32

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("train_split", "train[5%:]"),
            ("validation_split", "test"),
            ("crop", "random"),
            ("label_column", "kind"),
            ("resolution", 64),
            ("max_validation_samples", 7),
            ("streaming", True),
            ("num_classes", 9),
            ("dataset_config", "small"),
            ("caption_column", "text"),
            ("image_column", "jpg"),
        ],
    )
    def test_what_has_no_effect(self, cache, name, value):
        with pytest.raises(
            ValueError, match=f"^{name} has no effect on the latents in .*, got {re.escape(repr(value))}$"
        ):
            CachedLatents.from_arguments(self.arguments(cache, **{name: value}))


KILLED = """
import os, sys
from pyarrow.parquet import ParquetWriter

write_table, calls = ParquetWriter.write_table, []

def die_in_the_second_shard(self, table):
    write_table(self, table)
    calls.append(table)
    if len(calls) == 5:
        os._exit(9)

ParquetWriter.write_table = die_in_the_second_shard
sys.path.insert(0, sys.argv[1])
import cache_latents
cache_latents.main(sys.argv[2:])
"""

SIGNALLED = """
import os, signal, sys
from hf_fae.data.latent_shards import ShardWriter

write = ShardWriter.write

def signalled_write(self, *batch):
    if self.path.name == "00001.parquet":
        os.kill(os.getpid(), signal.SIGUSR1)
    write(self, *batch)

ShardWriter.write = signalled_write
sys.path.insert(0, sys.argv[1])
import cache_latents
cache_latents.main(sys.argv[2:])
"""


class TestResuming:
    @pytest.fixture
    def flags(self, fae, image_folder):
        return ["--config", CONFIG, "--vae", str(fae), "--dataset_name", str(image_folder), "--label_column", "label"]

    def test_killed_and_started_again(self, tmp_path, cache, flags, processes, monkeypatch, capsys):
        folder = tmp_path / "latents"
        child = processes.start(["-c", KILLED, SCRIPTS, *flags, "--output_dir", folder])
        assert child.wait() == 9, child.stderr[-3000:]
        assert sorted(path.name for path in folder.rglob("*")) == [
            ".lock",
            "00000.parquet",
            "00000.parquet.sha256",
            "00001.part",
            "index.json",
            "train",
        ]
        with pytest.raises(ValueError, match="unfinished"):
            CachedLatents(folder)
        kept = (folder / "train" / "00000.parquet").stat().st_mtime_ns

        monkeypatch.syspath_prepend(SCRIPTS)
        import cache_latents

        cache_latents.main([*flags, "--output_dir", str(folder)])
        assert "train: 32 rows in 4 shards" in capsys.readouterr().out
        assert (folder / "train" / "00000.parquet").stat().st_mtime_ns == kept
        assert shard_bytes(folder) == shard_bytes(cache)
        indices = [json.loads((path / "index.json").read_text()) for path in (folder, cache)]
        assert indices[0]["splits"] == indices[1]["splits"] and indices[0]["statistics"] == indices[1]["statistics"]
        assert not list(folder.rglob("*.part"))

    def test_both_processes_stop_for_the_signal_of_one(self, tmp_path, cache, flags, processes):
        """The second one gets it in its first shard, three times: the first finishes its own shard, too."""
        folder = tmp_path / "latents"
        words = [SCRIPTS, *flags, "--output_dir", folder]
        for process in processes.start_two_processes(["-c", SIGNALLED, *words]):
            assert process.wait() == 128 + signal.SIGUSR1, process.stderr[-3000:]
            assert "Traceback" not in process.stderr
        kept = shard_bytes(folder)
        assert kept == {name: shard_bytes(cache)[name] for name in ("train/00000.parquet", "train/00001.parquet")}
        assert not list(folder.rglob("*.part"))
        processes.run_in_two_processes([SCRIPTS / "cache_latents.py", *words[1:]])
        assert shard_bytes(folder) == shard_bytes(cache)

    def test_two_processes_write_the_same_files(self, tmp_path, cache, flags, processes):
        folder = tmp_path / "latents"
        processes.run_in_two_processes([SCRIPTS / "cache_latents.py", *flags, "--output_dir", folder])
        assert shard_bytes(folder) == shard_bytes(cache)
        index, expected = (json.loads((path / "index.json").read_text()) for path in (folder, cache))
        assert all(index[name] == expected[name] for name in expected if name not in ("vae", "settings"))

    def test_other_data_or_another_tokenizer(self, tmp_path, cache, fae, image_folder):
        folder = shutil.copytree(cache, tmp_path / "latents")
        before = shard_bytes(folder)
        with pytest.raises(ValueError, match="holds other latents.*: rows_per_shard was 10, now 11$"):
            encode(folder, fae, make_data(image_folder, label_column="label"), rows_per_shard=11)
        with pytest.raises(ValueError, match="label_column was 'label', now None; max_train_samples was None, now 7"):
            encode(folder, fae, make_data(image_folder, max_train_samples=7))
        other = tiny_fae()
        other.set_feature_statistics(other.features_mean + 1, other.features_std)
        other.save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match="holds other latents .of the tokenizer 'x'.*: encoder was '.*', now '"):
            encode(folder, tmp_path / "other", make_data(image_folder, label_column="label"))
        assert shard_bytes(folder) == before

    @pytest.fixture
    def interrupted(self, tmp_path, fae, image_folder):
        """A copy of the images, and a cache of it that lacks a shard."""
        pictures = Path(shutil.copytree(image_folder, tmp_path / "pictures"))
        encode(tmp_path / "latents", fae, make_data(pictures, label_column="label"))
        (tmp_path / "latents/train/00001.parquet").unlink()
        return pictures, tmp_path / "latents"

    def test_data_at_another_place(self, tmp_path, interrupted, fae):
        pictures, folder = interrupted
        encode(folder, fae, make_data(pictures.rename(tmp_path / "elsewhere"), label_column="label"))
        assert len(CachedLatents(folder)) == 32

    def test_a_renamed_class(self, interrupted, fae):
        pictures, folder = interrupted
        for split in ("train", "validation"):
            (pictures / split / "circle").rename(pictures / split / "zebra")
        with pytest.raises(ValueError, match="class 0 was 'circle', now 'cross'; .*the content of train was"):
            encode(folder, fae, make_data(pictures, label_column="label"))

    @pytest.mark.parametrize("split", ["train", "validation"])
    def test_a_replaced_image(self, interrupted, fae, split):
        pictures, folder = interrupted
        path = sorted((pictures / split).rglob("*.png"))[-1]
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(path)
        with pytest.raises(ValueError, match=f"or be deleted: the content of {split} was '.*', now '.*'$"):
            encode(folder, fae, make_data(pictures, label_column="label"))

    def test_a_replaced_cell(self, tmp_path, fae):
        from datasets import Dataset

        def write(name, number):
            (tmp_path / name).mkdir()
            rows = {"image": [Image.new("RGB", (32, 32), (n, 0, 0)) for n in (1, 2, number)], "text": ["a", "b", "c"]}
            for split in ("train", "validation"):
                Dataset.from_dict(rows).to_parquet(tmp_path / name / f"{split}.parquet")
            return make_data(tmp_path / name, caption_column="text")

        encode(tmp_path / "latents", fae, write("first", 3))
        encode(tmp_path / "latents", fae, write("copy", 3))
        with pytest.raises(ValueError, match="the content of train was"):
            encode(tmp_path / "latents", fae, write("other", 4))

    def test_a_folder_of_something_else(self, tmp_path, fae, image_folder):
        (tmp_path / "index.json").write_text("{}")
        with pytest.raises(ValueError, match="is no folder for latents"):
            encode(tmp_path, fae, make_data(image_folder))
        assert (tmp_path / "index.json").read_text() == "{}"

    @pytest.mark.parametrize(("name", "value"), [("streaming", True), ("crop", "random")])
    def test_data_that_cannot_be_cached(self, tmp_path, fae, image_folder, name, value):
        with pytest.raises(ValueError, match=f"{name} must be .*got {value!r}"):
            encode(tmp_path / "latents", fae, make_data(image_folder, **{name: value}))
        assert not (tmp_path / "latents").exists()

    @pytest.mark.parametrize("name", ["batch_size", "rows_per_shard"])
    def test_sizes(self, tmp_path, fae, image_folder, name):
        with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
            encode(tmp_path / "latents", fae, make_data(image_folder), **{name: 0})


@pytest.fixture(scope="module")
def damaged_folder(tmp_path_factory):
    """120 rows, of which 10 to 19 hold no image, 25 is text and 50 has no class."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    def png(number):
        file = io.BytesIO()
        Image.new("RGB", (32, 32), (2 * number, 0, 0)).save(file, "PNG")
        return file.getvalue()

    folder = tmp_path_factory.mktemp("damaged")
    cells = [b"" if 10 <= number < 20 else b"text" if number == 25 else png(number) for number in range(120)]
    kinds = [None if number == 50 else f"kind {number % 3}" for number in range(120)]
    features = Features({"image": ImageFeature(), "kind": Value("string")})
    columns = {"image": [{"bytes": cell, "path": None} for cell in cells], "kind": kinds}
    for split in ("train", "validation"):
        Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


class TestCorruptRows:
    def test_are_left_out_and_counted(self, tmp_path, fae, damaged_folder):
        data = make_data(damaged_folder, label_column="kind", max_validation_samples=20)
        index = encode(tmp_path, fae, data, max_corrupt_share=0.2)
        content = index["splits"]["train"]
        assert content["damaged"] == {"empty": 10, "undecodable": 1, "bad_label": 1}
        assert content["rows"] == 108 and content["shards"]["train/00001.parquet"] == 0
        latents = CachedLatents(tmp_path)
        good = [row for row in range(120) if not 10 <= row < 20 and row not in (25, 50)]
        seen = [row for batch in take(latents, 9, 12) for row in batch["row_ids"].tolist()]
        assert sorted(seen) == good
        # Validation leaves them out, too, of the same choice of rows.
        chosen = [row for batch in data.validation_batches(8) for row in batch["row_ids"].tolist()]
        assert [row for batch in latents.validation_batches(8) for row in batch["row_ids"].tolist()] == chosen
        assert index["splits"]["validation"]["damaged"] == data.corrupt_validation_rows.counts()

    def test_too_many(self, tmp_path, fae, damaged_folder):
        data = make_data(damaged_folder, label_column="kind")
        with pytest.raises(ValueError, match="12 of the .* rows read are corrupt.*max_corrupt_share=0.05"):
            encode(tmp_path, fae, data, max_corrupt_share=0.05, num_workers=1)

    def test_too_many_of_a_few(self, tmp_path, fae, damaged_folder):
        data = make_data(damaged_folder, label_column="kind", max_train_samples=20)
        with pytest.raises(ValueError, match="10 of the 20 rows read are corrupt"):
            encode(tmp_path, fae, data)

    def test_values_beyond_float16(self, tmp_path, image_folder):
        vae = tiny_fae()
        with torch.no_grad():
            vae.encoder.proj_out.bias[0] = 1e6
        vae.save_pretrained(tmp_path / "fae")
        with pytest.raises(ValueError, match="moments in float16 must be finite"):
            encode(tmp_path / "latents", tmp_path / "fae", make_data(image_folder))


class TestStoredStatistics:
    def test_by_the_script(self, tmp_path, fae, image_folder, monkeypatch):
        monkeypatch.syspath_prepend(SCRIPTS)
        import cache_latents

        folder = shutil.copytree(fae, tmp_path / "fae")
        flags = ["--config", CONFIG, "--dataset_name", str(image_folder), "--output_dir", str(tmp_path / "latents")]
        cache_latents.main([*flags, "--vae", str(folder), "--max_train_samples", "8", "--update_vae"])
        ours, theirs = (AutoencoderFAE.from_pretrained(f) for f in (folder, tmp_path / "latents" / "tokenizer"))
        assert torch.equal(ours.latents_mean, theirs.latents_mean)
        assert torch.equal(ours.latents_std, theirs.latents_std)
        with pytest.raises(ValueError, match="vae must be a local folder for update_vae, got 'user/fae'"):
            cache_latents.main([*flags, "--vae", "user/fae", "--update_vae"])
