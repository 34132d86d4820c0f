"""`hf-fae generate`: images of classes or texts, in one labelled grid."""

import argparse

from .argument_types import TEXT_ENCODER_HELP, add_model_arguments, check_limits, positive, seed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser, "folder or Hub id of a pipeline")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--class", dest="class_labels", nargs="+", metavar="NAME_OR_ID", help="classes to generate")
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to generate from, each in quotation marks")
    parser.add_argument(
        "--num-images-per-prompt", type=positive, default=1, metavar="N", help="samples per class or text"
    )
    parser.add_argument("--text_encoder", metavar="PATH_OR_ID", help=TEXT_ENCODER_HELP)
    parser.add_argument("--num-inference-steps", type=positive, metavar="N", help="default: the pipeline's own")
    parser.add_argument("--guidance-scale", type=float, metavar="SCALE", help="default: the pipeline's own")
    parser.add_argument(
        "--seed", type=seed, default=0, help="of the first image; +1 for each further one (default: 0)"
    )
    parser.add_argument("--no-limits", action="store_true", help="allow any number of steps and images")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..images import make_grid, save_png
    from ..loading import complete_text_encoder, open_pipeline

    count = args.num_images_per_prompt
    num_images = count * len(args.class_labels or args.prompt)
    check_limits(args.num_inference_steps, num_images, args.no_limits)
    if args.seed + num_images > 2**63:
        raise ValueError(f"--seed must leave room for {num_images} seeds below 2^63, got {args.seed}")
    pipe = open_pipeline("--model", args.model, getattr(torch, args.dtype)).to(args.device)
    if (args.prompt is not None) != pipe.reads_text:
        conditions = "texts: use --prompt" if pipe.reads_text else "classes: use --class"
        raise ValueError(f"--model {args.model!r} is a {type(pipe).__name__} that generates from {conditions}")
    options = {"guidance_scale": args.guidance_scale}
    if args.num_inference_steps is not None:
        if not hasattr(pipe, "scheduler"):
            raise ValueError(f"--num-inference-steps has no meaning for a {type(pipe).__name__}, got {args.model!r}")
        options["num_inference_steps"] = args.num_inference_steps
    complete_text_encoder(pipe, args.text_encoder)
    if pipe.reads_text:
        conditions = captions = args.prompt
    else:
        names = [int(name) if name.isdecimal() and name not in pipe.label2id else name for name in args.class_labels]
        conditions = pipe.label_ids(names, "--class")
        captions = [pipe.id2label.get(label, f"class {label}") for label in conditions]
    conditions, captions = ([item for item in items for _ in range(count)] for items in (conditions, captions))
    # One random generator per image: an image stays the same when others are added.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(conditions))]
    images = pipe(conditions, generator=generators, **options).images
    save_png(make_grid(images, columns=count if count > 1 else None, labels=captions), args.output)
    print(f"wrote {len(images)} image{'s' if len(images) > 1 else ''} to {args.output}")
