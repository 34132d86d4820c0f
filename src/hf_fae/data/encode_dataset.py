"""Encode a data set once and for all: writes the cache of `latent_cache.py`, whole or to be resumed at any moment."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..autoencoders.frozen_encoder import frozen_features
from ..latents import LatentAutoencoderMixin, check_finite, latent_size, latent_statistics
from ..utils.atomic import atomic_write
from .captions import CaptionEncoder, pack_embeds
from .corrupt import DamagedRow, DamageReport
from .feature_cache import FeatureData
from .fingerprints import fingerprint_split
from .images import ImageData
from .latent_cache import CAPTION_EMBEDS, COPIES, GROUP, INDEX, LABELS, is_latent_cache, tokenizer_fingerprint


__all__ = ["encode_dataset"]

SPLITS = ("train", "validation")
SHOWN_DIFFERENCES = 6


@dataclass(frozen=True)
class _Shard:
    """The rows at `places` of a split, and the file of those among them that are not damaged."""

    path: Path
    split: str
    places: range

    def batches(self, size: int) -> list[range]:
        """They start anew with every shard: what is encoded together does not depend on who encodes it."""
        return _cut(self.places, size)


def _cut(places, size):
    return [places[start : start + size] for start in range(0, len(places), size)]


def encode_dataset(
    folder: str | Path,
    vae: torch.nn.Module,
    data: ImageData,
    accelerator,
    *,
    source: str,
    batch_size: int = 64,
    rows_per_shard: int = 4096,
    num_workers: int = 0,
    max_damaged_share: float = 0.1,
    features: FeatureData | None = None,
    captions: CaptionEncoder | None = None,
) -> dict:
    """Write the latents of the training and validation rows of `data` into `folder`.

    Shards that are there already are kept: a run that was killed goes on when it is started again. The processes share
    the shards; what the files hold does not depend on how many there are.

    Args:
        vae: a tokenizer, on the accelerator's device, with its frozen encoder if `features` is None. It is left with
            the statistics of these latents: mean and standard deviation of samples of the posterior over all training
            rows and their copies. diffusers' `AutoencoderKL` keeps its own, the scaling factor in its config.
        data: training rows get a mirrored copy if `random_flip` is set.
        source: where the tokenizer came from, for the record.
        batch_size: pictures of a forward pass; may be another one when a run goes on, at the price of rounding.
        num_workers: processes that decode pictures, per rank.
        max_damaged_share: damaged rows are left out; more than this share of them is an error.
        features: what the frozen encoder gave for these pictures, at the precision of float16.
        captions: reads the captions, on the accelerator's device; without it they are kept as texts alone.

    Returns:
        What `index.json` holds.

    Raises:
        ValueError: a size is not positive, `folder` holds latents of another tokenizer or of other data, the data are
            streamed or cropped at random, or have no captions to be read; too many rows are damaged, or moments or
            embeddings do not fit into float16.
    """
    if data.args.streaming:
        raise ValueError("streaming must be False, as a shard is a range of row numbers, got True")
    if data.args.crop != "center":
        raise ValueError(f"crop must be 'center', as a picture is encoded once, got {data.args.crop!r}")
    if captions is not None and data.args.caption_column is None:
        raise ValueError("caption_column must name the captions for text_encoder, got None")
    for name, value in (("batch_size", batch_size), ("rows_per_shard", rows_per_shard)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    folder, rows = Path(folder), {split: _Rows(data, split, captions is not None) for split in SPLITS}
    settings = {name: value for name, value in asdict(data.args).items() if name not in ("streaming", "shuffle_block")}
    settings |= {f"{split}_rows": len(rows[split]) for split in SPLITS}
    settings |= {"seed": data.seed, "rows_per_shard": rows_per_shard, "mixed_precision": accelerator.mixed_precision}
    index = {
        "vae": source,
        "fingerprint": tokenizer_fingerprint(vae),
        "settings": settings,
        "content": {split: fingerprint_split(data, split) for split in SPLITS},
        "id2label": data.id2label,
    }
    if captions is not None:
        settings["max_caption_length"] = captions.max_length
        index["fingerprint"]["text_encoder"] = captions.fingerprint()
        index["text_encoder"] = {
            "source": captions.source,
            "max_length": captions.max_length,
            "width": captions.width,
        }
    _check_same(folder, index)

    shards = [
        _Shard(folder / split / f"{number:05d}.parquet", split, places)
        for split in SPLITS
        for number, places in enumerate(_cut(range(len(rows[split])), rows_per_shard))
    ]
    missing = [shard for shard in shards if not shard.path.exists()]
    if accelerator.is_main_process and not (folder / INDEX).exists():
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(folder / INDEX, index)
    accelerator.wait_for_everyone()  # all have the same list before the first of these files appears
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    _encode(mine, rows, vae, accelerator, batch_size, num_workers, max_damaged_share, features, captions)
    accelerator.wait_for_everyone()

    size = latent_size(vae, data.args.resolution, data.args.resolution)
    index |= {"dtype": "float16", "shape": [2 * vae.config.latent_channels, *size]}
    index |= _summarize(shards, max_damaged_share)
    if isinstance(vae, LatentAutoencoderMixin):
        mean, std = (torch.tensor(index["statistics"][name]).view(vae.latents_mean.shape) for name in ("mean", "std"))
        vae.set_latent_statistics(mean, std)
    if accelerator.is_main_process:
        part = folder / "tokenizer.part"
        vae.save_pretrained(part)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        part.rename(folder / "tokenizer")
        _write_json(folder / INDEX, index)  # last: its "splits" say that everything is there
    accelerator.wait_for_everyone()
    return index


def _check_same(folder, index):
    """Refuse to write among the shards of another tokenizer or of other data."""
    if not (folder / INDEX).exists():
        return
    if not is_latent_cache(folder):
        raise ValueError(f"output_dir {str(folder)!r} is no folder for latents: it has an {INDEX} of something else")
    old = json.loads((folder / INDEX).read_text())
    was, now = _identity(old), _identity(json.loads(json.dumps(index)))
    differences = [
        f"{name} was {was.get(name)!r}, now {now.get(name)!r}"
        for name in {**now, **was}
        if was.get(name) != now.get(name)
    ]
    if differences:
        shown = "; ".join(differences[:SHOWN_DIFFERENCES]) + "; ..." * (len(differences) > SHOWN_DIFFERENCES)
        raise ValueError(
            f"output_dir {str(folder)!r} holds other latents (of the tokenizer {old['vae']!r}), which must be resumed "
            f"with the same arguments and data or be deleted: {shown}"
        )


def _identity(index):
    """What must be the same for shards to belong together; of the data what they hold, not where they lie."""
    settings = {name: value for name, value in sorted(index["settings"].items()) if name != "dataset_name"}
    classes = {f"class {label}": name for label, name in (index.get("id2label") or {}).items()}
    content = {f"the content of {split}": value for split, value in index.get("content", {}).items()}
    return {**index["fingerprint"], **settings, **classes, **content}


def _write_json(path, content):
    atomic_write(path, json.dumps(content, indent=1) + "\n")


class _Rows(Dataset):
    """The rows of a split by place: examples, or `(row_id, kind)` where a row is damaged."""

    def __init__(self, data, split, with_embeds):
        import pyarrow as pa

        self.data = data
        self.row_ids, self.rows = data.rows(split)
        self.copies = COPIES if split == "train" and data.args.random_flip else COPIES[:1]
        fields = {"row_id": pa.int64()}
        if data.args.label_column:
            fields["label"] = pa.int64()
        if data.args.caption_column:
            fields["caption"] = pa.string()
        if with_embeds:
            fields[CAPTION_EMBEDS] = pa.binary()
        if data.args.balance_column and split == "train":
            fields[GROUP] = pa.string()
        self.schema = pa.schema({**fields, **dict.fromkeys(self.copies, pa.binary())})

    def __len__(self):
        return len(self.row_ids)

    def __getitem__(self, place):
        row_id = self.row_ids[place]
        try:
            row = self.rows[place]
            group = {GROUP: str(row[self.data.args.balance_column])} if GROUP in self.schema.names else {}
            return {**self.data.example(row), "row_ids": row_id, **group}
        except DamagedRow as error:
            return row_id, error.kind


def _collate(examples):
    """The good examples as one batch, their pictures stacked, and the list of the damaged."""
    good = [example for example in examples if isinstance(example, dict)]
    batch = {name: [example[name] for example in good] for name in (good[0] if good else ())}
    if good:
        batch["pixel_values"] = torch.stack(batch["pixel_values"])
    return batch, [example for example in examples if isinstance(example, tuple)]


@torch.no_grad()
def _encode(shards, rows, vae, accelerator, batch_size, num_workers, max_damaged_share, features, captions):
    """Write this process's shards."""
    statistics = latent_statistics(vae)[0].shape
    if isinstance(vae, LatentAutoencoderMixin):  # with these `encode` gives the unnormalised posterior
        vae.set_latent_statistics(torch.zeros_like(vae.latents_mean), torch.ones_like(vae.latents_std))
    vae.eval()

    def encode(split, batch, copy):
        mirrored = copy == COPIES[1]
        with accelerator.autocast():
            if features is None:
                images = batch["pixel_values"].to(accelerator.device)
                posterior = vae.encode(images.flip(-1) if mirrored else images).latent_dist
            else:
                maps = features.read(split, batch["row_ids"], [mirrored] * len(batch["row_ids"]))
                posterior = vae.encode_features(
                    *frozen_features(vae, {"features": maps.to(accelerator.device)})
                ).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).half()  # the latter clamped to [-30, 20]
        check_finite("moments in float16", moments)
        return moments

    def read_captions(texts):
        with accelerator.autocast():
            embeds = captions(texts)
        check_finite("embeddings in float16", embeds.half())
        return pack_embeds(embeds)

    count = sum(len(shard.places) for shard in shards)
    progress = tqdm(total=count, disable=not accelerator.is_main_process, desc="encoding", unit="row")
    for split in SPLITS:
        report, rows_read = DamageReport(), 0
        todo = [shard for shard in shards if shard.split == split]
        batches = [batch for shard in todo for batch in shard.batches(batch_size)]
        loader = iter(DataLoader(rows[split], batch_sampler=batches, num_workers=num_workers, collate_fn=_collate))
        for shard in todo:
            with _ShardWriter(shard.path, rows[split].schema, statistics) as writer:
                for places in shard.batches(batch_size):
                    batch, damaged = next(loader)
                    if batch:
                        if captions is not None:
                            batch[CAPTION_EMBEDS] = read_captions(batch["captions"])
                        writer.write(batch, {copy: encode(split, batch, copy) for copy in rows[split].copies})
                    writer.damaged += damaged
                    report.add(damaged)
                    rows_read += len(places)
                    report.check(rows_read, max_damaged_share, len(rows[split]))
                    progress.update(len(places))
    progress.close()


class _ShardWriter:
    """One shard, which appears under its name when it is complete; its footer says what is in it.

    Args:
        path: of the file.
        schema: its columns.
        shape: of the latent statistics, (C, 1, 1) or (C, h, w).
    """

    def __init__(self, path, schema, shape):
        self.path, self.schema, self.damaged = path, schema, []
        self.rows = self.count = 0
        self.total, self.squares = torch.zeros(2, *shape, dtype=torch.float64)

    def __enter__(self):
        from pyarrow.parquet import ParquetWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Latents do not compress, and statistics of bytes say nothing.
        self.file = ParquetWriter(
            self.path.with_suffix(".part"),
            self.schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
        )
        return self

    def write(self, labels, copies):
        """Append rows: lists of what `LABELS` and the schema name, and the moments (B, 2C, h, w) of each copy."""
        import pyarrow as pa

        names = {**LABELS, CAPTION_EMBEDS: CAPTION_EMBEDS, GROUP: GROUP}
        columns = {column: labels[name] for column, name in names.items() if name in labels}
        for name, moments in copies.items():
            mean, logvar = moments.double().chunk(2, dim=1)
            self.total += mean.sum(0).sum_to_size(self.total.shape).cpu()
            self.squares += (mean.square() + logvar.exp()).sum(0).sum_to_size(self.total.shape).cpu()
            self.count += mean.numel() // self.total.numel()
            columns[name] = [row.tobytes() for row in moments.cpu().numpy()]
        self.file.write_table(pa.table(columns, schema=self.schema))
        self.rows += len(columns["row_id"])

    def __exit__(self, error, *_):
        if error is None:
            sums = {"total": self.total.flatten().tolist(), "squares": self.squares.flatten().tolist()}
            footer = {"rows": self.rows, "damaged": self.damaged, "count": self.count, **sums}
            self.file.add_key_value_metadata({"hf_fae": json.dumps(footer)})
        self.file.close()
        if error is None:
            self.path.with_suffix(".part").replace(self.path)


def _summarize(shards, max_damaged_share):
    """Splits and statistics, for the index: all of it stands in the footers of the shards."""
    from pyarrow.parquet import read_metadata

    splits = {}
    for split in SPLITS:
        footers = {
            shard: json.loads(read_metadata(shard.path).metadata[b"hf_fae"])
            for shard in shards
            if shard.split == split
        }
        report = DamageReport()
        report.add(tuple(entry) for footer in footers.values() for entry in footer["damaged"])
        rows = sum(len(shard.places) for shard in footers)
        report.check(rows, max_damaged_share, rows)
        splits[split] = {
            "rows": sum(footer["rows"] for footer in footers.values()),
            "damaged": report.counts(),
            "shards": {f"{split}/{shard.path.name}": footer["rows"] for shard, footer in footers.items()},
        }
        if not splits[split]["rows"]:
            raise ValueError(f"split {split!r} has no row that can be used: {str(report) or 'it is empty'}")
        if split == "train":
            count = sum(footer["count"] for footer in footers.values())
            sums = ([footer[name] for footer in footers.values()] for name in ("total", "squares"))
            mean, square = (torch.tensor(values, dtype=torch.float64).sum(0) / count for values in sums)
            # E[x^2] of samples is that of the means plus the posterior's variance: both are in `squares`.
            statistics = {"mean": mean.tolist(), "std": (square - mean.square()).sqrt().tolist()}
    return {"splits": splits, "statistics": statistics}
