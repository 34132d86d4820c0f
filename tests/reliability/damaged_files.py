"""Corrupt files of checkpoints, logs, evaluations and caches: the intact rest is used, or one sentence says why."""

import functools
import shutil
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from factories import tiny_fae
from training_fixtures import write_parquet
from training_runs import Regression, Stopped, Vectors, assert_equal_checkpoints, read_log, run

from hf_fae.data.encode_dataset import encode_dataset
from hf_fae.data.images import DataArguments, ImageData
from hf_fae.data.latent_cache import CachedLatents
from hf_fae.evaluation.options import CHUNK
from hf_fae.evaluation.resumable import Parts, check_settings

from .case import Case, refused


def delete(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    """One bit of the payload."""
    content = bytearray(path.read_bytes())
    content[3 * len(content) // 4] ^= 4
    path.write_bytes(content)


DAMAGES = {"deleted": delete, "truncated": truncate, "empty": empty, "flipped": flip}


@functools.cache
def runs() -> Path:
    """A whole run of 12 steps, and one that was killed after its checkpoints of steps 4 and 8."""
    folder = Path(tempfile.mkdtemp(prefix="hf-fae-damaged-"))
    objective, killed = Regression(), Regression()
    killed.load_state_dict(objective.state_dict())
    run(folder / "whole", objective=objective)
    try:
        run(folder / "killed", Vectors(kill_after=40), killed)
    except Stopped:
        pass
    return folder


def resume(folder: Path, damage) -> Path:
    """Damage a copy of the killed run, resume it, and compare it with the whole one."""
    copy = folder / "run"
    shutil.copytree(runs() / "killed", copy)
    damage(copy)
    run(copy, resume_from_checkpoint="latest")
    assert_equal_checkpoints(*(path / "checkpoint-12" for path in (runs() / "whole", copy)))
    return copy


def checkpoint_file(name: str, damage, folder: Path) -> None:
    resume(folder, lambda copy: damage(copy / "checkpoint-8" / name))


def foreign(make, folder: Path) -> None:
    resume(folder, make)


def all_corrupt(damage, folder: Path) -> None:
    copy = folder / "run"
    shutil.copytree(runs() / "killed", copy)
    for step in (4, 8):
        damage(copy / f"checkpoint-{step}" / "model.safetensors")
    call = functools.partial(run, copy, resume_from_checkpoint="latest")
    refused(call, str(copy), "checkpoint-4", "checkpoint-8", "model.safetensors")


def named_corrupt(damage, folder: Path) -> None:
    copy = folder / "run"
    shutil.copytree(runs() / "killed", copy)
    damage(copy / "checkpoint-8" / "optimizer.safetensors")
    call = functools.partial(run, copy, resume_from_checkpoint=str(copy / "checkpoint-8"))
    refused(call, "checkpoint-8", "optimizer.safetensors")


def log_with(extra: bytes, position: int, folder: Path) -> None:
    """Bytes in the log, before a line of that number; all other lines survive."""

    def damage(copy):
        lines = (copy / "log.jsonl").read_bytes().splitlines(keepends=True)
        (copy / "log.jsonl").write_bytes(b"".join([*lines[:position], extra, *lines[position:]]))

    assert read_log(resume(folder, damage)) == read_log(runs() / "whole")


def log_file(damage, folder: Path) -> None:
    resume(folder, lambda copy: damage(copy / "log.jsonl"))


def squares(numbers):
    return {"square": torch.tensor([[float(number) ** 2] * 64 for number in numbers])}


def part_file(name: str, damage, folder: Path) -> None:
    """A part of an evaluation, or its digest: only this part is computed again."""
    parts, again = Parts(folder, 3 * CHUNK, CHUNK), []
    parts.compute(squares, "squares")
    before = parts.stack("square")
    damage(folder / name)
    parts.compute(lambda numbers: again.append(numbers) or squares(numbers), "squares")
    assert again == [range(CHUNK, 2 * CHUNK)], again
    assert torch.equal(parts.stack("square"), before)


def settings_file(content: bytes, folder: Path) -> None:
    check_settings(folder / "run", {"seed": 0})
    (folder / "run" / "settings.json").write_bytes(content)
    refused(functools.partial(check_settings, folder / "run", {"seed": 0}), str(folder / "run"))


@functools.cache
def cache() -> Path:
    """A latent cache of 4 + 1 shards, and its images."""
    folder = Path(tempfile.mkdtemp(prefix="hf-fae-damaged-"))
    (folder / "data").mkdir()
    write_parquet(folder / "data")
    encode(folder / "latents")
    return folder


def encode(latents: Path) -> None:
    data = ImageData(DataArguments(str(latents.parent / "data"), resolution=32, label_column="kind"))
    encode_dataset(latents, tiny_fae(), data, Accelerator(cpu=True), source="fae", batch_size=8, rows_per_shard=8)


def copy_cache(folder: Path) -> Path:
    shutil.copytree(cache() / "latents", folder / "latents")
    (folder / "data").symlink_to(cache() / "data")
    return folder / "latents"


def shard_file(name: str, damage, folder: Path) -> None:
    """A cache refuses to open with a corrupt shard; encoding again repairs it."""
    latents = copy_cache(folder)
    damage(latents / name)
    refused(functools.partial(CachedLatents, latents), str(latents), "run cache_latents.py once more")
    encode(latents)
    assert (latents / name).read_bytes() == (cache() / "latents" / name).read_bytes()
    CachedLatents(latents)


def index_file(content: bytes, folder: Path) -> None:
    latents = copy_cache(folder)
    (latents / "index.json").write_bytes(content)
    refused(functools.partial(CachedLatents, latents), str(latents), "index.json")


FILES = ["checksums.json", "state.json", "model.safetensors", "ema.safetensors", "optimizer.safetensors"]
LINES = {
    "NUL": b"\0" * 512 + b"\n",
    "not-UTF-8": b'{"step": 3, "loss": "\xff\xfe"}\n',
    "without-step": b'{"loss": 1.0}\n',
    "no-object": b"[1, 2]\n",
    "half": b'{"step": 3, "lo\n',
    "nested": b"[" * 100_000 + b"\n",
}
FOREIGN = {
    "empty-folder": lambda run: (run / "checkpoint-99999").mkdir(),
    "file-of-that-name": lambda run: (run / "checkpoint-99999").write_text(""),
    "leftover": lambda run: (run / ".checkpoint-12").mkdir(),
    "copy-by-hand": lambda run: (run / "checkpoint-8 (copy)").mkdir(),
}
CONTENTS = {"empty": b"", "truncated": b'{"seed": ', "NUL": b"\0" * 64, "list": b"[1]", "nested": b"[" * 100_000}
partial = functools.partial
CASES = [
    *(
        Case(f"checkpoint-{file}-{kind}", partial(checkpoint_file, file, damage))
        for file in FILES
        for kind, damage in DAMAGES.items()
    ),
    *(Case(f"checkpoint-{kind}", partial(foreign, make)) for kind, make in FOREIGN.items()),
    *(Case(f"all-checkpoints-{kind}", partial(all_corrupt, damage)) for kind, damage in DAMAGES.items()),
    *(Case(f"named-checkpoint-{kind}", partial(named_corrupt, damage)) for kind, damage in DAMAGES.items()),
    *(
        Case(f"log-{kind}-line-{position}", partial(log_with, line, position))
        for kind, line in LINES.items()
        for position in (0, 2)
    ),
    *(Case(f"log-{kind}", partial(log_file, damage)) for kind, damage in DAMAGES.items()),
    *(
        Case(f"part-{name}-{kind}", partial(part_file, f"{CHUNK:09d}.{name}", damage))
        for name in ("safetensors", "safetensors.sha256")
        for kind, damage in DAMAGES.items()
    ),
    *(Case(f"settings-{kind}", partial(settings_file, content)) for kind, content in CONTENTS.items()),
    *(
        Case(f"cache-{name}-{kind}", partial(shard_file, name, damage))
        for name in ("train/00001.parquet", "validation/00000.parquet")
        for kind, damage in DAMAGES.items()
    ),
    *(Case(f"cache-index-{kind}", partial(index_file, content)) for kind, content in CONTENTS.items()),
]
