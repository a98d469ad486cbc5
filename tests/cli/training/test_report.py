"""The log of a training and its plot."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.cli_runs import language_config

from llm_ext.cli.training import read_log, resume, train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "text.txt").write_text("one two six ten. " * 120)
    train(language_config(steps=10), [folder / "text.txt"], folder / "run")
    return folder / "run"


@pytest.mark.parametrize("damage", ["bytes", "types", "long", "deep", "pipe", "directory", "nothing"])
def test_a_damaged_log_stops_nothing(run: Path, tmp_path: Path, damage: str) -> None:
    out = Path(shutil.copytree(run, tmp_path / "run"))
    log = out / "log.jsonl"
    number = "1" + "0" * 400  # no float is as large
    lines = {
        "bytes": b"\xff\0",
        "types": b'7\n[]\n{"step": "1"}\n{"step": 1, "event": [], "loss": "x"}\n',
        "long": f'{{"step": 1, "event": "training", "loss": {number}}}\n{{"step": -{number}}}'.encode(),
        "deep": b"[" * 10**5,
    }
    if damage in lines:
        log.write_bytes(lines[damage] + b"\n" + log.read_bytes())
    else:
        log.unlink()
        if damage == "pipe":
            os.mkfifo(log)
        elif damage == "directory":
            log.mkdir()
    assert resume(out, {"steps": 20}).progress.step == 20
    if damage != "directory":
        assert [record["step"] for record in read_log(log) if record["step"] > 10] == [15, 20, 20]
