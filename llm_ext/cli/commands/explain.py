"""`llm-ext explain`: a picture of the attention of a model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import add_model, add_search, add_traceback, check_search, search_options, warn
from llm_ext.cli.device import find_device
from llm_ext.cli.errors import CommandError
from llm_ext.cli.inference.explanation import explain_language_model, explain_translation
from llm_ext.cli.inference.picture import draw
from llm_ext.cli.inference.translator import Translator

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "explain",
        help="draw the attention of a model",
        description="Draw attention weights: of a translator, between each word it writes and the words of the source; "
        "of a language model, between each word and the words before it.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_model(parser)
    parser.add_argument("--text", required=True, metavar="TEXT", help="text to read")
    parser.add_argument(
        "--target", metavar="TEXT", help="translator: translation to explain (default: that of the model)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write, .html or .png")
    add_search(parser)
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Write the picture and print its summary; return the exit code."""
    check_search(options)
    if options.out.suffix not in (".html", ".png"):
        options.fail(f"--out must end in .html or .png, got {options.out.name!r}")
    run_directory, device = Run(options.dir), find_device(options.device)
    if run_directory.checkpoint(options.checkpoint).task == "lm":
        if options.target is not None:
            raise CommandError(f"{run_directory.path}: holds a language model, which has no --target")
        model, tokenizer = run_directory.load_language_model(options.checkpoint)
        attention = explain_language_model(model.to(device), tokenizer, options.text)
    else:
        translator = Translator.load(run_directory, options.checkpoint, device)
        attention = explain_translation(translator, options.text, options.target, warn, search_options(options))
    draw(attention, options.out)
    print(f"{attention.summary}\nsaved in {options.out}")
    return 0
