"""Tokenizers: bytes, characters, or byte pairs (BPE); from text to token ids and back."""

from __future__ import annotations

import codecs
import collections
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Fuse
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.trainers import BpeTrainer

from llm_ext.cli.data.files import read_json, write_json
from llm_ext.cli.errors import CommandError

__all__ = [
    "BPE_SAMPLE",
    "KINDS",
    "BpeTokenizer",
    "ByteTokenizer",
    "CharTokenizer",
    "Ids",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_from_files",
    "tokenizer_from_texts",
]

Ids = npt.NDArray[np.integer[Any]]

KINDS = ("bytes", "chars", "bpe")
FORMAT = "llm_ext vocabulary"

# Bytes of text read at a time. Larger blocks are not faster and use more memory.
BLOCK = 1 << 20
# BPE is trained on at most this many bytes, in blocks spread evenly over the text. Frequent pairs are known long before
# that, and the word table of the trainer would otherwise grow with the corpus.
BPE_SAMPLE = 64 << 20
# Characters of one piece of text: the trainer loads 256 pieces at a time, the encoder gives one to each thread.
PIECE = 1 << 14


class Tokenizer(ABC):
    """Maps text to token ids 0 .. size - 1; each id represents some bytes of UTF-8.

    Attributes:
        kind: One of `KINDS`.
        pieces: The bytes of each id.
    """

    kind: str
    pieces: Sequence[bytes]

    @property
    def size(self) -> int:
        """V, the number of tokens."""
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids [N] of a text.

        Raises:
            CommandError: The vocabulary cannot represent the text.
        """

    @abstractmethod
    def encode_file(self, path: Path) -> Iterator[Ids]:
        """Yield the ids of a file block by block, so that memory use does not depend on its size.

        Raises:
            CommandError: The file is not UTF-8 where it has to be, or the vocabulary cannot represent it.
        """

    def first_text(self) -> str:
        """Return the text to begin with where none is given: a line break."""
        return "\n"

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """Return the JSON values from which `load_tokenizer` restores the tokenizer."""

    @abstractmethod
    def to_library(self) -> tokenizers.Tokenizer:
        """Return a new tokenizer of the `tokenizers` library with the same ids."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are not UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as soon as each character is complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.pieces[i])
        yield decoder.decode(b"", final=True)

    def save(self, path: Path) -> None:
        """Write the tokenizer as JSON."""
        write_json(path, {"format": FORMAT, "version": 1, "tokens": self.kind, **self.contents()})


class ByteTokenizer(Tokenizer):
    """The 256 bytes: encodes any file."""

    kind = "bytes"
    pieces: Sequence[bytes] = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> Ids:
        # surrogateescape: an argument of the command line may hold bytes that are not UTF-8.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def encode_file(self, path: Path) -> Iterator[Ids]:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield np.frombuffer(block, dtype=np.uint8)

    def contents(self) -> dict[str, Any]:
        return {}

    def to_library(self) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(BPE(_byte_level_alphabet(), []))
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = ByteLevelDecoder()
        return tokenizer


class CharTokenizer(Tokenizer):
    """The characters of the training text, in Unicode order.

    Args:
        characters: The vocabulary.
    """

    kind = "chars"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.pieces = [character.encode() for character in self.characters]
        self._ids = np.full(0x110000, -1, dtype=np.int32)
        self._ids[_code_points(self.characters)] = np.arange(len(self.characters))

    @classmethod
    def from_files(cls, files: Iterable[Path]) -> CharTokenizer:
        """Collect the characters of files."""
        return cls.from_texts(text for path in files for _, text in _text_blocks(path))

    @classmethod
    def from_texts(cls, texts: Iterable[str]) -> CharTokenizer:
        """Collect the characters of texts."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[_code_points(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def encode(self, text: str) -> Ids:
        ids, unknown = self._look_up(text)
        if unknown is not None:
            raise CommandError(f"{_describe(text[unknown])} is not among the characters of the training text")
        return ids

    def encode_file(self, path: Path) -> Iterator[Ids]:
        for offset, text in _text_blocks(path):
            ids, unknown = self._look_up(text)
            if unknown is not None:
                raise CommandError(
                    f"{path}: {_describe(text[unknown])} at byte {offset + len(text[:unknown].encode())} is not "
                    "among the characters of the training text; bytes or bpe tokens can encode any text"
                )
            yield ids

    def first_text(self) -> str:
        """Return a line break, or the first character where the training text has none."""
        return "\n" if "\n" in self.characters else self.characters[:1]

    def contents(self) -> dict[str, Any]:
        return {"characters": self.characters}

    def to_library(self) -> tokenizers.Tokenizer:
        # Without an unknown token, which the model lacks, other characters are an error.
        tokenizer = tokenizers.Tokenizer(WordLevel({character: i for i, character in enumerate(self.characters)}))
        tokenizer.pre_tokenizer = Split(tokenizers.Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = Fuse()
        return tokenizer

    def _look_up(self, text: str) -> tuple[Ids, int | None]:
        """Return the ids of a text and the index of its first unknown character."""
        ids = self._ids[_code_points(text)]
        unknown = np.flatnonzero(ids < 0)
        return ids, int(unknown[0]) if unknown.size else None


class BpeTokenizer(Tokenizer):
    """Byte-level byte pairs of the `tokenizers` library: encodes any text.

    Source: "Neural machine translation of rare words with subword units", arXiv 1508.07909.
    """

    kind = "bpe"

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        byte_of = _byte_level_alphabet()
        words = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.pieces = [bytes(byte_of[character] for character in word or "") for word in words]

    @classmethod
    def from_files(cls, files: Sequence[Path], vocab_size: int) -> BpeTokenizer:
        """Learn merges from files until there are `vocab_size` tokens or nothing is left to merge."""
        blocks = sum(path.stat().st_size for path in files) // BPE_SAMPLE + 1

        def sample() -> Iterator[str]:
            for path in files:
                for number, (_, text) in enumerate(_text_blocks(path)):
                    if number % blocks == 0:
                        yield from _split(text)

        return cls.from_texts(sample(), vocab_size)

    @classmethod
    def from_texts(cls, texts: Iterable[str], vocab_size: int) -> BpeTokenizer:
        """Learn merges from short texts."""
        tokenizer = _byte_pairs({}, [])
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            # Sorted, because the order of the library's list, and with it the ids, differs between processes.
            initial_alphabet=sorted(ByteLevel.alphabet()),
            show_progress=False,
        )
        tokenizer.train_from_iterator(texts, trainer)
        return cls(tokenizer)

    def encode(self, text: str) -> Ids:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            got = f"{text[error.start]!r} at character {error.start}"
            raise CommandError(f"text must be UTF-8, got {got}") from None
        return self._encode([text])

    def encode_file(self, path: Path) -> Iterator[Ids]:
        rest = ""
        for _, text in _text_blocks(path):
            *pieces, rest = _split(rest + text)
            if len(rest) > BLOCK:
                # A million characters without a space: cut here to bound memory.
                pieces, rest = [*pieces, rest], ""
            if pieces:
                yield self._encode(pieces)
        if rest:
            yield self._encode([rest])

    def contents(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self._tokenizer.to_str())}

    def to_library(self) -> tokenizers.Tokenizer:
        return tokenizers.Tokenizer.from_str(self._tokenizer.to_str())

    def _encode(self, texts: list[str]) -> Ids:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])


def tokenizer_from_files(kind: str, files: Sequence[Path], vocab_size: int) -> Tokenizer:
    """Build a tokenizer from the files of a training text.

    Args:
        kind: One of `KINDS`.
        files: The text.
        vocab_size: V, for BPE.

    Raises:
        CommandError: A file is not UTF-8 where it has to be.
    """
    if kind == "bytes":
        return ByteTokenizer()
    return CharTokenizer.from_files(files) if kind == "chars" else BpeTokenizer.from_files(files, vocab_size)


def tokenizer_from_texts(kind: str, texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Build a tokenizer from short texts; see `tokenizer_from_files` for the other arguments."""
    if kind == "bytes":
        # Read the texts nevertheless, to report errors in them.
        collections.deque(texts, maxlen=0)
        return ByteTokenizer()
    return CharTokenizer.from_texts(texts) if kind == "chars" else BpeTokenizer.from_texts(texts, vocab_size)


def load_tokenizer(path: Path, size: int | None = None) -> Tokenizer:
    """Load a tokenizer that `Tokenizer.save` wrote.

    Args:
        path: The file.
        size: The number of tokens it must have, or None to accept any.

    Raises:
        CommandError: The file is missing, damaged, or has another number of tokens.
    """
    value = read_json(path, FORMAT)
    kind = value.get("tokens")
    tokenizer: Tokenizer
    try:
        if kind == "bytes":
            tokenizer = ByteTokenizer()
        elif kind == "chars":
            tokenizer = CharTokenizer(value["characters"])
            if tokenizer.characters != value["characters"]:
                raise ValueError("the characters must be in order, each once")
        elif kind == "bpe":
            tokenizer = BpeTokenizer(_byte_pairs(*_read_byte_pairs(value["tokenizer"])))
        else:
            raise ValueError(f"tokens must be one of {', '.join(KINDS)}, got {kind!r}")
    # The tokenizers library raises a plain Exception.
    except Exception as error:
        raise CommandError(f"{path}: damaged: {error}") from None
    if size not in (None, tokenizer.size):
        raise CommandError(f"{path}: expected the {size} tokens of the model, got {tokenizer.size}")
    return tokenizer


def _byte_pairs(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> tokenizers.Tokenizer:
    """Return a tokenizer of byte-level byte pairs."""
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def _read_byte_pairs(saved: dict[str, Any]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges of a saved tokenizer, whose other parts are always the same.

    The library itself is not given a file that others may have written: it takes any padding, or ends with a panic.

    Raises:
        KeyError, TypeError, ValueError: The tokenizer is not one of `BpeTokenizer`.
    """
    for part in ("truncation", "padding", "added_tokens", "normalizer", "post_processor"):
        if saved.get(part):
            raise ValueError(f"the tokenizer must have no {part}")
    vocabulary: dict[str, int] = saved["model"]["vocab"]
    if sorted(vocabulary.values()) != [*range(len(vocabulary))]:
        raise ValueError(f"the ids of {len(vocabulary)} tokens must be 0 to {len(vocabulary) - 1}")
    # Version 0.19 of the library and before join the two parts by a space.
    pairs = [each.split(" ") if isinstance(each, str) else each for each in saved["model"]["merges"]]
    merges = [(left, right) for left, right in pairs]
    for left, right in merges:
        for token in (left, right, left + right):
            if token not in vocabulary:
                raise ValueError(f"the merge {left!r} {right!r} has no token {token!r}")
    return vocabulary, merges


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _describe(character: str) -> str:
    return f"the character {character!r} (U+{ord(character):04X})"


def _text_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the text of a UTF-8 file in blocks, each with the offset in bytes at which it starts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that has not been decoded
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise CommandError(
                    f"{path}: expected UTF-8, got {error.object[error.start : error.start + 1]!r} at byte "
                    f"{offset + error.start}; bytes tokens (--tokens bytes) can encode any file"
                ) from None
            if text:
                yield offset, text
                offset += len(text.encode())
            if not block:
                return


# Byte-level BPE starts a new word between a non-space and a space, whatever surrounds them. Text cut there has the same
# tokens as the whole text. \S here and \s in the BPE both follow Unicode.
_CUT = re.compile(r"\S[ \n]")


def _split(text: str) -> Iterator[str]:
    """Yield pieces of a text, each a little longer than `PIECE`; the last one is the rest and may be empty."""
    start = 0
    while cut := _CUT.search(text, start + PIECE):
        yield text[start : cut.start() + 1]
        start = cut.start() + 1
    yield text[start:]


def _byte_level_alphabet() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE: printable Latin-1 is itself, the rest starts at U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}
