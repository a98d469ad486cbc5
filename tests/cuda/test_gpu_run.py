"""`make gpu` without a GPU: the order of the steps, their time limits, and files that survive whenever it is killed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from support.cuda_rnn import ROUTES as ROUTE_NAMES
from support.cuda_rnn import kernel_sources
from support.emulator import EMULATOR, Request, build, run, tensor

from bench.__main__ import select_cases
from bench.cases.cuda import CASES


def _load() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("gpu_run", Path(__file__).with_name("gpu_run.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_run"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


gpu_run = _load()

# Instead of Python with torch: prints what it was asked for, and does what the words in it stand for.
FAKE = r"""#!{python}
import os, re, signal, sys, time
words = " ".join(sys.argv[1:])
if "get_device_capability" in words:
    print("9.0"); sys.exit()
print("asked for", words, os.environ.get("TORCH_CUDA_ARCH_LIST", ""), flush=True)
if "two streams" in os.environ.get("HANG", "") and "--streams grid" in words:
    signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGABRT, signal.SIG_IGN)
    print("hangs", flush=True); time.sleep(1000)
if "headline.json" in words:
    try:
        time.sleep(1000 if os.environ.get("HANG") else 0)
    except KeyboardInterrupt:
        print("says what it knows", flush=True)
sys.exit(3 if "GRU" in sys.argv and "cluster" in sys.argv else 0)
"""


@pytest.fixture
def fake(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(FAKE.replace("{python}", sys.executable))
    path.chmod(0o755)
    return str(path)


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


def test_order_of_the_steps(tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells most comes first; every step has a limit, and all fit."""
    assert gpu_run.architecture_of_gpu(fake) == "9.0a"
    all_steps = gpu_run.steps(fake, tmp_path, "9.0a")
    names = [step.name for step in all_steps]
    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    assert kinds == ["build", "what", "smoke", "two", "headline", "cpu", "test", "bench", "sanitizer"]
    assert len(names) == len(set(names))
    assert all_steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    for route in gpu_run.ROUTES:
        for cell in gpu_run.CELLS:
            for dtype in ("float32", "bfloat16", "float16", "float64" if route == "generic" else "tf32"):
                assert f"smoke {route} {cell} {dtype}" in names
    assert all(step.limit <= 20 for step in all_steps if step.name.startswith(("smoke", "two streams")))
    assert all(step.together == "" for step in all_steps if step.name.startswith("two streams"))
    assert not any("test_gpu_run" in word for step in all_steps for word in step.command)


def test_headline_cases_exist() -> None:
    """Each pattern names a case in both phases, and all of them have a target."""
    for pattern in gpu_run.HEADLINE:
        cases = select_cases(CASES, [pattern])
        assert len(cases) == 2, pattern
        assert all(case.targets for case in cases)


def test_sizes_take_their_routes(tmp_path: Path) -> None:
    """On an H200; forward and backward."""
    T, B, _ = gpu_run.SIZES
    problems = [
        (mode, backward, type_, T, B, H, H, 1, int(dtype == "tf32"), ROUTE_NAMES.index(route))
        for route, hidden in gpu_run.ROUTES.items()
        for mode, H in zip((0, 3, 4), hidden, strict=True)
        for backward in (0, 1)
        for dtype, type_ in (("float32", 0), ("tf32", 0), ("bfloat16", 2), ("float16", 3))
    ]
    program = build("plans", [*kernel_sources(), EMULATOR / "plans.cpp"])
    request: Request = {
        "sm": 90,
        "sm_count": 132,
        "shared_bytes": 227 * 1024,
        "problems": torch.tensor([(*problem[:-1], -1) for problem in problems]),
    }
    answer = run(program, request)
    for i, problem in enumerate(problems):
        route = int(tensor(answer[str(i)], torch.int64, 10)[0])
        assert route == problem[-1], f"{problem} takes {ROUTE_NAMES[route]}"


def test_a_run(tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one step that fails, one that says something when it is interrupted, and one that only dies."""
    monkeypatch.setattr(gpu_run, "GRACE", 1.0)
    monkeypatch.setenv("HANG", "two streams")
    wanted = ("build", "smoke cluster", "two streams grid", "headline", "test cuda", "sanitizer")
    short = [
        gpu_run.Step(step.name, step.command, min(step.limit, 2.0), step.environment, step.together)
        for step in gpu_run.steps(fake, tmp_path, "9.0a")
        if step.name.startswith(wanted)
    ]
    assert gpu_run.Run(tmp_path / "out", 60).all(short) == 1
    status = {step["name"]: step["status"] for step in record_of(tmp_path / "out")["steps"]}
    assert set(status) == {step.name for step in short}
    assert status.pop("two streams grid") == "took too long"
    assert status.pop("headline") == "took too long"
    failed = {name for name, how in status.items() if how == "failed with 3"}
    assert failed == {f"smoke cluster GRU {dtype}" for dtype in gpu_run.TILE_DTYPES}
    assert {how for name, how in status.items() if name not in failed} == {"passed"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert "says what it knows" in log
    assert re.search(r"asked for .*pip.* 9\.0a", log)
    assert log.index("two streams grid: ") < log.index("headline: ") < log.index("sanitizer: ")


def test_time_is_over(tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not fit is left out, and the record says so; nothing follows a failed build."""
    monkeypatch.setattr(gpu_run, "GRACE", 1.0)
    monkeypatch.setenv("HANG", "yes")
    kept = [step for step in gpu_run.steps(fake, tmp_path, "9.0a") if step.name in ("headline", "bench", "sanitizer")]
    started = time.monotonic()
    gpu_run.Run(tmp_path / "out", 0.5).all(kept)
    assert time.monotonic() - started < 5
    status = [step["status"] for step in record_of(tmp_path / "out")["steps"]]
    assert status == ["took too long", "left out", "left out"]
    build = gpu_run.Step("build", [sys.executable, "-c", "raise SystemExit(1)"], 5)
    assert gpu_run.Run(tmp_path / "failed", 5).all([build, *kept]) == 1
    assert [step["name"] for step in record_of(tmp_path / "failed")["steps"]] == ["build"]


def test_killed_in_the_middle(tmp_path: Path, fake: str) -> None:
    """The record is whole at any moment, and the log has the last line of the step that ran."""
    command = [sys.executable, str(gpu_run.__file__), "--out", str(tmp_path / "out"), "--python", fake]
    environment = os.environ | {"HANG": "two streams"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    log, deadline, records = tmp_path / "out" / "log.txt", time.monotonic() + 60, 0
    while not (log.exists() and "hangs" in log.read_text()):
        assert time.monotonic() < deadline
        if log.exists():
            record_of(tmp_path / "out")
            records += 1
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = [step["name"] for step in record_of(tmp_path / "out")["steps"]]
    assert records > 3
    assert names[0] == "build"
    assert names[-1] == "two streams cluster"
    assert sum(name.startswith("smoke ") for name in names) == len(gpu_run.smoke_names())
    # The step that hung is in a process group of its own.
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and fake.encode() in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
