"""Pairs of lines: reading, encoding, splitting."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ext.cli import CommandError
from llm_ext.cli.data import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    EncodedPairs,
    LineTokenizer,
    PairFiles,
    encode_pairs,
)
from llm_ext.cli.data.pairs import tokenizer_from_pairs

BYTES = LineTokenizer(ByteTokenizer())


def encoded(path: Path, longest: int = 200, notes: list[str] | None = None) -> EncodedPairs:
    return encode_pairs(
        PairFiles(path), BYTES, BYTES, path.parent / "cache", longest, ([] if notes is None else notes).append
    )


def test_one_file_or_two(tmp_path: Path) -> None:
    """Further columns, spaces at the ends, carriage returns and a byte order mark are ignored."""
    (tmp_path / "both.tsv").write_bytes("\ufeffGo.\tVa !\tby X\r\n Run. \t Cours ! \tby Y\n".encode())
    (tmp_path / "en").write_bytes("\ufeffGo.\r\n Run. \n".encode())
    (tmp_path / "fr").write_bytes(b"Va !\nCours !")  # without a last newline
    expected = [(1, "Go.", "Va !"), (2, "Run.", "Cours !")]
    assert list(PairFiles(tmp_path / "both.tsv")) == expected
    assert list(PairFiles(tmp_path / "en", tmp_path / "fr")) == expected


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (b"a\nb\nc\n", b"x\ny\n", "en has 3 lines, .*fr has 2; each line of one file must have a line in the other"),
        (b"a\nb\n", b"x\ny\nz\n", "en has 2 lines, .*fr has 3"),
        (b"a\ncaf\xe9\n", b"x\ny\n", r"en: line 2: expected UTF-8, got b'\\xe9' at byte 3 of the line"),
        (b"", b"x\n", "en: expected text, got an empty file"),
        (b"a\tx\nb\n", None, "en: line 2: expected source and target separated by a tab, got no tab"),
        (b"a\n", b"", "fr: expected text, got an empty file"),
    ],
)
def test_an_error_names_file_and_line(tmp_path: Path, source: bytes, target: bytes | None, message: str) -> None:
    (tmp_path / "en").write_bytes(source)
    files = PairFiles(tmp_path / "en")
    if target is not None:
        (tmp_path / "fr").write_bytes(target)
        files = PairFiles(tmp_path / "en", tmp_path / "fr")
    with pytest.raises(CommandError, match=message):
        encode_pairs(files, BYTES, BYTES, tmp_path / "cache", 200)
    assert not list((tmp_path / "cache").glob("*")) or not (tmp_path / "cache").exists()


def test_pairs_that_are_left_out_are_reported(tmp_path: Path) -> None:
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
    with pytest.raises(CommandError, match="expected source and target"):
        encoded(path)
    path.write_text("\tx\n" * 9)
    notes.clear()
    with pytest.raises(CommandError, match="no pair is left to use"):
        encoded(path, 200, notes)
    assert "left out 9 with an empty side (line 1, 2, 3, 4, 5, …)" in notes[0]


def test_long_sources_are_cut(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("one two x three\tone\none\ttwo\n" + "x" * 30 + "\t" + "y" * 9 + "\n")
    notes: list[str] = []
    pairs = encode_pairs(PairFiles(path), BYTES, BYTES, tmp_path / "cache", 8, notes.append, 10)
    assert [BYTES.decode(pairs.source(i).tolist()) for i in range(len(pairs))] == ["one two x", "one"]
    assert notes == [
        f"{path}: left out 1 with a side of more than 8 tokens (line 3)",
        f"{path}: cut 1 of 2 sources, those of more than 10 tokens",
    ]


def test_encoded_pairs_decode_to_their_lines(pairs: Path) -> None:
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
    lines = pairs.read_text().splitlines()
    swapped = ["\t".join(reversed(line.split("\t")[:2])) for line in lines]
    pairs.write_text("\n".join(lines + swapped + lines))
    there = encoded(pairs)
    training, validation = there.split(0.2)
    assert sorted([*training, *validation]) == list(range(len(there)))
    assert 0.1 < len(validation) / len(there) < 0.3
    sources = [{bytes(there.source(i)) for i in side} for side in (training, validation)]
    assert not sources[0] & sources[1]
    assert len(there.split(0.0)[1]) == 0


def test_characters_that_occur_in_validation_pairs_only(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a\tb\n")
    (tmp_path / "c").write_text("c\td\n")
    files, more = PairFiles(tmp_path / "a"), PairFiles(tmp_path / "c")
    chars = tokenizer_from_pairs("chars", files, 0, (0,), more)
    assert isinstance(chars, CharTokenizer)
    assert chars.characters == "ac"
    assert isinstance(tokenizer_from_pairs("bpe", files, 300, (0,), more), BpeTokenizer)


def test_folds_have_all_pairs_of_a_source_and_equally_many_sources(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"source {number % 13}\ttarget {number}\n" for number in range(60)))
    every, held_out = encoded(path), []
    for index in range(5):
        chosen, fold = every.fold(index, 5)
        assert sorted([*chosen, *fold]) == list(range(60))
        held_out.append({bytes(every.source(i).tolist()) for i in fold})
        assert held_out[-1].isdisjoint(bytes(every.source(i).tolist()) for i in chosen)
    assert sorted(map(len, held_out)) == [2, 2, 3, 3, 3]
    assert len(set.union(*held_out)) == 13
    every.fold(12, 13)
    with pytest.raises(CommandError, match="--folds 14: the pairs have only 13 different sources"):
        every.fold(0, 14)
