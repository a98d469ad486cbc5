"""What setup.py decides about the CUDA half, by torch, nvcc and LLM_EXT_CUDA; nothing is compiled."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA_TORCH = torch.version.cuda is not None


def set_up(path: str | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {n: v for n, v in os.environ.items() if n not in ("LLM_EXT_CUDA", "CUDA_HOME", "CUDA_PATH")}
    if path is not None:
        variables["PATH"] = path
    return subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=ROOT,
        env=variables | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A path with an nvcc of a CUDA that no torch has."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    script.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def test_without_cuda_if_so_wanted(nvcc: str) -> None:
    run = set_up(nvcc, LLM_EXT_CUDA="0")
    assert (run.returncode, run.stdout.split()[-1]) == (0, "llm_ext")
    assert "building for the CPU only" not in run.stderr


def test_says_why_without_cuda(nvcc: str) -> None:
    run = set_up(nvcc)
    assert run.returncode == 0
    assert "llm_ext: building for the CPU only: " in run.stderr
    reason = "nvcc is of CUDA 1" if CUDA_TORCH else f"torch {torch.__version__} has no CUDA"
    assert reason in run.stderr


def test_an_error_if_it_is_asked_for_and_cannot_be(nvcc: str) -> None:
    run = set_up(nvcc, LLM_EXT_CUDA="1")
    assert run.returncode != 0
    assert "LLM_EXT_CUDA=1 asks for the CUDA half, which cannot be built: " in run.stderr
    assert ("nvcc is of CUDA 1" if CUDA_TORCH else "has no CUDA") in run.stderr


def test_a_torch_with_cuda_without_nvcc(tmp_path: Path) -> None:
    run = set_up(LLM_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert run.returncode != 0
    assert ("nvcc is missing" if CUDA_TORCH else "has no CUDA") in run.stderr


def test_a_word_that_means_nothing() -> None:
    run = set_up(LLM_EXT_CUDA="yes")
    assert run.returncode != 0
    assert "LLM_EXT_CUDA must be 0 or 1, got yes" in run.stderr
