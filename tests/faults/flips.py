"""Flipped bytes in each file of a run directory: what is read afterwards is what was written, or is refused."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path

from support.cli_runs import last_weights

from faults.cases import Case
from llm_ext.cli import CommandError
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import resume

OUTCOMES = ("refused", "same result", "another result")


def flip(case: Case, folder: Path, draw: random.Random, count: int) -> dict[str, Counter[str]]:
    """Flip a byte in each file `count` times, resume for three steps, and compare the weights.

    Returns:
        For each file the number of each of `OUTCOMES`; the last one must not occur.
    """
    changes = {"steps": (case.config.steps or 0) + 3}
    expected = folder / "expected"
    shutil.copytree(case.whole, expected)
    resume(expected, changes)
    weights = last_weights(expected)
    last = Run(case.whole).checkpoint("last").path.name
    files = [path for path in sorted(case.whole.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    found: dict[str, Counter[str]] = {}
    for number, file in enumerate(path.relative_to(case.whole) for path in files):
        if file.suffix == ".svg" or file.parts[0] not in (last, file.name, "cache"):
            continue
        counter = found.setdefault(str(file), Counter())
        for _ in range(count):
            out = folder / f"flipped-{number}"
            shutil.copytree(case.whole, out)
            data = bytearray((out / file).read_bytes())
            data[draw.randrange(len(data))] ^= draw.randrange(1, 256)
            (out / file).write_bytes(data)
            try:
                resume(out, changes)
                same = all(weights[name].equal(each) for name, each in last_weights(out).items())
                counter[OUTCOMES[1 if same else 2]] += 1
            except CommandError:
                counter[OUTCOMES[0]] += 1
            shutil.rmtree(out)
    return found
