"""Encode a data set once: write the cache of `latent_cache.py`, which can be interrupted and resumed at any moment."""

import contextlib
import json
import logging
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from ..autoencoders.frozen_encoder import frozen_features
from ..latents import LatentAutoencoderMixin, check_finite, latent_size, latent_statistics
from ..utils.atomic import atomic_write
from ..utils.digests import find_damage
from ..utils.locks import lock_folder
from ..utils.processes import on_main_process
from ..utils.stopping import StopSignals, ignore_signals
from .captions import CaptionEncoder, pack_embeds
from .corrupt import CorruptionReport, CorruptRow
from .feature_cache import FeatureData
from .images import ImageData
from .latent_cache import CAPTION_EMBEDS, COPIES, GROUP, INDEX, is_latent_cache, tokenizer_fingerprint
from .latent_shards import SPLITS, Shard, ShardWriter, chunks, summarize_shards


__all__ = ["encode_dataset"]

logger = logging.getLogger(__name__)

SHOWN_DIFFERENCES = 6


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
    max_corrupt_share: float = 0.1,
    features: FeatureData | None = None,
    captions: CaptionEncoder | None = None,
) -> dict:
    """Write the latents of the training and validation rows of `data` into `folder`.

    Finished shards are kept: a killed run continues when it is started again. The processes share the shards; the
    content of the files does not depend on the number of processes.

    Args:
        vae: a tokenizer, on the accelerator's device, with its frozen encoder if `features` is None. Afterwards it has
            the statistics of these latents: mean and standard deviation of posterior samples over all training rows
            and their mirrored copies. diffusers' `AutoencoderKL` keeps the scaling factor of its config.
        data: training rows get a mirrored copy if `random_flip` is set.
        source: where the tokenizer was loaded from, for the record.
        batch_size: images per forward pass; may change when a run is resumed, at the cost of rounding differences.
        num_workers: processes that decode images, per rank.
        max_corrupt_share: largest accepted share of corrupt rows, which are left out.
        features: cached features of these images, at the precision of float16.
        captions: embeds the captions, on the accelerator's device; without it only their texts are stored.

    Returns:
        The content of `index.json`.

    Raises:
        SystemExit: a process received a signal; each has finished its current shard.
        ValueError: a size is not positive, `folder` is in use or holds latents of another tokenizer or of other data,
            the data are streamed, randomly cropped or lack captions to embed, too many rows are corrupt, or moments or
            embeddings exceed float16.
    """
    if data.args.streaming:
        raise ValueError("streaming must be False, as a shard is a range of row numbers, got True")
    if data.args.crop == "random":
        raise ValueError("crop must be fixed, as an image is encoded once, got 'random'")
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
        "content": {split: data.fingerprint(split) for split in SPLITS},
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
    shards = [
        Shard(folder / split / f"{number:05d}.parquet", split, indices)
        for split in SPLITS
        for number, indices in enumerate(chunks(range(len(rows[split])), rows_per_shard))
    ]
    encoder = _Encoder(vae, accelerator, features, captions)
    with _locked(folder, index, accelerator):
        missing = on_main_process(accelerator.is_main_process, partial(_list_missing, folder, shards))
        _write_shards(missing, rows, encoder, batch_size, num_workers=num_workers, max_corrupt_share=max_corrupt_share)
        accelerator.wait_for_everyone()
        facts = {"resolution": data.args.resolution, "max_corrupt_share": max_corrupt_share}
        return _finish(folder, index, shards, vae, accelerator, **facts)


@contextlib.contextmanager
def _locked(folder, index, accelerator):
    """The folder of the cache, created if need be, for this run alone."""
    locks = []

    def lock():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"output_dir {str(folder)!r} cannot be written: {error.strerror}") from error
        locks.append(lock_folder(folder))
        _check_same(folder, index)
        if not (folder / INDEX).exists():
            _write_json(folder / INDEX, index)

    try:
        on_main_process(accelerator.is_main_process, lock)
        yield
    finally:
        for held in locks:
            held.release()


def _list_missing(folder, shards):
    """The shards that are missing or corrupt."""
    damages = {shard: find_damage(shard.path, require_digest=False) for shard in shards if shard.path.exists()}
    if corrupt := [damage for damage in damages.values() if damage]:
        logger.warning("%s: encoded again, as they are corrupt: %s", folder, "; ".join(corrupt))
    return [shard for shard in shards if damages.get(shard, "missing")]


def _finish(folder, index, shards, vae, accelerator, *, resolution, max_corrupt_share):
    """Statistics, tokenizer and index of the complete cache."""
    size = latent_size(vae, resolution, resolution)
    index |= {"dtype": "float16", "shape": [2 * vae.config.latent_channels, *size]}
    index |= summarize_shards(shards, max_corrupt_share)
    if isinstance(vae, LatentAutoencoderMixin):
        mean, std = (torch.tensor(index["statistics"][name]).view(vae.latents_mean.shape) for name in ("mean", "std"))
        vae.set_latent_statistics(mean, std)
    if accelerator.is_main_process:
        part = folder / "tokenizer.part"
        vae.save_pretrained(part)
        shutil.rmtree(folder / "tokenizer", ignore_errors=True)
        part.rename(folder / "tokenizer")
        _write_json(folder / INDEX, index)  # last: its "splits" mark the cache as complete
    accelerator.wait_for_everyone()
    return index


def _check_same(folder, index):
    """Refuse to mix shards of different tokenizers or data."""
    if not (folder / INDEX).exists():
        return
    if not is_latent_cache(folder):
        raise ValueError(f"output_dir {str(folder)!r} is no folder for latents: its {INDEX} belongs to something else")
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
    """What must be equal for shards to belong together; of the data their content, not their location."""
    settings = {name: value for name, value in sorted(index["settings"].items()) if name != "dataset_name"}
    classes = {f"class {label}": name for label, name in (index.get("id2label") or {}).items()}
    content = {f"the content of {split}": value for split, value in index.get("content", {}).items()}
    return {**index["fingerprint"], **settings, **classes, **content}


def _write_json(path, content):
    atomic_write(path, json.dumps(content, indent=1) + "\n")


class _Rows(Dataset):
    """The rows of a split by index: examples, or `(row_id, kind)` where a row is corrupt."""

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

    def __getitem__(self, index):
        row_id = self.row_ids[index]
        try:
            row = self.rows[index]
            group = {GROUP: str(row[self.data.args.balance_column])} if GROUP in self.schema.names else {}
            return {**self.data.example(row), "row_ids": row_id, **group}
        except CorruptRow as error:
            return row_id, error.kind


def _collate(examples):
    """The good examples as one batch, their images stacked, and the list of corrupt rows."""
    good = [example for example in examples if isinstance(example, dict)]
    batch = {name: [example[name] for example in good] for name in (good[0] if good else ())}
    if good:
        batch["pixel_values"] = torch.stack(batch["pixel_values"])
    return batch, [example for example in examples if isinstance(example, tuple)]


class _Encoder:
    """Encodes images, or their cached features, and captions."""

    def __init__(self, vae, accelerator, features, captions):
        self.accelerator, self.features, self.captions = accelerator, features, captions
        self.vae = vae.eval()
        self.statistics_shape = latent_statistics(vae)[0].shape
        self.is_deterministic = isinstance(vae, LatentAutoencoderMixin) and vae.is_deterministic
        if isinstance(vae, LatentAutoencoderMixin):  # with these, `encode` returns the unnormalised posterior
            vae.set_latent_statistics(torch.zeros_like(vae.latents_mean), torch.ones_like(vae.latents_std))

    @torch.no_grad()
    def moments(self, split, batch, mirrored):
        """Posterior moments (B, 2C, h, w) in float16."""
        device = self.accelerator.device
        with self.accelerator.autocast():
            if self.features is None:
                images = batch["pixel_values"].to(device)
                posterior = self.vae.encode(images.flip(-1) if mirrored else images).latent_dist
            else:
                maps = self.features.read(split, batch["row_ids"], [mirrored] * len(batch["row_ids"]))
                features, grid = frozen_features(self.vae, {"features": maps.to(device)})
                posterior = self.vae.encode_features(features, grid).latent_dist
        moments = torch.cat([posterior.mean, posterior.logvar], dim=1).half()  # logvar is clamped to [-30, 20]
        check_finite("moments in float16", moments)
        return moments

    @torch.no_grad()
    def caption_embeds(self, texts):
        """Embeddings as bytes, one cell per text."""
        with self.accelerator.autocast():
            embeds = self.captions(texts)
        check_finite("embeddings in float16", embeds.half())
        return pack_embeds(embeds)


def _write_shards(missing, rows, encoder, batch_size, *, num_workers, max_corrupt_share):
    """Encode and write this process's shards; a signal ends all processes after their current one."""
    accelerator = encoder.accelerator
    shards = missing[accelerator.process_index :: accelerator.num_processes]
    count, is_main = sum(len(shard.indices) for shard in shards), accelerator.is_main_process
    progress = tqdm(total=count, disable=not is_main, desc="encoding", unit="row")
    with StopSignals("the current shard", announce=is_main) as signals:
        for split in SPLITS:
            report, rows_read = CorruptionReport(), 0
            todo = [shard for shard in shards if shard.split == split]
            batches = [batch for shard in todo for batch in shard.batches(batch_size)]
            options = {"num_workers": num_workers, "worker_init_fn": ignore_signals}
            loader = iter(DataLoader(rows[split], batch_sampler=batches, collate_fn=_collate, **options))
            for shard in todo:
                writing = shard.path, rows[split].schema, encoder.statistics_shape, encoder.is_deterministic
                with ShardWriter(*writing) as writer:
                    for indices in shard.batches(batch_size):
                        batch, corrupt = next(loader)
                        if batch:
                            if encoder.captions is not None:
                                batch[CAPTION_EMBEDS] = encoder.caption_embeds(batch["captions"])
                            moments = {}
                            for copy in rows[split].copies:
                                moments[copy] = encoder.moments(split, batch, mirrored=copy == COPIES[1])
                            writer.write(batch, moments)
                        writer.corrupt += corrupt
                        report.add(corrupt)
                        rows_read += len(indices)
                        report.check(rows_read, max_corrupt_share, len(rows[split]))
                        progress.update(len(indices))
                signals.check()
        if len(shards) < len(missing[:: accelerator.num_processes]):  # the others have one more
            signals.check()
    progress.close()
