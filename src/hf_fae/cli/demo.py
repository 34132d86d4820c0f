"""`hf-fae demo`: pipelines in the browser."""

import argparse

from .argument_types import TEXT_ENCODER_HELP, port


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        nargs="+",
        action="extend",
        metavar="PATH_OR_ID",
        help="folders or Hub ids of pipelines (default: those in the environment variable HF_FAE_MODELS, else those "
        "in checkpoints/ of the clone)",
    )
    parser.add_argument(
        "--image-encoder", metavar="PATH_OR_ID", help="the frozen encoder, for pipelines that were saved without it"
    )
    parser.add_argument("--text-encoder", metavar="PATH_OR_ID", help=TEXT_ENCODER_HELP)
    parser.add_argument("--host", metavar="ADDRESS", help="address to listen on (default: 127.0.0.1)")
    parser.add_argument("--port", type=port, help="default: the first free one from 7860")


def run(args: argparse.Namespace) -> None:
    try:
        from .. import app
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ValueError("the demo needs gradio: pip install hf_fae[demo]") from error
    app.main(args.model, args.image_encoder, args.text_encoder, args.host, args.port)
