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


__all__ = ["COMMANDS", "FORWARDING", "main", "make_parser"]

COMMANDS = {
    "generate": "generate images of classes or texts, in one labelled grid or single files",
    "reconstruct": "show images next to their reconstructions by a tokenizer",
    "inspect": "list the parts, shapes and parameter counts of a model",
    "demo": "serve pipelines in the browser: generate, reconstruct, compare patches",
    "train": "train a generator on a folder of images in one command, resumable",
    "zoo": "list the published weights that load by name",
    "completion": "print a script that completes commands and flags in a shell",
    "convert": "convert published weights to a folder of ours, or a saved model to its published layout",
    "evaluate": "measure a pipeline or a tokenizer, see docs/guides/evaluate.md",
}
FORWARDING = {"evaluate"}


def main(argv: list[str] | None = None) -> None:
    """Run a command. Bad input exits with code 2 and one sentence on standard error, before anything is written."""
    argv = [expand_home(str(argument)) for argument in (sys.argv[1:] if argv is None else argv)]
    parser, parsers = make_parser()
    if argv[:1] and argv[0] in COMMANDS:
        command = import_module(f".{argv[0]}", __package__)
        if argv[0] in FORWARDING:
            run = partial(command.run, argv[1:])
        else:
            command.add_arguments(parsers[argv[0]])
            run = partial(command.run, parser.parse_args([_with_dashes(argument) for argument in argv]))
            quieten_libraries()
    else:
        parser.parse_args(argv)  # prints the help, or the error, and exits
    command_line.run(run, "hf-fae")


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser and those of its commands, still without their arguments."""
    parser = _Parser(prog="hf-fae", description="Generate, reconstruct, inspect and evaluate with hf_fae models.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    return parser, {name: commands.add_parser(name, help=summary) for name, summary in COMMANDS.items()}


def _with_dashes(argument):
    """A flag with dashes between its words; underscores are accepted as well."""
    flag, equals, value = argument.partition("=")
    return f"{flag.replace('_', '-')}{equals}{value}" if flag.startswith("--") else argument


class _Parser(argparse.ArgumentParser):
    """argparse without the usage that it prints before each error."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message}\n")
