"""Pictures for training: a Hub data set, a local imagefolder or a folder of parquet files, streamed or not.

The order of a run is a function of the seed and of the number of images seen, never of a sampler's hidden state: batch
k of rank r is the same in a run that was interrupted and in one that was not.
"""

import io
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from .order import PositionSampler


__all__ = ["DataArguments", "ImageData", "center_crop", "decode_image", "to_rgb"]


@dataclass
class DataArguments:
    """Which pictures to train on, and how they become tensors."""

    dataset_name: str = field(metadata={"help": "Hub id of a data set, or a local folder of images or parquet files."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration name of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on; slices such as train[5%:] work."})
    validation_split: str = field(default="validation", metadata={"help": "Split to validate on; slices work too."})
    image_column: str = field(default="image", metadata={"help": "Column of the pictures."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the classes; none: no labels."})
    resolution: int = field(default=256, metadata={"help": "Side of the square training pictures, in pixels."})
    random_flip: bool = field(default=True, metadata={"help": "Mirror half of the training pictures."})
    streaming: bool = field(default=False, metadata={"help": "Read the data while training; nothing is stored."})
    shuffle_block: int = field(
        default=1024, metadata={"help": "Streaming only: rows are shuffled within blocks of this many."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first N rows only."})
    max_validation_samples: int = field(
        default=256, metadata={"help": "Validate on this many rows: a fixed random choice, or the first if streaming."}
    )


def to_rgb(image):
    """A PIL picture of any mode as RGB: upright by its EXIF tag, transparency on white, 16-bit grey scaled to 8."""
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # PIL's own conversion clips 16-bit values at 255 instead of scaling them
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def decode_image(value):
    """The RGB picture in a cell of a data set: `{"bytes", "path"}`, bytes, a path or a PIL picture."""
    from PIL import Image

    if isinstance(value, dict):
        value = value["bytes"] if value.get("bytes") is not None else value["path"]
    if isinstance(value, bytes):
        value = io.BytesIO(value)
    return to_rgb(value if isinstance(value, Image.Image) else Image.open(value))


def center_crop(image, size: int):
    """ADM's square crop: halve with a box filter while possible, bicubic to `size`, then cut out the centre."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


class ImageData:
    """The training and validation pictures of one data set, as batches.

    A batch is `{"pixel_values": (B, 3, resolution, resolution) float32 in [-1, 1]}`, with a label column also
    `"class_labels": (B,) long`.

    Args:
        args: which data, and how to cut them.
        seed: of order, mirroring and the choice of validation rows.

    Attributes:
        id2label: class id -> name: the names of the `ClassLabel` column, else the sorted values of the train split;
            None without a label column.

    Raises:
        ValueError: a column does not exist, or a label is unknown (when it is met).
    """

    def __init__(self, args: DataArguments, seed: int = 0):
        self.args = args
        self.seed = seed
        self.train = self._open(args.train_split)
        if args.max_train_samples is not None:
            take = args.max_train_samples
            self.train = self.train.take(take) if args.streaming else self.train.take(min(take, len(self.train)))
        self.id2label, self._label_ids = self._labels() if args.label_column else (None, None)

    def __len__(self) -> int:
        """Number of training rows (not known when streaming: TypeError)."""
        return len(self.train)

    def batches(
        self, batch_size: int, *, images_seen: int = 0, rank: int = 0, world_size: int = 1, num_workers: int = 0
    ) -> Iterator[dict]:
        """Endless training batches of one process.

        Args:
            batch_size: images of this process in a batch.
            images_seen: images that all processes together have consumed before: where to go on.
            rank, world_size: this process, and how many share the data. Batches of the ranks laid side by side are
                what one process with the `world_size`-fold batch size gets (not so when streaming).
        """
        if self.args.streaming:
            first_batch = images_seen // (batch_size * world_size)
            rows, order = _StreamedRows(self, batch_size, first_batch, rank, world_size), {"batch_size": batch_size}
        else:
            sampler = PositionSampler(len(self.train), batch_size, self.seed, images_seen, rank, world_size)
            rows, order = _IndexedRows(self), {"batch_sampler": sampler}
        # A generator of its own: starting the loader must not draw from the run's random numbers.
        generator, pin = torch.Generator(), torch.cuda.is_available()
        return iter(DataLoader(rows, **order, num_workers=num_workers, pin_memory=pin, generator=generator))

    def validation_batches(self, batch_size: int) -> Iterator[dict]:
        """The fixed validation pictures in a fixed order, unmirrored; the last batch may be smaller."""
        rows = self._open(self.args.validation_split)
        if self.args.streaming:
            rows = rows.take(self.args.max_validation_samples)
        else:
            chosen = np.random.default_rng(self.seed).permutation(len(rows))[: self.args.max_validation_samples]
            rows = rows.select(sorted(chosen))
        examples = map(self._example, rows)
        while batch := list(itertools.islice(examples, batch_size)):
            yield torch.utils.data.default_collate(batch)

    def _open(self, split):
        from datasets import Image, load_dataset

        args = self.args
        rows = load_dataset(args.dataset_name, args.dataset_config, split=split, streaming=args.streaming)
        columns = [name for name in (args.image_column, args.label_column) if name]
        for name in columns:
            if rows.column_names is not None and name not in rows.column_names:
                raise ValueError(f"{args.dataset_name!r} has no column {name!r}; its columns are {rows.column_names}")
        # Decoding is ours: modes, transparency and orientation are handled in one place, and only where a row is used.
        return rows.select_columns(columns).cast_column(args.image_column, Image(decode=False))

    def _labels(self):
        """Class id -> name, and cell value -> class id."""
        from datasets import ClassLabel

        column = self.args.label_column
        feature = (self.train.features or {}).get(column)
        if isinstance(feature, ClassLabel):
            return dict(enumerate(feature.names)), {index: index for index in range(len(feature.names))}
        rows = self.train.select_columns([column])
        values = {row[column] for row in rows} if self.args.streaming else self.train.unique(column)
        values = sorted(value for value in values if value is not None)
        return {i: str(value) for i, value in enumerate(values)}, {value: i for i, value in enumerate(values)}

    def _example(self, row, rng=None):
        args = self.args
        image = center_crop(decode_image(row[args.image_column]), args.resolution)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 127.5 - 1
        if rng is not None and args.random_flip and rng.random() < 0.5:
            pixels = pixels.flip(-1)
        example = {"pixel_values": pixels.contiguous()}
        if args.label_column:
            label = row[args.label_column]
            if label not in self._label_ids:
                raise ValueError(
                    f"column {args.label_column!r} holds {label!r}, which is none of the {len(self.id2label)} classes "
                    f"of split {args.train_split!r}"
                )
            example["class_labels"] = self._label_ids[label]
        return example


class _IndexedRows(Dataset):
    def __init__(self, data):
        self.data = data

    def __getitem__(self, key):
        epoch, index = key
        return self.data._example(self.data.train[index], np.random.default_rng((self.data.seed, epoch, index)))


class _StreamedRows(IterableDataset):
    """The endless rows of one reader, a reader being one worker of one rank.

    Every reader has rows of its own: whole shards where their number divides evenly, else every n-th row. Rows are
    shuffled within blocks, so that a place in the sequence is found again by counting; the rows before it are read but
    not decoded, at most two epochs of them.
    """

    def __init__(self, data, batch_size, first_batch, rank, world_size):
        self.data, self.batch_size, self.first_batch = data, batch_size, first_batch
        self.rank, self.world_size = rank, world_size

    def __iter__(self):
        from datasets.distributed import split_dataset_by_node

        data, info = self.data, get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        # Batches come from the workers in turn, always starting with worker 0: after a restart this worker takes the
        # part of the one whose turn it was.
        worker = (self.first_batch + worker) % num_workers
        reader = self.rank * num_workers + worker
        rows = split_dataset_by_node(data.train, rank=reader, world_size=self.world_size * num_workers)
        skip = len(range(worker, self.first_batch, num_workers)) * self.batch_size

        block_size, epoch, passed = data.args.shuffle_block, 0, 0
        while True:
            count = 0
            # `iter` rather than `__iter__`: the latter would split the rows among the workers once more.
            for block, columns in enumerate(rows.iter(batch_size=block_size)):
                size = len(columns[data.args.image_column])
                first, count = count, count + size
                if passed + count <= skip:
                    continue
                order = np.random.default_rng((data.seed, epoch, reader, block)).permutation(size)
                for place in order[max(0, skip - passed - first) :]:
                    row = {name: values[place] for name, values in columns.items()}
                    yield data._example(row, np.random.default_rng((data.seed, epoch, reader, first + int(place))))
            if count == 0:
                raise ValueError(f"{data.args.dataset_name!r} has no rows for reader {reader}: use fewer workers")
            whole = max(1, (skip - passed) // count) if passed + count <= skip else 1  # epochs to jump over unread
            epoch, passed = epoch + whole, passed + whole * count
