"""The one exception for failures that a user caused or must know of."""

from __future__ import annotations


class TextError(Exception):
    """A failure whose message says, to the user, what was expected and what came."""
