"""The functions of the compiled module, for a Python that it was not built for.

Where the module exists, Python finds it before this file. Its functions call those of the library directly, and these
call them as ops of torch.
"""

from __future__ import annotations

from pathlib import Path

import torch

_LIBRARY = Path(__file__).parent / "lib" / "libllm_ext.so"
if not _LIBRARY.exists():
    raise ImportError(
        f"llm_ext is not built: {_LIBRARY} does not exist; run make build, or pip install --no-build-isolation ."
    )
try:
    torch.ops.load_library(_LIBRARY)  # type: ignore[no-untyped-call]
except OSError as error:  # Python reports a compiled module that cannot be loaded in this way
    raise ImportError(str(error.__cause__ or error)) from error
_ops = torch.ops.llm_ext


def build_info() -> dict[str, str | bool | None]:
    """Return compiler, torch, CUDA and OpenMP of the build, and the ISA in use."""
    return dict(zip(("compiler", "torch", "cuda", "openmp", "isa"), _ops.build_info(), strict=True))


def packed_weight_cache_bytes() -> int:
    """Return the size of the packed weight cache in bytes."""
    return int(_ops.packed_weight_cache_bytes())


def clear_packed_weight_cache() -> None:
    """Free all cached packed weights."""
    _ops.clear_packed_weight_cache()


def cpu_cache_bytes() -> int:
    """Return the bytes that the CPU caching allocator holds for reuse."""
    return int(_ops.cpu_cache_bytes())


def empty_cpu_cache() -> None:
    """Return the memory that the CPU caching allocator holds for reuse to the system."""
    _ops.empty_cpu_cache()
