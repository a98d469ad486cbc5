"""Peak memory does not grow with the corpus; measured in processes of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.cli_memory import encode, read_streams, train_model, write_text
from support.cli_process import peak_memory

MIB = 1 << 20


@pytest.mark.parametrize(("kind", "block", "small", "large"), [("chars", MIB, 2, 40), ("bpe", 1 << 14, 0.25, 1)])
def test_encoding(kind: str, block: int, small: float, large: float, tmp_path: Path) -> None:
    """Encodings of byte pairs take 100 bytes per token, so that blocks and texts are smaller."""
    peaks = []
    for size in (small, large):
        text = write_text(tmp_path / f"{size}.txt", int(size * MIB))
        peaks.append(peak_memory(encode, kind, text, tmp_path, block))
    assert peaks[1] - peaks[0] < 16, f"{peaks[0]} MiB for {small} MiB of text, {peaks[1]} MiB for {large}"


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "tokens"
    peaks = []
    for size in (1 << 24, 1 << 28):
        with open(path, "wb") as file:
            file.truncate(size)  # a sparse file
        peaks.append(peak_memory(read_streams, path))
    assert peaks[1] - peaks[0] < 16, f"{peaks[0]} MiB for 16 MiB of tokens, {peaks[1]} MiB for 256 MiB"


def test_training_and_validation(tmp_path: Path) -> None:
    small = peak_memory(train_model, write_text(tmp_path / "small.txt", 2 * MIB), tmp_path / "a")
    large = peak_memory(train_model, write_text(tmp_path / "large.txt", 60 * MIB), tmp_path / "b")
    assert large - small < 32, f"{small} MiB for 2 MiB of text, {large} MiB for 60"
    assert np.fromfile(next((tmp_path / "b" / "cache").glob("*.uint8")), np.uint8).size == 60 * MIB
