"""`llm-ext` as a process: streams, signals, kills."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.cli_process import CommandProcess
from support.cli_runs import (
    assert_same_runs,
    language_config,
    language_options,
    last_step,
)

from llm_ext.cli.checkpoint import Run
from llm_ext.cli.training import read_log, resume, train

pytestmark = pytest.mark.usefixtures("no_plot")


def test_the_module_runs_as_a_script(language_model: Path) -> None:
    command = [sys.executable, "-m", "llm_ext.cli", "generate", str(language_model), "--prompt", "ten"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, done.stdout[:3]) == (0, "", "ten")


def test_text_is_printed_as_it_is_sampled(language_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    process = CommandProcess(
        ["generate", language_model, "--prompt", "ten", "--length", 10**9], tmp_path, stdout=tmp_path / "out"
    )
    with open(tmp_path / "out") as output:
        assert len(output.read(200)) == 200
        process.send_signal(signal.SIGINT)
        output.read()
    code, _, errors = process.wait()
    assert (code, errors) == (130, "llm-ext: interrupted\n")


def test_a_closed_output_ends_the_command(language_model: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "out")
    process = CommandProcess(
        ["generate", language_model, "--prompt", "ten", "--length", 10**6], tmp_path, stdout=tmp_path / "out"
    )
    with open(tmp_path / "out") as output:
        assert output.read(3) == "ten"
    code, _, errors = process.wait()
    assert (code, errors) == (0, "")


def test_a_line_is_translated_before_the_next_is_read(translator: Path, tmp_path: Path) -> None:
    for name in ("in", "out"):
        os.mkfifo(tmp_path / name)
    process = CommandProcess(
        ["translate", translator, "--batch", 1], tmp_path, stdin=tmp_path / "in", stdout=tmp_path / "out"
    )
    with open(tmp_path / "in", "w", buffering=1) as lines, open(tmp_path / "out") as output:
        for line, expected in (("one two", "deux, un."), ("ten six", "six, dix.")):
            lines.write(f"{line}\n")
            assert output.readline() == f"{expected}\n"
    assert process.wait()[0] == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_ends_a_training(text: Path, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "run"
    options = language_options(steps=10**7, validate_every=10**6)
    process = CommandProcess(["train", text, "--out", out, *options], tmp_path)
    process.wait_until(lambda: (out / "log.jsonl").exists() and (out / "log.jsonl").stat().st_size > 0)
    process.send_signal(number)
    code, said, errors = process.wait()
    assert (code, errors) == (128 + number, "")
    assert last_step(out) > 0
    assert f"stopped by {number.name} at step {last_step(out)}; saved; " in said
    Run(out).load_language_model("last")


@pytest.mark.parametrize("closed", [(1,), (2,), (0, 1, 2)])
def test_a_training_survives_closed_streams(text: Path, tmp_path: Path, closed: tuple[int, ...]) -> None:
    out = tmp_path / "run"
    process = CommandProcess(
        ["train", text, "--out", out, *language_options(steps=10)], tmp_path, stdin=text, closed=closed
    )
    code, said, errors = process.wait()
    assert (code, errors) == (0, "")
    assert (last_step(out), bool(said)) == (10, 1 not in closed)
    assert len(list(read_log(out / "log.jsonl"))) == 3  # no other file had a number of a stream


def test_a_training_survives_the_end_of_its_reader(text: Path, tmp_path: Path) -> None:
    """As that of `| head -1`; or of a disk that is full."""
    os.mkfifo(tmp_path / "out")
    arguments = ["train", text, *language_options(steps=30)]
    process = CommandProcess([*arguments, "--out", tmp_path / "run"], tmp_path, stdout=tmp_path / "out")
    with open(tmp_path / "out") as output:
        output.readline()
    expected = (0, "", "llm-ext: standard output: Broken pipe; the command goes on without it\n")
    assert process.wait() == expected
    assert last_step(tmp_path / "run") == 30
    process = CommandProcess([*arguments, "--out", tmp_path / "other"], tmp_path, stdout=Path("/dev/full"))
    assert process.wait() == (0, "", expected[2].replace("Broken pipe", "No space left on device"))
    assert_same_runs(tmp_path / "run", tmp_path / "other")


def test_other_commands_name_a_stream_that_fails(language_model: Path, translator: Path, tmp_path: Path) -> None:
    process = CommandProcess(["generate", language_model], tmp_path, stdout=Path("/dev/full"))
    assert process.wait() == (1, "", "llm-ext: standard output: No space left on device\n")
    process = CommandProcess(["translate", translator], tmp_path, closed=(0,))
    assert process.wait() == (1, "", "llm-ext: the standard input is closed: give FILE\n")


def test_one_process_trains_in_a_directory(text: Path, tmp_path: Path) -> None:
    """A lock of a process that was killed is free."""
    out = tmp_path / "run"
    options = language_options(steps=10**7, validate_every=5, log_every=10**6)
    first = CommandProcess(["train", text, "--out", out, *options], tmp_path)
    first.wait_until(lambda: (out / ".lock.owner").exists())
    for arguments in (["train", text, "--out", out], ["train", "--resume", "--out", out]):
        first.wait_until(Run(out).exists if "--resume" in arguments else lambda: True)
        code, _, errors = CommandProcess(arguments, tmp_path).wait()
        assert code == 1
        assert re.search(rf"run: (another process trains here \(process {first.pid} on |holds a run already)", errors)
    first.kill()
    step = last_step(out)
    assert resume(out, {"steps": step + 1}).progress.step == step + 1


def test_kills_at_random_moments_lose_nothing(text: Path, tmp_path: Path) -> None:
    """Every second step is saved, so that kills hit saves; the results are those of an uninterrupted run."""
    # With a constant learning rate the results do not depend on the final step.
    settings = {"validate_every": 2, "dropout": 0.1, "schedule": "constant", "warmup": 0.0}
    out, draw, steps = tmp_path / "run", random.Random(1), [0]
    arguments: list[object] = ["train", text, "--out", out, *language_options(steps=10**6, **settings)]
    for _ in range(5):
        process = CommandProcess(arguments, tmp_path)
        process.wait_until(lambda: Run(out).exists() and last_step(out) > steps[-1])
        time.sleep(draw.random() * 0.1)
        process.kill()
        Run(out).load_language_model("last")
        Run(out).load_language_model("best")
        steps.append(last_step(out))
        arguments = ["train", "--resume", "--out", out]
    assert steps == sorted(set(steps))
    resume(out, {"steps": steps[-1] + 10})
    train(language_config(steps=steps[-1] + 10, **settings), [text], tmp_path / "whole")
    assert_same_runs(out, tmp_path / "whole")
    assert {path.name for path in out.iterdir() if path.name.startswith((".step", "step"))} == {
        Run(out).checkpoint(which).path.name for which in ("last", "best")
    }
