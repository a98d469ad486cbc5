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

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support.cuda_rnn import ROUTES as ROUTE_NAMES
from support.cuda_rnn import kernel_sources
from support.emulator import EMULATOR, Request, build, run, tensor
from support.throwing import throws

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
hang = os.environ.get("HANG", "")
if ("two streams" in hang and "--streams grid" in words) or ("smoke" in hang and "--smoke cluster LSTM tf32" in words):
    signal.signal(signal.SIGINT, signal.SIG_IGN); signal.signal(signal.SIGABRT, signal.SIG_IGN)
    print("hangs", flush=True); time.sleep(1000)
if "LD_BIND_NOW" in os.environ or "ops.rnn(torch.ones(2, 2, 3)," in words:
    os.kill(os.getpid(), signal.SIGSEGV)
if "headline.json" in words:
    try:
        time.sleep(1000 if os.environ.get("HANG") else 0)
    except KeyboardInterrupt:
        print("says what it knows", flush=True)
if "--throwing only" in words and "ops/test_linear.py" in words:
    sys.exit(5)
sys.exit(3 if "GRU" in sys.argv and "cluster" in sys.argv else 0)
"""
DEBUGGER = """#!/bin/sh
echo debugs "$@"
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    for name, text in (("python", FAKE.replace("{python}", sys.executable)), ("cuda-gdb", DEBUGGER)):
        path = tmp_path / name
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return str(tmp_path / "python")


def record_of(out: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((out / "record.json").read_text())
    return record


def test_order_of_the_steps(tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells most comes first; every step has a limit, and all fit."""
    assert gpu_run.architecture_of_gpu(fake) == "9.0a"
    all_steps = gpu_run.steps(fake, tmp_path, "9.0a")
    names = [step.name for step in all_steps]
    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    assert kinds == [
        *("build", "what", "throws", "smoke", "two", "headline", "cpu", "test", "throwing", "bench", "sanitizer")
    ]
    assert len(names) == len(set(names))
    assert all_steps[0].environment["TORCH_CUDA_ARCH_LIST"] == "9.0a"
    for route in gpu_run.ROUTES:
        for cell in gpu_run.CELLS:
            for dtype in ("float32", "bfloat16", "float16", "float64" if route == "generic" else "tf32"):
                assert f"smoke {route} {cell} {dtype}" in names
    assert all(step.limit <= 20 for step in all_steps if step.name.startswith(("smoke", "two streams")))
    assert all(step.together == "" for step in all_steps if step.name.startswith("two streams"))
    assert not any("test_gpu_run" in word for step in all_steps for word in step.command)
    # Both tests of a file with exceptions and those without run, apart.
    for file in ("ops/test_linear.py", "cuda/test_gpu.py"):
        for kind, throwing in (("test", "none"), ("throwing test", "only")):
            step = next(step for step in all_steps if step.name == f"{kind} {file}")
            assert step.command[-2:] == [throwing, str(gpu_run.ROOT / "tests" / file)]


def test_headline_cases_exist() -> None:
    """Each pattern names a case, in both phases if it has room for them; they are of every kind of op."""
    for pattern in gpu_run.HEADLINE:
        assert len(select_cases(CASES, [pattern])) == pattern.count("*") + 1, pattern
    for word in ("lstm", "gru", "pooling-op", "prefix-op", "additive"):
        assert any(f"/{word}-" in pattern for pattern in gpu_run.HEADLINE)


def test_crashes_are_debugged(tmp_path: Path, fake: str) -> None:
    """A call that must raise, and that a signal ends, runs once more in the debugger, with its environment."""
    found = [step for step in gpu_run.steps(fake, tmp_path, "9.0a") if step.name.startswith("throws")]
    assert {step.together for step in found} == {"throws"}
    assert sum(step.limit for step in found) / gpu_run.PROCESSES["throws"] < 30
    assert gpu_run.Run(tmp_path / "out", 60).all(found) == 1
    status = {step["name"]: step["status"] for step in record_of(tmp_path / "out")["steps"]}
    crashed = {name for name, how in status.items() if how == "died of SIGSEGV"}
    assert crashed == {"throws package", "throws library, bound now"}
    assert {name for name in status if "debugger" in name} == {f"{name}, in a debugger" for name in crashed}
    assert {how for name, how in status.items() if name not in crashed} == {"passed"}
    log = (tmp_path / "out" / "log.txt").read_text()
    assert re.search(
        rf"debugs -batch -ex run -ex bt 60 .* --args {re.escape(fake)} -X faulthandler -c import torch", log
    )


@pytest.mark.parametrize("name", ["torch", "library", "thread", "package"])
def test_calls_that_must_raise(name: str) -> None:
    """Those that need no GPU do, and the text of the others compiles."""
    for code in gpu_run.RAISING.values():
        compile(code, "code", "exec")
    done = subprocess.run(
        [sys.executable, "-c", gpu_run.RAISING[name]],
        cwd=gpu_run.ROOT,
        env=os.environ | {"PYTHONPATH": str(gpu_run.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] in ("RuntimeError", "ArgumentError")


def test_facts(capfd: pytest.CaptureFixture[str]) -> None:
    gpu_run.facts()
    said = capfd.readouterr().out
    assert "exit status 0" in said
    assert re.search(r"libllm_ext\.so.*__cxa_throw", said)


def test_throwing_tests_are_known() -> None:
    """`--throwing` selects by the text of a test, also under hypothesis."""

    @hypothesis.given(st.integers())
    def drawn(number: int) -> None:
        with pytest.raises(ValueError, match="invalid"):
            int(f"{number}x")

    class Item:
        def __init__(self, function: Any) -> None:
            self.function = function

    raises: Any = Item(drawn)
    other: Any = Item(record_of)
    assert throws(raises)
    assert not throws(other)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "no:cacheprovider"]
    command += ["tests/cuda/test_launches.py", "tests/cuda/test_check.py", "--throwing"]
    names = []
    for which in ("only", "none"):
        done = subprocess.run([*command, which], cwd=gpu_run.ROOT, capture_output=True, text=True, check=True)
        names.append({line for line in done.stdout.splitlines() if "::" in line})
    assert names[0]
    assert all("test_check.py" in name for name in names[0])
    assert any("test_launches.py" in name for name in names[1])
    assert names[0].isdisjoint(names[1])


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
    wanted = ("build", "smoke cluster", "two streams grid", "headline", "test cuda", "throwing test ops", "sanitizer")
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
    assert status.pop("throwing test ops/test_linear.py") == "no tests"
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


@pytest.mark.parametrize(("hang", "file"), [("two streams", "log.txt"), ("smoke", "steps/smoke-cluster-LSTM-tf32.txt")])
def test_killed_in_the_middle(tmp_path: Path, fake: str, hang: str, file: str) -> None:
    """The record is whole at any moment, and a file has the last line of each step that ran, alone or with others."""
    command = [sys.executable, str(gpu_run.__file__), "--out", str(tmp_path / "out"), "--python", fake]
    process = subprocess.Popen(
        command, env=os.environ | {"HANG": hang}, stdout=subprocess.DEVNULL, start_new_session=True
    )
    log, deadline, records = tmp_path / "out" / file, time.monotonic() + 60, 0
    while not (log.exists() and "hangs" in log.read_text()):
        assert time.monotonic() < deadline
        if (tmp_path / "out" / "record.json").exists():
            record_of(tmp_path / "out")
            records += 1
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    names = [step["name"] for step in record_of(tmp_path / "out")["steps"]]
    assert records > 3
    assert names[0] == "build"
    if hang == "two streams":
        assert names[-1] == "two streams cluster"
        assert sum(name.startswith("smoke ") for name in names) == len(gpu_run.smoke_names())
    # The step that hung is in a process group of its own.
    for path in Path("/proc").iterdir():
        with suppress(OSError):
            if path.name.isdigit() and fake.encode() in (path / "cmdline").read_bytes():
                os.kill(int(path.name), signal.SIGKILL)
