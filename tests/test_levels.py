"""The instruction levels in one binary: what may run where."""

import platform
import re
import shutil
import subprocess

import pytest

import llm_ext._C

LEVELS = ("avx2", "avx512", "avx512_bf16")


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, of binutils")
@pytest.mark.skipif(
    platform.machine() != "x86_64" or not llm_ext.build_info()["compiler"].startswith("gcc"),
    reason="built without levels",
)
def test_only_the_levels_use_their_instructions() -> None:
    """Without AVX nothing may run but what belongs to no level: no AVX may stand there."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", llm_ext._C.__file__], check=True, capture_output=True, text=True
    ).stdout
    users: set[str] = set()  # functions with AVX
    symbol = ""
    for line in listing.splitlines():
        if match := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            symbol = match[1]
        elif re.search(r"\t(v[a-z0-9]+ .*%[xyz]mm|vzero)", line):
            users.add(symbol)
    marks = [f"7llm_ext{len(level)}{level}" for level in LEVELS]
    assert all(any(mark in user for user in users) for mark in marks)
    assert not [user for user in users if not any(mark in user for mark in marks)]
