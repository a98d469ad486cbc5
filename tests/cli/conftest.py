"""What the tests of llm_ext.text share: a small text, a small model, the command line as a process."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from llm_ext.text.config import TrainConfig, TranslateConfig

ROOT = Path(__file__).resolve().parents[2]
WORDS = (
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "that",
    "it",
    "was",
    "good",
    "but",
    "not",
    "all",
)

# Settings of a model that trains in a second.
SMALL: dict[str, object] = {"hidden": 16, "embedding": 8, "batch": 4, "chunk": 8, "tokens": "chars"}
SMALL |= {"validate_every": 10, "log_every": 5, "accelerator": "cpu"}

# The same of a translator.
PAIRS: dict[str, object] = {"hidden": 16, "embedding": 8, "batch": 8, "tokens": "chars", "dropout": 0.1}
PAIRS |= {"validate_every": 10, "log_every": 5, "accelerator": "cpu"}


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> Iterator[None]:
    """A shell starts background jobs deaf to Ctrl-C, and processes inherit that: here it must be heard."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def options(**changes: object) -> list[str]:
    """The same settings for the command line."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (SMALL | changes).items()]
    return [word for pair in pairs for word in pair]


def small(**changes: object) -> TrainConfig:
    """The same settings for the functions."""
    return TrainConfig(**(SMALL | {"steps": 30} | changes))  # type: ignore[arg-type]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of 6,000 characters or so, with some order in it."""
    draw = random.Random(0)
    path = tmp_path / "text.txt"
    path.write_text("\n".join(" ".join(draw.choices(WORDS, k=8)) for _ in range(180)), encoding="utf-8")
    return path


def pair_options(**changes: object) -> list[str]:
    """Settings of a small translator for the command line."""
    pairs = [(f"--{name.replace('_', '-')}", str(value)) for name, value in (PAIRS | changes).items()]
    return ["--task", "translate", *(word for pair in pairs for word in pair)]


def small_pairs(**changes: object) -> TranslateConfig:
    """The same settings for the functions."""
    return TranslateConfig(**(PAIRS | {"steps": 30} | changes))  # type: ignore[arg-type]


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """A tab-separated file of 200 pairs: a few words, and the same words in capitals and turned around."""
    draw = random.Random(0)
    path = tmp_path / "pairs.tsv"
    lines = [" ".join(draw.choices(WORDS, k=draw.randint(1, 5))) for _ in range(200)]
    turned = [" ".join(reversed(line.upper().split())) for line in lines]
    path.write_text("".join(f"{a}\t{b}\tsomebody\n" for a, b in zip(lines, turned, strict=True)), encoding="utf-8")
    return path


def environment() -> dict[str, str]:
    """That of a child process which imports this very tree."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    """Start `llm-ext` in a process of its own."""
    command = [sys.executable, "-m", "llm_ext.text.cli", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment(), stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def command() -> Callable[..., tuple[int, str, str]]:
    """Run `llm-ext` in a process of its own: (exit code, stdout, stderr)."""

    def run(*arguments: object) -> tuple[int, str, str]:
        process = start(*arguments)
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err

    return run
