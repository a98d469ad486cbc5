"""What csrc/cuda and csrc/torch ask of CUDA's runtime when they launch kernels, over a runtime without a GPU."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.emulator import ROOT, compiler

CSRC = ROOT / "csrc"
HERE = ROOT / "tests" / "cuda"


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def test_launches(tmp_path: Path) -> None:
    """Clusters are planned by what the loaded code was compiled for; sizes are checked; errors are cleared."""
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("needs nvcc")
    runtime = HERE / "runtime"
    flags = [nvcc, "-std=c++17", "-O0", f"-I{CSRC}", f"-I{runtime}", "-arch=compute_80", "-cudart=none"]
    _run([*flags, str(runtime / "launches.cu"), str(runtime / "runtime.cpp"), "-o", str(tmp_path / "launches")])
    assert _run([str(tmp_path / "launches")]) == ""


@pytest.fixture(scope="module")
def grid_turns(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("grid_turns") / "grid_turns"
    _run([compiler(), "-std=c++17", f"-I{CSRC}", str(HERE / "host" / "grid_turns.cpp"), "-o", str(program), "-pthread"])
    return program


def grids(program: Path, *calls: tuple[int, int, int]) -> list[str]:
    """What is queued for grids, each with its stream, its capture and the error of its launch."""
    said = _run([str(program), *(str(number) for call in calls for number in call)])
    return [re.sub("stream (.) ", r"\1 ", line) for line in said.splitlines()]


def test_grids_of_a_device_take_turns(grid_turns: Path) -> None:
    """Each waits for the one before, on whatever stream; one that was refused is not waited for."""
    assert grids(grid_turns, (1, 0, 0), (2, 0, 720), (3, 0, 0)) == [
        "1 runs a grid",
        "1 records event 1",
        "2 awaits event 1",
        "2 runs a grid",
        "3 awaits event 1",
        "3 runs a grid",
        "3 records event 1",
    ]


def test_grids_of_a_graph_take_turns(grid_turns: Path) -> None:
    """Events of a capture are awaited in that capture alone, and calls outside of it by calls outside."""
    assert grids(grid_turns, (1, 0, 0), (1, 7, 0), (1, 8, 0), (2, 7, 0), (3, 0, 0)) == [
        "1 runs a grid",
        "1 records event 1",
        "1 runs a grid",
        "1 records event 2",
        "1 runs a grid",
        "1 records event 3",
        "2 awaits event 2",
        "2 runs a grid",
        "2 records event 2",
        "3 awaits event 1",
        "3 runs a grid",
        "3 records event 1",
    ]


def test_events_of_captures_are_used_again(grid_turns: Path) -> None:
    said = grids(grid_turns, *((1, capture, 0) for capture in range(1, 21)))
    assert not [line for line in said if "awaits" in line]
    assert len({line for line in said if "records" in line}) < 20
    # A capture that goes on keeps its order, however many others come and go.
    captures = [1, 2, 3, 4, 5, 6, 7, 8, 1, 9]
    said = grids(grid_turns, *((1, capture, 0) for capture in captures), (2, 1, 0))
    assert said[-3:] == ["2 awaits event 1", "2 runs a grid", "2 records event 1"]


def test_instructions_of_a_warp_are_volatile() -> None:
    """A statement that is not may be moved to where only some lanes use its result."""
    text = (CSRC / "cuda" / "device.cuh").read_text()
    statements = re.findall(r"\basm\s*(volatile)?\s*\(\s*\"([\s\S]*?)\"", text)
    of_warps = [(kind, code) for kind, code in statements if ".sync" in code or ".aligned" in code]
    assert len(of_warps) >= 5, "the search finds mma and the barriers of clusters"
    assert all(kind == "volatile" for kind, _ in of_warps), of_warps
