"""`hf-fae zoo | convert`: what is published, and published weights into ours and back."""

import argparse
import json
from dataclasses import asdict
from pathlib import Path

from ..zoo import ZOO


__all__ = ["add_commands"]

DTYPES = ["float32", "bfloat16", "float16"]


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the two commands to the parsers of `hf-fae`."""
    zoo = commands.add_parser("zoo", help="list the published weights that load by name")
    zoo.add_argument("--json", action="store_true", help="print JSON, with files and settings")
    zoo.set_defaults(run=_zoo)

    convert = commands.add_parser(
        "convert", help="write published weights as a folder of ours, or the other way round"
    )
    convert.add_argument("source", metavar="NAME|DIR", help="name in `hf-fae zoo`; with --export, a saved model")
    target = convert.add_mutually_exclusive_group(required=True)
    target.add_argument("--output", type=Path, metavar="DIR", help="folder to write for from_pretrained, new or empty")
    target.add_argument("--export", type=Path, metavar="FILE", help="write the model in DIR in its published layout")
    convert.add_argument(
        "--files", type=Path, metavar="DIR", help="folder with the published files, instead of the Hub"
    )
    convert.add_argument("--dtype", choices=DTYPES, help="of the weights written (default: as published)")
    convert.add_argument("--push_to_hub", metavar="ID", help="push the folder to this Hub repository")
    convert.set_defaults(run=_convert)


def _zoo(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps({name: {**asdict(entry), "address": entry.address} for name, entry in ZOO.items()}, indent=2))
        return
    rows = [("name", "figure", "licence", "published at")]
    for name, entry in ZOO.items():
        rows.append((name, entry.figure or "", entry.license or "none stated", entry.address))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())


def _convert(args: argparse.Namespace) -> None:
    import torch

    from ..hub import push_folder
    from .export import export_model
    from .published import convert_published

    dtype = args.dtype and getattr(torch, args.dtype)
    if args.export is not None:
        for name in ("files", "push_to_hub"):
            if getattr(args, name) is not None:
                raise ValueError(f"--{name} must not be given with --export, got {str(getattr(args, name))!r}")
        paths = export_model(args.source, args.export, dtype)
        print(f"wrote {', '.join(map(str, paths))}")
        return
    if args.push_to_hub is not None and args.source in ZOO and ZOO[args.source].license is None:
        raise ValueError(f"--push_to_hub must not be given for {args.source}, whose weights have no stated licence")
    convert_published(args.source, args.output, args.files, dtype)
    print(f"wrote {args.output}")
    if args.push_to_hub is not None:
        print(f"pushed to {push_folder(args.output, args.push_to_hub).repo_url}")
