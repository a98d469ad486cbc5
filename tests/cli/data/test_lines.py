"""Lines as token ids."""

from __future__ import annotations

from pathlib import Path

import pytest

from llm_ext.cli.data import ByteTokenizer, LineTokenizer, PairFiles
from llm_ext.cli.data.pairs import tokenizer_from_pairs


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_lines_are_encoded_and_decoded(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text("to be or not to be\têtre ou ne pas être\n" * 30, encoding="utf-8")
    files = PairFiles(path)
    shared = LineTokenizer(tokenizer_from_pairs(kind, files, 300, (0, 1)))
    for line in ("to be", "être", "or  not"):
        ids = shared.encode(line).tolist()
        assert shared.end not in ids
        assert shared.decode([*ids, shared.end]) == line
        assert "".join(shared.stream(iter([*ids, shared.end, *ids]))) == line
    source, target = (tokenizer_from_pairs(kind, files, 300, (side,)) for side in (0, 1))
    if kind == "chars":
        assert "ê".encode() not in source.pieces
        assert "ê".encode() in target.pieces
    if kind == "bpe":
        # A word is the same at the beginning of a line and inside it.
        assert LineTokenizer(source).encode("to be").tolist() == LineTokenizer(source).encode("be to").tolist()[::-1]


@pytest.mark.parametrize("kind", ["bytes", "chars", "bpe"])
def test_lines_are_cut_at_words(tmp_path: Path, kind: str) -> None:
    line = "to be or  not to bee"
    (tmp_path / "pairs.tsv").write_text(f"{line}\t{line}\n")
    tokenizer = LineTokenizer(tokenizer_from_pairs(kind, PairFiles(tmp_path / "pairs.tsv"), 256, (0, 1)))
    ids = tokenizer.encode(line)
    for most in range(1, len(ids) + 2):
        cut = tokenizer.decode(tokenizer.cut(ids, most))
        assert len(tokenizer.cut(ids, most)) <= most
        # As many words as fit; a first word that does not fit is cut.
        fits = max((n for n in range(8) if len(tokenizer.encode(" ".join(line.split(" ")[:n]))) <= most), default=0)
        expected = " ".join(line.split(" ")[:fits]).rstrip()
        assert cut.rstrip() == expected or (not expected and line.startswith(cut))


def test_a_line_has_no_line_breaks() -> None:
    tokenizer, text = LineTokenizer(ByteTokenizer()), b"one\ntwo\r"
    assert tokenizer.decode(text) == "one two "
    assert "".join(tokenizer.stream(text)) == "one two "
