"""Pairs of source and target lines: reading them, and encoding them into a memory-mapped file."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from llm_ext.cli.data.cache import is_whole, write_cache
from llm_ext.cli.data.corpus import Corpus, cache_path
from llm_ext.cli.data.files import check_files, read_lines
from llm_ext.cli.data.lines import LineTokenizer
from llm_ext.cli.data.tokenizer import BPE_SAMPLE, Ids, Tokenizer, tokenizer_from_texts
from llm_ext.cli.errors import CommandError

__all__ = ["EncodedPairs", "Indices", "PairFiles", "encode_pairs", "tokenizer_from_pairs"]

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PairFiles:
    """Pairs in two files, line by line, or in one file whose first two tab-separated columns are source and target.

    Attributes:
        source: File of the sources, or of both.
        target: File of the targets, or None.
    """

    source: Path
    target: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """The one or two files."""
        return [self.source] if self.target is None else [self.source, self.target]

    def __iter__(self) -> Iterator[tuple[int, str, str]]:
        """Yield line number (starting at 1), source and target, without surrounding spaces.

        Raises:
            CommandError: A file is missing, empty or not UTF-8, a line has no tab, or the files differ in length.
        """
        check_files(self.paths)
        if self.target is None:
            for number, line in read_lines(self.source):
                columns = line.split("\t")
                if len(columns) < 2:
                    raise CommandError(
                        f"{self.source}: line {number}: expected source and target separated by a tab, got no tab"
                    )
                yield number, columns[0].strip(), columns[1].strip()
            return
        for (number, source), (_, target) in zip(read_lines(self.source), read_lines(self.target), strict=False):
            yield number, source.strip(), target.strip()
        counts = [_count_lines(path) for path in self.paths]
        if counts[0] != counts[1]:
            raise CommandError(
                f"{self.source} has {counts[0]:,} lines, {self.target} has {counts[1]:,}; "
                "each line of one file must have a line in the other"
            )


def tokenizer_from_pairs(
    kind: str, files: PairFiles, vocab_size: int, sides: tuple[int, ...], val: PairFiles | None = None
) -> Tokenizer:
    """Build the tokenizer of one side of pairs, or of both.

    Args:
        kind: One of `KINDS` of the tokenizer module.
        files: The pairs.
        vocab_size: V, for BPE.
        sides: 0 for the source, 1 for the target.
        val: Validation pairs, whose characters a character tokenizer must know as well.

    Raises:
        CommandError: The pairs cannot be read.
    """
    every = sum(path.stat().st_size for path in files.paths if path.exists()) // BPE_SAMPLE + 1

    def texts() -> Iterator[str]:
        for number, *pair in files:
            if kind == "chars" or number % every == 0:
                yield from (f" {pair[side]}" if kind == "bpe" else pair[side] for side in sides)
        if val is not None and kind == "chars":
            for _, *pair in val:
                yield from (pair[side] for side in sides)

    return tokenizer_from_texts(kind, texts(), vocab_size)


class EncodedPairs:
    """Encoded pairs in memory-mapped files.

    Args:
        path: The file of ids; the offsets of each pair are in a file with the suffix `.pairs`.
        dtype: Type of one id.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self._ids = Corpus(path, dtype)
        table = np.fromfile(_offsets_path(path), dtype=np.int64).reshape(-1, 4)
        # Begin of the source, begin of the target, end of the target, and a checksum of the source for `split`.
        self._begin, self._middle, self._end, self._checksum = np.ascontiguousarray(table.T)

    def __len__(self) -> int:
        return int(self._begin.size)

    @property
    def source_lengths(self) -> Indices:
        """Tokens of each source, without its end."""
        lengths: Indices = self._middle - self._begin
        return lengths

    @property
    def target_lengths(self) -> Indices:
        """Tokens of each target, without its end."""
        lengths: Indices = self._end - self._middle
        return lengths

    def source(self, index: int) -> Ids:
        """Return the ids of a source."""
        return self._ids.read(slice(int(self._begin[index]), int(self._middle[index])))

    def target(self, index: int) -> Ids:
        """Return the ids of a target."""
        return self._ids.read(slice(int(self._middle[index]), int(self._end[index])))

    def split(self, fraction: float) -> tuple[Indices, Indices]:
        """Return the indices of the pairs to train on and of those for validation.

        About `fraction` of the sources go to validation. All pairs of a source are in the same part.
        """
        held_out = self._checksum < fraction * 2**32
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def fold(self, index: int, count: int) -> tuple[Indices, Indices]:
        """Return the indices of the pairs to train on and of those for validation, for one part of `count`.

        The parts have equally many sources. All pairs of a source are in the same part.

        Raises:
            CommandError: There are fewer sources than parts.
        """
        sources, source = np.unique(self._checksum, return_inverse=True)
        if len(sources) < count:
            raise CommandError(f"--folds {count}: the pairs have only {len(sources)} different sources")
        held_out = source * count // len(sources) == index
        return np.flatnonzero(~held_out), np.flatnonzero(held_out)

    def fingerprint(self) -> str:
        """Return a hash of the number of pairs and of samples of them, to detect a changed text."""
        return hashlib.sha256(f"{len(self)} {self._ids.fingerprint()}".encode()).hexdigest()


def encode_pairs(
    files: PairFiles,
    source: LineTokenizer,
    target: LineTokenizer,
    cache: Path,
    longest: int,
    notify: Callable[[str], object] = print,
    longest_source: int | None = None,
) -> EncodedPairs:
    """Encode pairs, or open the encoded pairs of an earlier call.

    Args:
        files: The pairs.
        source: Tokenizer of the sources.
        target: Tokenizer of the targets.
        cache: Directory of encoded pairs. The name of a file depends on the vocabularies and on the path, size and
            modification time of each file.
        longest: Pairs with a side of more tokens are left out.
        notify: Receives a message about pairs that were left out, and about sources that were cut.
        longest_source: Sources of more tokens are cut at the end of a word. None: they are not cut.

    Raises:
        CommandError: A file cannot be read or encoded, or no pair is left.
    """
    check_files(files.paths)
    tokenizers = [[side.tokenizer.kind, side.tokenizer.contents()] for side in (source, target)]
    limits = (longest,) if longest_source is None else (longest, longest_source)
    path, dtype = cache_path(cache, files.paths, max(source.size, target.size), [tokenizers], *limits)
    if not is_whole(path, _offsets_path(path)):
        _write_pairs(path, dtype, files, (source, target), longest, notify, longest_source)
    return EncodedPairs(path, dtype)


def _write_pairs(
    path: Path,
    dtype: npt.DTypeLike,
    files: PairFiles,
    tokenizers: tuple[LineTokenizer, LineTokenizer],
    longest: int,
    notify: Callable[[str], object],
    longest_source: int | None,
) -> None:
    """Write the ids and offsets of all pairs that can be used."""
    left_out: dict[str, list[int]] = {"an empty side": [], f"a side of more than {longest} tokens": []}
    empty, long = left_out.values()
    begin, kept, cut = 0, 0, 0
    bar = tqdm(desc="encoding", unit=" pairs", unit_scale=True, disable=None, delay=1, leave=False)
    with bar, write_cache(path, _offsets_path(path)) as (ids_file, offsets_file):
        for number, *pair in files:
            bar.update()
            if not all(pair):
                empty.append(number)
                continue
            sides = []
            for tokenizer, text, name in zip(tokenizers, pair, (files.source, files.paths[-1]), strict=True):
                try:
                    sides.append(tokenizer.encode(text).astype(dtype))
                except CommandError as error:
                    raise CommandError(f"{name}: line {number}: {error}") from None
            source_tokens = len(sides[0])
            if longest_source is not None:
                sides[0] = tokenizers[0].cut(sides[0], longest_source)
            # A source that may be cut is never too long.
            if max(map(len, sides if longest_source is None else sides[1:])) > longest:
                long.append(number)
                continue
            cut += len(sides[0]) < source_tokens
            for side in sides:
                ids_file.write(side.tobytes())
            middle = begin + len(sides[0])
            end = middle + len(sides[1])
            checksum = zlib.crc32(pair[0].encode())
            offsets_file.write(np.array((begin, middle, end, checksum), dtype=np.int64).tobytes())
            begin, kept = end, kept + 1
        names = " and ".join(map(str, files.paths))
        for reason, numbers in left_out.items():
            if numbers:
                shown = ", ".join(map(str, numbers[:5])) + (", …" if len(numbers) > 5 else "")
                notify(f"{names}: left out {len(numbers):,} with {reason} (line {shown})")
        if cut:
            notify(f"{names}: cut {cut:,} of {kept:,} sources, those of more than {longest_source:,} tokens")
        if not kept:
            raise CommandError(f"{names}: no pair is left to use")


def _offsets_path(path: Path) -> Path:
    return path.with_suffix(".pairs")


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(1 for _ in file)
