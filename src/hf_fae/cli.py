"""`hf-fae generate | reconstruct | inspect | demo | evaluate | zoo | convert`: the package from the command line."""

import argparse
import json
import os
import sys
import warnings
from pathlib import Path

import torch

from .convert.cli import add_commands
from .evaluation.options import DTYPES


__all__ = ["main"]

TEXT_ENCODER_HELP = "the text encoder, for pipelines that read texts and come without it"


def main(argv: list[str] | None = None) -> None:
    """Run a command. On bad input exits with code 2 after one sentence on standard error; nothing is written then."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    parser = _parser()
    argv = sys.argv[1:] if argv is None else argv
    # A task has its own arguments, `--help` among them.
    args = argparse.Namespace(run=_evaluate, argv=argv[1:]) if argv[:1] == ["evaluate"] else parser.parse_args(argv)
    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        parser.error(" ".join(str(error).split()))


class _Parser(argparse.ArgumentParser):
    """argparse, which would print the usage before each error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="hf-fae", description="Generate, reconstruct and inspect with hf_fae models.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="draw samples of classes or texts into one labelled picture")
    _add_model_arguments(generate, "folder or Hub id of a pipeline")
    what = generate.add_mutually_exclusive_group(required=True)
    what.add_argument("--class", dest="class_labels", nargs="+", metavar="NAME_OR_ID", help="classes to draw")
    what.add_argument("--prompt", nargs="+", metavar="TEXT", help="texts to draw, each in quotation marks")
    generate.add_argument(
        "--num-images-per-prompt", type=_positive, default=1, metavar="N", help="samples per class or text"
    )
    generate.add_argument("--text_encoder", metavar="PATH_OR_ID", help=TEXT_ENCODER_HELP)
    generate.add_argument("--num-inference-steps", type=_positive, metavar="N", help="default: the pipeline's own")
    generate.add_argument("--guidance-scale", type=float, metavar="SCALE", help="default: the pipeline's own")
    generate.add_argument("--seed", type=int, default=0, help="of the first picture; the others count on (default: 0)")
    generate.set_defaults(run=_generate)

    reconstruct = commands.add_parser("reconstruct", help="put pictures beside what a tokenizer makes of them")
    _add_model_arguments(reconstruct, "folder or Hub id of a tokenizer, or of a pipeline that has one")
    reconstruct.add_argument(
        "images", nargs="+", type=Path, metavar="IMAGE", help="picture files of any mode and size"
    )
    reconstruct.add_argument(
        "--encoder", metavar="PATH_OR_ID", help="the frozen encoder, for a checkpoint that comes without it"
    )
    reconstruct.set_defaults(run=_reconstruct)

    inspect = commands.add_parser("inspect", help="list the parts, shapes and parameter counts of a model")
    inspect.add_argument("model", metavar="PRESET|PATH", help="name of a preset, or a folder with a model or pipeline")
    inspect.add_argument("--json", action="store_true", help="print JSON")
    inspect.set_defaults(run=_inspect)

    demo = commands.add_parser("demo", help="show pipelines in the browser: draw, reconstruct, compare patches")
    demo.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="PATH_OR_ID",
        help="folders or Hub ids of pipelines (default: those in the environment variable "
        "HF_FAE_MODELS, else those in checkpoints/ of the clone)",
    )
    demo.add_argument(
        "--image_encoder", metavar="PATH_OR_ID", help="the frozen encoder, for pipelines that come without it"
    )
    demo.add_argument("--text_encoder", metavar="PATH_OR_ID", help=TEXT_ENCODER_HELP)
    demo.add_argument("--host", metavar="ADDRESS", help="where to listen (default: 127.0.0.1)")
    demo.add_argument("--port", type=_positive, help="default: the first free one from 7860")
    demo.set_defaults(run=_demo)

    add_commands(commands)
    commands.add_parser("evaluate", help="measure a pipeline or a tokenizer, see docs/evaluation.md", add_help=False)
    return parser


def _add_model_arguments(parser: argparse.ArgumentParser, help: str) -> None:
    device = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    parser.add_argument("--model", required=True, metavar="PATH_OR_ID", help=help)
    parser.add_argument("--output", required=True, type=_png, metavar="PNG", help="where to write the picture")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision (default: float32)")
    parser.add_argument("--device", type=_device, default=device, help="where to compute (default here: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"must be a positive whole number, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.empty(0, device=text).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here: {str(error).splitlines()[0]}") from error


def _png(text: str) -> Path:
    """A file that can be written, as is known before any work is done."""
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"must end in .png, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"lies in the folder {str(path.parent)!r}, which does not exist")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written")
    return path


def _generate(args: argparse.Namespace) -> None:
    from diffusers import DiffusionPipeline

    from .images import make_grid
    from .loading import complete_text_encoder, loading
    from .pipelines.latent_pipeline import LatentPipeline

    with loading("--model", args.model):
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=DTYPES[args.dtype]).to(args.device)
    if not isinstance(pipe, LatentPipeline):
        raise ValueError(f"--model {args.model!r} is a {type(pipe).__name__}, which is no pipeline of hf_fae")
    if (args.prompt is not None) != pipe.reads_text:
        draws = "texts: use --prompt" if pipe.reads_text else "classes: use --class"
        raise ValueError(f"--model {args.model!r} is a {type(pipe).__name__} that draws {draws}")
    options = {"guidance_scale": args.guidance_scale}
    if args.num_inference_steps is not None:
        if not hasattr(pipe, "scheduler"):
            raise ValueError(f"--num-inference-steps has no meaning for a {type(pipe).__name__}, got {args.model!r}")
        options["num_inference_steps"] = args.num_inference_steps
    if pipe.reads_text:
        complete_text_encoder(pipe, args.text_encoder)
        wanted = captions = args.prompt
    else:
        names = [int(name) if name.isdecimal() and name not in pipe.label2id else name for name in args.class_labels]
        wanted = pipe.label_ids(names, "--class")
        captions = [pipe.id2label.get(label, f"class {label}") for label in wanted]
    count = args.num_images_per_prompt
    wanted, captions = ([one for one in many for _ in range(count)] for many in (wanted, captions))
    # A generator of its own for each picture: it stays the same when others are added.
    generators = [torch.Generator().manual_seed(args.seed + index) for index in range(len(wanted))]
    images = pipe(wanted, generator=generators, **options).images
    make_grid(images, columns=count if count > 1 else None, labels=captions).save(args.output)
    print(f"wrote {len(images)} pictures to {args.output}")


def _reconstruct(args: argparse.Namespace) -> None:
    from diffusers.image_processor import VaeImageProcessor
    from tqdm import tqdm

    from .data.decoding import center_crop
    from .images import make_grid, to_pil
    from .latents import LatentAutoencoderMixin
    from .layers.positions import grid_size
    from .loading import open_tokenizer
    from .utils.image_metrics import feature_cosine, psnr

    pictures = [_read_picture(path) for path in args.images]
    vae = open_tokenizer(args.model, args.encoder, DTYPES[args.dtype]).to(args.device)
    if not isinstance(vae, LatentAutoencoderMixin):
        raise ValueError(f"--model {args.model!r} is a {type(vae).__name__}, which is no tokenizer of hf_fae")
    has_features = hasattr(vae, "decode_features")
    size = min(grid_size(vae.config.sample_size))
    processor = VaeImageProcessor(do_resize=False)
    sheet, captions, scores = [], [], []
    for path, picture in zip(tqdm(args.images, unit="picture"), pictures, strict=True):
        pixel_values = processor.preprocess(center_crop(picture, size)).to(args.device, vae.dtype)
        with torch.no_grad():
            if has_features:
                features, grid = vae.extract_features(pixel_values)
                latents = vae.encode_features(features, grid).latent_dist.mode()
                cosines = [feature_cosine(vae.decode_features(latents), vae.last_features(features))]
            else:
                latents, cosines = vae.encode(pixel_values).latent_dist.mode(), []
            sample = vae.decode(latents).sample
            scores.append((psnr(sample, pixel_values), *cosines))
        sheet += to_pil(pixel_values) + to_pil(sample)
        captions += [path.stem, f"{scores[-1][0]:.2f} dB"]
    make_grid(sheet, columns=2 * min(len(pictures), 4), labels=captions).save(args.output)

    rows = [(str(path), *score) for path, score in zip(args.images, scores, strict=True)]
    if len(rows) > 1:
        rows.append(("mean", *torch.tensor(scores).mean(dim=0)))
    width = max(len(name) for name, *_ in rows)
    for name, decibel, *cosines in rows:
        print(f"{name:{width}}  PSNR {decibel:6.2f} dB", *(f" feature cosine {cosine:.4f}" for cosine in cosines))
    print(f"wrote {args.output}")


def _read_picture(path: Path):
    from .data.decoding import decode_image

    try:
        return decode_image(path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"IMAGE {str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error


def _evaluate(args: argparse.Namespace) -> None:
    from .evaluation.commands import TASKS, evaluate

    task, *arguments = args.argv or ["--help"]
    if task in ("-h", "--help"):
        width = max(map(len, TASKS))
        print("usage: hf-fae evaluate TASK --model PATH_OR_ID --output_dir FOLDER ... (TASK --help has the rest)\n")
        print("\n".join(f"  {task:{width}}  {help}" for task, help in TASKS.items()))
    else:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_: print(f"hf-fae: warning: {message}", file=sys.stderr)
            evaluate(task, arguments)


def _demo(args: argparse.Namespace) -> None:
    try:
        from . import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the demo needs gradio: pip install hf_fae[demo]") from error
    app.main(args.model, args.image_encoder, args.text_encoder, args.host, args.port)


def _inspect(args: argparse.Namespace) -> None:
    from .inspection import inspect

    report = inspect(args.model)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        _print_report(report)


def _print_report(report: dict, indent: str = "") -> None:
    print(f"{indent}{report['name']}: {report['class']}")
    rows = [(part, count, "") for part, count in report["parameters"].items() if report["parameters"]["total"]]
    rows += [(part, count, "  frozen, not in the total") for part, count in report.get("frozen", {}).items()]
    width = max((len(part) for part, _, _ in rows), default=0)
    for part, count, remark in rows:
        print(f"{indent}  {part:{width}}  {count:>13,}  {count / 1e6:9.2f} M{remark}")
    for name, shape in report.get("shapes", {}).items():
        print(f"{indent}  {name}: {' x '.join(map(str, shape))}")
    for variant, summary in report.get("weights", {}).items():
        dtypes = ", ".join(f"{count:,} {dtype}" for dtype, count in summary["elements"].items())
        print(f"{indent}  weights{f' ({variant})' if variant else ''}: {summary['tensors']} tensors, {dtypes}")
    for component in report.get("components", {}).values():
        _print_report(component, indent + "  ")


if __name__ == "__main__":
    main()
