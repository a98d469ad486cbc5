from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from llm_ext.text import pairs as pairing
from llm_ext.text.errors import TextError
from llm_ext.text.pairs import Batches, Language, PairFiles, encode, learn, make_batch
from llm_ext.text.tokens import BpeTokens, ByteTokens, CharTokens

BYTES = Language(ByteTokens())
ENDS = (BYTES.end, BYTES.end)


def encoded(path: Path, longest: int = 200, notes: list[str] | None = None) -> pairing.Pairs:
    say = (lambda note: None) if notes is None else notes.append
    return encode(PairFiles(path), BYTES, BYTES, path.parent / "cache", longest, say)


def test_one_file_or_two(tmp_path: Path) -> None:
    """Further columns, spaces at the ends, carriage returns and a byte order mark mean nothing."""
    (tmp_path / "both.tsv").write_bytes("\ufeffGo.\tVa !\tby X\r\n Run. \t Cours ! \tby Y\n".encode())
    (tmp_path / "en").write_bytes("\ufeffGo.\r\n Run. \n".encode())
    (tmp_path / "fr").write_bytes(b"Va !\nCours !")  # without a last newline
    expected = [(1, "Go.", "Va !"), (2, "Run.", "Cours !")]
    assert list(PairFiles(tmp_path / "both.tsv")) == expected
    assert list(PairFiles(tmp_path / "en", tmp_path / "fr")) == expected


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\nc\n", b"x\ny\n", "en has 3 lines, .*fr has 2; each line of the one must have its line in the other"),
        (b"a\nb\n", b"x\ny\nz\n", "en has 2 lines, .*fr has 3"),
        (b"a\ncaf\xe9\n", b"x\ny\n", r"en: line 2: expected UTF-8, got b'\\xe9' at byte 3 of the line"),
        (b"", b"x\n", "en: expected text, got an empty file"),
        (b"a\tx\nb\n", None, "en: line 2: expected source and target with a tab between, got no tab"),
        (b"a\n", b"", "fr: expected text, got an empty file"),
    ],
)
def test_what_is_wrong_and_where(tmp_path: Path, source: bytes, target: bytes | None, message: str) -> None:
    (tmp_path / "en").write_bytes(source)
    files = PairFiles(tmp_path / "en")
    if target is not None:
        (tmp_path / "fr").write_bytes(target)
        files = PairFiles(tmp_path / "en", tmp_path / "fr")
    with pytest.raises(TextError, match=message):
        encode(files, BYTES, BYTES, tmp_path / "cache", 200)
    assert not list((tmp_path / "cache").glob("*")) or not (tmp_path / "cache").exists()


def test_left_out_and_said(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("a\tb\n\t\nc\t\n" + "d" * 30 + "\te\nf\tg\n")
    notes: list[str] = []
    pairs = encoded(path, 20, notes)
    assert len(pairs) == 2
    assert notes == [
        f"{path}: left out 2 with an empty side (line 2, 3)",
        f"{path}: left out 1 with a side of more than 20 tokens (line 4)",
    ]
    again: list[str] = []
    assert len(encoded(path, 20, again)) == 2
    assert again == []
    path.write_text("\n" * 9 + "\tx\n")
    with pytest.raises(TextError, match="expected source and target"):
        encoded(path)
    path.write_text("\tx\n" * 9)
    notes.clear()
    with pytest.raises(TextError, match="no pair is left to use"):
        encoded(path, 200, notes)
    assert "left out 9 with an empty side (line 1, 2, 3, 4, 5, …)" in notes[0]


def test_what_was_encoded_comes_back(pairs: Path) -> None:
    there = encoded(pairs)
    lines = list(PairFiles(pairs))
    assert len(there) == len(lines) == 200
    for i, (_, source, target) in enumerate(lines):
        assert BYTES.decode(there.source(i).tolist()) == source
        assert BYTES.decode(there.target(i).tolist()) == target
        assert there.source_lengths[i] == len(source)
        assert there.target_lengths[i] == len(target)
    assert there.fingerprint() == encoded(pairs).fingerprint()
    pairs.write_text(pairs.read_text().replace("cat", "cow"))
    assert there.fingerprint() != encoded(pairs).fingerprint()


def test_the_pairs_of_a_source_stay_together(pairs: Path) -> None:
    first = pairs.read_text()
    pairs.write_text(first + first[::-1].replace("\n", "\t1\n") + "\n" + first)
    there = encoded(pairs)
    training, validation = there.split(0.2)
    assert sorted([*training, *validation]) == list(range(len(there)))
    assert 0.1 < len(validation) / len(there) < 0.3
    sources = [{bytes(there.source(i)) for i in side} for side in (training, validation)]
    assert not sources[0] & sources[1]
    assert len(there.split(0.0)[1]) == 0


def test_a_batch(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("ab\tx\nc\tyz\n")
    batch = make_batch(encoded(path), np.array([1, 0]), ENDS)
    e = BYTES.end
    assert batch.source.tolist() == [[ord("c"), e, e], [ord("a"), ord("b"), e]]
    assert batch.target.tolist() == [[e, ord("y"), ord("z")], [e, ord("x"), e]]
    assert batch.source_lengths is not None
    assert batch.source_lengths.tolist() == [2, 3]
    assert batch.target_lengths is not None
    assert batch.target_lengths.tolist() == [3, 2]
    assert batch.keep.tolist() == [[True, True, True], [True, True, False]]
    assert batch.expected.tolist() == [ord("y"), ord("z"), e, ord("x"), e]
    alone = make_batch(encoded(path), np.array([1]), ENDS)
    assert alone.source_lengths is None
    assert alone.target_lengths is None
    assert alone.keep.all()


def test_a_pass_reads_every_pair_and_a_batch_is_of_like_length(pairs: Path) -> None:
    there = encoded(pairs)
    chosen = np.arange(3, 200)
    batches = Batches(there, chosen, 16, 1, ENDS)
    assert batches.steps_per_pass == 13
    first = [batches.rows(step) for step in range(13)]
    seen = np.concatenate(first)
    assert set(seen.tolist()) == set(chosen.tolist())
    assert len(seen) == 13 * 16
    # Almost no padding on the side that costs arithmetic, where a shuffle alone would have a third.
    lengths = there.target_lengths + 1
    real = sum(lengths[rows].sum() for rows in first)
    assert real / sum(lengths[rows].max() * len(rows) for rows in first) > 0.9
    assert real / sum(lengths[rows].max() * len(rows) for rows in np.array_split(chosen, 13)) < 0.75
    second = [batches.rows(step) for step in range(13, 26)]
    assert not all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_batches_are_a_function_of_the_step(pairs: Path) -> None:
    there = encoded(pairs)

    def rows(seed: int, steps: list[int]) -> list[list[int]]:
        batches = Batches(there, np.arange(200), 16, seed, ENDS)
        return [batches.rows(step).tolist() for step in steps]

    assert rows(1, [3, 40, 4]) == [rows(1, [step])[0] for step in (3, 40, 4)]
    assert rows(1, [3]) != rows(2, [3])


def test_processes_share_a_batch(pairs: Path) -> None:
    batches = Batches(encoded(pairs), np.arange(200), 16, 1, ENDS)
    whole, tokens = batches.read(5, slice(0, 16))
    assert tokens == len(whole.expected)
    halves = [batches.read(5, slice(begin, begin + 8)) for begin in (0, 8)]
    assert [count for _, count in halves] == [tokens, tokens]
    assert torch.equal(torch.cat([half.expected for half, _ in halves]), whole.expected)


def test_too_few_pairs(pairs: Path) -> None:
    with pytest.raises(TextError, match=r"at least batch × processes = 300 pairs to train on, got 200"):
        Batches(encoded(pairs), np.arange(200), 300, 1, ENDS)


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_lines_to_ids_and_back(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("to be or not to be\têtre ou ne pas être\n" * 30, encoding="utf-8")
    files = PairFiles(path)
    shared = Language(learn(kind, files, 300, (0, 1), None))
    for line in ("to be", "être", "or  not"):
        ids = shared.encode(line).tolist()
        assert shared.end not in ids
        assert shared.decode([*ids, shared.end]) == line
        assert "".join(shared.stream(iter([*ids, shared.end, *ids]))) == line
    source, target = (learn(kind, files, 300, (side,), None) for side in (0, 1))
    if kind == "chars":
        assert "ê".encode() not in source.pieces
        assert "ê".encode() in target.pieces
    if kind == "bpe":
        # A word is the same at the begin of a line and within it.
        assert Language(source).encode("to be").tolist() == Language(source).encode("be to").tolist()[::-1]


def test_characters_that_only_the_validation_has(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a\tb\n")
    (tmp_path / "c").write_text("c\td\n")
    files, more = PairFiles(tmp_path / "a"), PairFiles(tmp_path / "c")
    chars = learn("chars", files, 0, (0,), more)
    assert isinstance(chars, CharTokens)
    assert chars.characters == "ac"
    assert isinstance(learn("bpe", files, 300, (0,), more), BpeTokens)


def test_no_line_becomes_two(tmp_path: Path) -> None:
    text = "one\ntwo\r"
    assert BYTES.decode(list(text.encode())) == "one two "
    assert re.fullmatch("one two ", "".join(BYTES.stream(iter(text.encode()))))
