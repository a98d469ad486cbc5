"""One binary for several ISAs: the choice by LLM_EXT_ISA, and which functions may contain AVX instructions."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from support.devices import ISAS, supported_isas
from support.process import check_fork, check_python

import llm_ext

LIBRARY = Path(llm_ext.__file__).parent / "lib" / "libllm_ext.so"

# LLM_EXT_ISA is read at the first call of a kernel or of build_info.
PRINT_ISA = """
import os, sys
os.environ["LLM_EXT_ISA"] = sys.argv[1]
import llm_ext
try:
    print(llm_ext.build_info()["isa"])
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("isa", supported_isas())
def test_isa_is_chosen_and_reported(isa: str) -> None:
    assert check_fork(PRINT_ISA, isa).strip() == isa


def test_unknown_isa_is_refused() -> None:
    assert "LLM_EXT_ISA must be one of" in check_fork(PRINT_ISA, "mmx")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not llm_ext.build_info()["compiler"].startswith("gcc"),
    reason="built for one ISA",
)
def test_avx_only_in_kernels_of_an_isa() -> None:
    """A machine without AVX runs everything outside the kernels of an ISA, so no AVX instruction may be there."""
    command = ["objdump", "-d", "--no-show-raw-insn", str(LIBRARY)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    users: set[str] = set()  # functions with AVX
    symbol = ""
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            symbol = match[1]
        elif re.search(r"\t(v[a-z0-9]+ .*%[xyz]mm|vzero)", line):
            users.add(symbol)
    quantized = ["avx2", "avx_vnni", "avx512", "avx512_vnni", "avx512_bf16"]
    namespaces = [*ISAS[1:], *(f"{name}_quantized" for name in quantized)]
    marks = [f"7llm_ext{len(name)}{name}" for name in namespaces]
    assert all(any(mark in user for user in users) for mark in marks)
    assert not [user for user in users if not any(mark in user for mark in marks)]


def test_one_openmp_runtime() -> None:
    """A second OpenMP runtime beside torch's would compete for the cores and ignore set_num_threads."""
    if not os.path.exists("/proc/self/maps"):
        pytest.skip("needs /proc")
    code = """
import torch, llm_ext
llm_ext.RNN(8, 8)(torch.randn(4, 2, 8))
maps = open("/proc/self/maps").read()
names = ("libgomp", "libiomp", "libomp")
print(len({line.split()[-1] for line in maps.splitlines() if any(name in line for name in names)}))
"""
    assert check_python(code).strip() == "1"
