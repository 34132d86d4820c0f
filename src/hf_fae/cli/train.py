"""`hf-fae train`: from a folder of images to a generator in one command; the same command resumes it."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of this command."""
    parser.add_argument("folder", help="images, in a sub-folder per class, or with captions, or neither")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; pass it again to resume")
    parser.add_argument(
        "--tokenizer", help="AutoencoderFAE to start from: Hub id or folder (default: the shipped one)"
    )
    parser.add_argument(
        "--recipe", choices=("folder_large", "folder_small"), help="default: folder_small below 5,000 images"
    )
    parser.add_argument(
        "--condition", choices=("classes", "captions", "none"), help="default: what all images of the folder have"
    )
    parser.add_argument("--crop", choices=("center", "lanczos", "pad"), help="default: pad, or center for squares")
    parser.add_argument("--image-encoder", "--image_encoder", help="frozen encoder of the tokenizer: Hub id or folder")
    parser.add_argument("--text-encoder", "--text_encoder", help="what embeds captions: Hub id or folder")
    parser.add_argument("--duration", type=float, default=1.0, help="factor of the recipe's steps (default: 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and noise (default: 0)")
    parser.add_argument("--dry-run", "--dry_run", action="store_true", help="print the plan, write nothing")


def run(args: argparse.Namespace) -> None:
    """Plan, and train."""
    from ..own_images.plan import Request
    from ..own_images.run import train_folder

    values = {name: value for name, value in vars(args).items() if name in Request.__dataclass_fields__}
    train_folder(Request(**values), args.output, args.dry_run)
