"""Files: atomic writes, locks, JSON with a format name, input checks, lines of UTF-8 text."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import AcquireReturnProxy, FileLock

from llm_ext.cli.errors import CommandError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Key of the checksum in JSON files.
CHECKSUM = "checksum"
# Bytes of the largest JSON file: enough for the largest vocabulary.
LARGEST_JSON = 1 << 30

__all__ = [
    "atomic_write",
    "check_file",
    "check_files",
    "copy_pipes",
    "decode_line",
    "encode_name",
    "lock_directory",
    "make_directory",
    "read_json",
    "read_lines",
    "read_toml",
    "sync_directory",
    "write_json",
]


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that replaces `path` in one step, after all of it has reached the disk.

    On any error the previous file stays and the unfinished one is removed.

    Raises:
        OSError: The file cannot be written; the error names it.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        # An earlier process with this number may have left the file, or someone else a link.
        unfinished.unlink(missing_ok=True)
        with open(unfinished, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(unfinished)):
            error.filename, error.filename2 = str(path), None  # writes and flushes name no file
        raise


def make_directory(path: Path) -> None:
    """Create a directory and its parents, if they are missing, so that they survive a power failure."""
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        sync_directory(path.parent)


def lock_directory(path: Path, *, wait: bool) -> AcquireReturnProxy[FileLock]:
    """Lock a directory, which is created if it is missing, until the end of a `with` or `.lock.release()`.

    The system ends the lock with the process, however that ends.

    Args:
        path: The directory.
        wait: Wait for the process that has the lock.

    Raises:
        filelock.Timeout: Another process has the lock.
        OSError: The file of the lock cannot be opened, or is a link.
    """
    make_directory(path)
    return FileLock(path / ".lock").acquire(timeout=-1 if wait else 0)


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to the disk, so that new names survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a checksum of its contents, atomically."""
    text = json.dumps({**value, CHECKSUM: _checksum(value)}, indent=1, ensure_ascii=False)
    with atomic_write(path) as file:
        # A path that is not UTF-8 has surrogates, which the escapes of JSON can express.
        file.write(text.encode(errors="backslashreplace"))


def _checksum(value: Mapping[str, Any]) -> str:
    """Return a hash of JSON values that does not depend on how they are written."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path, kind: str, version: int = 1) -> dict[str, Any]:
    """Read a JSON object and check its format name and version.

    Args:
        path: The file.
        kind: Expected value of its key "format".
        version: Expected value of its key "version".

    Raises:
        CommandError: The file is missing, is not JSON, is damaged, or has another format or version.
    """
    check_file(path, f"a {kind}", LARGEST_JSON)
    try:
        value = json.loads(path.read_bytes())
        # Files of version 0.2 and before have no checksum. It may be too deep for a value that could just be read.
        checksum = value.pop(CHECKSUM, None) if isinstance(value, dict) else None
        whole = checksum is None or checksum == _checksum(value)
    except (ValueError, RecursionError) as error:
        raise CommandError(f"{path}: damaged: expected JSON, got something else ({error})") from None
    if not isinstance(value, dict) or value.get("format") != kind:
        raise CommandError(f"{path}: expected a {kind}, got a file of another program")
    if value.get("version") != version:
        raise CommandError(f"{path}: expected version {version} of a {kind}, got {value.get('version')!r}")
    if not whole:
        raise CommandError(f"{path}: damaged: its checksum differs from that of its contents")
    return value


def check_file(path: Path, expected: str, most: int | None = None) -> None:
    """Raise a CommandError unless `path` is a regular file of at most `most` bytes, which a pipe or a device is not."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise CommandError(f"{path}: no such file; expected {expected}") from None
    if not stat.S_ISREG(status.st_mode):
        raise CommandError(f"{path}: expected {expected}, got no regular file")
    if most is not None and status.st_size > most:
        raise CommandError(f"{path}: expected {expected} of at most {most:,} bytes, got {status.st_size:,}")


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        CommandError: The file is missing, or is not TOML.
    """
    check_files([path])
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CommandError(f"{path}: expected TOML, got something else: {error}") from None
    return values


def check_files(files: Sequence[Path]) -> None:
    """Raise a CommandError if a file is missing, is empty, or cannot hold text; pipes and terminals can."""
    for path in files:
        if not path.exists():
            raise CommandError(f"{path}: no such file")
        if not (path.is_file() or path.is_fifo() or path.is_char_device()):
            got = "a directory" if path.is_dir() else "something else"
            raise CommandError(f"{path}: expected a text file, got {got}")
        if path.is_file() and path.stat().st_size == 0:
            raise CommandError(f"{path}: expected text, got an empty file")


def copy_pipes(files: Sequence[Path], directory: Path) -> list[Path]:
    """Return the files, each pipe replaced by a copy of its text, which can be read more than once.

    Args:
        files: Files that `check_files` has accepted.
        directory: Directory of the copies. The name of a copy depends on the text.

    Raises:
        CommandError: A pipe is empty.
    """
    copies = []
    for path in files:
        copy = path
        if not path.is_file():
            make_directory(directory)
            sha = hashlib.sha256()
            unfinished = directory / f".{os.getpid()}.unfinished"
            with open(path, "rb") as pipe, atomic_write(unfinished) as file:
                while block := pipe.read(1 << 20):
                    sha.update(block)
                    file.write(block)
            copy = directory / f"{sha.hexdigest()[:16]}.txt"
            os.replace(unfinished, copy)
            if copy.stat().st_size == 0:
                copy.unlink()
                raise CommandError(f"{path}: expected text, got an empty pipe")
        copies.append(copy)
    return copies


def encode_name(name: str) -> bytes:
    """Return the bytes of a name that may come from a path, and so have surrogates for bytes that are not UTF-8."""
    return name.encode(errors="surrogatepass")


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, starting at 1.

    Raises:
        CommandError: A line is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, decode_line(line, f"{path}: line {number}")


def decode_line(line: bytes, where: str) -> str:
    """Return the text of a line without its line ending and without a byte order mark.

    Args:
        line: The bytes of the line.
        where: File and line number, for the error message.

    Raises:
        CommandError: The line is not UTF-8.
    """
    try:
        return line.decode().removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        got = f"{line[error.start : error.start + 1]!r} at byte {error.start} of the line"
        raise CommandError(f"{where}: expected UTF-8, got {got}") from None
