"""lib/libllm_ext.so serves every Python: with the compiled module `_C` of one, or with llm_ext/_C.py without."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from support.process import check_fork, check_python

import llm_ext
from llm_ext import _C

PACKAGE = Path(llm_ext.__file__).parent
LIBRARY = PACKAGE / "lib" / "libllm_ext.so"

USE_EVERY_FUNCTION = """
import os, sys
sys.path.insert(0, sys.argv[1])
import torch, llm_ext
from llm_ext import _C
print(_C.__file__)
os.environ["LLM_EXT_ISA"] = "mmx"
try:
    llm_ext.build_info()
except RuntimeError as error:
    print(error)
os.environ["LLM_EXT_ISA"] = ""
llm_ext.empty_cpu_cache()
llm_ext.clear_packed_weight_cache()
layer, x = llm_ext.LSTM(64, 64), torch.randn(128, 64, 64)
with torch.no_grad():
    for _ in range(2):
        y = layer(x)
del y
bytes = llm_ext.packed_weight_cache_bytes(), llm_ext.cpu_cache_bytes()
llm_ext.empty_cpu_cache()
llm_ext.clear_packed_weight_cache()
print(bytes, llm_ext.packed_weight_cache_bytes(), llm_ext.cpu_cache_bytes())
print(sorted(llm_ext.build_info().items(), key=str))
"""


def test_python_without_a_module(tmp_path: Path) -> None:
    """The package without its compiled module works as with it."""
    shutil.copytree(PACKAGE, tmp_path / "llm_ext", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / "llm_ext" / "lib").rmdir()
    (tmp_path / "llm_ext" / "lib").symlink_to(LIBRARY.parent)
    module, *expected = check_python(USE_EVERY_FUNCTION, PACKAGE.parent).splitlines()
    fallback, *actual = check_python(USE_EVERY_FUNCTION, tmp_path).splitlines()
    assert (Path(module), Path(fallback)) == (Path(_C.__file__), tmp_path / "llm_ext" / "_C.py")
    assert "LLM_EXT_ISA must be one of" in expected[0]
    assert "(0, " not in expected[1], "the caches are in use"
    assert actual == expected


def test_package_that_is_not_built(tmp_path: Path) -> None:
    shutil.copy(PACKAGE / "_C.py", tmp_path)
    spec = importlib.util.spec_from_file_location("not_built", tmp_path / "_C.py")
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"llm_ext is not built: .* run make build, or pip install"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


NO_CUDA = "libcudart.so.99: cannot open shared object file"


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(
    ("reason", "named"),
    [
        (NO_CUDA, True),
        ("/opt/lib/libllm_ext.so: undefined symbol: aoti_torch_get_current_cuda_stream", True),
        ("/lib/libc.so.6: version `GLIBC_2.28' not found (required by /opt/cuda-13/libllm_ext.so)", False),
    ],
)
def test_cuda_that_torch_lacks_is_named(compiled: bool, reason: str, named: bool) -> None:
    """Also without a compiled module, and no other error is taken for it."""
    code = f"""
import sys, torch
REASON, FALLBACK = {reason!r}, {str(PACKAGE / "_C.py")!r}
def load_library(path):
    raise OSError(f"Could not load this library: {{path}}") from OSError(REASON)
class Loader:
    def find_spec(name, path, target=None):
        if name == "llm_ext._C" and {compiled}:
            raise ImportError(REASON)
        if name == "llm_ext._C":
            import importlib.util
            return importlib.util.spec_from_file_location(name, FALLBACK)
for name in [name for name in sys.modules if name.startswith("llm_ext")]:
    del sys.modules[name]
torch.ops.load_library = load_library
sys.meta_path.insert(0, Loader)
try:
    import llm_ext
except ImportError as error:
    print(error)
"""
    said = check_fork(code)
    assert reason in said
    assert (f"torch {torch.__version__} has another CUDA or none" in said) == named


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs nm, of binutils")
def test_library_depends_on_no_version() -> None:
    """It uses nothing of Python, the stable interface of torch alone, and the OpenMP runtime that torch has loaded."""
    listing = subprocess.run(["nm", "-D", "-u", LIBRARY], check=True, capture_output=True, text=True).stdout
    symbols = {line.split()[-1] for line in listing.splitlines()}
    assert {"torch_library_impl", "GOMP_parallel"} <= symbols, "the search finds the symbols, which have no version"
    unstable = re.compile(r"_?Py|_ZNK?(2at|3c10|5torch)|.*@(GOMP|OMP)_")
    assert not [symbol for symbol in symbols if unstable.match(symbol)]
