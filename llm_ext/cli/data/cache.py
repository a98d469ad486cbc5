"""Encoded data on disk, which are used again only if they are whole."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from llm_ext.cli.data.files import atomic_write, check_file, make_directory, read_json, write_json
from llm_ext.cli.errors import CommandError

__all__ = ["CacheFile", "is_whole", "write_cache"]

FORMAT = "llm_ext cache"
# Bytes read at a time.
BLOCK = 1 << 20


class CacheFile:
    """A file to write, with the number of its bytes and their checksum."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.size, self.checksum = 0, 0

    def write(self, data: bytes) -> None:
        """Append bytes."""
        self._file.write(data)
        self.size += len(data)
        self.checksum = zlib.crc32(data, self.checksum)


@contextlib.contextmanager
def write_cache(*paths: Path) -> Iterator[list[CacheFile]]:
    """Open files that replace `paths` when all of them are complete; their checksums are in a file beside the first."""
    make_directory(paths[0].parent)
    with contextlib.ExitStack() as stack:
        files = [CacheFile(stack.enter_context(atomic_write(path))) for path in paths]
        yield files
    summary = {path.name: [file.size, file.checksum] for path, file in zip(paths, files, strict=True)}
    write_json(_summary(paths[0]), {"format": FORMAT, "version": 1, "files": summary})


def is_whole(*paths: Path) -> bool:
    """Return whether `paths` are what `write_cache` wrote, and none of them is empty."""
    try:
        expected = read_json(_summary(paths[0]), FORMAT).get("files")
        found = {path.name: _sum(path) for path in paths}
        return expected == found and all(size > 0 for size, _ in found.values())
    except (CommandError, OSError):
        return False


def _summary(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _sum(path: Path) -> list[int]:
    """Return the number of bytes of a file and their checksum."""
    check_file(path, "encoded text")
    size, checksum = 0, 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return [size, checksum]
