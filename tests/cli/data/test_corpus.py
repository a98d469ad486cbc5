"""Encoded texts and the streams that training reads."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from llm_ext.cli import CommandError
from llm_ext.cli.data import ByteTokenizer, CharTokenizer, Streams, corpus, encode_text


class LargeVocabulary(ByteTokenizer):
    """Bytes in a vocabulary of any size."""

    def __init__(self, size: int) -> None:
        self.pieces = [b"x"] * size


@pytest.mark.parametrize(("size", "itemsize"), [(256, 1), (257, 2), (65536, 2), (65537, 4)])
def test_ids_take_as_few_bytes_as_the_vocabulary_allows(text: Path, tmp_path: Path, size: int, itemsize: int) -> None:
    encoded = encode_text([text], LargeVocabulary(size), tmp_path)
    assert encoded.path.stat().st_size == itemsize * len(encoded)
    ids = encoded.rows(np.array([0]), len(encoded), 0, len(encoded))[0]
    assert bytes(ids.tolist()) == text.read_bytes()


def test_several_files_follow_each_other(text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("more")
    encoded = encode_text([text, other], ByteTokenizer(), tmp_path / "cache")
    assert encoded.rows(np.array([len(encoded) - 4]), 4, 0, len(encoded))[0].tolist() == list(b"more")


def test_the_length_of_a_text_is_in_its_fingerprint(tmp_path: Path) -> None:
    """Samples of a text and of a longer one may be equal."""
    found = set()
    for size in (10**5, 2 * 10**5):
        (tmp_path / "text.txt").write_text("a" * size)
        found.add(encode_text([tmp_path / "text.txt"], ByteTokenizer(), tmp_path / "cache").fingerprint())
    assert len(found) == 2


def test_a_text_is_encoded_once(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode_text([text], ByteTokenizer(), tmp_path / "cache")
    with monkeypatch.context() as context:
        context.setattr(ByteTokenizer, "encode_file", lambda *_: pytest.fail("encoded again"))
        assert encode_text([text], ByteTokenizer(), tmp_path / "cache").fingerprint() == first.fingerprint()
    characters = CharTokenizer.from_files([text])
    assert encode_text([text], characters, tmp_path / "cache").path != first.path
    text.write_text(text.read_text() + "!")
    assert encode_text([text], ByteTokenizer(), tmp_path / "cache").fingerprint() != first.fingerprint()


def test_a_full_disk_leaves_no_unfinished_file(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        encode_text([text], ByteTokenizer(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (Path.mkdir, "expected a text file"),
        (Path.touch, "an empty file"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "input.txt"
    make(path)
    with pytest.raises(CommandError, match=f"input.txt: .*{message}"):
        encode_text([path], ByteTokenizer(), tmp_path / "cache")


def test_streams_read_every_token_in_order_and_go_round(text: Path, tmp_path: Path) -> None:
    encoded = encode_text([text], ByteTokenizer(), tmp_path)
    raw = text.read_bytes()[10:1001]
    streams = Streams(encoded, 10, 1001, 3, 16, slice(None))
    rows: list[list[int]] = [[], [], []]
    for step in range(200):
        x, y = streams.read(step)
        assert x[:, 1:].tolist() == y[:, :-1].tolist()
        for row, ids in zip(rows, x.tolist(), strict=True):
            row += ids
    for start, row in zip((0, 330, 660), rows, strict=True):
        assert bytes(row) == ((raw * 5)[start:])[: len(row)]
    assert streams.steps_per_pass == 330 // 16


def test_streams_leave_out_a_fold(text: Path, tmp_path: Path) -> None:
    encoded = encode_text([text], ByteTokenizer(), tmp_path)
    raw, ends = text.read_bytes(), []
    for index in range(3):
        begin, end = encoded.fold(index, 3)
        ends += [begin, end]
        rest = raw[end:] + raw[:begin]
        streams = Streams(encoded, end, begin + len(encoded), 2, 16, slice(None))
        rows = np.concatenate([streams.read(step)[0] for step in range(300)], axis=1)
        for start, row in zip((0, len(rest) // 2), rows.tolist(), strict=True):
            assert bytes(row) == ((rest * 3)[start:])[: len(row)]
    # The folds are the whole text.
    assert ends[::2] == [0, *ends[1:-1:2]]
    assert ends[-1] == len(encoded)


def test_processes_share_the_streams_of_one(text: Path, tmp_path: Path) -> None:
    encoded = encode_text([text], ByteTokenizer(), tmp_path)
    whole = Streams(encoded, 0, 2000, 4, 8, slice(None)).read(7)[0]
    parts = [Streams(encoded, 0, 2000, 4, 8, slice(at, at + 2)).read(7)[0] for at in (0, 2)]
    assert [*parts[0].tolist(), *parts[1].tolist()] == whole.tolist()


def test_a_text_shorter_than_a_chunk(text: Path, tmp_path: Path) -> None:
    encoded = encode_text([text], ByteTokenizer(), tmp_path)
    with pytest.raises(CommandError, match=r"more than batch × chunk = 4 × 25 = 100 tokens, got 100"):
        Streams(encoded, 0, 100, 4, 25, slice(None))
    Streams(encoded, 0, 101, 4, 25, slice(None))


def test_a_large_file_is_read_in_blocks(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "SMALL", 100)
    monkeypatch.setattr(corpus, "ROWS", 3)
    encoded = encode_text([text], ByteTokenizer(), tmp_path)
    rows = encoded.rows(np.arange(0, 900, 90), 90, 0, len(encoded))
    assert b"".join(map(bytes, rows.tolist())) == text.read_bytes()[:900]
