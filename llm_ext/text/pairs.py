"""Pairs of lines, source and target: read, encoded into a memory-mapped file, and put into batches of like length."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llm_ext.text import tokens as vocabulary
from llm_ext.text.corpus import Corpus, check_files
from llm_ext.text.errors import TextError
from llm_ext.text.files import beside
from llm_ext.text.tokens import BPE_SAMPLE, Ids, Tokens

# Pairs are sorted by length among those of so many batches: enough that the targets of a batch are almost all of one
# length, and few enough that batches differ from pass to pass.
POOL = 100
# Pairs read side by side in an evaluation.
ROWS = 64

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairFiles:
    """Where pairs stand: in two files, line by line, or in one whose columns are source and target (and others)."""

    source: Path
    target: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """The one or two files."""
        return [self.source] if self.target is None else [self.source, self.target]

    def named(self) -> list[str]:
        """Return the paths as text, absolute."""
        return [str(path.resolve()) for path in self.paths]

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        """Yield the number of each line, from 1, its source and its target, without spaces around them.

        Raises:
            TextError: a file is missing, empty or no UTF-8, a line has no tab, or the files differ in length.
        """
        check_files(self.paths)
        if self.target is None:
            for number, line in read_lines(self.source):
                columns = line.split("\t")
                if len(columns) < 2:
                    raise TextError(
                        f"{self.source}: line {number}: expected source and target with a tab between, got no tab"
                    )
                yield number, columns[0].strip(), columns[1].strip()
            return
        sources, targets = read_lines(self.source), read_lines(self.target)
        number = 0
        for (number, source), (_, target) in zip(sources, targets, strict=False):
            yield number, source.strip(), target.strip()
        # zip has taken one more of the sources than of the targets, if there is one.
        counts = [_count_lines(path) for path in self.paths]
        if counts[0] != counts[1]:
            raise TextError(
                f"{self.source} has {counts[0]:,} lines, {self.target} has {counts[1]:,}; "
                "each line of the one must have its line in the other"
            )


def read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file with their numbers, from 1.

    Raises:
        TextError: a line is not UTF-8.
    """
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield number, decode_line(line, f"{path}: line {number}")


def decode_line(line: bytes, where: str) -> str:
    """Return the text of a line without its end, and without the mark of UTF-8 that some editors put first.

    Raises:
        TextError: it is not UTF-8.
    """
    try:
        return line.decode().removeprefix("\ufeff").rstrip("\r\n")
    except UnicodeDecodeError as error:
        got = f"{line[error.start : error.start + 1]!r} at byte {error.start} of the line"
        raise TextError(f"{where}: expected UTF-8, got {got}") from None


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)


class Language(NamedTuple):
    """The vocabulary of one side, and one more id: that which ends a line, and begins a target."""

    tokens: Tokens

    @property
    def size(self) -> int:
        """How many ids there are."""
        return self.tokens.size + 1

    @property
    def end(self) -> int:
        """The id that ends a line."""
        return self.tokens.size

    def encode(self, line: str) -> Ids:
        """Return the ids of a line, without its end.

        Raises:
            TextError: the vocabulary has no tokens for it.
        """
        # So that its first word is the same word as within a line.
        return self.tokens.encode(f" {line}" if self.tokens.kind == "bpe" else line)

    def decode(self, ids: list[int]) -> str:
        """Return the line of ids, those of an end left out."""
        text = self.tokens.decode(i for i in ids if i != self.end)
        return one_line(text.removeprefix(" ") if self.tokens.kind == "bpe" else text)

    def stream(self, ids: Iterator[int]) -> Iterator[str]:
        """Yield the line of ids up to an end, as soon as its characters are complete."""

        def until_end() -> Iterator[int]:
            for i in ids:
                if i == self.end:
                    return
                yield i

        first = self.tokens.kind == "bpe"
        for piece in self.tokens.stream(until_end()):
            if piece:
                yield one_line(piece.removeprefix(" ") if first else piece)
                first = False


def one_line(text: str) -> str:
    """Return a text with spaces for what would begin another line."""
    return text.replace("\r", " ").replace("\n", " ")


def learn(kind: str, files: PairFiles, vocab_size: int, sides: tuple[int, ...], more: PairFiles | None) -> Tokens:
    """Make the vocabulary of one side of pairs, or of both.

    Args:
        kind: one of `tokens.KINDS`.
        files: the pairs.
        vocab_size: V, for BPE.
        sides: 0 for the source, 1 for the target.
        more: pairs whose characters must be known, too; not for BPE.

    Raises:
        TextError: as reading the pairs.
    """
    every = sum(path.stat().st_size for path in files.paths if path.exists()) // BPE_SAMPLE + 1

    def texts() -> Iterator[str]:
        for number, *pair in files:
            if kind == "chars" or number % every == 0:
                yield from (f" {pair[side]}" if kind == "bpe" else pair[side] for side in sides)
        if more is not None and kind == "chars":
            for _, *pair in more:
                yield from (pair[side] for side in sides)

    return vocabulary.learn(kind, texts(), vocab_size)


class Pairs:
    """Encoded pairs in memory-mapped files.

    Args:
        path: of the file of ids; that of where each pair stands in it is beside it.
        dtype: of one id.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._ids = Corpus(path, dtype)
        table = np.fromfile(_table(path), dtype=np.int64).reshape(-1, 4)
        # Where source and target begin, where the target ends, and what the draw for validation goes by.
        self._begin, self._middle, self._end, self._draw = np.ascontiguousarray(table.T)

    def __len__(self) -> int:
        return int(self._begin.size)

    @property
    def source_lengths(self) -> Numbers:
        """Tokens of each source, without its end."""
        lengths: Numbers = self._middle - self._begin
        return lengths

    @property
    def target_lengths(self) -> Numbers:
        """Tokens of each target, without its end."""
        lengths: Numbers = self._end - self._middle
        return lengths

    def source(self, index: int) -> Ids:
        """Return the ids of a source."""
        return self._ids.read(slice(int(self._begin[index]), int(self._middle[index])))

    def target(self, index: int) -> Ids:
        """Return the ids of a target."""
        return self._ids.read(slice(int(self._middle[index]), int(self._end[index])))

    def split(self, fraction: float) -> tuple[Numbers, Numbers]:
        """Return which pairs to train on and which are for validation: all pairs of about that fraction of the sources.

        A source that comes several times is on one side only, wherever it stands.
        """
        held_out = self._draw < fraction * 2**32
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def fingerprint(self) -> str:
        """Return a hash of how many pairs there are and of samples of them, by which a changed text is noticed."""
        return hashlib.sha256(f"{len(self)} {self._ids.fingerprint()}".encode()).hexdigest()


class Batch(NamedTuple):
    """Pairs side by side, padded with the ids of ends.

    source: [B, S] int64, each with its end; `source_lengths`: [B], or None if all have S tokens.
    target: [B, T] int64, each begun with an end; `target_lengths`: likewise.
    keep: the positions that have something to predict, [B, T] bool; `expected`: what that is, [N] int64.
    """

    source: Tensor
    target: Tensor
    source_lengths: Tensor | None
    target_lengths: Tensor | None
    keep: Tensor
    expected: Tensor


def make_batch(pairs: Pairs, chosen: Numbers, ends: tuple[int, int]) -> Batch:
    """Read pairs; `ends` are the ids that end a source and a target."""
    sources = [pairs.source(i) for i in chosen.tolist()]
    targets = [pairs.target(i) for i in chosen.tolist()]
    source, source_lengths = pad(sources, ends[0])
    expected, target_lengths = pad(targets, ends[1])
    target = torch.cat((expected.new_full((len(expected), 1), ends[1]), expected[:, :-1]), 1)
    keep = torch.arange(expected.shape[1]) < target_lengths[:, None]
    return Batch(
        source, target, _unless_all(source_lengths, source), _unless_all(target_lengths, target), keep, expected[keep]
    )


def _unless_all(lengths: Tensor, ids: Tensor) -> Tensor | None:
    """Lengths, or None if no row ends before the others: then nothing need be packed."""
    return lengths if (lengths < ids.shape[1]).any() else None


def pad(lines: list[Ids], end: int) -> tuple[Tensor, Tensor]:
    """Return lines with their ends, padded with more of them, [B, S] int64, and their lengths, [B]."""
    lengths = torch.tensor([len(line) + 1 for line in lines], dtype=torch.int64)
    ids = torch.full((len(lines), int(lengths.max()) if lines else 0), end)
    for row, line in zip(ids, lines, strict=True):
        row[: len(line)] = torch.from_numpy(line.astype(np.int64))
    return ids, lengths


class Batches:
    """Batches of pairs of like length; which pairs a step reads is a function of the step alone.

    Each pass shuffles the pairs, sorts them by length in pools, and shuffles the batches cut from these. The last batch
    of a pass is filled up with the first pairs of its shuffle.

    Args:
        pairs: all pairs.
        chosen: those to train on.
        size: B, pairs of a batch, of all processes together.
        seed: of the shuffles.
        ends: ids that end a source and a target.

    Raises:
        TextError: there are fewer pairs than fill a batch.
    """

    def __init__(self, pairs: Pairs, chosen: Numbers, size: int, seed: int, ends: tuple[int, int]) -> None:
        if len(chosen) < size:
            raise TextError(
                f"there must be at least batch × processes = {size} pairs to train on, got {len(chosen)}; "
                "give more, or a smaller --batch"
            )
        self.pairs, self.chosen, self.size, self.seed, self.ends = pairs, chosen, size, seed, ends
        self.steps_per_pass = -(-len(chosen) // size)
        self._pass, self._order = -1, np.empty((0, size), dtype=np.int64)

    def rows(self, step: int) -> Numbers:
        """Return the pairs of a step, [B], the longest target first."""
        number, at = divmod(step, self.steps_per_pass)
        if number != self._pass:
            draw = np.random.default_rng((self.seed, number))
            order = np.resize(draw.permutation(self.chosen), self.steps_per_pass * self.size)
            for begin in range(0, len(order), POOL * self.size):
                pool = order[begin : begin + POOL * self.size]
                pool[:] = pool[by_length(self.pairs, pool)]
            self._pass, self._order = number, draw.permutation(order.reshape(-1, self.size))
        rows: Numbers = self._order[at]
        return rows

    def read(self, step: int, mine: slice) -> tuple[Batch, int]:
        """Return the rows of a step that are read here, and how many targets' tokens the whole step has."""
        rows = self.rows(step)
        total = int(self.pairs.target_lengths[rows].sum()) + len(rows)
        return make_batch(self.pairs, rows[mine], self.ends), total


def by_length(pairs: Pairs, chosen: Numbers) -> Numbers:
    """Return the order of pairs by the length of the target, and then of the source, the longest first."""
    order: Numbers = np.lexsort((pairs.source_lengths[chosen], pairs.target_lengths[chosen]))[::-1]
    return order


def encode(
    files: PairFiles, source: Language, target: Language, cache: Path, longest: int, say: Callable[[str], Any] = print
) -> Pairs:
    """Encode pairs; do nothing if that was done before.

    Args:
        files: the pairs.
        source: the vocabulary of the sources.
        target: that of the targets.
        cache: directory that keeps the encoded pairs, under a name made from the vocabularies and from the path, size
            and time of change of each file.
        longest: tokens; pairs with a longer side are left out.
        say: told of pairs that were left out, and where they stand.

    Raises:
        TextError: a file cannot be used, cannot be encoded, or no pair is left.
    """
    check_files(files.paths)
    largest = max(source.size, target.size) - 1
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32) if largest <= np.iinfo(d).max)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files.paths]
    contents = [[side.tokens.kind, side.tokens.contents()] for side in (source, target)]
    key = hashlib.sha256(json.dumps([contents, stats, longest]).encode()).hexdigest()[:16]
    path = cache / f"{key}.{np.dtype(dtype).name}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        left_out: dict[str, list[int]] = {"an empty side": [], f"a side of more than {longest} tokens": []}
        empty, long = left_out.values()
        begin, kept = 0, 0
        bar = tqdm(desc="encoding", unit=" pairs", unit_scale=True, disable=None, delay=1, leave=False)
        with bar, beside(path) as ids_file, beside(_table(path)) as table:
            for number, *pair in files:
                bar.update()
                if not all(pair):
                    empty.append(number)
                    continue
                sides = []
                for language, text, name in zip((source, target), pair, (files.source, files.paths[-1]), strict=True):
                    try:
                        sides.append(language.encode(text).astype(dtype))
                    except TextError as error:
                        raise TextError(f"{name}: line {number}: {error}") from None
                if max(map(len, sides)) > longest:
                    long.append(number)
                    continue
                for side in sides:
                    ids_file.write(side.tobytes())
                middle = begin + len(sides[0])
                end = middle + len(sides[1])
                draw = zlib.crc32(pair[0].encode())
                table.write(np.array((begin, middle, end, draw), dtype=np.int64).tobytes())
                begin, kept = end, kept + 1
            where = " and ".join(map(str, files.paths))
            for reason, numbers in left_out.items():
                if numbers:
                    shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
                    say(f"{where}: left out {len(numbers):,} with {reason} (line {shown})")
            if not kept:
                raise TextError(f"{where}: no pair is left to use")
    return Pairs(path, dtype)


def _table(path: Path) -> Path:
    return path.with_suffix(".pairs")
