"""`llm-ext summarize`: summarize lines with a summarizer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llm_ext.cli.commands.translate import add_line_command

if TYPE_CHECKING:
    from llm_ext.cli.commands.arguments import Commands

__all__ = ["add_parser"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    add_line_command(commands, "summarize", "summarize lines")
