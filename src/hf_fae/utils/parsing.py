"""Command lines as dataclasses, filled from a YAML file and from flags."""

import sys
from dataclasses import asdict

import yaml
from transformers import HfArgumentParser

from .home import expand_home


__all__ = ["parse_arguments"]

# Former names of arguments, which configs and command lines may still use.
RENAMED = {"max_damaged_share": "max_corrupt_share"}


def parse_arguments(
    *dataclass_types: type, argv: list[str] | None = None, description: str | None = None, prog: str | None = None
) -> tuple:
    """Fill dataclasses from `--config FILE.yaml` and from flags, which override it; both use the same names.

    Args:
        dataclass_types: dataclasses whose field names do not overlap.
        argv: the command line without the program's name; by default that of the process.
        description, prog: of the program, for `--help`.

    Returns:
        One instance of each dataclass, then a dict of all their values.

    Raises:
        SystemExit: unknown or missing arguments, or values of the wrong type (argparse's message).
    """
    parser = HfArgumentParser(dataclass_types, description=description, prog=prog)
    parser.add_argument("--config", help="YAML file of arguments; flags on the command line override it.")
    argv = list(sys.argv[1:] if argv is None else argv)
    finder = HfArgumentParser((), add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(argv)[0].config
    if path is not None:
        # Put before the flags as if typed: the same checks and conversions, and the last one counts.
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
    argv = [expand_home(_current_name(argument)) for argument in argv]
    *parsed, rest, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    return *parsed, {name: value for group in parsed for name, value in asdict(group).items()}


def _current_name(argument):
    """A flag under its current name; "--name=value" keeps its value, and dashes are as good as underscores."""
    flag, equals, value = argument.partition("=")
    name = flag.removeprefix("--").replace("-", "_")
    return f"--{RENAMED[name]}{equals}{value}" if flag.startswith("--") and name in RENAMED else argument
