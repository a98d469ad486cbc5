"""`llm-ext translate`: translate lines with a translator; what it shares with `llm-ext summarize`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import (
    add_model,
    add_search,
    add_traceback,
    add_weights,
    check_search,
    round_weights,
    search_options,
)
from llm_ext.cli.data.files import check_files, decode_line, read_lines
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.translator import Translator
from llm_ext.cli.streams import warn

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_line_command", "add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    add_line_command(commands, "translate", "translate lines")


def add_line_command(commands: Commands, task: str, does: str) -> None:
    """Add a command that writes a line for each line with a model of a task.

    Args:
        commands: The command line.
        task: The task, which is also the name of the command.
        does: Its effect on lines, as an imperative.
    """
    parser = commands.add_parser(
        task,
        help=does,
        description=f"{does.capitalize()} of files or of the standard input: one line is written for each. At a "
        "terminal, or with --batch 1, each line is answered before the next one is read; without a beam its words are "
        "printed as they are found.",
    )
    parser.set_defaults(run=run, fail=parser.error, task=task)
    add_model(parser)
    add_weights(parser)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="lines to read; pipes too (default: standard input)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"lines read together (default: {BATCH}; at a terminal 1)"
    )
    add_search(parser)
    parser.add_argument(
        "--num-return-sequences",
        type=int,
        default=1,
        metavar="N",
        help="lines to write for each line, best first; at most --beam (default: 1)",
    )
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the line that the model writes for each line; return the exit code."""
    check_search(options)
    check_files(options.files)
    translator = Translator.load(Run(options.dir), options.checkpoint, find_device(options.device), options.task)
    if not options.files and sys.stdin is None:
        raise CommandError("the standard input is closed: give FILE")
    round_weights(options, translator.model)
    batch = options.batch or (1 if not options.files and sys.stdin.isatty() else BATCH)
    if batch == 1 and options.beam == 1 and not options.no_repeat_ngram_size:
        _stream(translator, _lines(options.files), options.max_length)
    else:
        for targets in translator.translate_lines(_lines(options.files), batch, warn, search_options(options)):
            print("\n".join(targets), flush=True)
    if translator.cuts:
        warn(f"lines cut to at most {translator.longest_source:,} tokens: {translator.cuts:,}")
    return 0


def _lines(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Yield where each line is from, and its text; without files, from the standard input."""
    for path in files:
        for number, line in read_lines(path):
            yield f"{path}: line {number}", line
    if not files:
        # Bytes, because the text is UTF-8 whatever the locale says.
        for number, raw in enumerate(iter(sys.stdin.buffer.readline, b""), 1):
            yield f"line {number}", decode_line(raw, f"line {number}")


def _stream(translator: Translator, lines: Iterator[tuple[str, str]], max_length: int | None) -> None:
    """Answer one line at a time, printing each piece of text as it is found."""
    for where, line in lines:
        if line.strip():
            for piece in translator.stream(translator.encode(line.strip(), where, warn), max_length):
                print(piece, end="", flush=True)
        print(flush=True)
