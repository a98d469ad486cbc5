"""Atomic writes, locks and JSON files."""

from __future__ import annotations

import os
import sys
import threading
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
from filelock import Timeout
from support.process import CONTEXT

from llm_ext.cli import CommandError
from llm_ext.cli.data.cache import is_whole, write_cache
from llm_ext.cli.data.files import (
    atomic_write,
    check_files,
    copy_pipes,
    decode_line,
    lock_directory,
    read_json,
    write_json,
)


class Killed(BaseException):
    """Ends a call as if the process had been killed."""


def test_a_file_is_replaced_completely_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with atomic_write(path) as file:
            file.write(b"new")
            raise Killed

    with pytest.raises(Killed):
        fail()
    assert path.read_text() == "old"
    assert [*tmp_path.iterdir()] == [path]
    with atomic_write(path) as file:
        file.write(b"new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [*tmp_path.iterdir()] == [path]


def _hold_lock(directory: Path, sender: Connection) -> None:
    with lock_directory(directory, wait=True):
        sender.send("locked")
        threading.Event().wait()


def test_processes_take_turns_in_a_directory(tmp_path: Path) -> None:
    """The lock of a process that is killed is free, for one that waits, too."""
    directory = tmp_path / "new" / "directory"

    def start() -> tuple[ForkServerProcess, Connection]:
        receiver, sender = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_hold_lock, args=(directory, sender))
        process.start()
        return process, receiver

    first, said = start()
    assert said.recv() == "locked"
    with pytest.raises(Timeout):
        lock_directory(directory, wait=False)
    second, waiting = start()
    assert not waiting.poll(0.3)
    first.kill()
    assert waiting.recv() == "locked"
    second.kill()
    with lock_directory(directory, wait=True), pytest.raises(Timeout):
        lock_directory(directory, wait=False)
    lock_directory(directory, wait=False).lock.release()


def test_json_has_a_format_and_a_version(tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    write_json(path, {"format": "poem", "version": 1, "text": "ä"})
    assert read_json(path, "poem")["text"] == "ä"
    with pytest.raises(CommandError, match=r"file.json: expected a song, got a file of another program"):
        read_json(path, "song")
    with pytest.raises(CommandError, match=r"file.json: expected version 2 of a poem, got 1"):
        read_json(path, "poem", 2)


def test_pipes_become_files(tmp_path: Path) -> None:
    file, cache = tmp_path / "file", tmp_path / "cache"
    file.write_text("some text")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for text in (b"one\n" * 50_000, b"two", b""):
        thread = threading.Thread(target=pipe.write_bytes, args=(text,))
        thread.start()
        check_files([file, pipe])
        if text:
            same, copy = copy_pipes([file, pipe], cache)
            assert (same, copy.parent, copy.read_bytes()) == (file, cache, text)
        else:
            with pytest.raises(CommandError, match="expected text, got an empty pipe"):
                copy_pipes([file, pipe], cache)
        thread.join()
    assert len([*cache.iterdir()]) == 2
    with pytest.raises(CommandError, match="expected a text file, got a directory"):
        check_files([tmp_path])


def test_a_line_has_no_byte_order_mark_and_no_line_ending() -> None:
    assert decode_line("\ufeffGo.\r\n".encode(), "") == "Go."
    with pytest.raises(CommandError, match=r"here: expected UTF-8, got b'\\xe9' at byte 3 of the line"):
        decode_line(b"caf\xe9\n", "here")


def test_json_of_any_depth(tmp_path: Path) -> None:
    """Around the limit of recursion, what can be read may be too deep for its checksum."""
    path, refused = tmp_path / "file.json", 0
    for depth in range(900, 1100):
        nested = "[" * depth + "]" * depth
        path.write_text(f'{{"format": "test", "version": 1, "checksum": "", "value": {nested}}}')
        with pytest.raises(CommandError, match="damaged") as error:
            read_json(path, "test")
        refused += "expected JSON" in str(error.value)
    assert sys.version_info >= (3, 12) or 0 < refused < 200


@pytest.mark.parametrize("kind", ["pipe", "device", "nothing", "empty"])
def test_a_cache_that_is_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "ids"
    with write_cache(path) as (file,):
        file.write(b"" if kind == "empty" else b"ids")
    assert is_whole(path) == (kind != "empty")
    if kind != "empty":
        path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/null")
    assert not is_whole(path)
