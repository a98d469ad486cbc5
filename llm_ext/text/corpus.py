"""A text as a memory-mapped file of token ids, and the parallel streams that training reads from it."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llm_ext.text.errors import TextError
from llm_ext.text.files import beside
from llm_ext.text.tokens import Ids, Tokens

# A touch of a mapped file may map 2 MB of it, which count as ours until they are handed back (the system
# keeps them cached). A larger file is handed back after every few rows: 32 rows then take 0.3 ms in place
# of 0.03, and peak memory is that of a small file.
SMALL, ROWS = 16 << 20, 8


class Corpus:
    """Token ids in a memory-mapped file.

    Args:
        path: of the file, as `encode` wrote it.
        dtype: of one id in it.
    """

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path = path
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._ids: Ids = np.frombuffer(self._map, dtype=dtype)

    def __len__(self) -> int:
        return int(self._ids.size)

    def rows(self, starts: npt.NDArray[np.int64], length: int, begin: int, end: int) -> Tensor:
        """Read rows of neighbouring ids [len(starts), length] int64; past `end` a row goes on at `begin`."""
        places = begin + (starts[:, None] - begin + np.arange(length)) % (end - begin)
        few = ROWS if len(self._map) > SMALL else max(len(places), 1)
        parts = [self.read(places[at : at + few]) for at in range(0, len(places), few)]
        return torch.from_numpy(np.concatenate(parts).astype(np.int64))

    def read(self, places: npt.NDArray[np.int64] | slice) -> Ids:
        """Return a copy of the ids at some places."""
        ids: Ids = self._ids[places].copy()
        if len(self._map) > SMALL:
            self._map.madvise(mmap.MADV_DONTNEED)
        return ids

    def split(self, fraction: float) -> int:
        """Return where the last `fraction` of the tokens begins, which is kept for validation."""
        return int(len(self) * (1 - fraction))

    def fingerprint(self) -> str:
        """Return a hash of the length and of 64 samples of the ids, by which a changed text is noticed."""
        digest = hashlib.sha256(str(len(self)).encode())
        for start in np.linspace(0, len(self), num=64, endpoint=False).astype(np.int64).tolist():
            digest.update(self.read(slice(start, start + 256)).astype("<u4").tobytes())
        return digest.hexdigest()


class Streams:
    """Places spread evenly over a range of a corpus, which all move on by one chunk a step.

    Past the end of the range a stream goes on at its beginning, so that no token is left out, and where the
    streams stand is a function of the step alone.

    Args:
        corpus: the text.
        begin: first token of the range.
        end: one past its last token.
        count: B, streams altogether.
        chunk: T, tokens a step.
        mine: which of the streams this process reads.

    Raises:
        TextError: the range is too short.
    """

    def __init__(self, corpus: Corpus, begin: int, end: int, count: int, chunk: int, mine: slice) -> None:
        if end - begin <= count * chunk:
            raise TextError(
                f"the training text must have more than batch × chunk = {count} × {chunk} = {count * chunk} "
                f"tokens, got {end - begin}; give more text, or a smaller --batch or --chunk"
            )
        self.corpus, self.begin, self.end, self.chunk = corpus, begin, end, chunk
        self.starts = (begin + (end - begin) // count * np.arange(count, dtype=np.int64))[mine]
        # Steps in which the streams together read the range once.
        self.steps_per_pass = (end - begin) // count // chunk

    def read(self, step: int) -> tuple[Tensor, Tensor]:
        """Return the input ids of a step and those that follow each of them, both [B, T]."""
        rows = self.corpus.rows(self.starts + step * self.chunk, self.chunk + 1, self.begin, self.end)
        return rows[:, :-1], rows[:, 1:]


def check_files(files: Sequence[Path]) -> None:
    """Raise a TextError if one of the files cannot be read or is empty."""
    for path in files:
        if not path.exists():
            raise TextError(f"{path}: no such file")
        if not path.is_file():
            raise TextError(f"{path}: expected a text file, got something else")
        if path.stat().st_size == 0:
            raise TextError(f"{path}: expected text, got an empty file")


def encode(files: Sequence[Path], tokens: Tokens, cache: Path) -> Corpus:
    """Encode files, one after the other, into one corpus; do nothing if that was done before.

    Args:
        files: the text.
        tokens: its vocabulary.
        cache: directory that keeps the encoded text, under a name made from the vocabulary and from the path,
            size and time of change of each file.

    Raises:
        TextError: a file is missing, empty, or cannot be encoded.
    """
    check_files(files)
    dtype = next(d for d in (np.uint8, np.uint16, np.uint32) if tokens.size - 1 <= np.iinfo(d).max)
    stats = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps([tokens.kind, tokens.contents(), stats]).encode()).hexdigest()[:16]
    path = cache / f"{key}.{np.dtype(dtype).name}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # disable=None: no bar where nobody watches. Small texts are done before a bar could be read.
        bar = tqdm(desc="encoding", unit=" tokens", unit_scale=True, disable=None, delay=1, leave=False)
        with bar, beside(path) as file:
            for text in files:
                for ids in tokens.encode_file(text):
                    file.write(ids.astype(dtype).tobytes())
                    bar.update(len(ids))
    return Corpus(path, dtype)
