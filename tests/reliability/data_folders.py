"""Odd folders of images and data files: all rows are there, or one sentence says what is left out and what to do."""

import base64
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, DatasetDict, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from pyarrow import parquet

from hf_fae.data.images import DataArguments, ImageData

from .case import Case, refused


__all__ = ["CASES"]

SIZE = 32


def pixels(seed=0, mode="RGB"):
    """Random pixels of a mode."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).convert(mode)


def encoded(format="PNG", seed=0, mode="RGB", **options):
    """The bytes of an image file."""
    file = io.BytesIO()
    pixels(seed, mode).save(file, format, **options)
    return file.getvalue()


def write(folder, *names, data=None):
    """Image files, each with pixels of its own."""
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or encoded(Image.registered_extensions()[path.suffix.lower()], seed))


def table(cells, **columns):
    """A data set with a column "image" of cells {"bytes", "path"}."""
    rows = Dataset.from_dict({"image": cells, **columns})
    return rows.cast_column("image", ImageFeature(decode=False))


def cell(data=None, path=None):
    return {"bytes": data, "path": path}


def write_rows(cells, path):
    """Rows as they are; `Dataset.to_parquet` would read the paths."""
    parquet.write_table(table(cells).data.table, path)


class Folder(NamedTuple):
    """A folder, how it is read, and what is expected: rows and classes, corrupt rows by kind, or a sentence."""

    make: Callable[[Path], object]  # returns `dataset_name`, or None for the folder itself
    arguments: dict = {}
    rows: int = 0
    classes: tuple[str, ...] = ()
    corrupt: dict[str, int] = {}
    sentence: tuple[str, ...] = ()


LABELS = {"label_column": "label"}
TWO = ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png")


def images(*names):
    return lambda folder: write(folder, *names)


def one(name, data):
    return lambda folder: write(folder, name, data=data)


def linked(folder):
    write(folder, "photos/cat/0.png", "elsewhere/dog/0.png")
    (folder / "photos" / "dog").symlink_to(folder / "elsewhere" / "dog")
    return folder / "photos"


def linked_file(folder):
    write(folder, "photos/cat/0.png", "elsewhere/0.png")
    (folder / "photos" / "cat" / "1.png").symlink_to(folder / "elsewhere" / "0.png")
    return folder / "photos"


def linked_root(folder):
    write(folder / "real", *TWO)
    (folder / "photos").symlink_to(folder / "real")
    return folder / "photos"


def csv_of_paths(folder):
    write(folder, "0.png")
    (folder / "train.csv").write_text(f"image\n{folder}/0.png\n")
    return folder / "train.csv"


def brackets(folder):
    write(folder / "photos [x]", *TWO)
    return folder / "photos [x]"


def parquet_in_brackets(folder):
    (folder / "rows [x]").mkdir()
    table([cell(encoded())]).to_parquet(folder / "rows [x]" / "train.parquet")
    return folder / "rows [x]"


def parquet_of(cells, name="train.parquet"):
    def make(folder):
        write_rows(cells(folder) if callable(cells) else cells, folder / name)

    return make


def parquet_file(folder):
    table([cell(encoded())] * 3, label=[0, 1, 1]).to_parquet(folder / "some rows.parquet")
    return folder / "some rows.parquet"


def saved(splits):
    def make(folder):
        rows = table([cell(encoded(seed=seed)) for seed in range(4)], label=["a", "b", "a", "b"])
        (DatasetDict(dict.fromkeys(splits, rows)) if splits else rows).save_to_disk(folder / "saved")
        return folder / "saved"

    return make


def zip_file(folder):
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        for name in TWO:
            archive.writestr(name, encoded())
    return folder / "photos.zip"


def lists(folder):
    features = Features({"image": List(ImageFeature())})
    Dataset.from_dict({"image": [[cell(encoded())] * 2]}, features=features).to_parquet(folder / "train.parquet")


def base64_text(folder):
    text = base64.b64encode(encoded()).decode()
    Dataset.from_dict({"image": [text] * 3}).to_parquet(folder / "train.parquet")


def url_safe_base64(folder):
    text = base64.urlsafe_b64encode(encoded("JPEG")).decode()
    Dataset.from_dict({"image": [text] * 3}).to_parquet(folder / "train.parquet")


def semicolons(folder):
    write(folder, "0.png")
    (folder / "train.csv").write_text("image;label\n0.png;cat\n")
    return folder / "train.csv"


def with_metadata(folder):
    write(folder, "0.png", "1.png")
    lines = [{"file_name": f"{number}.png", "text": f"image {number}"} for number in range(2)]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def secret(folder):
    write(folder / "private", "0.png")
    (folder / "rows").mkdir()
    rows = [cell(path=str(folder / "private" / "0.png"))] * 2 + [cell(encoded())] * 2
    write_rows(rows, folder / "rows" / "train.parquet")
    return folder / "rows"


def fifo(folder):
    write(folder, "0.png")
    os.mkfifo(folder / "1.png")


def png_chunk(kind, content):
    """A PNG with one more chunk after its header."""
    data = encoded()
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return data[:33] + chunk + data[33:]


LONG_TEXT = png_chunk(b"zTXt", b"comment\0\0" + zlib.compress(b" " * 2**21))
BROKEN_EXIF = png_chunk(b"eXIf", b"no such thing")
ODD_RATIONAL = encoded("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x1a\0\x05\0\0\0\x01\xff\xff\xff\xf0\0\0\0\0")
FLOAT_IMAGE = io.BytesIO()
Image.fromarray(np.full((SIZE, SIZE), 300.0, dtype=np.float32)).save(FLOAT_IMAGE, "TIFF")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
CUT = encoded()[:200]

FOLDERS = {
    "flat": Folder(images("0.png", "1.jpg", "2.webp"), rows=3),
    "class folders": Folder(images(*TWO), LABELS, 4, ("cat", "dog")),
    "class folders, labels unused": Folder(images(*TWO), rows=4),
    "one class folder": Folder(images("cat/0.png", "cat/1.png"), LABELS, 2, ("cat",)),
    "class folders below a folder": Folder(images(*(f"photos/{name}" for name in TWO)), LABELS, 4, ("cat", "dog")),
    "split folders": Folder(images(*(f"{s}/{n}" for s in ("train", "val") for n in TWO)), LABELS, 4, ("cat", "dog")),
    "classes named like splits": Folder(images("train/0.png", "bus/0.png"), LABELS, 2, ("bus", "train")),
    "names like splits": Folder(images("steam-train.png", "test.png", "val.png"), rows=3),
    "capital endings": Folder(images("a/0.PNG", "b/1.JPG"), LABELS, 2, ("a", "b")),
    "unicode names": Folder(images("größe/ä.png", "猫/0.png"), LABELS, 2, ("größe", "猫")),
    "spaces and quotes": Folder(images("my 'cat'/a b.png", "dog/0.png"), LABELS, 2, ("dog", "my 'cat'")),
    "hidden files": Folder(images("a/0.png", "a/.1.png", ".b/2.png"), rows=1),
    "other files beside": Folder(lambda f: write(f, "0.png") or write(f, "notes.txt", data=b"x"), rows=1),
    "stray image beside class folders": Folder(images("0.png", *TWO), LABELS, sentence=("label", "top", "cat, dog")),
    "no class folders": Folder(images("0.png"), LABELS, sentence=("label", "without class folders")),
    "uneven depth": Folder(images("cat/0.png", "dog/big/1.png"), LABELS, sentence=("depth", "dog/big")),
    "linked class folder": Folder(linked, LABELS, sentence=("left out", "dog/0.png", "links")),
    "the folder itself is a link": Folder(linked_root, LABELS, 4, ("cat", "dog")),
    "csv of paths": Folder(csv_of_paths, rows=1),
    "linked file": Folder(linked_file, rows=2),
    "unknown ending": Folder(images("cat/0.png", "dog/0.qoi"), LABELS, sentence=("left out", "dog/0.qoi", "PNG")),
    "split folders and others": Folder(
        images("train/0.png", "val/0.png", "more/0.png"), sentence=("named like splits", "more")
    ),
    "brackets in the path": Folder(brackets, LABELS, 4, ("cat", "dog")),
    "brackets in names": Folder(images("[cat]/0.png", "dog/[1].png"), LABELS, 2, ("[cat]", "dog")),
    "brackets around data files": Folder(parquet_in_brackets, sentence=("dataset_name", "[ ]", "rows [x]")),
    "no validation split": Folder(
        images(*TWO), {"train_split": "validation"}, sentence=("no split 'validation'", "train[:90%]")
    ),
    "slices as splits": Folder(images(*TWO), {"train_split": "train[:50%]"}, rows=2),
    "captions in metadata": Folder(with_metadata, {"caption_column": "text"}, rows=2),
    "no such column": Folder(images("0.png"), {"caption_column": "text"}, sentence=("no column 'text'", "image")),
    "parquet folder": Folder(parquet_of([cell(encoded())] * 3), rows=3),
    "parquet file": Folder(parquet_file, {"label_column": "label", "num_classes": 2}, 3, ("0", "1")),
    "zip file": Folder(zip_file, sentence=("dataset_name", "photos.zip", "unpack")),
    "folder with a zip": Folder(lambda f: zip_file(f).parent, sentence=("cannot be read",)),
    "csv with semicolons": Folder(semicolons, sentence=("no column 'image'", "image;label")),
    "a file of text": Folder(
        lambda f: (f / "a.txt").write_text("x") and f / "a.txt", sentence=("dataset_name", "a.txt")
    ),
    "saved to disk": Folder(saved(["train", "test"]), LABELS, 4, ("a", "b")),
    "saved to disk, without splits": Folder(saved([]), LABELS, 4, ("a", "b")),
    "saved to disk, a slice": Folder(saved(["train"]), {"train_split": "train[:2]"}, sentence=("train[:2]", "whole")),
    "lists of images": Folder(lists, sentence=("one image per row", "'image'")),
    "base64 text": Folder(base64_text, sentence=("base64", "'image'")),
    "URL-safe base64 text": Folder(url_safe_base64, sentence=("base64", "'image'")),
    "another user's file": Folder(secret, rows=4, corrupt={"unsafe": 2}),
    "a URL": Folder(
        parquet_of([cell(path="http://127.0.0.1:9/0.png"), cell(encoded())]), rows=2, corrupt={"unsafe": 1}
    ),
    "a chain of URLs": Folder(
        parquet_of(lambda f: [cell(path=f"file:///etc/hostname::{f}/a.zip"), cell(encoded())]),
        rows=2,
        corrupt={"unsafe": 1},
    ),
    "a name that no file can have": Folder(
        parquet_of(lambda f: [cell(path=f"{f}/{'x' * 999}"), cell(path=f"{f}/\0.png"), cell(encoded())]),
        rows=3,
        corrupt={"missing": 2},
    ),
    "a pipe by name": Folder(
        parquet_of(lambda f: os.mkfifo(f / "p.png") or [cell(path=str(f / "p.png")), cell(encoded())]),
        rows=2,
        corrupt={"undecodable": 1},
    ),
    "a device": Folder(parquet_of([cell(path="/dev/zero"), cell(encoded())]), rows=2, corrupt={"unsafe": 1}),
    "a pipe": Folder(fifo, rows=1),
    "a missing file": Folder(
        parquet_of(lambda f: [cell(path=str(f / "gone.png")), cell(encoded())]), rows=2, corrupt={"missing": 1}
    ),
    "an empty cell": Folder(parquet_of([cell(), cell(encoded())]), rows=2, corrupt={"empty": 1}),
    "an empty file": Folder(parquet_of([cell(b""), cell(encoded())]), rows=2, corrupt={"empty": 1}),
    "a cut file": Folder(parquet_of([cell(CUT), cell(encoded())]), rows=2, corrupt={"truncated": 1}),
    "EPS": Folder(one("0.png", EPS), rows=1, corrupt={"undecodable": 1}),
    "text above Pillow's limit": Folder(one("0.png", LONG_TEXT), rows=1),
    "broken EXIF in PNG": Folder(one("0.png", BROKEN_EXIF), rows=1),
    "odd rational in JPEG": Folder(one("0.jpg", ODD_RATIONAL), rows=1),
    "floats of unknown range": Folder(one("0.tiff", FLOAT_IMAGE.getvalue()), rows=1, corrupt={"undecodable": 1}),
}


def check(name: str, folder: Path) -> None:
    """Read a folder as training does."""
    case = FOLDERS[name]
    dataset_name = str(case.make(folder) or folder)
    options = {"resolution": 16, "validation_split": "train", **case.arguments}
    arguments = DataArguments(dataset_name=dataset_name, **options)
    if case.sentence:
        refused(lambda: ImageData(arguments, seed=0), *case.sentence)
        return
    data = ImageData(arguments, seed=0)
    assert len(data.train) == case.rows, f"{len(data.train)} of {case.rows} rows"
    assert tuple((data.id2label or {}).values()) == case.classes, f"classes are {data.id2label}"
    found: dict[str, int] = {}
    for row in data.train:
        try:
            assert data.reader.read(row)["pixel_values"].shape == (3, 16, 16)
        except ValueError as error:
            kind = error.kind
            found[kind] = found.get(kind, 0) + 1
    assert found == case.corrupt, f"corrupt rows are {found}"
    assert len(data.fingerprint("train")) == 32


CASES = [Case(name, lambda folder, name=name: check(name, folder)) for name in FOLDERS]
