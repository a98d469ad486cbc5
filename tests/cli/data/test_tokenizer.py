"""Tokenizers: round trips, block boundaries, errors."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers.pre_tokenizers import ByteLevel

from llm_ext.cli import CommandError
from llm_ext.cli.data import (
    BpeTokenizer,
    ByteTokenizer,
    CharTokenizer,
    Tokenizer,
    load_tokenizer,
    tokenizer,
    tokenizer_from_files,
)

SAMPLE = "Ein Gruß,  naïve Welt!\n\tzwei\r\n 漢字かな \u2003 x\u00a0y 🎉🎉 don't  stop\n\n\n1234 5 --- end \x1c z "


def noise(seed: int, length: int) -> str:
    """Text with every trap of a boundary: runs of spaces, several alphabets, characters of 1 to 4 bytes."""
    draw = random.Random(seed)
    return "".join(draw.choices(SAMPLE + "     \n\n''sstlve", k=length))


@pytest.fixture(params=tokenizer.KINDS)
def trained(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    path = tmp_path / "learn.txt"
    path.write_text(SAMPLE * 20 + noise(1, 3000), encoding="utf-8", newline="")
    return tokenizer_from_files(request.param, [path], 400)


@pytest.mark.parametrize("seed", range(3))
def test_a_file_in_small_blocks_has_the_tokens_of_the_whole(
    trained: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    whole = noise(seed, 3000)
    path = tmp_path / "text.txt"
    path.write_text(whole, encoding="utf-8", newline="")
    # 7 bytes: most blocks end inside a character, a word or a run of spaces.
    monkeypatch.setattr(tokenizer, "BLOCK", 7 if not isinstance(trained, BpeTokenizer) else 200)
    monkeypatch.setattr(tokenizer, "PIECE", 3)
    in_blocks = np.concatenate(list(trained.encode_file(path)))
    assert in_blocks.tolist() == trained.encode(whole).tolist()
    assert trained.decode(in_blocks.tolist()) == whole


def test_encoding_streams_back_as_whole_characters(trained: Tokenizer) -> None:
    pieces = list(trained.stream(trained.encode(SAMPLE).tolist()))
    assert "".join(pieces) == SAMPLE
    assert "\ufffd" not in "".join(pieces)


def test_bytes_that_are_not_utf8_are_replaced_in_a_stream() -> None:
    assert "".join(ByteTokenizer().stream([0x61, 0xFF, 0xC3, 0x62, 0xC3])) == "a\ufffd\ufffdb\ufffd"


def test_a_saved_tokenizer_encodes_the_same(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "vocabulary.json")
    loaded = load_tokenizer(tmp_path / "vocabulary.json", trained.size)
    assert loaded.kind == trained.kind
    assert list(loaded.pieces) == list(trained.pieces)
    assert loaded.encode(SAMPLE).tolist() == trained.encode(SAMPLE).tolist()
    with pytest.raises(CommandError, match="expected the 7 tokens"):
        load_tokenizer(tmp_path / "vocabulary.json", 7)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "another program"),
        ('{"model": {"type": "BPE"}}', "another program"),
        ('{"format": "llm_ext vocabulary", "version": 9}', "expected version 1"),
        ('{"format": "llm_ext vocabulary", "version": 1, "tokens": "chars"}', "damaged"),
        ('{"format": "llm_ext vocabulary", "version": 1, "tokens": "bpe", "tokenizer": {}}', "damaged"),
        ('{"format": "llm_ext vocabulary", "version": 1, "tokens": "words"}', "must be one of bytes"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "vocabulary.json"
    path.write_text(content)
    with pytest.raises(CommandError, match=message) as error:
        load_tokenizer(path)
    assert str(path) in str(error.value)


def test_the_byte_alphabet_is_that_of_the_library() -> None:
    assert set(tokenizer._byte_level_alphabet()) == set(ByteLevel.alphabet())


def test_bpe_encodes_any_text(tmp_path: Path) -> None:
    path = tmp_path / "learn.txt"
    path.write_text("only plain words here " * 50)
    tokens = BpeTokenizer.from_files([path], 300)
    assert 256 < tokens.size <= 300
    assert tokens.decode(tokens.encode(SAMPLE).tolist()) == SAMPLE
    assert len(tokens.encode("only plain words")) < len("only plain words")


def test_bpe_bounds_memory_where_there_is_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BLOCK", 1000)
    path = tmp_path / "long.txt"
    path.write_text("x" * 10_000)
    tokens = BpeTokenizer.from_files([path], 300)
    blocks = list(tokens.encode_file(path))
    assert len(blocks) > 3
    assert tokens.decode(np.concatenate(blocks).tolist()) == "x" * 10_000


@pytest.mark.parametrize("at", [0, 6, 7, 100])
def test_an_error_names_file_and_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    monkeypatch.setattr(tokenizer, "BLOCK", 7)
    path = tmp_path / "latin1.txt"
    path.write_bytes("äb".encode() * 60)  # 3 bytes each
    raw = bytearray(path.read_bytes())
    raw[at - at % 3 + 2] = 0xE9
    path.write_bytes(raw)
    for kind in ("chars", "bpe"):
        with pytest.raises(CommandError, match=rf"latin1.txt: expected UTF-8.*at byte {at - at % 3 + 2};"):
            tokenizer_from_files(kind, [path], 300)
    assert np.concatenate(list(ByteTokenizer().encode_file(path))).tobytes() == bytes(raw)


def test_a_character_cut_off_at_the_end_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cut.txt"
    path.write_bytes("abcß".encode()[:-1])
    with pytest.raises(CommandError, match="at byte 3"):
        CharTokenizer.from_files([path])


def test_an_unknown_character_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "BLOCK", 4)
    tokens = CharTokenizer("abcß")
    path = tmp_path / "text.txt"
    path.write_text("aßßbécß", encoding="utf-8")
    with pytest.raises(CommandError, match=r"text.txt: the character 'é' \(U\+00E9\) at byte 6"):
        list(tokens.encode_file(path))
    with pytest.raises(CommandError, match="'é'"):
        tokens.encode("aé")


def test_an_argument_that_is_not_utf8() -> None:
    assert ByteTokenizer().encode("a\udcff").tolist() == [0x61, 0xFF]
    with pytest.raises(CommandError, match="not among"):
        CharTokenizer("a").encode("a\udcff")
