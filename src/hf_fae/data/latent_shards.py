"""The parquet shards of a latent cache: what each holds, how it is written, and the summary of all of them."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ..utils.digests import commit_with_digest
from .corrupt import CorruptionReport
from .latent_cache import CAPTION_EMBEDS, GROUP, LABELS


__all__ = ["SPLITS", "Shard", "ShardWriter", "chunks", "summarize_shards"]

SPLITS = ("train", "validation")


def chunks(indices: range, size: int) -> list[range]:
    """Consecutive parts of `size`; the last one may be smaller."""
    return [indices[start : start + size] for start in range(0, len(indices), size)]


@dataclass(frozen=True)
class Shard:
    """The rows at `indices` of a split, and the file of those among them that are not corrupt."""

    path: Path
    split: str
    indices: range

    def batches(self, size: int) -> list[range]:
        """No batch spans two shards: what is encoded together does not depend on the number of processes."""
        return chunks(self.indices, size)


class ShardWriter:
    """One shard, which appears under its name when it is complete; its footer describes its content.

    Args:
        path: of the file.
        schema: its columns.
        shape: of the latent statistics, (C, 1, 1) or (C, h, w).
        means_alone: leave out the log-variances, as `CachedLatents` knows those of points.
    """

    def __init__(self, path: Path, schema, shape: tuple[int, ...], means_alone: bool):
        self.path, self.schema, self.means_alone, self.corrupt = path, schema, means_alone, []
        self.rows = self.count = 0
        self.total, self.squares = torch.zeros(2, *shape, dtype=torch.float64)

    def __enter__(self):
        from pyarrow.parquet import ParquetWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        # Saves a third of log-variances and a twelfth of means; dictionaries and statistics of bytes are useless.
        self.file = ParquetWriter(
            self.path.with_suffix(".part"),
            self.schema,
            compression="zstd",
            use_dictionary=False,
            write_statistics=False,
        )
        return self

    def write(self, labels: dict[str, list], copies: dict[str, torch.Tensor]) -> None:
        """Append rows: lists named by `LABELS` and the schema, and the moments (B, 2C, h, w) of each copy."""
        import pyarrow as pa

        names = {**LABELS, CAPTION_EMBEDS: CAPTION_EMBEDS, GROUP: GROUP}
        columns = {column: labels[name] for column, name in names.items() if name in labels}
        for name, moments in copies.items():
            mean, logvar = moments.double().chunk(2, dim=1)
            self.total += mean.sum(0).sum_to_size(self.total.shape).cpu()
            self.squares += (mean.square() + logvar.exp()).sum(0).sum_to_size(self.total.shape).cpu()
            self.count += mean.numel() // self.total.numel()
            kept = moments.chunk(2, dim=1)[0] if self.means_alone else moments
            columns[name] = [row.tobytes() for row in kept.cpu().numpy()]
        self.file.write_table(pa.table(columns, schema=self.schema))
        self.rows += len(columns["row_id"])

    def __exit__(self, error, *_):
        if error is None:
            sums = {"total": self.total.flatten().tolist(), "squares": self.squares.flatten().tolist()}
            # "damaged" is what caches have called corrupt rows from the start.
            footer = {"rows": self.rows, "damaged": self.corrupt, "count": self.count, **sums}
            self.file.add_key_value_metadata({"hf_fae": json.dumps(footer)})
        self.file.close()
        if error is None:
            commit_with_digest(self.path.with_suffix(".part"), self.path)


def summarize_shards(shards: list[Shard], max_corrupt_share: float) -> dict:
    """Splits and latent statistics, as the index of the cache holds them, from the footers of all shards.

    Raises:
        ValueError: a split has too many corrupt rows, or no other ones.
    """
    from pyarrow.parquet import read_metadata

    splits = {}
    for split in SPLITS:
        footers = {
            shard: json.loads(read_metadata(shard.path).metadata[b"hf_fae"])
            for shard in shards
            if shard.split == split
        }
        report = CorruptionReport()
        report.add(tuple(entry) for footer in footers.values() for entry in footer["damaged"])
        rows = sum(len(shard.indices) for shard in footers)
        report.check(rows, max_corrupt_share, rows)
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
