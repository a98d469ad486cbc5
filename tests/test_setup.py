"""setup.py decides what to build from torch, nvcc, the headers of Python and LLM_EXT_*; nothing is compiled."""

from __future__ import annotations

import os
import re
import runpy
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
CUDA_TORCH = torch.version.cuda is not None


class Run(NamedTuple):
    """The result of setup.py."""

    error: str  # the message it exited with
    out: str
    err: str
    namespace: dict[str, Any]


@pytest.fixture
def run_setup(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Runs `setup.py --name` in this process, which has imported torch, under an environment."""

    def run(path: str | None = None, **environment: str) -> Run:
        for name in ("LLM_EXT_CUDA", "CUDA_HOME", "CUDA_PATH"):
            monkeypatch.delenv(name, raising=False)
        for name, value in (environment | ({"PATH": path} if path else {})).items():
            monkeypatch.setenv(name, value)
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["setup.py", "--name"])
        error, namespace = "", {}
        try:
            namespace = runpy.run_path(str(ROOT / "setup.py"), run_name="__main__")
        except SystemExit as end:
            error = str(end.code)
        return Run(error, *capfd.readouterr(), namespace)

    return run


@pytest.fixture
def nvcc(tmp_path: Path) -> str:
    """A PATH with the nvcc of a CUDA version that no torch has."""
    script = tmp_path / "nvcc"
    script.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 1.0, V1.0.1'\n")
    script.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


def test_cuda_is_switched_off(nvcc: str, run_setup: Callable[..., Run]) -> None:
    run = run_setup(nvcc, LLM_EXT_CUDA="0")
    assert (run.error, run.out.split()[-1]) == ("", "llm_ext")
    assert "building for the CPU only" not in run.err


def test_reason_for_a_build_without_cuda(nvcc: str, run_setup: Callable[..., Run]) -> None:
    run = run_setup(nvcc)
    assert run.error == ""
    assert "llm_ext: building for the CPU only: " in run.err
    reason = "nvcc has CUDA 1" if CUDA_TORCH else f"torch {torch.__version__} has no CUDA"
    assert reason in run.err


def test_cuda_is_required_but_impossible(nvcc: str, run_setup: Callable[..., Run]) -> None:
    run = run_setup(nvcc, LLM_EXT_CUDA="1")
    assert "LLM_EXT_CUDA=1, but the CUDA half cannot be built: " in run.error
    assert ("nvcc has CUDA 1" if CUDA_TORCH else "has no CUDA") in run.error


def test_nvcc_is_missing(tmp_path: Path, run_setup: Callable[..., Run]) -> None:
    run = run_setup(LLM_EXT_CUDA="1", CUDA_HOME=str(tmp_path))
    assert ("nvcc is missing" if CUDA_TORCH else "has no CUDA") in run.error


@pytest.mark.parametrize(
    ("preset", "left", "out"),
    [
        ("7.0;7.5;8.0;9.0a+PTX", "8.0;9.0a+PTX", "7.0 7.5"),
        ("Volta 8.6 12.0", "8.6;12.0", "Volta"),
        ("Ampere+Tegra;Hopper", "Ampere+Tegra;Hopper", None),
        ("native", "native", None),
        ("", "", None),
    ],
)
def test_old_architectures_are_left_out(
    preset: str, left: str, out: str | None, run_setup: Callable[..., Run], capfd: pytest.CaptureFixture[str]
) -> None:
    run_setup(LLM_EXT_CUDA="0", TORCH_CUDA_ARCH_LIST=preset).namespace["leave_out_old_architectures"]()
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == left
    said = f"llm_ext: the CUDA kernels need 8.0; left out: {out}\n" if out else ""
    assert capfd.readouterr().err == said


def test_only_old_architectures(run_setup: Callable[..., Run]) -> None:
    leave_out = run_setup(LLM_EXT_CUDA="0", TORCH_CUDA_ARCH_LIST="6.1 7.5+PTX").namespace["leave_out_old_architectures"]
    with pytest.raises(SystemExit, match=r"TORCH_CUDA_ARCH_LIST is 6\.1;7\.5\+PTX, but .* need at least 8\.0"):
        leave_out()


def test_default_architectures_are_those_of_nvcc(tmp_path: Path, run_setup: Callable[..., Run]) -> None:
    """Machine code for each generation that nvcc has, and for Jetson Orin; PTX for those after it."""
    script = tmp_path / "nvcc"
    for codes, expected in (
        ("sm_75 sm_80 sm_87 sm_90", ["sm_80,sm_87", "sm_90,compute_90"]),
        ("sm_80 sm_87 sm_90 sm_100 sm_120", ["sm_80,sm_87", "sm_90,sm_100,sm_120,compute_90"]),
    ):
        script.write_text(f"#!/bin/sh\n[ $1 = --list-gpu-code ] && echo {codes}\n")
        script.chmod(0o755)
        found = run_setup(f"{tmp_path}{os.pathsep}{os.environ['PATH']}", LLM_EXT_CUDA="0").namespace["architectures"]()
        assert found == [f"arch=compute_{ptx},code=[{code}]" for ptx, code in zip((80, 90), expected, strict=True)]


@pytest.mark.parametrize("absent", ["torch", "setuptools.command.bdist_wheel"])
def test_isolated_build_says_what_to_do(
    absent: str, monkeypatch: pytest.MonkeyPatch, run_setup: Callable[..., Run]
) -> None:
    """Without torch, or with an old setuptools."""
    monkeypatch.setitem(sys.modules, absent, None)
    (sentence,) = run_setup().error.splitlines()
    assert re.match(f"llm_ext: the build does not find {absent}; .* pip install --no-build-isolation", sentence)


def test_modules_of_other_pythons(tmp_path: Path, run_setup: Callable[..., Run]) -> None:
    """Each Python with headers has a module, once; one without headers has none, and the library has no tag."""
    include = tmp_path / "include"
    include.mkdir()
    (include / "Python.h").touch()
    pythons = []
    for name, folder in (("with", include), ("without", tmp_path)):
        python = tmp_path / name
        python.write_text(f"#!/bin/sh\necho {folder}\necho .cpython-{name}.so\n")
        python.chmod(0o755)
        pythons.append(str(python))
    run = run_setup(LLM_EXT_CUDA="0", LLM_EXT_PYTHONS=" ".join([*pythons, sys.executable, "absent"]))
    suffix = sysconfig.get_config_var("EXT_SUFFIX")
    modules = {"llm_ext/lib/libllm_ext.so", f"llm_ext/_C{suffix}", "llm_ext/_C.cpython-with.so"}
    assert set(run.namespace["FILES"].values()) == modules


@pytest.mark.parametrize("name", ["LLM_EXT_CUDA", "LLM_EXT_MANYLINUX"])
def test_invalid_setting(name: str, run_setup: Callable[..., Run]) -> None:
    assert f"{name} must be 0 or 1, got yes" in run_setup(**{name: "yes"}).error
