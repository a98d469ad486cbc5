"""Several trainings at once in one run directory, or with one cache; and a clock that jumps."""

from __future__ import annotations

import random
import time
from pathlib import Path
from unittest import mock

from support.cli_process import CommandProcess
from support.cli_runs import assert_same_runs

from faults.cases import Case
from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import train


def write_together(case: Case, folder: Path, count: int) -> int:
    """Start `count` trainings in one directory: one trains, the others say why they do not; return their number."""
    out = folder / "together"
    processes = [CommandProcess(case.command(out), folder) for _ in range(count)]
    results = [process.wait() for process in processes]
    refused = [errors for code, _, errors in results if code == 1]
    assert sorted(code for code, _, _ in results) == [0] + [1] * (count - 1), results
    assert all("another process trains here" in error or "holds a run already" in error for error in refused)
    assert_same_runs(case.whole, out)
    return len(refused)


def share_a_cache(case: Case, folder: Path, count: int) -> None:
    """Start `count` trainings that encode the same text into the same cache."""
    outs = [folder / f"shared-{number}" for number in range(count)]
    processes = [CommandProcess([*case.command(out), "--cache", folder / "cache"], folder) for out in outs]
    for process, out in zip(processes, outs, strict=True):
        assert process.wait()[0] == 0
        assert_same_runs(case.whole, out)


def read_while_training(case: Case, folder: Path, count: int) -> None:
    """Load the checkpoints of a training that replaces them all the time."""
    out = folder / "read"
    process = CommandProcess([*case.command(out), "--steps", 10**7, "--validate-every", 1], folder)
    process.wait_until(Run(out).exists)
    for number in range(count):
        Run(out).load(("best", "last")[number % 2])
    process.kill()


def jump(case: Case, folder: Path, draw: random.Random) -> None:
    """Train while the clock jumps by up to ten years between any two looks at it."""
    seconds = time.time

    def jumping() -> float:
        return seconds() + draw.uniform(-3e8, 3e8)

    def jumping_ns() -> int:
        return int(jumping() * 1e9)

    with mock.patch.object(time, "time", jumping), mock.patch.object(time, "time_ns", jumping_ns):
        train(case.config, [case.data], folder / "clock")
    assert_same_runs(case.whole, folder / "clock")
