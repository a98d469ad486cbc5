"""Disks that are full, or that become read-only while a training runs. To mount them needs the rights of root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from support.cli_process import CommandProcess
from support.cli_runs import assert_same_runs, last_step

from faults.cases import Case
from faults.kills import check_checkpoints
from llm_ext.cli.checkpoint import Run

PAGE = os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def mounted(path: Path, *arguments: str) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", *arguments, str(path)], check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def can_mount(folder: Path) -> bool:
    try:
        with mounted(folder / "probe", "-t", "tmpfs", "tmpfs"):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


def fill_while_training(case: Case, folder: Path) -> None:
    """The training ends with a message; with space again it continues to the same end."""
    disk = folder / "full"
    with mounted(disk, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        out, filler = disk / "run", disk / "filler"
        process = _saving(case, out, folder)
        with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(bytes(PAGE))
        _expect(process, out, "No space left on device")
        filler.unlink()
        _finish(case, out, folder)


def turn_read_only(case: Case, folder: Path) -> None:
    """Likewise, for a file system that is read-only from some moment on."""
    disk = folder / "read-only"
    with mounted(disk, "-t", "tmpfs", "-o", "size=16m", "tmpfs"):
        out = disk / "run"
        process = _saving(case, out, folder)
        with mounted(disk, "--bind", str(disk)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(disk)], check=True)
            _expect(process, out, "Read-only file system")
            code, _, errors = CommandProcess(["train", "--resume", "--out", out], folder).wait()
            assert (code, "Read-only file system" in errors, errors.count("\n")) == (1, True, 1), errors
        _finish(case, out, folder)


def sizes(case: Case, folder: Path, most: int) -> tuple[int, int]:
    """Train on disks of 0 pages, 1 page, … until a training succeeds; return the numbers of failures and successes."""
    failures = 0
    for pages in range(1, most):
        disk = folder / f"disk-{pages}"
        with mounted(disk, "-t", "tmpfs", "-o", f"size={pages * PAGE}", "tmpfs"):
            code, _, errors = CommandProcess(case.command(disk / "run"), folder).wait()
            check_checkpoints(disk / "run")
            if code == 0:
                return failures, 1
            assert code == 1, errors
            assert "No space left on device" in errors
            assert "Traceback" not in errors
            assert str(disk) in errors
            failures += 1
    return failures, 0


def _saving(case: Case, out: Path, folder: Path) -> CommandProcess:
    """Start a training that does not end, and wait for its first checkpoints."""
    process = CommandProcess([*case.command(out), "--steps", 10**7, "--schedule", "constant", "--warmup", 0], folder)
    process.wait_until(lambda: Run(out).exists() and last_step(out) >= 6)
    return process


def _expect(process: CommandProcess, out: Path, reason: str) -> None:
    code, _, errors = process.wait()
    assert code == 1
    assert f"cannot be saved in {out}: {reason}; the checkpoint of step {last_step(out)} is kept" in errors
    check_checkpoints(out)


def _finish(case: Case, out: Path, folder: Path) -> None:
    """Continue to the next checkpoint, and compare with a training that was not disturbed."""
    steps = last_step(out) + 3
    assert CommandProcess(["train", "--resume", "--out", out, "--steps", steps], folder).wait()[0] == 0
    whole = folder / f"{out.parent.name}-whole"
    command = [*case.command(whole), "--steps", steps, "--schedule", "constant", "--warmup", 0]
    assert CommandProcess(command, folder).wait()[0] == 0
    assert_same_runs(whole, out)
