"""`hf-fae generate`: images of classes or texts, in one labelled grid."""

import argparse

import torch
from diffusers import DiffusionPipeline

from ..evaluation.options import DTYPES
from ..images import make_grid
from ..loading import complete_text_encoder, loading
from ..pipelines.latent_pipeline import LatentPipeline
from .argument_types import TEXT_ENCODER_HELP, add_model_arguments, positive


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
    parser.add_argument("--seed", type=int, default=0, help="of the first image; +1 for each further one (default: 0)")


def run(args: argparse.Namespace) -> None:
    with loading("--model", args.model):
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    if not isinstance(pipe, LatentPipeline):
        raise ValueError(f"--model {args.model!r} must be a pipeline of hf_fae, got a {type(pipe).__name__}")
    if (args.prompt is not None) != pipe.reads_text:
        conditions = "texts: use --prompt" if pipe.reads_text else "classes: use --class"
        raise ValueError(f"--model {args.model!r} is a {type(pipe).__name__} that generates from {conditions}")
    options = {"guidance_scale": args.guidance_scale}
    if args.num_inference_steps is not None:
        if not hasattr(pipe, "scheduler"):
            raise ValueError(f"--num-inference-steps has no meaning for a {type(pipe).__name__}, got {args.model!r}")
        options["num_inference_steps"] = args.num_inference_steps
    if pipe.reads_text:
        complete_text_encoder(pipe, args.text_encoder)
        conditions = captions = args.prompt
    else:
        names = [int(name) if name.isdecimal() and name not in pipe.label2id else name for name in args.class_labels]
        conditions = pipe.label_ids(names, "--class")
        captions = [pipe.id2label.get(label, f"class {label}") for label in conditions]
    count = args.num_images_per_prompt
    conditions, captions = ([item for item in items for _ in range(count)] for items in (conditions, captions))
    # One random generator per image: an image stays the same when others are added.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(conditions))]
    images = pipe(conditions, generator=generators, **options).images
    make_grid(images, columns=count if count > 1 else None, labels=captions).save(args.output)
    print(f"wrote {len(images)} image{'s' if len(images) > 1 else ''} to {args.output}")
