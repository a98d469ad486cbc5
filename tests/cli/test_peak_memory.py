"""Peak memory must not grow with the corpus: measured in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .conftest import ROOT, environment

PEAK = "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"

ENCODE = f"""
import sys
from pathlib import Path
from llm_ext.text import tokens
from llm_ext.text.corpus import encode

kind, text, out = sys.argv[1:]
encode([Path(text)], tokens.train(kind, [Path(text)], 512), Path(out))
{PEAK}
"""

TRAIN = f"""
import sys
from pathlib import Path
from llm_ext.text.config import TrainConfig
from llm_ext.text.train import train

text, out = sys.argv[1:]
config = TrainConfig(hidden=8, embedding=4, attention="none", steps=5, accelerator="cpu")
train(config, [Path(text)], Path(out))
{PEAK}
"""

READ = f"""
import sys
from pathlib import Path
import numpy as np
from llm_ext.text.corpus import Corpus, Streams

corpus = Corpus(Path(sys.argv[1]), np.uint16)
streams = Streams(corpus, 0, len(corpus), 32, 4096, slice(None))
for step in range(1000):
    streams.read(step)
{PEAK}
"""


def peak(code: str, *arguments: object) -> int:
    """Peak memory of a process, in MiB."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def write(path: Path, megabytes: int) -> Path:
    source = (ROOT / "examples/shakespeare/input.txt").read_bytes()
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(source[: 1 << 20])
    return path


@pytest.mark.parametrize(("kind", "large"), [("bytes", 60), ("chars", 60), ("bpe", 20)])
def test_encoding(kind: str, large: int, tmp_path: Path) -> None:
    little = peak(ENCODE, kind, write(tmp_path / "little.txt", 2), tmp_path)
    much = peak(ENCODE, kind, write(tmp_path / "much.txt", large), tmp_path)
    assert much - little < 16, f"{little} MiB for 2 MiB of text, {much} MiB for {large}"


def test_reading(tmp_path: Path) -> None:
    """A gigabyte of tokens, of which 250 MB are read."""
    path = tmp_path / "tokens"
    peaks = []
    for size in (1 << 26, 1 << 30):
        with open(path, "wb") as file:
            file.truncate(size)  # takes no room on the disk
        peaks.append(peak(READ, path))
    assert peaks[1] - peaks[0] < 16, f"{peaks[0]} MiB for 64 MiB of tokens, {peaks[1]} MiB for 1 GiB"


def test_training_and_validation(tmp_path: Path) -> None:
    little = peak(TRAIN, write(tmp_path / "little.txt", 2), tmp_path / "a")
    much = peak(TRAIN, write(tmp_path / "much.txt", 60), tmp_path / "b")
    assert much - little < 32, f"{little} MiB for 2 MiB of text, {much} MiB for 60"
    assert np.fromfile(next((tmp_path / "b" / "cache").iterdir()), np.uint8).size == 60 << 20
