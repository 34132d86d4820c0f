"""Command lines as dataclasses, filled from a YAML file and from flags."""

import sys
from dataclasses import asdict

import yaml
from transformers import HfArgumentParser


__all__ = ["parse_arguments"]


def parse_arguments(
    *dataclass_types: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple:
    """Fill dataclasses from `--config FILE.yaml` and from flags, which win; both know the same names.

    Args:
        dataclass_types: dataclasses whose field names do not overlap.
        argv: the command line without the program's name; by default that of the process.
        description, prog: what `--help` says of the program, and its name.

    Returns:
        One instance of each dataclass, then a dict of all their values.

    Raises:
        SystemExit: unknown or missing arguments, or values of the wrong type (argparse's message).
    """
    parser = HfArgumentParser(dataclass_types, description=description, prog=prog)
    parser.add_argument("--config", help="YAML file of arguments; flags on the command line win.")
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = HfArgumentParser((), add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        # Put before the flags as if they had been typed: the same checks and conversions, and the later one wins.
        with open(path) as file:
            try:
                values = yaml.safe_load(file) or {}
            except yaml.YAMLError as error:
                parser.error(f"--config {path}: the file must be YAML: {' '.join(str(error).split())}")
        if not isinstance(values, dict):
            parser.error(f"--config {path}: the file must hold a mapping of arguments, not {type(values).__name__}")
        typed = []
        for name, value in values.items():
            if value is not None and value != []:
                typed += [f"--{name}", *(str(item) for item in (value if isinstance(value, list) else [value]))]
        argv = typed + argv
    *parsed, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return *parsed, {name: value for group in parsed for name, value in asdict(group).items()}
