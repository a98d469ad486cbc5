"""The parser of the command line."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llm_ext.cli.commands import eval, explain, export, generate, predict, summarize, train, translate, tune

__all__ = ["parse"]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; a wrong one exits the process with 2.

    Args:
        arguments: Arguments without the name of the program; None for those of this process.

    Returns:
        The options. Their `run` is the function that runs the command, `fail` reports a wrong command line and exits.
    """
    options, rest = _build_parser().parse_known_args(arguments)
    if rest and getattr(options, "files", None) == [] and not any(word.startswith("-") for word in rest):
        # Before Python 3.12 argparse accepts optional positional arguments only directly after DIR, before any option.
        options.files, rest = [Path(word) for word in rest], []
    if rest:
        options.fail(f"unrecognized arguments: {' '.join(rest)}")
    return options


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llm-ext",
        description="Train and use recurrent language models, translators, summarizers, classifiers and transcribers.",
        epilog="'llm-ext COMMAND --help' lists the options of a command.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in (train, tune, eval, generate, translate, summarize, predict, explain, export):
        command.add_parser(commands)
    return parser
