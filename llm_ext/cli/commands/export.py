"""`llm-ext export`: write a trained model in the format of another library."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.commands.arguments import add_checkpoint, add_traceback
from llm_ext.cli.errors import CommandError

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "export",
        help="write a model for another library",
        description="Write a language model, a translator or a summarizer with its tokenizer to a folder that Hugging "
        "Face transformers loads, after `import llm_ext.hf`.",
    )
    parser.set_defaults(run=run, fail=parser.error)
    add_checkpoint(parser)
    parser.add_argument("--hf", type=Path, required=True, metavar="OUT", help="folder to write; new or empty")
    add_traceback(parser)


def run(options: argparse.Namespace) -> int:
    """Write the folder; return the exit code."""
    # Imported here, because transformers takes seconds.
    from transformers.utils import logging

    from llm_ext.cli.inference.hugging_face import export

    logging.disable_progress_bar()
    out: Path = options.hf
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise CommandError(f"{out}: must be a new or an empty folder")
    model = export(Run(options.dir), options.checkpoint, out)
    print(f"{out}: {type(model).__name__} and its tokenizer, for transformers with `import llm_ext.hf`")
    return 0
