"""`hf-fae generate`: images of classes or texts, in one labelled grid or each in a file of its own."""

import argparse
from dataclasses import dataclass
from typing import Any

from .argument_types import check_limits
from .generation_settings import add_settings, make_record, resolve_settings
from .image_records import check_record, read_record, write_image
from .output_files import file_names, output, writes_several


@dataclass
class Sample:
    """One image: `condition` and `negative` are a class id or a text, `negative` None is the pipeline's default."""

    name: str
    condition: int | str
    negative: int | str | None
    seed: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--from", dest="source", metavar="IMAGE", help="repeat an image of hf-fae generate, with other flags if given"
    )
    add_settings(parser)
    parser.add_argument(
        "--output",
        required=True,
        type=output,
        metavar="FILE",
        help="PNG, WebP or JPEG by its ending; a folder, or a name with {name}, {seed} or {index}, for single images",
    )
    parser.add_argument(
        "--grid",
        action=argparse.BooleanOptionalAction,
        help="one labelled grid, or single images without labels (default: single ones for a folder or pattern)",
    )
    parser.add_argument("--no-limits", action="store_true", help="allow any number of steps and images")


def run(args: argparse.Namespace) -> None:
    from ..images import make_grid

    record = {} if args.source is None else read_record(args.source)
    settings = resolve_settings(args, record, args.source)
    grid = _writes_grid(args, record)
    count = settings["num-images-per-prompt"]
    num_images = count * len(settings.get("class") or settings["prompt"])
    check_limits(settings.get("num-inference-steps"), num_images, args.no_limits)
    if settings["seed"] + num_images > 2**63:
        raise ValueError(f"--seed must leave room for {num_images} seeds below 2^63, got {settings['seed']}")
    pipe = _open_pipeline(settings)
    samples, options = _samples(pipe, settings), _options(pipe, settings)
    if grid:
        files, records = [args.output], [make_record(settings, grid)]
    else:
        files = file_names(args.output, [sample.name for sample in samples], [sample.seed for sample in samples])
        records = [make_record(settings, grid, **_alone(pipe, sample)) for sample in samples]
    for record, file in zip(records, files, strict=True):
        check_record(record, file)
    args.output.parent.mkdir(exist_ok=True)  # a folder is named before it exists
    if grid:
        images = _generate(pipe, samples, options)
        captions, notes = [sample.name for sample in samples], [f"seed {sample.seed}" for sample in samples]
        image = make_grid(images, columns=count if count > 1 else None, labels=captions, notes=notes)
        write_image(image, args.output, records[0])
    else:  # one at a time: a batch may round differently, and each image is to be repeated alone
        for sample, file, record in zip(samples, files, records, strict=True):
            write_image(_generate(pipe, [sample], options)[0], file, record)
    place = files[0] if len(files) == 1 else args.output.parent
    print(f"wrote {num_images} image{'s' if num_images > 1 else ''} to {place}")


def _writes_grid(args, record):
    if writes_several(args.output):
        if args.grid:
            raise ValueError(f"--output must be the name of one file with --grid, got {str(args.output)!r}")
        return False
    return record.get("grid", True) is True if args.grid is None else args.grid


def _open_pipeline(settings):
    """The pipeline with its LoRA and text encoder; the commit of a Hub id becomes the setting `revision`."""
    import torch

    from ..loading import complete_text_encoder, hub_commit, loading, open_pipeline

    path, lora, revision = settings["model"], settings.get("lora"), settings.get("revision")
    pipe = open_pipeline("--model", path, getattr(torch, settings["dtype"]), revision)
    reads_text = "prompt" in settings or "negative-prompt" in settings
    reads_classes = "class" in settings or "negative-class" in settings
    if reads_classes if pipe.reads_text else reads_text:
        flag, others = ("prompt", "texts") if pipe.reads_text else ("class", "classes")
        raise ValueError(f"--model {path!r} is a {type(pipe).__name__} that generates from {others}: use --{flag}")
    if commit := hub_commit(path, revision):
        settings["revision"] = commit
    complete_text_encoder(pipe, settings.get("text-encoder"))
    if lora is not None:
        with loading("--lora", lora):
            pipe.load_lora_weights(lora, adapter_name="lora")
        pipe.set_adapters("lora", settings["lora-scale"])
    return pipe.to(settings["device"])


def _samples(pipe, settings):
    if pipe.reads_text:
        names = conditions = settings["prompt"]
        negatives = settings.get("negative-prompt")
    else:
        conditions = _class_ids(pipe, settings["class"], "--class")
        names = [pipe.id2label.get(label, f"class {label}") for label in conditions]
        negatives = settings.get("negative-class")
        negatives = negatives and _class_ids(pipe, negatives, "--negative-class")
    negatives = negatives or [None]
    if len(negatives) not in (1, len(conditions)):
        flag = "--negative-prompt" if pipe.reads_text else "--negative-class"
        raise ValueError(f"{flag} must be one or {len(conditions)} as there are conditions, got {len(negatives)}")
    if len(negatives) == 1:
        negatives = negatives * len(conditions)
    count = settings["num-images-per-prompt"]
    rows = [row for row in zip(names, conditions, negatives, strict=True) for _ in range(count)]
    return [Sample(*row, seed=settings["seed"] + index) for index, row in enumerate(rows)]


def _class_ids(pipe, names, flag):
    return pipe.label_ids(
        [int(name) if name.isdecimal() and name not in pipe.label2id else name for name in names], flag
    )


def _options(pipe, settings) -> dict[str, Any]:
    options = {"guidance_scale": settings.get("guidance-scale")}
    if "num-inference-steps" in settings:
        if not hasattr(pipe, "scheduler"):
            message = f"--num-inference-steps has no meaning for a {type(pipe).__name__}"
            raise ValueError(f"{message}, got {settings['model']!r}")
        options["num_inference_steps"] = settings["num-inference-steps"]
    return options


def _generate(pipe, samples, options):
    import torch

    # One random generator per image: an image stays the same when others are added.
    generators = [torch.Generator().manual_seed(sample.seed) for sample in samples]
    if samples[0].negative is not None:
        name = "negative_prompt" if pipe.reads_text else "negative_class_labels"
        options = {**options, name: [sample.negative for sample in samples]}
    return pipe([sample.condition for sample in samples], generator=generators, **options).images


def _alone(pipe, sample):
    """The settings that repeat one image by itself."""
    kind = "prompt" if pipe.reads_text else "class"
    values = {kind: sample.condition} | ({} if sample.negative is None else {f"negative_{kind}": sample.negative})
    if not pipe.reads_text:  # by name, which stays when numbers change; a name of two classes is that of the first
        for key, label in values.items():
            name = pipe.id2label.get(label)
            values[key] = name if pipe.label2id.get(name) == label else str(label)
    return {**{key: [value] for key, value in values.items()}, "seed": sample.seed, "num_images_per_prompt": 1}
