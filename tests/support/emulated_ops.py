"""llm_ext.ops over the CUDA ops compiled for the CPU (tests/cuda/host), as a package of its own."""

from __future__ import annotations

import hashlib
import importlib
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from support.emulator import BUILD, EMULATOR, ROOT, compiler, exclusive

NAME = "llm_ext_emulated"
HOST = ROOT / "tests" / "cuda" / "host"
CSRC = ROOT / "csrc"
TORCH = Path(torch.__file__).parent
WITH_TORCH = [
    *sorted((CSRC / "torch" / "ops").glob("*_cuda.cpp")),
    CSRC / "torch" / "ops" / "schema.cpp",
    CSRC / "torch" / "alloc" / "empty.cpp",
]
WITHOUT_TORCH = [
    *(CSRC / "cuda" / "rnn" / name for name in ("generic.cu", "plan.cpp", "shift_rows.cu")),
    *sorted((CSRC / "cuda" / "pooling").glob("*.c*")),
    *sorted((CSRC / "cuda" / "attention").glob("*.c*")),
    CSRC / "cuda" / "reduce_partial_sums.cu",
    CSRC / "torch" / "alloc" / "cpu_caching_allocator.cpp",
    CSRC / "torch" / "threads" / "usable_cores.cpp",
    HOST / "backend.cpp",
    HOST / "no_sanitizer.cpp",
    *(EMULATOR / f"{name}.cpp" for name in ("scheduler", "races", "device")),
]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.fail(f"{' '.join(command)}\n{done.stdout}{done.stderr}", pytrace=False)


def build_library() -> Path:
    """The ops as a library of their own, built at most once for the same text and torch."""
    flags = ["-fPIC", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    flags += [f"-Dllm_ext={NAME}", '-DLLM_EXT_CUDA_VERSION="0"', f"-I{HOST}", f"-I{EMULATOR}"]
    flags += [f"-I{CSRC}", f"-isystem{TORCH / 'include'}"]
    folders = (CSRC / "cuda", CSRC / "torch", CSRC / "params", EMULATOR, HOST)
    suffixes = (".h", ".cuh", ".cpp", ".cu")
    texts = [path for folder in folders for path in sorted(folder.rglob("*")) if path.suffix in suffixes]
    read = b"".join(path.read_bytes() for path in texts)
    key = hashlib.sha256(read + repr((flags, torch.__version__)).encode()).hexdigest()[:20]
    library = BUILD / f"{NAME}-{key}.so"
    with exclusive():
        if not library.exists():
            _build(library, flags)
    return library


def _build(library: Path, flags: list[str]) -> None:
    sources = [path for path in (*WITH_TORCH, *WITHOUT_TORCH) if path.suffix in (".cpp", ".cu")]

    def compile_one(source: Path) -> str:
        target = BUILD / f"{NAME}-{source.parent.name}-{source.name}-{os.getpid()}.o"
        # Torch's headers take long to optimize, and these sources little to run.
        level = ["-std=c++20", "-O0"] if source in WITH_TORCH else ["-std=c++17", "-O1"]
        _run([compiler(), *level, *flags, "-x", "c++", "-c", str(source), "-o", str(target)])
        return str(target)

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        objects = list(pool.map(compile_one, sources))
    partial = library.with_suffix(f".{os.getpid()}.partial")
    libraries = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10"]
    _run([compiler(), "-shared", "-fopenmp", *objects, "-o", str(partial), *libraries, "-Wl,--no-undefined"])
    for name in objects:
        Path(name).unlink()
    for stale in BUILD.glob(f"{NAME}-*.so"):
        stale.unlink()
    partial.rename(library)


def load(folder: Path) -> Any:
    """llm_ext.ops over this library, which takes the CPU for a GPU; its sources are written to `folder`."""
    torch.ops.load_library(str(build_library()))  # type: ignore[no-untyped-call]
    package = folder / NAME
    package.mkdir()
    replacements = (
        ("torch.ops.llm_ext", f"torch.ops.{NAME}"),
        ('"llm_ext::', f'"{NAME}::'),
        ('Library("llm_ext"', f'Library("{NAME}"'),
        ("from llm_ext.ops", f"from {NAME}"),
        # Paths for the CPU alone are not taken, as on a GPU.
        ("x.is_cpu", "x.is_meta"),
        ("x.is_cuda", "x.is_cpu"),
    )
    found = set()
    for source in (ROOT / "llm_ext" / "ops").glob("*.py"):
        text = source.read_text()
        for old, new in replacements:
            found |= {old} if old in text else set()
            text = text.replace(old, new)
        (package / source.name).write_text(text)
    assert found == {old for old, _ in replacements}
    sys.path.insert(0, str(folder))
    try:
        return importlib.import_module(NAME)
    finally:
        sys.path.remove(str(folder))
