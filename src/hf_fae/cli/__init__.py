"""`hf-fae COMMAND ...`: the command line. Each command is a module of this package, imported when it runs.

A module has `run(args)` and `add_arguments(parser)`. One whose name is in `FORWARDING` parses its own command line,
`--help` included: it has `run(argv)` alone. Libraries are imported in `run`, so that help and errors come at once.
"""

import argparse
import sys
from functools import partial
from importlib import import_module

from .. import __version__
from ..utils import command_line
from ..utils.home import expand_home
from .verbosity import quieten_libraries


__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "generate": "generate images of classes or texts, in one labelled grid",
    "reconstruct": "show images next to their reconstructions by a tokenizer",
    "inspect": "list the parts, shapes and parameter counts of a model",
    "demo": "serve pipelines in the browser: generate, reconstruct, compare patches",
    "train": "train a generator on a folder of images in one command, resumable",
    "zoo": "list the published weights that load by name",
    "convert": "convert published weights to a folder of ours, or a saved model to its published layout",
    "evaluate": "measure a pipeline or a tokenizer, see docs/guides/evaluate.md",
}
FORWARDING = {"evaluate"}


def main(argv: list[str] | None = None) -> None:
    """Run a command. Bad input exits with code 2 and one sentence on standard error, before anything is written."""
    argv = [expand_home(str(argument)) for argument in (sys.argv[1:] if argv is None else argv)]
    parser = _Parser(prog="hf-fae", description="Generate, reconstruct, inspect and evaluate with hf_fae models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    parsers = {name: commands.add_parser(name, help=summary) for name, summary in COMMANDS.items()}
    if argv[:1] and argv[0] in COMMANDS:
        command = import_module(f".{argv[0]}", __package__)
        if argv[0] in FORWARDING:
            run = partial(command.run, argv[1:])
        else:
            command.add_arguments(parsers[argv[0]])
            run = partial(command.run, parser.parse_args(argv))
            quieten_libraries()
    else:
        parser.parse_args(argv)  # prints the help, or the error, and exits
    command_line.run(run, "hf-fae")


class _Parser(argparse.ArgumentParser):
    """argparse without the usage that it prints before each error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")
