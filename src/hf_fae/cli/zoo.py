"""`hf-fae zoo`: the published weights that load by name."""

import argparse
import json
from dataclasses import asdict


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON, with files and settings")


def run(args: argparse.Namespace) -> None:
    from ..zoo import ZOO

    if args.json:
        print(json.dumps({name: {**asdict(entry), "address": entry.address} for name, entry in ZOO.items()}, indent=2))
        return
    rows = [("name", "figure", "licence", "published at")]
    for name, entry in ZOO.items():
        rows.append((name, entry.figure or "", entry.license or "none stated", entry.address))
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        print("  ".join(f"{cell:{width}}" for cell, width in zip(row, widths)).rstrip())
