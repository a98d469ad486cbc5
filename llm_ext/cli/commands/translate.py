"""`llm-ext translate`: translate lines with a translator."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import add_model, add_search, add_traceback, check_search, search_options, warn
from llm_ext.cli.data.files import check_files, decode_line, read_lines
from llm_ext.cli.device import find_device
from llm_ext.cli.inference.translator import Translator

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]

BATCH = 32


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "translate",
        help="translate lines",
        description="Translate the lines of files or of the standard input. At a terminal, or with --batch 1, each "
        "line is translated before the next one is read; without a beam its words are printed as they are found.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    parser.add_argument(
        "files", nargs="*", type=Path, metavar="FILE", help="lines to translate (default: standard input)"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help=f"lines translated together (default: {BATCH}; at a terminal 1)"
    )
    add_search(parser)
    parser.add_argument(
        "--num-return-sequences",
        type=int,
        default=1,
        metavar="N",
        help="translations to print for each line, best first; at most --beam (default: 1)",
    )
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Print the translation of each line; return the exit code."""
    check_search(options)
    check_files(options.files)
    translator = Translator.load(Run(options.dir), options.checkpoint, find_device(options.device))
    batch = options.batch or (1 if not options.files and sys.stdin.isatty() else BATCH)
    if batch == 1 and options.beam == 1:
        _stream(translator, _lines(options.files), options.max_length)
        return 0
    for targets in translator.translate_lines(_lines(options.files), batch, warn, search_options(options)):
        print("\n".join(targets), flush=True)
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
    """Translate one line at a time, printing each piece of text as it is found."""
    for where, line in lines:
        if line.strip():
            for piece in translator.stream(translator.encode(line.strip(), where, warn), max_length):
                print(piece, end="", flush=True)
        print(flush=True)
