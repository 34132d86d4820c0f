"""A data set encoded once: posterior moments in parquet shards, so that generators train without the encoder.

    folder/index.json            what was encoded with which tokenizer; shards, class names, corrupt rows, statistics
    folder/train/00000.parquet   rows in the order of the data set; likewise validation/
    folder/tokenizer/            the tokenizer with the statistics of these latents

`encode_dataset.py` writes it. The moments are those of unnormalised latents: they stay valid when the tokenizer's
statistics change. They are stored in float16, whose error (2^-11 of a mean, at most 0.008 of a log-variance within
[-30, 20]) is far below the posterior's own spread. A cell holds the bytes of one (2C, h, w) array, which is read five
times as fast as a list of numbers. Of a posterior that is a point it holds the mean alone, (C, h, w).

There may be caption embeddings as well, which depend on the text encoder and its maximum length: float16, a cell the
bytes of one (tokens, width) array, without padding.
"""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from ..latents import MIN_LOGVAR, LatentAutoencoderMixin
from ..loading import load_tokenizer
from ..utils.digests import find_damage
from .captions import CaptionEncoder, unpack_embeds
from .fingerprints import fingerprint_parameters
from .order import choose_row, group_rows, indexed_batches, is_mirrored, row_random
from .source import DataArguments


__all__ = ["CAPTION_EMBEDS", "COPIES", "INDEX", "LABELS", "CachedLatents", "is_latent_cache", "tokenizer_fingerprint"]

INDEX = "index.json"
COPIES = ("moments", "moments_flipped")
# Columns next to the moments -> their names in batches.
LABELS = {"row_id": "row_ids", "label": "class_labels", "caption": "captions"}
CAPTION_EMBEDS = "caption_embeds"  # a column, and its name in batches
GROUP = "group"  # column of the values by which a balanced data set is grouped
READING = ("dataset_name", "random_flip", "max_train_samples")  # the fields of `DataArguments` that apply to a cache


def is_latent_cache(folder: str | Path) -> bool:
    """Whether `folder` was written by `encode_dataset`, finished or not.

    Raises:
        ValueError: its index is corrupt.
    """
    try:
        index = json.loads((Path(folder) / INDEX).read_text())
    except OSError:
        return False
    except (ValueError, RecursionError) as error:
        if (Path(folder) / "train" / "00000.parquet").exists():
            raise ValueError(
                f"the latent cache {str(folder)!r} has a corrupt {INDEX}: delete it and run cache_latents.py once more"
            ) from error
        return False
    return isinstance(index, dict) and {"vae", "fingerprint", "settings"} <= index.keys()


def tokenizer_fingerprint(vae: torch.nn.Module) -> dict[str, str | None]:
    """Hashes of what moments depend on: "encoder" (with its feature statistics) and "image_encoder".

    Decoders and latent statistics do not count. "image_encoder" is None where none is attached or needed.
    """
    if not isinstance(vae, LatentAutoencoderMixin):  # diffusers' `AutoencoderKL`
        parts = [vae.encoder, vae.quant_conv] if vae.config.use_quant_conv else [vae.encoder]
        encoder = fingerprint_parameters([p for part in parts for p in part.parameters()])
        return {"encoder": encoder, "image_encoder": None}
    fingerprint = {"encoder": fingerprint_parameters(*vae.encoding_parts()), "image_encoder": None}
    if (image_encoder := getattr(vae, "image_encoder", None)) is not None:
        settings = [image_encoder.image_mean, image_encoder.image_std, image_encoder.patch_size]
        fingerprint["image_encoder"] = fingerprint_parameters(image_encoder.parameters(), settings)
    return fingerprint


class CachedLatents:
    """The latents that `encode_dataset` wrote, as batches: a `GeneratorData` in place of `ImageData`.

    A batch is a dict of "moments" (B, 2C, h, w) float32, "row_ids" (B,) long and, in training, "mirrored" (B,) bool,
    with "class_labels" (B,) long and
    "captions", a list of strings, where the data set has them, and "caption_embeds" (B, length, width) float32, zero
    after the end of each text, where a text encoder has embedded them. `latents.normalized_posterior` turns moments
    into the posterior of normalised latents. Order and mirroring are those of `ImageData` on the same rows.

    When a cache is opened for the first time, `datasets` copies its rows into a memory-mapped file of its own cache.

    Args:
        folder: the cache.
        seed: of order and mirroring.
        random_flip: use the mirrored copy of half of the training rows.
        max_train_samples: train on the first N rows only.

    Attributes:
        groups: as in `ImageData`, if the data set was balanced when it was encoded.
        id2label: class id -> name; None without labels.
        shape: (2C, h, w) of one row's moments.
        has_captions: whether the rows have captions.
        text_encoder: what has embedded the captions, {"source", "max_length", "width"}; None without embeddings.

    Raises:
        ValueError: `folder` is no finished cache, or `random_flip` is set and it has no mirrored copies.
    """

    def __init__(
        self, folder: str | Path, seed: int = 0, random_flip: bool = True, max_train_samples: int | None = None
    ):
        self.folder, self.seed = Path(folder), seed
        if not is_latent_cache(folder):
            raise ValueError(f"folder {str(folder)!r} is no latent cache: it has no {INDEX} of one")
        self.index = json.loads((self.folder / INDEX).read_text())
        if "splits" not in self.index:
            raise ValueError(f"folder {str(folder)!r} is an unfinished latent cache: run cache_latents.py once more")
        self.shape = tuple(self.index["shape"])
        self._no_spread = np.full(math.prod(self.shape) // 2, MIN_LOGVAR, np.float16)
        self.text_encoder = self.index.get("text_encoder")
        id2label = self.index["id2label"]
        self.id2label = id2label and {int(label): name for label, name in id2label.items()}
        self.train, self.validation = self._open("train"), self._open("validation")
        self.has_captions = "caption" in self.train.column_names
        self.random_flip = random_flip
        if random_flip and COPIES[1] not in self.train.column_names:
            raise ValueError(f"random_flip must be False: {str(folder)!r} has no mirrored copies, got True")
        if max_train_samples is not None:
            self.train = self.train.take(min(max_train_samples, len(self.train)))
        balanced = GROUP in self.train.column_names
        self.groups = group_rows(self.train[GROUP].to_pylist()) if balanced else None

    @classmethod
    def from_arguments(cls, args: DataArguments, seed: int = 0) -> "CachedLatents":
        """The cache in the folder `args.dataset_name`.

        Raises:
            ValueError: as above, or an argument about images differs both from its default and from the value that the
                cache was made with: it would have no effect.
        """
        latents = cls(args.dataset_name, seed, args.random_flip, args.max_train_samples)
        settings = latents.index["settings"]
        for argument in fields(args):
            value = getattr(args, argument.name)
            fixed = settings.get(argument.name, argument.default)
            if argument.name not in READING and value not in (argument.default, fixed):
                raise ValueError(
                    f"{argument.name} has no effect on the latents in {args.dataset_name!r}, which were made with "
                    f"{fixed!r}, got {value!r}"
                )
        return latents

    def __len__(self) -> int:
        """Number of training rows."""
        return len(self.train)

    def check_tokenizer(self, vae: torch.nn.Module) -> None:
        """Refuse a tokenizer with another latent space; its frozen encoder is compared if it is attached.

        Raises:
            ValueError: another encoder made them.
        """
        self._check_parts(vae, tokenizer_fingerprint(vae))

    def check_caption_encoder(self, captions: CaptionEncoder) -> None:
        """As `GeneratorData.check_caption_encoder`; without embeddings any text encoder fits."""
        if self.text_encoder is None:
            return
        if captions.max_length != self.text_encoder["max_length"]:
            raise ValueError(
                f"max_caption_length must be that of the latents in {str(self.folder)!r}, "
                f"{self.text_encoder['max_length']}, got {captions.max_length}"
            )
        ours, theirs = self.index["fingerprint"]["text_encoder"], captions.fingerprint()
        if theirs != ours:
            raise ValueError(
                f"text_encoder must be that of the captions in {str(self.folder)!r}, {self.text_encoder['source']!r}, "
                f"whose fingerprint is {ours}, got {theirs}"
            )

    def check_image_encoder(self, vae: torch.nn.Module) -> None:
        """As `check_tokenizer`, for the frozen encoder alone: its features serve all tokenizers on it."""
        self._check_parts(vae, {"image_encoder": tokenizer_fingerprint(vae)["image_encoder"]})

    def _check_parts(self, vae, theirs):
        ours = self.index["fingerprint"]
        for part in theirs:
            if theirs[part] not in (None, ours[part]):
                raise ValueError(
                    f"vae must be the tokenizer of the latents in {str(self.folder)!r}, {self.index['vae']!r}, whose "
                    f"{part} has the fingerprint {ours[part]}, got {theirs[part]}"
                )

    def class_names(self) -> dict[int, str]:
        """As `GeneratorData.class_names`."""
        if self.id2label is None:
            raise ValueError(f"dataset_name must have classes, but the latents in {str(self.folder)!r} have none")
        return self.id2label

    def load_tokenizer(self, path: str | None, image_encoder: str | None = None):
        """As `GeneratorData.load_tokenizer`: by default the one in the cache; no frozen encoder is loaded."""
        vae = load_tokenizer(str(path or self.folder / "tokenizer"), image_encoder=None)
        self.check_tokenizer(vae)
        return vae

    def prepare_tokenizer(self, vae, image_encoder: str | None = None) -> None:
        """As `check_tokenizer`: no frozen encoder is needed."""
        self.check_tokenizer(vae)

    def latent_size(self, vae) -> tuple[int, int]:
        """As `GeneratorData.latent_size`."""
        return self.shape[-2:]

    def batches(
        self, batch_size: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict]:
        """Endless training batches of one process; as `TrainingData.batches`."""
        position = {"images_seen": images_seen, "rank": rank, "world_size": world_size, "num_workers": num_workers}
        return indexed_batches(_CachedRows(self), _identity, self.seed, batch_size, **position)

    def signature(self, batch_size: int, world_size: int = 1, num_workers: int = 0) -> dict:
        """As `ImageData.signature`, and equal to it if no row was left out: the order is then equal, too."""
        signature = {"rows": len(self), "split": self.index["settings"]["train_split"], "seed": self.seed}
        return signature | ({"groups": len(self.groups)} if self.groups else {})

    def describe(self) -> str:
        """Rows, classes and splits in one line, for the start of a run."""
        settings, splits = self.index["settings"], self.index["splits"]
        classes = f" in {len(self.id2label):,} classes" if self.id2label is not None else ""
        balance = f" ({len(self.groups):,} of them in an epoch)" if self.groups else ""
        return (
            f"{len(self):,} rows{balance}{classes} of {str(self.folder)!r}, latents of {settings['dataset_name']!r} "
            f"({settings['train_split']}); validation: {splits['validation']['rows']:,} rows of "
            f"{settings['validation_split']}"
        )

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """The validation rows in their order, unmirrored; the last batch may be smaller."""
        rows = self.validation
        for start in range(0, len(rows), batch_size):
            indices = list(range(start, min(start + batch_size, len(rows))))
            yield self.read(rows, indices, [False] * len(indices))

    def facts(self) -> dict:
        """As `TrainingData.facts`, for the data set that was encoded."""
        settings = self.index["settings"]
        return {
            "dataset": settings["dataset_name"],
            "split": settings["train_split"],
            "validation_split": settings["validation_split"],
            "resolution": settings["resolution"],
            "validation_samples": self.index["splits"]["validation"]["rows"],
        }

    def _open(self, split):
        from datasets import load_dataset_builder

        files = [self.folder / file for file, rows in self.index["splits"][split]["shards"].items() if rows]
        if missing := [str(file.relative_to(self.folder)) for file in files if not file.is_file()]:
            raise ValueError(self._damaged(f"{missing[0]} is missing"))
        options = {"data_files": [str(file) for file in files]}
        builder = load_dataset_builder("parquet", **options)
        if not os.path.isdir(builder.cache_dir):  # all is read now, once
            if damages := [damage for file in files if (damage := find_damage(file, require_digest=False))]:
                raise ValueError(self._damaged(f"of {split!r}, {damages[0]}"))
        builder.download_and_prepare()
        return builder.as_dataset("train").with_format("arrow")

    def _damaged(self, what):
        return f"the latent cache {str(self.folder)!r} is corrupt, run cache_latents.py once more: {what}"

    def read(self, rows, indices: list[int], mirrored: list[bool]) -> dict:
        """Rows as one batch. `datasets` slices its memory-mapped file: only the copy in use is read."""
        table = rows[indices]
        copies = [table[name] for name in COPIES if name in table.column_names]
        cells = [cell[mirror] for *cell, mirror in zip(*copies, mirrored, strict=True)]
        moments = np.stack([self._moments(cell) for cell in cells])
        batch = {"moments": torch.from_numpy(moments).float().unflatten(1, self.shape)}
        for column, name in LABELS.items():
            if column in table.column_names:
                values = table[column].to_pylist()
                batch[name] = values if name == "captions" else torch.tensor(values)
        if self.text_encoder is not None:
            cells = [cell.as_buffer() for cell in table[CAPTION_EMBEDS]]
            batch[CAPTION_EMBEDS] = unpack_embeds(cells, self.text_encoder["width"])
        return batch

    def _moments(self, cell):
        values = np.frombuffer(cell.as_buffer(), np.float16)
        return np.concatenate([values, self._no_spread]) if len(values) == len(self._no_spread) else values


class _CachedRows(Dataset):
    def __init__(self, latents):
        self.latents = latents

    def __len__(self):
        return len(self.latents.groups or self.latents)

    def __getitems__(self, keys):
        latents = self.latents
        mirrored = [latents.random_flip and is_mirrored(row_random(latents.seed, *key)) for key in keys]
        rows = [choose_row(latents.groups, latents.seed, *key) for key in keys]
        return {**latents.read(latents.train, rows, mirrored), "mirrored": torch.tensor(mirrored)}


def _identity(batch):
    return batch
