"""Training in several processes: the results of one, on any number of processes, by every strategy."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from support.cli_process import CommandProcess, torchrun_environments
from support.cli_runs import (
    classification_config,
    language_config,
    last_step,
    losses,
    options_of,
    transcription_config,
    translation_config,
)

from llm_ext.cli.errors import CommandError
from llm_ext.cli.training import Config, resume, train

pytestmark = pytest.mark.usefixtures("no_plot")


def start(folder: Path, *arguments: object) -> list[CommandProcess]:
    """Start a command in two processes."""
    return [CommandProcess(list(arguments), folder, environment=each) for each in torchrun_environments(2)]


def two_processes(folder: Path, *arguments: object) -> str:
    """Run a command in two processes; return what it says."""
    (code, said, errors), other = [process.wait() for process in start(folder, *arguments)]
    assert (code, errors, other) == (0, "", (0, "", ""))
    return said


CASES = [
    # The state of an LSTM with attention has every part that a state can have.
    (language_config(steps=10, layers=2, cell="lstm", batch=6), "ddp", "fsdp"),
    (translation_config(steps=10, dropout=0.0, tie_head=True, freeze="encoder"), "fsdp", "ddp"),
    (classification_config(steps=10, dropout=0.0), "auto", None),
    (transcription_config(steps=10, dropout=0.0), "fsdp", None),
]


@pytest.mark.parametrize(("config", "first", "second"), CASES, ids=[f"{case[0].task} {case[1]}" for case in CASES])
def test_two_processes_train_like_one(
    config: Config, first: str, second: str | None, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """A run of one process continues on two, and the other way round."""
    names = {"lm": "text", "translate": "pairs"}
    data = request.getfixturevalue(names.get(config.task, "arrays"))
    two, one = tmp_path / "two", tmp_path / "one"
    said = two_processes(tmp_path, "train", data, "--out", two, "--strategy", first, *options_of(config))
    assert "cpu, 2 processes, " in said
    assert said.endswith(f"saved in {two}\n")
    train(config, [data], one)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    if second is None:
        return
    resume(two, {"steps": 15})
    two_processes(tmp_path, "train", "--resume", "--out", one, "--steps", 15, "--strategy", second)
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert len(losses(two)) == 3 + 2  # of training, of validation


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "ddp"}, "--strategy ddp needs several processes, got 1: give --devices N, or start them with"),
        ({"strategy": "fsdp"}, "--strategy fsdp needs several processes, got 1"),
        ({"devices": 2, "batch": 5}, "the number of processes must divide --batch, which is 5, got 2 processes"),
    ],
)
def test_numbers_of_processes_that_are_refused(
    changes: dict[str, Any], message: str, text: Path, tmp_path: Path
) -> None:
    with pytest.raises(CommandError, match=f"^{message}"):
        train(language_config(**changes), [text], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    """Each process would read a part of it."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CommandError, match="pipe: several processes cannot read a pipe; save it in a file"):
        train(language_config(devices=2), [tmp_path / "pipe"], tmp_path / "run")


@pytest.mark.parametrize("missing", [(1,), (0, 1)], ids=["second", "both"])
def test_a_failure_ends_all_processes_with_one_message(missing: tuple[int, ...], text: Path, tmp_path: Path) -> None:
    """A process that does not find the text ends one that waits for it, or that fails as well."""
    files = [tmp_path / "missing.txt" if rank in missing else text for rank in range(2)]
    processes = [
        CommandProcess(
            ["train", file, "--out", tmp_path / "run", *options_of(language_config())], tmp_path, environment=each
        )
        for file, each in zip(files, torchrun_environments(2), strict=True)
    ]
    ended = [process.wait() for process in processes]
    assert [code for code, _, _ in ended] == [1, 1]
    assert "".join(errors for _, _, errors in ended) == f"llm-ext: {tmp_path / 'missing.txt'}: no such file\n"


def test_a_signal_or_the_end_of_a_process_ends_the_others(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    config = language_config(steps=10**4, validate_every=10)
    processes = start(tmp_path, "train", text, "--out", out, *options_of(config))
    processes[0].wait_until(lambda: (out / "run.json").exists())
    processes[1].send_signal(signal.SIGTERM)
    (code, said, errors), other = [process.wait() for process in processes]
    assert (code, errors, other) == (143, "", (143, "", ""))
    assert f"stopped by SIGTERM at step {last_step(out)}; saved" in said

    log = out / "log.jsonl"
    stopped = last_step(out)
    processes = start(tmp_path, "train", "--resume", "--out", out)
    processes[0].wait_until(lambda: last_step(out) > stopped)
    processes[1].kill()
    code, _, errors = processes[0].wait()
    assert (code, errors) == (1, "llm-ext: another process has ended; the last checkpoint, if there is one, is kept\n")
    assert all(json.loads(line) for line in log.read_text().splitlines())
