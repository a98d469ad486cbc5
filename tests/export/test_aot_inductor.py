"""AOTInductor: the programs of the guide give the bits of eager mode, in Python and in C++."""

from __future__ import annotations

import re
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config

import llm_ext

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "export.md"
TORCH = Path(torch.__file__).parent


def program(name: str) -> str:
    """The program of that name in the guide."""
    found = re.search(rf'^```\w+ title="{name}"\n(.*?)^```$', GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None
    return found[1]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_programs_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.cpp").write_text(program("run.cpp"))
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    command = ["g++", "-std=c++20", "-O0", "run.cpp", "-o", "run", f"-I{TORCH / 'include'}", *libraries]
    namespace: dict[str, Any] = {}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as compiler:
        quick = {"aot_inductor.compile_wrapper_opt_level": "O0", "aot_inductor.precompile_headers": False}
        with config.patch(quick):
            exec(program("compile.py"), namespace)  # compares Python's results
        _, errors = compiler.communicate()
        assert compiler.returncode == 0, errors

    with zipfile.ZipFile("tagger.pt2") as package:
        (wrapper,) = (name for name in package.namelist() if name.endswith("wrapper.cpp"))
        calls = [line for line in package.read(wrapper).decode().splitlines() if "proxy_executor_call_function" in line]
    weights = [name.replace(".", "_") for name, _ in namespace["model"].named_parameters()]
    for weight in weights:  # the op gets the weight itself, not a copy
        assert any(re.search(rf"\b{weight}\b", call) for call in calls), weight

    arguments = ["./run", "tagger.pt2", str(Path(llm_ext.__file__).parent / "lib" / "libllm_ext.so")]
    printed = subprocess.run(arguments, capture_output=True, text=True, timeout=100, check=True).stdout
    expected = namespace["model"](namespace["x"], namespace["lengths"])
    assert torch.equal(torch.tensor([float(line) for line in printed.split()]), expected.flatten())
