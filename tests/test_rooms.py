"""The rules of CONTRIBUTING.md, section "Rooms", by their numbers there."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CPP = (".h", ".cpp", ".inl", ".cu", ".cuh")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', re.MULTILINE)


def sources(folder: str, *suffixes: str) -> Iterator[tuple[str, str]]:
    """Path below the root, and text, of the files with these suffixes."""
    for path in sorted((ROOT / folder).rglob("*")):
        if path.suffix in suffixes:
            yield path.relative_to(ROOT).as_posix(), path.read_text()


def code_of(text: str) -> str:
    """C++ without comments."""
    return re.sub(r"//[^\n]*", "", text)


def imported_modules(text: str) -> set[str]:
    """Dotted names of everything a Python source imports, also inside functions; `from a import b` gives a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


# ---- C++


def test_only_stable_h_includes_torch() -> None:
    rule = "rule 1: only csrc/torch/stable.h includes torch's headers"
    found = {
        name
        for name, text in sources("csrc", *CPP)
        if any(header.startswith(("torch/csrc", "torch/headeronly", "ATen", "c10")) for header in INCLUDE.findall(text))
    }
    assert found == {"csrc/torch/stable.h"}, rule


def test_tensors_are_in_csrc_torch() -> None:
    rule = "rule 1: C++ that names a tensor of torch is in csrc/torch/"
    found = {name for name, text in sources("csrc", *CPP) if re.search(r"\bTensor\b", code_of(text))}
    assert {name for name in found if not name.startswith("csrc/torch/")} == set(), rule
    assert found, "the search finds the tensors of csrc/torch"


@pytest.mark.parametrize("room", ["csrc/cpu", "csrc/cuda"])
def test_kernels_do_not_allocate_print_or_throw(room: str) -> None:
    rule = "rule 2: kernels write into memory that the caller allocated: no allocation, output, exception or thread"
    forbidden = re.compile(
        r"\b(malloc|calloc|aligned_alloc|new\s+\w+|printf|std::cout|std::cerr|std::vector|throw|std::thread|std::async|"
        r"cudaMalloc|cudaDeviceSynchronize|cudaStreamSynchronize)\b|#pragma omp"
    )
    for name, text in sources(room, *CPP):
        if name != "csrc/cpu/isa/dispatch.cpp":  # selects the kernel table once, and throws if it cannot
            match = forbidden.search(code_of(text))
            assert match is None, f"{rule}: {name} has {match and match.group()!r}"


@pytest.mark.parametrize("room", ["csrc/cpu", "csrc/cuda", "csrc/params"])
def test_kernels_include_no_other_room(room: str) -> None:
    rule = "rule 2: kernels know params and their own room; csrc/torch calls them"
    own = room.removeprefix("csrc/")
    for name, text in sources(room, *CPP):
        rooms = {header.split("/")[0] for header in INCLUDE.findall(text) if "/" in header}
        assert rooms <= {own, "params", "sys"}, f"{rule}: {name} includes from {rooms}"


def test_cuda_bindings_include_nothing_of_the_cpu() -> None:
    rule = "rule 2: files of csrc/torch for CUDA include, directly or not, no file that is for the CPU only"
    texts = dict(sources("csrc", *CPP))
    reached = {name for name in texts if name.startswith("csrc/torch/") and "cuda" in Path(name).name}
    assert reached, "the search finds the CUDA bindings"
    pending = [*reached]
    while pending:
        for header in INCLUDE.findall(texts[pending.pop()]):
            name = f"csrc/{header}"
            if name in texts and name not in reached:
                reached.add(name)
                pending.append(name)
    cpu_only = ("csrc/cpu/", "csrc/torch/threads/", "csrc/torch/weight_cache/")
    found = {name for name in reached if name.startswith(cpu_only) or "_cpu" in Path(name).name}
    assert found == set(), f"{rule}: {found}"


def test_only_device_cuh_uses_cuda() -> None:
    rule = "rule 3: only csrc/cuda/device.cuh includes CUDA's headers and holds PTX, intrinsics and launches"
    cuda = re.compile(
        r"#\s*include\s*<(cuda|cooperative_groups|mma)|<<<|\basm\b|\b(threadIdx|blockIdx|blockDim|gridDim)\b|"
        r"__(shfl|syncthreads|syncwarp|shared|global|device|launch_bounds|ldg|threadfence|expf|fdividef|CUDA_ARCH)|"
        r"\bcuda(Stream|Error|Launch)_?\w*"
    )
    found = {}
    for name, text in sources("csrc", *CPP):
        match = cuda.search(code_of(text))
        if match is not None and not name.startswith("csrc/cpu/"):
            found[name] = match.group()
    assert set(found) == {"csrc/cuda/device.cuh"}, f"{rule}: {found}"


def test_emulator_has_the_same_vocabulary() -> None:
    rule = "rule 3: csrc/cuda/device.cuh and the emulator's device.cuh offer the same functions"

    def vocabulary(path: Path) -> set[str]:
        code = re.sub(r"^#define.*\n", "", code_of(path.read_text()), flags=re.MULTILINE)
        return set(
            re.findall(r"^(?:LLM_EXT_DEVICE|inline|int|T\*?|S)\s(?:[\w:<>, *]*?[ *])?(\w+)\(", code, re.MULTILINE)
        )

    (emulator,) = (ROOT / "tests").rglob("device.cuh")
    device, emulated = vocabulary(ROOT / "csrc/cuda/device.cuh"), vocabulary(emulator)
    assert "block_barrier" in device, "the search finds the vocabulary"
    assert device == emulated, f"{rule}: {device ^ emulated}"


def test_one_schema_file() -> None:
    rule = "rule 4: csrc/torch/ops/schema.cpp alone defines schemas"
    found = {name for name, text in sources("csrc", *CPP) if re.search(r"\bm\.def\(\s*\"\w+\(", code_of(text))}
    assert found == {"csrc/torch/ops/schema.cpp"}, rule


def test_pybind11_carries_no_tensor() -> None:
    rule = (
        "rule 9: tensors go through torch.ops alone; pybind11 carries everything else; no other C++ includes Python.h"
    )
    users = {name for name, text in sources("csrc", ".h", ".cpp") if re.search(r"pybind11|Python\.h", text)}
    assert users == {"csrc/module.cpp"}, rule
    assert "torch/" not in (ROOT / "csrc/module.cpp").read_text(), rule


def test_environment_is_read_in_two_places() -> None:
    rule = "rule 11: the environment is read in setup.py and csrc/cpu/isa/dispatch.cpp only"
    assert {name for name, text in sources("csrc", *CPP) if "getenv" in text} == {"csrc/cpu/isa/dispatch.cpp"}, rule
    readers = {name for name, text in sources("llm_ext", ".py") if re.search(r"os\.(environ|getenv)", text)}
    assert readers == set(), rule


def test_inl_files_use_no_standard_library() -> None:
    rule = "rule 13: .inl files use no standard header: its inline functions would be compiled for one ISA"
    for name, text in sources("csrc/cpu", ".inl"):
        outside = [header for header in INCLUDE.findall(text) if not header.startswith("cpu/")]
        assert outside == [], f"{rule}: {name} includes {outside}"
        assert not re.search(r"\bstd::", code_of(text)), f"{rule}: {name} uses std::"


def test_inl_files_include_what_they_use(tmp_path: Path) -> None:
    """Each compiles alone, so the order in which others include them means nothing."""
    rule = "rule 13: an .inl file includes every file that it uses"
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    command = [compiler, "-std=c++17", "-w", f"-I{ROOT / 'csrc'}"]
    prelude = tmp_path / "prelude.h"
    prelude.write_text('#include "cpu/isa/isa.h"\n')
    # Precompiled, because the headers of intrinsics take most of the time.
    subprocess.run([*command, "-x", "c++-header", str(prelude), "-o", f"{prelude}.gch"], check=True)
    region = '#define LLM_EXT_ISA_NAMESPACE alone\n#define LLM_EXT_ISA_NAME "alone"\n#define LLM_EXT_VECTOR_BYTES 16\n'

    def errors(path: Path) -> str:
        own = path.relative_to(ROOT / "csrc").as_posix()
        run = subprocess.run(
            [*command, "-fsyntax-only", "-include", str(prelude), "-xc++", "-"],
            input=f'{region}#include "{own}"\n',
            capture_output=True,
            text=True,
            check=False,
        )
        return "" if run.returncode == 0 else f"{own}:\n{run.stderr[:2000]}"

    with ThreadPoolExecutor(2) as pool:
        found = [text for text in pool.map(errors, sorted((ROOT / "csrc/cpu").rglob("*.inl"))) if text]
    assert not found, f"{rule}\n" + "\n".join(found)


# ---- Python

ROOMS_BELOW = {
    "_C": set(),
    "ops": {"_C", "reference"},
    "reference": set(),
    "nn": {"ops"},
    "models": {"nn", "ops"},
    "conversion": {"nn", "_C"},
    "hf": {"models", "nn", "ops"},
    "cli": {"hf", "models", "nn", "ops"},
}


def test_only_ops_uses_torch_ops() -> None:
    rule = "rule 5: only llm_ext/ops/ uses torch.ops, and _C.py for what is not a tensor"
    found = {name for name, text in sources("llm_ext", ".py") if "torch.ops" in re.sub(r'"""[\s\S]*?"""', "", text)}
    assert found, "the search finds torch.ops"
    assert all(name.startswith(("llm_ext/ops/", "llm_ext/_C.py")) for name in found), f"{rule}: {found}"


def test_reference_imports_torch_alone() -> None:
    rule = "rule 6: llm_ext/reference/ imports torch alone, never ops"
    allowed = {"__future__", "collections", "functools", "itertools", "math", "typing", "torch"}
    for name, text in sources("llm_ext/reference", ".py"):
        for module in imported_modules(text):
            assert module.split(".")[0] in allowed or module.startswith("llm_ext.reference."), (
                f"{rule}: {name}: {module}"
            )


def test_imports_go_one_way() -> None:
    rule = (
        "rule 14: cli -> hf -> models -> nn -> ops -> _C and reference, conversion -> nn; none imports cli, conversion"
    )
    needs_opacus = ("llm_ext/privacy.py", "llm_ext/cli/training/privacy.py")
    for name, text in sources("llm_ext", ".py"):
        parts = name.removesuffix(".py").split("/")
        room = parts[1] if len(parts) > 2 else None  # None: llm_ext/__init__.py
        rooms = {m.split(".")[1] for m in imported_modules(text) if m.startswith("llm_ext.") and m != "llm_ext.py"}
        rooms &= set(ROOMS_BELOW)
        if name not in needs_opacus:
            opacus = {m for m in imported_modules(text) if m.startswith(("opacus", "llm_ext.privacy"))}
            assert not opacus, f"{rule}, nor privacy: {name}"
        if room is None:
            assert not {"cli", "hf"} & rooms, f"{rule}: {name}"
        else:
            assert rooms <= ROOMS_BELOW[room] | {room}, f"{rule}: {name} imports {rooms - ROOMS_BELOW[room] - {room}}"
        if room != "cli":
            assert "llm_ext" not in imported_modules(text), f"{rule}: {name} imports the package itself"


def test_no_private_modules_of_torch() -> None:
    rule = "CONTRIBUTING, habits: private modules of torch are not used"
    private = re.compile(r"\btorch\.(\w+\.)*_(?!_)\w+")
    for name, text in sources("llm_ext", ".py"):
        if name == "llm_ext/ops/_transforms.py":  # detects transforms, for which torch has no public queries
            continue
        match = private.search(re.sub(r'"""[\s\S]*?"""', "", text))
        assert match is None, f"{rule}: {name}: {match and match.group()}"


# ---- tests


def test_no_test_imports_another() -> None:
    rule = "tests share code through tests/support, not by importing each other"
    for name, text in sources("tests", ".py"):
        for module in imported_modules(text):
            parts = module.split(".")
            other = any(part.startswith("test_") for part in parts[:-1]) or (
                parts[-1].startswith("test_") and parts[0] not in ("torch", "llm_ext")
            )
            forbidden = other or "conftest" in parts
            assert not forbidden, f"{rule}: {name} imports {module}"


def test_tolerances_are_in_one_table() -> None:
    rule = "rule 10: tolerances are in tests/support/tolerances.py"
    assigned = re.compile(r"\bTOLERANCE(_ON)?\b\s*(\[.*\]\s*)?=[^=]")
    found = {name for name, text in sources("tests", ".py") if assigned.search(text)}
    assert found - {"tests/test_rooms.py"} == {"tests/support/tolerances.py"}, rule
