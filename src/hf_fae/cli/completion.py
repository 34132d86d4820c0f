"""`hf-fae completion SHELL`: a script that completes commands, flags, choices and files."""

import argparse
from importlib import import_module


# What stands for a path in the help of a flag.
PATHS = {"PATH_OR_ID", "FILE", "IMAGE", "DIR"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=["bash", "tcsh", "zsh"], help="the shell to complete in")


def run(args: argparse.Namespace) -> None:
    try:
        import shtab
    except ModuleNotFoundError as error:
        raise ValueError("completion needs shtab: pip install hf_fae[completion]") from error

    from . import FORWARDING, make_parser
    from .evaluate import TASKS

    parser, parsers = make_parser()
    for name, command in parsers.items():
        if name not in FORWARDING:
            import_module(f".{name}", __package__).add_arguments(command)
        for action in command._actions:  # argparse has no other way to them
            if action.metavar in PATHS:
                action.complete = shtab.FILE
    parsers["evaluate"].add_argument("task", choices=list(TASKS))
    print(shtab.complete(parser, shell=args.shell))
