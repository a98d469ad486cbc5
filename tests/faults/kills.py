"""Processes killed at random moments: checkpoints stay whole, and resuming gives what no kill would have given."""

from __future__ import annotations

import random
import time
from pathlib import Path

from support.cli_process import CommandProcess
from support.cli_runs import assert_same_runs

from faults.cases import Case
from llm_ext.cli.checkpoint import STATE, Run


def kill_trainings(case: Case, folder: Path, draw: random.Random, count: int) -> int:
    """Kill trainings of a case `count` times, resume each and compare their ends; return the checkpoints found."""
    longest = _seconds(case.command(folder / "timed"), folder)
    kills = checkpoints = number = 0
    while kills < count:
        out, number = folder / f"killed-{number}", number + 1
        while True:
            resumed = Run(out).exists()
            process = CommandProcess(["train", "--resume", "--out", out] if resumed else case.command(out), folder)
            if kills < count and not process.ends_within(draw.uniform(0, longest)):
                process.kill()
                kills += 1
                checkpoints += check_checkpoints(out)
                continue
            assert process.wait()[::2] == (0, "")
            break
        assert_same_runs(case.whole, out)
    return checkpoints


def check_checkpoints(out: Path) -> int:
    """Load the checkpoints of a run that was killed, if it has any; return their number."""
    run = Run(out)
    if not run.exists():
        return 0
    for which in ("last", "best"):
        checkpoint = run.checkpoint(which)
        run.vocabularies(checkpoint.model(), checkpoint.task)
        checkpoint.tensors(STATE)
    return 2


def kill_translations(case: Case, folder: Path, draw: random.Random, count: int) -> int:
    """Kill translations `count` times; what was written is the beginning of the whole; return the lines found."""
    lines = folder / "lines.txt"
    lines.write_text("\n".join(line.split("\t")[0] for line in case.data.read_text().splitlines()))
    command: list[object] = ["translate", case.whole, lines, "--batch", 4, "--beam", 2]
    files = {path: path.read_bytes() for path in case.whole.rglob("*") if path.is_file()}
    longest = _seconds(command, folder)
    code, whole, errors = CommandProcess(command, folder).wait()
    assert (code, errors) == (0, "")
    found = 0
    for _ in range(count):
        process = CommandProcess(command, folder)
        if not process.ends_within(draw.uniform(0, longest)):
            process.kill()
        said = process.wait()[1]
        assert whole.startswith(said)
        found += said.count("\n")
    assert files == {path: path.read_bytes() for path in case.whole.rglob("*") if path.is_file()}
    return found


def _seconds(command: list[object], folder: Path) -> float:
    """Run a command, and return the time that it takes after the server of the processes has started."""
    CommandProcess(["--help"], folder).wait()
    begin = time.monotonic()
    CommandProcess(command, folder).wait()
    return time.monotonic() - begin
