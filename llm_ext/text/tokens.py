"""Tokens: bytes, characters, or byte pairs (BPE); from text to ids and back."""

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
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from llm_ext.text.errors import TextError
from llm_ext.text.files import read_json, write_json

Ids = npt.NDArray[np.integer[Any]]

KINDS = ("bytes", "chars", "bpe")
FORMAT = "llm_ext vocabulary"

# Bytes of text held at once. Larger blocks are not quicker, and memory grows with them.
BLOCK = 1 << 20
# BPE is trained on at most so much text, in blocks spread evenly: the merges of frequent pairs are known long
# before, and the trainer's table of words would otherwise grow with the corpus.
BPE_SAMPLE = 64 << 20
# The trainer takes 256 pieces at a time into memory; the encoder gives one piece to each thread.
PIECE = 1 << 14


class Tokens(ABC):
    """A vocabulary: token ids 0 .. size - 1, each standing for some bytes of UTF-8."""

    kind: str
    # The bytes that each id stands for.
    pieces: Sequence[bytes]

    @property
    def size(self) -> int:
        """V, how many tokens there are."""
        return len(self.pieces)

    @abstractmethod
    def encode(self, text: str) -> Ids:
        """Return the ids [N] of a text.

        Raises:
            TextError: the vocabulary has no tokens for it.
        """

    @abstractmethod
    def encode_file(self, path: Path) -> Iterator[Ids]:
        """Yield the ids of a file, block by block, so that memory does not grow with it.

        Raises:
            TextError: the file is not UTF-8 where that is needed, or the vocabulary has no tokens for it.
        """

    @abstractmethod
    def contents(self) -> dict[str, Any]:
        """Return what `load` needs to make the vocabulary again, of JSON types."""

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace")

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yield the text of ids as soon as its characters are complete."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        for i in ids:
            yield decoder.decode(self.pieces[i])
        yield decoder.decode(b"", final=True)

    def save(self, path: Path) -> None:
        """Write the vocabulary as JSON."""
        write_json(path, {"format": FORMAT, "version": 1, "tokens": self.kind, **self.contents()})


class ByteTokens(Tokens):
    """The 256 bytes: any file can be read, and nothing is unknown."""

    kind = "bytes"
    pieces = tuple(bytes([i]) for i in range(256))

    def encode(self, text: str) -> Ids:
        # surrogateescape: a command line may hold bytes that are no UTF-8.
        return np.frombuffer(text.encode("utf-8", "surrogateescape"), dtype=np.uint8)

    def encode_file(self, path: Path) -> Iterator[Ids]:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                yield np.frombuffer(block, dtype=np.uint8)

    def contents(self) -> dict[str, Any]:
        return {}


class CharTokens(Tokens):
    """The characters of the training text, in the order of Unicode.

    Args:
        characters: each character once.
    """

    kind = "chars"

    def __init__(self, characters: str) -> None:
        self.characters = "".join(sorted(set(characters)))
        self.pieces = [character.encode() for character in self.characters]
        self._ids = np.full(0x110000, -1, dtype=np.int32)
        self._ids[_code_points(self.characters)] = np.arange(len(self.characters))

    @classmethod
    def train(cls, files: Iterable[Path]) -> CharTokens:
        """Collect the characters of files."""
        return cls.learn(text for path in files for _, text in _text_blocks(path))

    @classmethod
    def learn(cls, texts: Iterable[str]) -> CharTokens:
        """Collect the characters of texts."""
        seen = np.zeros(0x110000, dtype=bool)
        for text in texts:
            seen[_code_points(text)] = True
        return cls("".join(map(chr, np.flatnonzero(seen).tolist())))

    def encode(self, text: str) -> Ids:
        ids, unknown = self._look_up(text)
        if unknown is not None:
            raise TextError(f"{_name(text[unknown])} is not among the characters of the training text")
        return ids

    def encode_file(self, path: Path) -> Iterator[Ids]:
        for offset, text in _text_blocks(path):
            ids, unknown = self._look_up(text)
            if unknown is not None:
                raise TextError(
                    f"{path}: {_name(text[unknown])} at byte {offset + len(text[:unknown].encode())} is not "
                    "among the characters of the training text; bytes or bpe tokens can encode any text"
                )
            yield ids

    def contents(self) -> dict[str, Any]:
        return {"characters": self.characters}

    def _look_up(self, text: str) -> tuple[Ids, int | None]:
        """The ids of text, and where the first unknown character stands."""
        ids = self._ids[_code_points(text)]
        unknown = np.flatnonzero(ids < 0)
        return ids, int(unknown[0]) if unknown.size else None


class BpeTokens(Tokens):
    """Byte-level byte pairs of the `tokenizers` library: any text can be encoded.

    Source: "Neural machine translation of rare words with subword units", arXiv 1508.07909.
    """

    kind = "bpe"

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        byte_of = _byte_level_alphabet()
        words = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
        self.pieces = [bytes(byte_of[character] for character in word or "") for word in words]

    @classmethod
    def train(cls, files: Sequence[Path], vocab_size: int) -> BpeTokens:
        """Learn merges from files until there are `vocab_size` tokens, or nothing is left to merge."""
        blocks = sum(path.stat().st_size for path in files) // BPE_SAMPLE + 1

        def sample() -> Iterator[str]:
            for path in files:
                for number, (_, text) in enumerate(_text_blocks(path)):
                    if number % blocks == 0:
                        yield from _split(text)

        return cls.learn(sample(), vocab_size)

    @classmethod
    def learn(cls, texts: Iterable[str], vocab_size: int) -> BpeTokens:
        """Learn merges from texts, none of them long."""
        tokenizer = Tokenizer(BPE())
        tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
        tokenizer.decoder = ByteLevelDecoder()
        trainer = BpeTrainer(
            vocab_size=vocab_size,
            # Sorted: the library lists them in another order in each process, and so would number them.
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
            raise TextError(f"text must be UTF-8, got {got}") from None
        return self._encode([text])

    def encode_file(self, path: Path) -> Iterator[Ids]:
        rest = ""
        for _, text in _text_blocks(path):
            *pieces, rest = _split(rest + text)
            if len(rest) > BLOCK:
                # A million characters without a space: cut anywhere, for the sake of memory.
                pieces, rest = [*pieces, rest], ""
            if pieces:
                yield self._encode(pieces)
        if rest:
            yield self._encode([rest])

    def contents(self) -> dict[str, Any]:
        return {"tokenizer": json.loads(self._tokenizer.to_str())}

    def _encode(self, texts: list[str]) -> Ids:
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return np.concatenate([np.array(encoding.ids, dtype=np.uint32) for encoding in encodings])


def train(kind: str, files: Sequence[Path], vocab_size: int) -> Tokens:
    """Make the vocabulary of a training text.

    Args:
        kind: one of `KINDS`.
        files: the text.
        vocab_size: V, for BPE.

    Raises:
        TextError: a file is not UTF-8 where that is needed.
    """
    if kind == "bytes":
        return ByteTokens()
    return CharTokens.train(files) if kind == "chars" else BpeTokens.train(files, vocab_size)


def learn(kind: str, texts: Iterable[str], vocab_size: int) -> Tokens:
    """Make the vocabulary of texts, none of them long; the other arguments are those of `train`."""
    if kind == "bytes":
        # Read all the same: what is wrong with them must show.
        collections.deque(texts, maxlen=0)
        return ByteTokens()
    return CharTokens.learn(texts) if kind == "chars" else BpeTokens.learn(texts, vocab_size)


def load(path: Path, size: int | None = None) -> Tokens:
    """Read a vocabulary that was saved.

    Args:
        path: of the file.
        size: how many tokens it must have, if that is known.

    Raises:
        TextError: the file is missing, damaged, or not a vocabulary of that size.
    """
    value = read_json(path, FORMAT)
    kind = value.get("tokens")
    tokens: Tokens
    try:
        if kind == "bytes":
            tokens = ByteTokens()
        elif kind == "chars":
            tokens = CharTokens(value["characters"])
        elif kind == "bpe":
            tokens = BpeTokens(Tokenizer.from_str(json.dumps(value["tokenizer"])))
        else:
            raise ValueError(f"tokens must be one of {', '.join(KINDS)}, got {kind!r}")
    # The tokenizers library raises plain Exception for JSON that is not its own.
    except Exception as error:
        raise TextError(f"{path}: damaged: {error}") from None
    if size not in (None, tokens.size):
        raise TextError(f"{path}: expected the {size} tokens of the model, got {tokens.size}")
    return tokens


def _code_points(text: str) -> Ids:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _name(character: str) -> str:
    return f"the character {character!r} (U+{ord(character):04X})"


def _text_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the text of a UTF-8 file in blocks, each with the offset in bytes at which it starts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0  # of the first byte that is not decoded yet
    with open(path, "rb") as file:
        while True:
            block = file.read(BLOCK)
            try:
                text = decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise TextError(
                    f"{path}: expected UTF-8, got {error.object[error.start : error.start + 1]!r} at byte "
                    f"{offset + error.start}; bytes tokens (--tokens bytes) can encode any file"
                ) from None
            if text:
                yield offset, text
                offset += len(text.encode())
            if not block:
                return


# Between a character that is no space and a space, byte-level BPE always begins a new word, whatever stands
# around them: text cut there has the tokens of the whole text. \S here and \s in the BPE are both of Unicode.
_CUT = re.compile(r"\S[ \n]")


def _split(text: str) -> Iterator[str]:
    """Yield pieces of text, each a little over `PIECE` characters; the last is the rest and may be empty."""
    start = 0
    while cut := _CUT.search(text, start + PIECE):
        yield text[start : cut.start() + 1]
        start = cut.start() + 1
    yield text[start:]


def _byte_level_alphabet() -> dict[str, int]:
    """How byte-level BPE writes bytes: printable Latin-1 as itself, the others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}
