"""Every line stands in its room; the rules are those of CONTRIBUTING.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def sources(folder: str, *suffixes: str) -> Iterator[tuple[str, str]]:
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes:
            yield str(path.relative_to(ROOT)), path.read_text()


def test_only_stable_h_includes_torch() -> None:
    rule = "rule 1: only csrc/torch/stable.h includes torch's headers; C++ that names a tensor lives in csrc/torch/"
    found = {
        name
        for name, text in sources("csrc", ".h", ".cpp", ".inl", ".cu", ".cuh")
        if any(header.startswith(("torch/csrc", "torch/headeronly", "ATen", "c10")) for header in INCLUDE.findall(text))
    }
    assert found == {"csrc/torch/stable.h"}, rule


def test_tensors_live_in_the_torch_room() -> None:
    rule = "rule 1: C++ that names a tensor of torch lives in csrc/torch/"
    found = {
        name for name, text in sources("csrc", ".h", ".cpp", ".inl", ".cu", ".cuh") if re.search(r"\bTensor\b", text)
    }
    assert {name for name in found if not name.startswith("csrc/torch/")} == set(), rule
    assert found, "the search finds the tensors of csrc/torch"


@pytest.mark.parametrize("room", ["csrc/cpu", "csrc/cuda"])
def test_kernels_do_not_allocate_print_or_throw(room: str) -> None:
    rule = "rule 2: kernels write into memory they were given: no allocation, output, exception, wait or thread"
    forbidden = re.compile(
        r"\b(malloc|calloc|aligned_alloc|new\s+\w+|printf|std::cout|std::cerr|std::vector|throw|std::thread|std::async|"
        r"cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize)\b|#pragma omp"
    )
    for name, text in sources(room, ".h", ".cpp", ".inl", ".cu", ".cuh"):
        if name == "csrc/cpu/isa/dispatch.cpp":  # chooses the table once, and says so when it cannot
            continue
        code = re.sub(r"//[^\n]*", "", text)
        match = forbidden.search(code)
        assert match is None, f"{rule}: {name} has {match and match.group()!r}"


def test_only_device_cuh_speaks_cuda() -> None:
    rule = "csrc/cuda/device.cuh alone includes CUDA's headers and holds PTX; kernels are written in its vocabulary"
    cuda = re.compile(
        r"#\s*include\s*<(cuda|cooperative_groups|mma)|<<<|\basm\b|\b(threadIdx|blockIdx|blockDim|gridDim)\b|__(shfl|syncthreads|"
        r"syncwarp|shared|global|device|launch_bounds|ldg|threadfence|expf|fdividef|CUDA_ARCH)|\bcuda(Stream|Error|Launch)_?\w*"
    )
    found = {}
    for name, text in sources("csrc", ".h", ".cpp", ".inl", ".cu", ".cuh"):
        match = cuda.search(re.sub(r"//[^\n]*", "", text))
        if match is not None and not name.startswith("csrc/cpu/"):
            found[name] = match.group()
    assert set(found) == {"csrc/cuda/device.cuh"}, f"{rule}: {found}"


def test_emulator_has_the_same_vocabulary() -> None:
    rule = "what csrc/cuda/device.cuh offers, tests/cuda_emulator/cuda/device.cuh offers as well, and nothing else"

    def vocabulary(path: str) -> set[str]:
        code = re.sub(r"//[^\n]*", "", (ROOT / path).read_text())
        code = re.sub(r"^#define.*\n", "", code, flags=re.MULTILINE)
        return set(
            re.findall(r"^(?:LLM_EXT_DEVICE|inline|int|T\*?|S)\s(?:[\w:<>, *]*?[ *])?(\w+)\(", code, re.MULTILINE)
        )

    ours, emulated = vocabulary("csrc/cuda/device.cuh"), vocabulary("tests/cuda_emulator/cuda/device.cuh")
    assert "block_barrier" in ours, "the search finds the vocabulary"
    assert ours == emulated, f"{rule}: {ours ^ emulated}"


def test_no_standard_header_inside_a_region() -> None:
    rule = "kernel bodies use nothing of the standard library: its inline functions would leak at the region's level"
    for name, text in sources("csrc/cpu", ".inl"):
        outside = [header for header in INCLUDE.findall(text) if not header.startswith("cpu/")]
        assert outside == [], f"{rule}: {name} includes {outside}"
        assert not re.search(r"\bstd::", re.sub(r"//[^\n]*", "", text)), f"{rule}: {name} uses std::"


def test_only_ops_names_the_ops() -> None:
    rule = "rule 5: only llm_ext/ops.py says torch.ops.llm_ext"
    found = {name for name, text in sources("llm_ext", ".py") if "torch.ops" in re.sub(r'"""[\s\S]*?"""', "", text)}
    assert found == {"llm_ext/ops.py"}, rule


def test_reference_stands_alone() -> None:
    rule = "rule 6: reference.py imports torch only, never ops"
    text = (ROOT / "llm_ext/reference.py").read_text()
    imports = set(re.findall(r"^\s*(?:from|import)\s+(\w+)", text, re.MULTILINE))
    assert imports <= {"__future__", "collections", "math", "torch", "typing"}, rule


def test_pybind11_carries_no_tensor() -> None:
    rule = "rule 9: tensors go through torch.ops alone; pybind11 carries what is not a tensor"
    users = {name for name, text in sources("csrc", ".h", ".cpp") if "pybind11" in text}
    assert users == {"csrc/module.cpp"}, rule
    assert "torch/" not in (ROOT / "csrc/module.cpp").read_text(), rule


def test_environment_is_read_in_two_places() -> None:
    rule = "rule 11: the environment is read in setup.py and csrc/cpu/isa/dispatch.cpp only"
    found = {name for name, text in sources("csrc", ".h", ".cpp", ".inl", ".cu", ".cuh") if "getenv" in text}
    assert found == {"csrc/cpu/isa/dispatch.cpp"}, rule
    readers = {name for name, text in sources("llm_ext", ".py") if re.search(r"os\.(environ|getenv)", text)}
    assert readers == set(), rule
