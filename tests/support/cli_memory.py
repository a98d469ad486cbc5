"""Work on corpora of any size, for measurements of memory in processes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from llm_ext.cli.data import Corpus, Streams, encode_text, tokenizer, tokenizer_from_files
from llm_ext.cli.training import LanguageConfig, train
from support.cli_runs import ROOT


def write_text(path: Path, size: int) -> Path:
    """Write `size` bytes, the same 256 KiB of text repeatedly."""
    block = (ROOT / "examples/shakespeare/input.txt").read_bytes()[: 1 << 18]
    with open(path, "wb") as file:
        for _ in range(size >> 18):
            file.write(block)
    return path


def encode(kind: str, text: Path, cache: Path, block: int) -> None:
    """Encode a text that is read `block` bytes at a time."""
    tokenizer.BLOCK = block
    encode_text([text], tokenizer_from_files(kind, [text], 260), cache)


def read_streams(path: Path) -> None:
    """Read 64 MB of a file of 16-bit tokens."""
    corpus = Corpus(path, np.uint16)
    streams = Streams(corpus, 0, len(corpus), 32, 4096, slice(None))
    for step in range(250):
        streams.read(step)


def train_model(text: Path, out: Path) -> None:
    """Train on bytes, and validate on a hundredth of them."""
    config = LanguageConfig(hidden=8, embedding=4, attention="none", steps=5, val_fraction=0.01, device="cpu")
    train(config, [text], out)
