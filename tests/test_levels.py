"""The instruction levels in one binary: what may run where."""

import re
import shutil
import subprocess

import pytest

import llm_ext._C

LEVELS = ("avx2", "avx512")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
def test_only_the_levels_use_their_instructions() -> None:
    """On a machine without AVX nothing may run but what no level owns: there, no AVX may stand."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", llm_ext._C.__file__], check=True, capture_output=True, text=True
    ).stdout
    owners = {False: set(), True: set()}  # of functions with and without AVX
    symbol = ""
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            symbol = match[1]
        elif re.search(r"\t(v[a-z0-9]+ .*%[xyz]mm|vzero)", line):
            owners[any(f"7llm_ext{len(level)}{level}" in symbol for level in LEVELS)].add(symbol)
    if not owners[True]:
        pytest.skip("built without levels")
    assert not owners[False]
