"""The exception for failures that the user can understand and fix."""

from __future__ import annotations

__all__ = ["CommandError"]


class CommandError(Exception):
    """A failure whose message tells the user what was expected and what was found."""
