"""Standard streams that are closed, or that stop to take output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

__all__ = ["drop_output", "open_closed_streams", "optional_output", "output_fails", "warn"]


def open_closed_streams() -> None:
    """Let output go nowhere where the caller has closed a stream, whose number a file would get otherwise.

    A closed `sys.stdin` stays None.
    """
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open to the end of the process


def output_fails() -> bool:
    """Return whether the standard output cannot be written."""
    try:
        sys.stdout.flush()
    except OSError:
        return True
    return False


def drop_output() -> None:
    """Let the standard output go nowhere, which Python would otherwise try to write once more at its end."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


@contextlib.contextmanager
def optional_output() -> Iterator[None]:
    """Go on without the standard output, and say so, if it cannot be written, as after `head -1` has read enough."""
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        drop_output()
        warn(f"standard output: {error.strerror}; the command goes on without it")


def warn(message: str) -> None:
    """Print a message on standard error, if that can be written."""
    with contextlib.suppress(OSError):
        print(f"llm-ext: {message}", file=sys.stderr, flush=True)
