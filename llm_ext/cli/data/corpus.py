"""A text as a memory-mapped file of token ids, and the parallel streams that training reads from it."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llm_ext.cli.data.cache import is_whole, write_cache
from llm_ext.cli.data.files import check_files
from llm_ext.cli.data.tokenizer import Ids, Tokenizer
from llm_ext.cli.errors import CommandError

__all__ = ["Corpus", "Streams", "cache_path", "encode_text"]

# Touching a mapped file may map 2 MB of it, which count as memory of the process until they are released (the system
# keeps them cached). Files above SMALL bytes are released after every ROWS rows: 32 rows take 0.3 ms instead of
# 0.03 ms, and peak memory is that of a small file.
SMALL, ROWS = 16 << 20, 8


class Corpus:
    """Token ids in a memory-mapped file.

    Args:
        path: The file, as `encode_text` wrote it.
        dtype: Type of one id.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids: Ids = np.frombuffer(self._map, dtype=dtype)

    def __len__(self) -> int:
        return int(self._ids.size)

    def rows(self, starts: npt.NDArray[np.int64], length: int, begin: int, end: int) -> Tensor:
        """Read rows of consecutive ids, [len(starts), length] int64; a row that reaches `end` continues at `begin`.

        A range whose `end` is beyond the corpus continues at its beginning.
        """
        indices = (begin + (starts[:, None] - begin + np.arange(length)) % (end - begin)) % len(self)
        step = ROWS if len(self._map) > SMALL else max(len(indices), 1)
        blocks = [self.read(indices[first : first + step]) for first in range(0, len(indices), step)]
        return torch.from_numpy(np.concatenate(blocks).astype(np.int64))

    def read(self, indices: npt.NDArray[np.int64] | slice) -> Ids:
        """Return a copy of the ids at some indices."""
        ids: Ids = self._ids[indices].copy()
        if len(self._map) > SMALL:
            self._map.madvise(mmap.MADV_DONTNEED)
        return ids

    def split(self, fraction: float) -> int:
        """Return the index at which the last `fraction` of the tokens begins: the validation text."""
        return int(len(self) * (1 - fraction))

    def fold(self, index: int, count: int) -> tuple[int, int]:
        """Return begin and end of the part `index` of `count` contiguous parts of equal size."""
        return len(self) * index // count, len(self) * (index + 1) // count

    def fingerprint(self) -> str:
        """Return a hash of the length and of 64 samples of the ids, to detect a changed text."""
        sha = hashlib.sha256(str(len(self)).encode())
        for start in np.linspace(0, len(self), num=64, endpoint=False).astype(np.int64).tolist():
            sha.update(self.read(slice(start, start + 256)).astype("<u4").tobytes())
        return sha.hexdigest()


class Streams:
    """Streams that start at evenly spaced offsets of a corpus and advance by one chunk per step.

    At the end of the range a stream continues at its beginning, so that every token is read. The position of each
    stream is a function of the step alone.

    Args:
        corpus: The text.
        begin: First token of the range.
        end: One past the last token of the range; beyond the corpus, the range continues at its beginning.
        count: B, the number of streams of all processes together.
        chunk: T, tokens per step.
        mine: The streams that this process reads.

    Raises:
        CommandError: The range is too short.
    """

    def __init__(self, corpus: Corpus, begin: int, end: int, count: int, chunk: int, mine: slice) -> None:
        if end - begin <= count * chunk:
            raise CommandError(
                f"the training text must have more than batch × chunk = {count} × {chunk} = {count * chunk} "
                f"tokens, got {end - begin}; give more text, or a smaller --batch or --chunk"
            )
        self.corpus, self.begin, self.end, self.chunk = corpus, begin, end, chunk
        self.starts = (begin + (end - begin) // count * np.arange(count, dtype=np.int64))[mine]
        # Steps in which all streams together read the range once.
        self.steps_per_pass = (end - begin) // count // chunk

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the input ids of a step and the id that follows each of them, both [B, T]."""
        rows = self.corpus.rows(self.starts + step * self.chunk, self.chunk + 1, self.begin, self.end)
        return rows[:, :-1], rows[:, 1:]


def encode_text(files: Sequence[Path], tokenizer: Tokenizer, cache: Path) -> Corpus:
    """Encode files, one after the other, into one corpus, or open the corpus of an earlier call.

    Args:
        files: The text.
        tokenizer: Its tokenizer.
        cache: Directory of encoded texts. The name of a file depends on the vocabulary and on the path, size and
            modification time of each text. A damaged file is written again.

    Raises:
        CommandError: A file is missing, empty, or cannot be encoded.
    """
    check_files(files)
    path, dtype = cache_path(cache, files, tokenizer.size, [tokenizer.kind, tokenizer.contents()])
    if not is_whole(path):
        # disable=None: show the bar at a terminal only. Small texts are encoded before the delay is over.
        bar = tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None, delay=1, leave=False)
        with bar, write_cache(path) as (file,):
            for text in files:
                for ids in tokenizer.encode_file(text):
                    file.write(ids.astype(dtype).tobytes())
                    bar.update(len(ids))
    return Corpus(path, dtype)


def cache_path(
    cache: Path, files: Sequence[Path], vocab_size: int, tokenizer: list[Any], *options: int
) -> tuple[Path, np.dtype[Any]]:
    """Return the path of an encoded text and the smallest type that holds its ids.

    Args:
        cache: Directory of encoded texts.
        files: The text.
        vocab_size: Number of ids.
        tokenizer: Contents of the tokenizer, JSON values.
        options: Other numbers on which the encoded text depends.
    """
    dtype = next(np.dtype(d) for d in (np.uint8, np.uint16, np.uint32) if vocab_size - 1 <= np.iinfo(d).max)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([*tokenizer, stats, *options]).encode()).hexdigest()[:16]
    return cache / f"{key}.{dtype.name}", dtype
