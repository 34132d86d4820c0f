"""`hf-fae convert`: published weights to a folder of ours, or a saved model to its published layout."""

import argparse
from pathlib import Path

from ..evaluation.options import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="NAME|DIR", help="name in `hf-fae zoo`; with --export, a saved model")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="DIR", help="folder to write for from_pretrained, new or empty")
    target.add_argument("--export", type=Path, metavar="FILE", help="write the model in DIR in its published layout")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="folder with the published files, instead of the Hub"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as published)")
    parser.add_argument("--push-to-hub", metavar="ID", help="push the folder to this Hub repository")


def run(args: argparse.Namespace) -> None:
    import torch

    from ..convert.export import export_model
    from ..convert.published import convert_published
    from ..hub import push_folder
    from ..zoo import ZOO

    dtype = args.dtype and getattr(torch, args.dtype)
    if args.export is not None:
        for name in ("files", "push_to_hub"):
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name.replace('_', '-')} must not be given with --export, got {str(getattr(args, name))!r}"
                )
        paths = export_model(args.source, args.export, dtype)
        print(f"wrote {', '.join(map(str, paths))}")
        return
    if args.push_to_hub is not None and args.source in ZOO and ZOO[args.source].license is None:
        raise ValueError(f"--push-to-hub must not be given for {args.source}, whose weights have no stated licence")
    convert_published(args.source, args.output, args.files, dtype)
    print(f"wrote {args.output}")
    if args.push_to_hub is not None:
        print(f"pushed to {push_folder(args.output, args.push_to_hub).repo_url}")
