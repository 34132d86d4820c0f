"""The content of data sets and weights as short strings."""

import hashlib
import json
from collections.abc import Iterable

import torch

from .corrupt import CorruptRow
from .image_files import open_regular
from .own_paths import check_inside
from .source import ImageSource


__all__ = ["fingerprint_parameters", "fingerprint_rows"]

TAIL = 4096  # the end of a compressed image depends on all of it: entropy codes, checksums


def fingerprint_parameters(parameters: Iterable[torch.Tensor], settings=None) -> str:
    """Hash of weights in fp32, without their names, which transformers changes between releases.

    Args:
        settings: whatever else counts, as plain values.
    """
    digests = [hashlib.sha256(tensor.detach().float().cpu().numpy()).hexdigest() for tensor in parameters]
    return hashlib.sha256(json.dumps([sorted(digests), settings]).encode()).hexdigest()[:32]


def fingerprint_rows(data: ImageSource, rows) -> str:
    """Hash of the rows in their order: length and last 4 KiB of every image, labels, captions and groups.

    Paths are ignored. Images behind URLs count by their URL: they are not fetched. Paths outside of the data
    set are not read.

    Args:
        data: says which columns these are.
        rows: indexed rows of `data`, images undecoded.
    """
    args, digest = data.args, hashlib.sha256()
    names = [name for name in (args.label_column, args.caption_column, args.balance_column) if name]
    columns = [data.find_column(rows, name) for name in names]
    for table in rows.with_format("arrow").iter(batch_size=1000):
        for cell in table[args.image_column]:
            digest.update(_end(cell, args.dataset_name) if cell.is_valid else b"none")
        values = [table[name].to_pylist() for name in columns]
        digest.update(json.dumps(values, default=str).encode())
    return digest.hexdigest()[:32]


def _end(cell, dataset_name):
    if cell["bytes"].is_valid:
        data = cell["bytes"].as_buffer()
        size, end = data.size, data.slice(max(0, data.size - TAIL)).to_pybytes()
        return b"%d:%b" % (size, end)
    path = cell["path"].as_py()
    if path is None:
        return b"none"
    if "://" in path:
        return path.encode()
    try:
        check_inside(path, dataset_name)
        with open_regular(path) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - TAIL))
            return b"%d:%b" % (size, file.read())
    except CorruptRow:
        return b"none"
