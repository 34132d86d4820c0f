"""What a folder of images holds: classes, captions, sizes, and files that cannot be used."""

import csv
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from ..data.corrupt import CorruptRow
from ..data.decoding import decode_image
from ..data.splits import split_of


__all__ = ["FolderImage", "ImageFolder", "read_folder"]

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
CAPTION_COLUMNS = ("caption", "text")


@dataclass(frozen=True)
class FolderImage:
    """An image that can be used.

    Attributes:
        name: path below the folder.
        label: the first sub-folder below the given one, or below its split where all of those are named like splits
            (`train/`, `validation/`), "" for a file that is in none.
        caption: from `metadata.jsonl` or `metadata.csv`, else the first line of the text file of the same
            name, else "".
        width, height: in pixels.
    """

    name: str
    label: str
    caption: str
    width: int
    height: int


@dataclass
class ImageFolder:
    """The usable images of a folder in the order of their paths, and the others with the reason."""

    path: str
    images: list[FolderImage] = field(default_factory=list)
    corrupt: dict[str, str] = field(default_factory=dict)

    @property
    def classes(self) -> Counter:
        """Class -> number of images; empty unless every image is in a sub-folder, of which there are two or more."""
        counts = Counter(image.label for image in self.images)
        return counts if len(counts) > 1 and "" not in counts else Counter()

    @property
    def num_captions(self) -> int:
        """Images with a caption."""
        return sum(bool(image.caption) for image in self.images)

    def describe(self) -> list[str]:
        """Lines for the plan."""
        lines = [f"{len(self.images):,} images in {self.path}"]
        if self.classes:
            (most, high), (least, low) = self.classes.most_common()[0], self.classes.most_common()[-1]
            lines.append(f"{len(self.classes)} classes, from {low:,} images ({least}) to {high:,} ({most})")
        if self.num_captions:
            lines.append(f"{self.num_captions:,} images with a caption")
        shorter = sorted(min(image.width, image.height) for image in self.images)
        lines.append(f"shorter side from {shorter[0]} to {shorter[-1]} px, median {shorter[len(shorter) // 2]}")
        if self.corrupt:
            path, reason = next(iter(self.corrupt.items()))
            lines.append(f"{len(self.corrupt):,} files left out, such as {path}: {reason}")
        return lines


def read_folder(path: str, min_side: int = 16) -> ImageFolder:
    """Decode every image of a folder and of its sub-folders once; hidden files and folders are ignored.

    Args:
        min_side: images with a shorter side are left out.

    Raises:
        ValueError: there is no such folder, or no image in it can be used.
    """
    root = Path(path).resolve()
    if not root.is_dir():
        raise ValueError(f"folder must be a folder of images, got {path!r}")
    found, captions = ImageFolder(str(root)), _read_metadata(root)
    paths = [
        file
        for file in sorted(root.rglob("*"))
        if file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith(".") for part in file.relative_to(root).parts)
    ]
    tops = {file.relative_to(root).parts[0] if file.parent != root else "" for file in paths}
    above = 1 if tops and all(split_of(top) for top in tops) else 0  # folders that are splits, which are no classes
    for file in tqdm(paths, desc="reading images", unit="image", leave=False):
        relative = file.relative_to(root)
        try:
            width, height = decode_image(str(file), min_side).size
        except (CorruptRow, OSError) as error:
            found.corrupt[relative.as_posix()] = str(error)
            continue
        label = relative.parts[above] if len(relative.parts) > above + 1 else ""
        caption = captions.get(file) or _read_caption(file.with_suffix(".txt"))
        found.images.append(FolderImage(relative.as_posix(), label, caption, width, height))
    if not found.images:
        raise ValueError(
            f"folder {path!r} has no image that can be used: {len(found.corrupt)} of its files are corrupt"
        )
    return found


def _read_metadata(root):
    captions = {}
    for table in sorted(root.rglob("metadata.*")):
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix == ".jsonl":
                rows = [json.loads(line) for line in file if line.strip()]
            elif table.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                continue
        for row in rows:
            caption = next((row[name] for name in CAPTION_COLUMNS if isinstance(row.get(name), str)), "")
            captions[table.parent / str(row.get("file_name"))] = caption.strip()
    return captions


def _read_caption(path):
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n", 1) if path.is_file() else [""]
    return lines[0].strip()
