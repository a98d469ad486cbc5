"""Reading and writing so that a kill, a full disk or a strange file does no harm."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from llm_ext.text.errors import TextError


@contextlib.contextmanager
def beside(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes the place of `path` in one moment, when everything has been written to the disk.

    On any error what stood at `path` stays, and the unfinished file goes.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory survive a loss of power."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: object) -> None:
    """Write JSON in the place of `path`, in one moment."""
    with beside(path) as file:
        file.write(json.dumps(value, indent=1, ensure_ascii=False).encode())


def read_json(path: Path, kind: str, version: int = 1) -> dict[str, Any]:
    """Read a JSON object that says of itself that it is a `kind` of this or an earlier version.

    Raises:
        TextError: the file is missing, is no JSON, or is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise TextError(f"{path}: no such file; expected a {kind}") from None
    except ValueError as error:
        raise TextError(f"{path}: damaged: expected JSON, got something else ({error})") from None
    if not isinstance(value, dict) or value.get("format") != kind:
        raise TextError(f"{path}: expected a {kind}, got a file of another program")
    if value.get("version") != version:
        raise TextError(f"{path}: expected version {version} of a {kind}, got {value.get('version')!r}")
    return value
