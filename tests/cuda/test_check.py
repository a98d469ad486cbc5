"""`make cuda-check` parses the report of ptxas, fails on a spill, and passes without nvcc."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support import nvcc


def _load() -> ModuleType:
    """The script tests/cuda/check.py as a module."""
    spec = importlib.util.spec_from_file_location("cuda_check", Path(__file__).with_name("check.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_check"] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


cuda_check = _load()
REPORT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4tile' for 'sm_80'
ptxas info    : Function properties for _Z4tile
    {stack} bytes stack frame, {spill} bytes spill stores, {spill} bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 1024 bytes smem, 744 bytes cmem[0]
ptxas info    : Compiling entry function '_Z7generic' for 'sm_90'
ptxas info    : Function properties for _Z7generic
    16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers
"""


@pytest.mark.parametrize(("stack", "spill", "faulty"), [(0, 0, False), (8, 0, True), (8, 4, True)])
def test_spills_are_seen_in_hot_kernels(stack: int, spill: int, faulty: bool) -> None:
    tile, generic = cuda_check.parse("some.cu", REPORT.format(stack=stack, spill=spill))
    assert (tile.name, tile.target, tile.registers, tile.shared) == ("_Z4tile", "sm_80", 128, 1024)
    assert (tile.stack, tile.spills, tile.faulty) == (stack, 2 * spill, faulty)
    assert (generic.target, generic.shared, generic.faulty) == ("sm_90", 0, False)
    assert "128" in cuda_check.table([tile, generic])


def test_unknown_reports_are_errors() -> None:
    with pytest.raises(ValueError, match="unknown format"):
        cuda_check.parse("some.cu", "Compiling entry function '_Z4tile' for 'sm_80'\nno more")


def test_names_are_short() -> None:
    name = "void llm_ext::cuda::(anonymous namespace)::kernel<(llm_ext::Cell)3, float>(llm_ext::Params<float>)"
    assert cuda_check.readable(name) == "kernel<3, float>"


def test_kernels_of_clusters_depend_on_the_target() -> None:
    """The PTX of all others is compiled once."""
    found = {source.name for source in (nvcc.CSRC / "cuda").rglob("*.cu") if nvcc.depends_on_target(source)}
    assert found == {"tiles_bf16.cu", "tiles_fp16.cu", "tiles_fp32.cu"}


def test_without_nvcc_the_check_passes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(nvcc, "find", lambda: None)
    assert cuda_check.main() == 0
    assert capsys.readouterr().out.count("\n") == 1
